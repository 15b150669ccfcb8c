"""Tiny prefix models and the batches that go with them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bridgework.models import MLP, EfficientNetConfig, LanguageConfig, Linear, PrefixVLM, ViTConfig
from bridgework.models.prefix_vlm import PrefixModel
from bridgework.system import IGNORE, IMAGE

LLAMA_7B = LanguageConfig(
    width=4096, depth=32, heads=32, kv_heads=32, ffn=11008, vocab=32_000, context=2048, tokenizer="bytes"
)
LLAVA = PrefixVLM(vision=ViTConfig(), bridge=MLP(), language=LLAMA_7B)  # LLaVA 1.5 7B
PICTURE = "<image>"


def build(
    vision: ViTConfig | EfficientNetConfig | None = None, bridge: Linear | MLP | None = None, seed: int = 0
) -> PrefixModel:
    torch.manual_seed(seed)
    model = PrefixVLM(vision=vision or ViTConfig(), bridge=bridge or MLP(), language=LLAMA_7B).tiny().build()
    with torch.no_grad():  # as drawn, images are small beside the tokens and biases are zero: an error could hide
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def pixels(images: int, size: int = 32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=generator)


def ids(*row: int | str, image_tokens: int = 16) -> Tensor:
    """(1, T): token ids, and PICTURE for the places of one image."""
    return torch.tensor([[t for r in row for t in ([IMAGE] * image_tokens if isinstance(r, str) else [r])]])


def labels(ids_BT: Tensor) -> Tensor:
    return ids_BT.masked_fill(ids_BT == IMAGE, IGNORE)


def padded(rows: Sequence[Tensor], side: str, fill: int) -> Tensor:
    """(B, T) of several (1, T_i)."""
    length = max(row.shape[1] for row in rows)
    fillers = [torch.full((1, length - row.shape[1]), fill) for row in rows]
    pairs = zip(rows, fillers, strict=True)
    return torch.cat([torch.cat([row, pad] if side == "right" else [pad, row], dim=1) for row, pad in pairs])
