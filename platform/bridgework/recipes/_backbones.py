"""The frozen towers that BLIP-2, InstructBLIP and MiniGPT-4 share."""

from dataclasses import replace

from bridgework.models import EvaConfig, LanguageConfig

VIT_G = EvaConfig(
    weights="Salesforce/blip2-itm-vit-g"
)  # whose ViT is EVA's own: BLIP-2 never trains it
OPT_2_7B = LanguageConfig(
    arch="opt", width=2560, depth=32, heads=32, kv_heads=32, ffn=10240, vocab=50272, context=2048, tied=True,
    tokenizer="facebook/opt-2.7b", weights="facebook/opt-2.7b",
)  # fmt: skip
OPT_6_7B = replace(
    OPT_2_7B, width=4096, ffn=16384, tokenizer="facebook/opt-6.7b", weights="facebook/opt-6.7b"
)
FLAN_XL = LanguageConfig(
    arch="t5", width=2048, depth=24, heads=32, kv_heads=32, ffn=5120, vocab=32128, context=512, tied=False,
    norm_eps=1e-6, extra={"feed_forward_proj": "gated-gelu", "d_kv": 64, "scale_decoder_outputs": False},
    tokenizer="google/flan-t5-xl", weights="google/flan-t5-xl",
)  # fmt: skip
VICUNA_7B = LanguageConfig(
    arch="llama", width=4096, depth=32, heads=32, kv_heads=32, ffn=11008, vocab=32000, context=2048, norm_eps=1e-6,
    tokenizer="lmsys/vicuna-7b-v1.1", weights="lmsys/vicuna-7b-v1.1",
)  # fmt: skip
VICUNA_13B = replace(
    VICUNA_7B, width=5120, depth=40, heads=40, kv_heads=40, ffn=13824,
    tokenizer="lmsys/vicuna-13b-v1.1", weights="lmsys/vicuna-13b-v1.1",
)  # fmt: skip
