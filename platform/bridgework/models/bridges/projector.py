"""Projectors: every patch becomes one token of the language model (LLaVA; arXiv:2304.08485 and 2310.03744)."""

# N images  P patches  F width of the tower's features  D width of the language model

from typing import cast

from torch import Tensor, nn

from bridgework.errors import SpecError
from bridgework.spec import spec


@spec
class Linear:
    """One matrix, as in LLaVA 1.0 (2304.08485, 4.1)."""

    def build(self, in_width: int, out_width: int) -> "Projector":
        return Projector(in_width, out_width, depth=1)

    def tokens(self, patches: int) -> int:
        return patches


@spec
class MLP:
    """`depth` matrices with a GELU between them; two in LLaVA 1.5 (2310.03744, 3.3)."""

    depth: int = 2

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise SpecError(f"bridge.depth must be at least 1 (1 is the linear projector), got {self.depth}")

    def build(self, in_width: int, out_width: int) -> "Projector":
        return Projector(in_width, out_width, depth=self.depth)

    def tokens(self, patches: int) -> int:
        return patches


class Projector(nn.Module):
    """`linear_1`, ..., `linear_<depth>`: the names that transformers gives LLaVA's projector."""

    def __init__(self, in_width: int, out_width: int, *, depth: int) -> None:
        super().__init__()
        self.depth = depth
        for i in range(1, depth + 1):
            self.add_module(f"linear_{i}", nn.Linear(in_width if i == 1 else out_width, out_width))

    def forward(self, patches_NPF: Tensor) -> Tensor:
        """(N, P, F) floats -> (N, P, D)."""
        tokens_NPD = patches_NPF
        for i in range(1, self.depth + 1):
            if i > 1:
                tokens_NPD = nn.functional.gelu(tokens_NPD)
            tokens_NPD = cast(Tensor, self.get_submodule(f"linear_{i}")(tokens_NPD))
        return tokens_NPD
