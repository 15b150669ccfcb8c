"""Gated cross-attention: blocks that read images, between the layers of a frozen language model.

Flamingo, arXiv:2204.14198, 2.2. The gates' tanh(alpha) starts at 0, so that the language model is
unchanged at the start (figure 4).
"""

# B batch  T tokens  M images of a row  Q tokens of an image  F their width
# D width of the language model  H heads  W width of a head

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import SpecError


@config_class
class GatesConfig:
    """Blocks and the layers of the language model that follow one; defaults: the paper."""

    # blocks come before the layers first, first + every, ... (3B: 1, 9B: 4, 80B: 7; table 5)
    every: int = 1
    first: int = 0  # as in the paper and Idefics; OpenFlamingo starts at every - 1
    heads: int = 16
    head_width: int = 128
    ffn: int | None = None  # hidden units; default: four times the language model's width
    activation: Literal["relu2", "gelu", "silu"] = "relu2"  # transformers' names
    gated_ffn: bool = False  # a third matrix gates the activation, as in Llama (Idefics)
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    qk_norm: bool = False  # also norm every head's queries and keys (Idefics)
    # of a gate tanh(alpha); none: no gates, as in the paper's ablation (3.3, table 3, iii)
    alpha: Literal["scalar", "vector", "none"] = "scalar"

    def __post_init__(self) -> None:
        for name in ("every", "heads", "head_width"):
            if getattr(self, name) < 1:
                raise SpecError(f"gates.{name} must be at least 1, got {getattr(self, name)}")
        if self.first < 0:
            raise SpecError(f"gates.first is the number of a layer, 0 or more, got {self.first}")

    def layers(self, depth: int) -> range:
        """Return the layers, of `depth`, with a block before them."""
        return range(self.first, depth, self.every)

    def build(self, depth: int, width: int, media_width: int) -> nn.ModuleDict:
        """Return the blocks by the number of their layer."""
        return nn.ModuleDict(
            {str(i): GatedCrossAttentionBlock(self, width, media_width) for i in self.layers(depth)}
        )

    def tiny(self) -> "GatesConfig":
        return replace(
            self,
            every=min(self.every, 2),
            first=min(self.first, 1),
            heads=2,
            head_width=8,
            ffn=None,
        )


class GatedCrossAttentionBlock(nn.Module):
    """y + tanh(alpha) attention(y, image), then y + tanh(alpha) feed-forward(y); no biases.

    Without gates, both terms are added as they are.
    """

    def __init__(self, config: GatesConfig, width: int, media_width: int) -> None:
        super().__init__()
        from transformers.activations import ACT2FN  # takes seconds: not before a model is built

        inner, hidden = config.heads * config.head_width, config.ffn or 4 * width
        self.heads = config.heads
        self.norm = _norm(config, width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(media_width, inner, bias=False)
        self.value = nn.Linear(media_width, inner, bias=False)
        self.query_norm = _norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.key_norm = _norm(config, config.head_width) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(inner, width, bias=False)
        self.alpha = _alpha(config, width)
        self.ffn_norm = _norm(config, width)
        self.up = nn.Linear(width, hidden, bias=False)
        self.gate = nn.Linear(width, hidden, bias=False) if config.gated_ffn else None
        self.activation = ACT2FN[config.activation]
        self.down = nn.Linear(hidden, width, bias=False)
        self.ffn_alpha = _alpha(config, width)

    def forward(self, hidden_BTD: Tensor, media_BMQF: Tensor, seen_BT: Tensor) -> Tensor:
        """Return (B, T, D).

        `seen` (B, T) int64 is the number of the image that a token sees, from 1. A token with 0
        sees none, and its attention output is 0.
        """
        attended_BTD = self._attend(self.norm(hidden_BTD), media_BMQF, seen_BT)
        hidden_BTD = hidden_BTD + _gated(self.alpha, attended_BTD)
        normed_BTD = self.ffn_norm(hidden_BTD)
        if self.gate is None:
            inner = self.activation(self.up(normed_BTD))
        else:
            inner = self.activation(self.gate(normed_BTD)) * self.up(normed_BTD)
        return hidden_BTD + _gated(self.ffn_alpha, self.down(inner))

    def _attend(self, normed_BTD: Tensor, media_BMQF: Tensor, seen_BT: Tensor) -> Tensor:
        images, tokens = media_BMQF.shape[1:3]
        # A token without an image reads the first one, because a softmax over nothing is NaN; its
        # output is zeroed below.
        image_BT1 = (seen_BT.clamp(min=1) - 1).unsqueeze(-1)
        mask_BTM = image_BT1 == torch.arange(images, device=seen_BT.device)
        attended_BHTW = F.scaled_dot_product_attention(
            self.query_norm(self._heads(self.query(normed_BTD))),
            self.key_norm(self._heads(self.key(media_BMQF.flatten(1, 2)))),
            self._heads(self.value(media_BMQF.flatten(1, 2))),
            attn_mask=mask_BTM.repeat_interleave(tokens, dim=-1).unsqueeze(1),
        )
        out_BTD: Tensor = self.out(attended_BHTW.transpose(1, 2).flatten(2))
        return out_BTD.masked_fill((seen_BT == 0).unsqueeze(-1), 0.0)

    def _heads(self, states: Tensor) -> Tensor:
        heads: Tensor = states.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


def insert_blocks(layers: nn.ModuleList, blocks: nn.ModuleDict) -> None:
    """Run each block before its layer, in every forward with the arguments `media` and `seen`.

    A third argument, the list `reached`, collects the layers that get them. transformers passes
    keyword arguments to every layer, so there is no state between calls: threads may generate with
    one model, and a recomputed layer gets the same images.
    """
    by_layer = dict(blocks.items())
    for number, layer in enumerate(layers):
        hook = _RunBlock(by_layer.get(str(number)))
        layer.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


class _RunBlock:
    """Forward pre-hook of one layer; without a block it only removes our arguments."""

    def __init__(self, block: nn.Module | None) -> None:
        self._block = block

    def __call__(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        media_BMQF, seen_BT, reached = (
            kwargs.pop(name, None) for name in ("media", "seen", "reached")
        )
        if reached is not None:
            reached.append(layer)
        if media_BMQF is None or self._block is None:
            return args, kwargs
        hidden_BTD = args[0] if args else kwargs["hidden_states"]
        if hidden_BTD.ndim != 3:
            raise SpecError(
                "gates: a block goes between layers with one state per token, and this language "
                f"model's have several. Got {tuple(hidden_BTD.shape)}; expected (B, T, D). "
                "Fix: take llama, mistral, qwen2, phi3, opt, ..."
            )
        hidden_BTD = self._block(hidden_BTD, media_BMQF, seen_BT)
        if args:
            return (hidden_BTD, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": hidden_BTD}


def _norm(config: GatesConfig, width: int) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def _gated(alpha: nn.Parameter | None, added_BTD: Tensor) -> Tensor:
    return added_BTD if alpha is None else alpha.tanh() * added_BTD


def _alpha(config: GatesConfig, width: int) -> nn.Parameter | None:
    if config.alpha == "none":
        return None
    shape = (1, 1, width) if config.alpha == "vector" else (1,)  # as in Idefics
    return nn.Parameter(torch.zeros(shape))
