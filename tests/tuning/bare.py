"""A space that says too little."""

SYSTEM = "llava"
STAGES = ("align",)
