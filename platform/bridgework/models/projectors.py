"""Projectors: map every patch, or every group of patches, to one token of the language model.

LLaVA, arXiv:2304.08485 and 2310.03744; MiniGPT-4, arXiv:2304.10592.
"""

# N images  P patches  F width of the tower's features  D width of the language model

from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from bridgework.config import added, bounded, config_class
from bridgework.errors import SpecError
from bridgework.models import pretrained as weights_of


@config_class
class LinearConfig:
    """One matrix, as in LLaVA 1.0 (2304.08485, 4.1)."""

    def build(self, in_width: int, out_width: int) -> "Projector":
        return Projector(in_width, out_width, depth=1)

    def tokens(self, patches: int) -> int:
        return patches

    def tiny(self) -> "LinearConfig":
        return self


@config_class
class MLPConfig:
    """`depth` matrices with a GELU between them; two in LLaVA 1.5 (2310.03744, 3.3)."""

    depth: int = 2
    # of the tower's features, in training; it keeps a bridge from memorizing a few thousand images
    dropout: float = added(default=0.0)

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise SpecError(
                f"bridge.depth must be at least 1 (1 is the linear projector), got {self.depth}"
            )
        bounded("bridge.dropout", self.dropout, least=0, below=1)

    def build(self, in_width: int, out_width: int) -> "Projector":
        return Projector(in_width, out_width, depth=self.depth, dropout=self.dropout)

    def tokens(self, patches: int) -> int:
        return patches

    def tiny(self) -> "MLPConfig":
        return self


@config_class
class ConcatConfig:
    """Concatenate `group` neighboring patches to one token (MiniGPT-4 on LLaMA-2, no Q-Former).

    Neighbors in the sequence, row by row, not 2 x 2.
    """

    group: int = 4
    ln_vision: bool = True  # a LayerNorm on the tower's output, as in BLIP-2
    weights: str | None = None  # folder or hub name of a complete BLIP-2 with that LayerNorm

    def __post_init__(self) -> None:
        if self.group < 1:
            raise SpecError(f"bridge.group must be at least 1, got {self.group}")

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs of the parameters that `weights` hold."""
        return () if self.weights is None or not self.ln_vision else ("ln_vision.*",)

    def build(self, in_width: int, out_width: int, *, pretrained: bool = True) -> "ConcatProjector":
        """Return the projector in float32. Raises WeightsError for weights that do not fit."""
        bridge = ConcatProjector(self, in_width, out_width)
        if pretrained and self.weights is not None and self.ln_vision:
            norm = weights_of.load_tensors(self.weights, ("vision_model.post_layernorm.",))
            found = {name.rpartition(".")[2]: tensor for name, tensor in norm.items()}
            weights_of.check_fields(
                self.weights, {"width": in_width}, {"width": len(found["weight"])}
            )
            bridge.ln_vision.load_state_dict(found)
        return bridge

    def tokens(self, patches: int) -> int:
        if patches % self.group:
            raise SpecError(
                f"bridge.group: {patches} patches do not fall into groups of {self.group}. "
                "Fix: set bridge.group, or drop CLS"
            )
        return patches // self.group

    def tiny(self) -> "ConcatConfig":
        return replace(self, weights=None)


class ConcatProjector(nn.Module):
    """`ln_vision` and one matrix, `projection`."""

    def __init__(self, config: ConcatConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.ln_vision = nn.LayerNorm(in_width, eps=1e-6) if config.ln_vision else nn.Identity()
        self.projection = nn.Linear(config.group * in_width, out_width)

    def forward(self, patches_NPF: Tensor) -> Tensor:
        """Map (N, P, F) floats to (N, P / group, D)."""
        grouped = (
            self.ln_vision(patches_NPF).flatten(1).unflatten(1, (-1, self.projection.in_features))
        )
        return cast(Tensor, self.projection(grouped))


class Projector(nn.Module):
    """`linear_1`, ..., `linear_<depth>`: the names in transformers' LLaVA projector."""

    def __init__(self, in_width: int, out_width: int, *, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.depth = depth
        self.dropout = dropout
        for i in range(1, depth + 1):
            self.add_module(f"linear_{i}", nn.Linear(in_width if i == 1 else out_width, out_width))

    def forward(self, patches_NPF: Tensor) -> Tensor:
        """Map (N, P, F) floats to (N, P, D)."""
        tokens_NPD = nn.functional.dropout(patches_NPF, self.dropout, self.training)
        for i in range(1, self.depth + 1):
            if i > 1:
                tokens_NPD = nn.functional.gelu(tokens_NPD)
            tokens_NPD = cast(Tensor, self.get_submodule(f"linear_{i}")(tokens_NPD))
        return tokens_NPD
