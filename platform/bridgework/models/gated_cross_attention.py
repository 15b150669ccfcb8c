"""Gated cross-attention: blocks between the layers of a frozen language model that look at images (Flamingo, 2.2).

The gates' tanh(alpha) starts at 0, so that the language model starts as it was (arXiv:2204.14198, figure 4).
"""

# B batch  T tokens  M images of a row  Q tokens of an image  F their width  D width of the language model
# H heads  W width of a head

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import SpecError


@config_class
class GatesConfig:
    """Which layers of the language model get a block before them, and what the blocks are; by default the paper's."""

    every: int = (
        1  # a block before the layers first, first + every, ... (3B: 1, 9B: 4, 80B: 7; table 5)
    )
    first: int = 0  # the paper and Idefics begin at 0, OpenFlamingo at every - 1
    heads: int = 16
    head_width: int = 128
    ffn: int | None = None  # hidden units; None: four times the language model's width
    activation: Literal["relu2", "gelu", "silu"] = "relu2"  # transformers' names
    gated_ffn: bool = False  # a third matrix beside the activation, as in Llama (Idefics)
    norm: Literal["layer", "rms"] = "layer"
    norm_eps: float = 1e-5
    qk_norm: bool = False  # the norm on every head's queries and keys too (Idefics)
    alpha: Literal["scalar", "vector"] = "scalar"

    def __post_init__(self) -> None:
        for name in ("every", "heads", "head_width"):
            if getattr(self, name) < 1:
                raise SpecError(f"gates.{name} must be at least 1, got {getattr(self, name)}")
        if self.first < 0:
            raise SpecError(f"gates.first is the number of a layer, 0 or more, got {self.first}")

    def layers(self, depth: int) -> range:
        """The layers, of `depth`, that get a block before them."""
        return range(self.first, depth, self.every)

    def build(self, depth: int, width: int, media_width: int) -> nn.ModuleDict:
        """The blocks by the number of their layer."""
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
    """y + tanh(alpha) attention(y, image), then y + tanh(alpha) feed-forward(y); no biases."""

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
        """(B, T, D). `seen` (B, T) int64 is the image that a token sees, from 1 on; 0 sees none, and gets 0 from it."""
        hidden_BTD = hidden_BTD + self.alpha.tanh() * self._look(
            self.norm(hidden_BTD), media_BMQF, seen_BT
        )
        own_BTD = self.ffn_norm(hidden_BTD)
        read = self.activation(self.up(own_BTD) if self.gate is None else self.gate(own_BTD))
        read = read if self.gate is None else read * self.up(own_BTD)
        thought_BTD: Tensor = hidden_BTD + self.ffn_alpha.tanh() * self.down(read)
        return thought_BTD

    def _look(self, own_BTD: Tensor, media_BMQF: Tensor, seen_BT: Tensor) -> Tensor:
        images, tokens = media_BMQF.shape[1:3]
        # A token without an image reads the first one, for a softmax over nothing is NaN; then its answer is dropped.
        own_BT1 = (seen_BT.clamp(min=1) - 1).unsqueeze(-1)
        mask_BTM = own_BT1 == torch.arange(images, device=seen_BT.device)
        heard_BHTW = F.scaled_dot_product_attention(
            self.query_norm(self._heads(self.query(own_BTD))),
            self.key_norm(self._heads(self.key(media_BMQF.flatten(1, 2)))),
            self._heads(self.value(media_BMQF.flatten(1, 2))),
            attn_mask=mask_BTM.repeat_interleave(tokens, dim=-1).unsqueeze(1),
        )
        told_BTD: Tensor = self.out(heard_BHTW.transpose(1, 2).flatten(2))
        return told_BTD.masked_fill((seen_BT == 0).unsqueeze(-1), 0.0)

    def _heads(self, states: Tensor) -> Tensor:
        heads: Tensor = states.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


def insert_blocks(layers: nn.ModuleList, blocks: nn.ModuleDict) -> None:
    """Run each block before its layer, in every forward of the language model that is given `media` and `seen`.

    Each layer that they reach is appended to the list `looked`, which is given with them.
    They are keyword arguments, which transformers passes down to every layer: there is no state between two calls, so
    threads may generate with one model, and a recomputed layer sees what it saw.
    """
    before = dict(blocks.items())
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(
            _Before(before.get(str(number))), with_kwargs=True, prepend=True
        )


class _Before:
    """The hook of one layer: without a block it only takes away what the layer does not know."""

    def __init__(self, block: nn.Module | None) -> None:
        self._block = block

    def __call__(
        self, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        media_BMQF, seen_BT, looked = (
            named.pop(name, None) for name in ("media", "seen", "looked")
        )
        if looked is not None:
            looked.append(layer)
        if media_BMQF is None or self._block is None:
            return given, named
        hidden_BTD = given[0] if given else named["hidden_states"]
        if hidden_BTD.ndim != 3:
            raise SpecError(
                "a block goes between layers with one state a token, and this language model's have several. "
                f"Got {tuple(hidden_BTD.shape)}; expected (B, T, D). Fix: take llama, mistral, qwen2, phi3, opt, ..."
            )
        looked_BTD = self._block(hidden_BTD, media_BMQF, seen_BT)
        return (
            ((looked_BTD, *given[1:]), named)
            if given
            else (given, named | {"hidden_states": looked_BTD})
        )


def _norm(config: GatesConfig, width: int) -> nn.Module:
    kind = nn.LayerNorm if config.norm == "layer" else nn.RMSNorm
    return kind(width, eps=config.norm_eps)


def _alpha(config: GatesConfig, width: int) -> nn.Parameter:
    return nn.Parameter(
        torch.zeros((1, 1, width) if config.alpha == "vector" else 1)
    )  # Idefics' shapes
