"""Pretrained backbones that several recipe pages share. This module is not a system."""

from dataclasses import replace

from bridgework.models import EvaConfig, LanguageConfig, ViTConfig

# EVA ViT-g/14 from BLIP-2's release. BLIP-2 never trains it, so these are EVA's own weights.
VIT_G = EvaConfig(weights="Salesforce/blip2-itm-vit-g")
SIGLIP = ViTConfig(
    kind="siglip", image_size=384, patch=14, width=1152, depth=27, heads=16, ffn=4304, layer=-1,
    fit="pad", weights="google/siglip-so400m-patch14-384",
)  # fmt: skip

OPT_2_7B = LanguageConfig(
    arch="opt", width=2560, depth=32, heads=32, kv_heads=32, ffn=10_240, vocab=50_272,
    context=2048, tied=True, tokenizer="facebook/opt-2.7b", weights="facebook/opt-2.7b",
)  # fmt: skip
OPT_6_7B = replace(
    OPT_2_7B, width=4096, ffn=16_384, tokenizer="facebook/opt-6.7b", weights="facebook/opt-6.7b"
)
FLAN_XL = LanguageConfig(
    arch="t5", width=2048, depth=24, heads=32, kv_heads=32, ffn=5120, vocab=32_128, context=512,
    norm_eps=1e-6, tokenizer="google/flan-t5-xl", weights="google/flan-t5-xl",
    extra={"feed_forward_proj": "gated-gelu", "d_kv": 64, "scale_decoder_outputs": False},
)  # fmt: skip
VICUNA_7B = LanguageConfig(
    arch="llama", width=4096, depth=32, heads=32, kv_heads=32, ffn=11_008, vocab=32_000,
    context=2048, norm_eps=1e-6, tokenizer="lmsys/vicuna-7b-v1.1", weights="lmsys/vicuna-7b-v1.1",
)  # fmt: skip
VICUNA_13B = replace(
    VICUNA_7B, width=5120, depth=40, heads=40, kv_heads=40, ffn=13_824,
    tokenizer="lmsys/vicuna-13b-v1.1", weights="lmsys/vicuna-13b-v1.1",
)  # fmt: skip
