"""A space without SPACE, METRIC and BUDGET."""

SYSTEM = "llava"
STAGES = ("align",)
