"""What the pages of LLaVA share: its tower, its language model, its data, its judges."""

from bridgework.evaluation import POPE, VQA, Writing
from bridgework.models import LanguageConfig, ViTConfig
from bridgework.system import Source

CLIP_L = ViTConfig(
    kind="clip", image_size=336, patch=14, width=1024, depth=24, heads=16, ffn=4096, layer=-2, select="patch",
    fit="pad", weights="openai/clip-vit-large-patch14-336",
)  # fmt: skip
VICUNA_7B = LanguageConfig(
    arch="llama", width=4096, depth=32, heads=32, kv_heads=32, ffn=11008, vocab=32000, context=4096,
    tokenizer="lmsys/vicuna-7b-v1.5", weights="lmsys/vicuna-7b-v1.5",
)  # fmt: skip
CAPTIONS = Source(name="blip558k", dataset="llava-blip558k", rows=558_128)
MIX_665K = {  # 1.5, table 7; by size, as the release concatenates them
    "llava": 158_000, "sharegpt": 40_000, "vqav2": 83_000, "gqa": 72_000, "okvqa": 9_000, "ocrvqa": 80_000,
    "aokvqa": 66_000, "textcaps": 22_000, "refcoco": 48_000, "vg": 86_000,
}  # fmt: skip
SHORT = ("{}\nAnswer the question using a single word or phrase.",)
JUDGES = (  # greedy, as the authors judge 1.5
    VQA(name="vqav2", dataset="vqav2-val", prompts=SHORT, writing=Writing(beams=1, most=10)),
    POPE(dataset="coco-val2014", prompts=SHORT),
)
