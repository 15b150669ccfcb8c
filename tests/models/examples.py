"""Tiny prefix models and batches for them."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from bridgework.models import (
    ConcatConfig,
    EfficientNetConfig,
    EvaConfig,
    LanguageConfig,
    LinearConfig,
    MLPConfig,
    PrefixVLMConfig,
    QFormerConfig,
    ResamplerConfig,
    ViTConfig,
)
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, IMAGE

LLAMA_7B = LanguageConfig(
    width=4096,
    depth=32,
    heads=32,
    kv_heads=32,
    ffn=11008,
    vocab=32_000,
    context=2048,
    tokenizer="bytes",
)
OPT_2_7B = LanguageConfig(
    arch="opt", width=2560, depth=32, heads=32, kv_heads=32, ffn=10240, vocab=50_272, context=2048, tokenizer="bytes",
    tied=True,
)  # fmt: skip
FLAN_XL = LanguageConfig(
    arch="t5", width=2048, depth=24, heads=32, kv_heads=32, ffn=5120, vocab=32_128, context=512, tokenizer="bytes",
    tied=False, norm_eps=1e-6, extra={"feed_forward_proj": "gated-gelu", "d_kv": 64, "scale_decoder_outputs": False},
)  # fmt: skip
LLAVA = PrefixVLMConfig(vision=ViTConfig(), bridge=MLPConfig(), language=LLAMA_7B)  # LLaVA 1.5 7B
PICTURE = "<image>"
Module = TypeVar("Module", bound=nn.Module)


def build(
    vision: ViTConfig | EvaConfig | EfficientNetConfig | None = None,
    bridge: LinearConfig | MLPConfig | ConcatConfig | QFormerConfig | ResamplerConfig | None = None,
    language: LanguageConfig = LLAMA_7B,
    seed: int = 0,
) -> PrefixVLM:
    torch.manual_seed(seed)
    model = (
        PrefixVLMConfig(
            vision=vision or ViTConfig(), bridge=bridge or MLPConfig(), language=language
        )
        .tiny()
        .build()
    )
    return stirred(model).eval()


def stirred(model: Module) -> Module:
    """Add noise to every parameter and return the model.

    Initial image tokens are small next to text and biases are zero, which could hide an error.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pixels(images: int, size: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)


def ids(*row: int | str, image_tokens: int = 16) -> Tensor:
    """(1, T): token ids, and PICTURE for the places of one image."""
    return torch.tensor(
        [[t for r in row for t in ([IMAGE] * image_tokens if isinstance(r, str) else [r])]]
    )


def labels(ids_BT: Tensor) -> Tensor:
    return ids_BT.masked_fill(ids_BT == IMAGE, IGNORE)


def padded(rows: Sequence[Tensor], side: str, fill: int) -> Tensor:
    """(B, T) of several (1, T_i)."""
    length = max(row.shape[1] for row in rows)
    fillers = [torch.full((1, length - row.shape[1]), fill) for row in rows]
    pairs = zip(rows, fillers, strict=True)
    return torch.cat(
        [torch.cat([row, pad] if side == "right" else [pad, row], dim=1) for row, pad in pairs]
    )
