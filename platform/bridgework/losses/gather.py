"""All-gather with the exact gradient, for contrastive losses over the batch of all ranks."""

# R ranks  b rows of this rank  B rows of all ranks  D width

from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor


class Gathered(NamedTuple):
    """All rows in the order of the ranks, and the index of this rank's first row."""

    rows_BD: Tensor
    offset: int


def gather(rows_bD: Tensor) -> Gathered:
    """Return the rows of all ranks; their numbers may differ. A single process returns its own.

    The gradient of a rank's rows is the sum of their gradients in the losses of all ranks. So the
    ranks' summed gradients equal those of one process with the complete batch. Every rank must
    call forward and backward alike.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return Gathered(rows_bD, 0)
    sizes = _sizes(rows_bD)
    padded = torch.cat([rows_bD, rows_bD.new_zeros(max(sizes) - len(rows_bD), *rows_bD.shape[1:])])
    stacked_RbD: Tensor = cast(Any, _AllGather).apply(padded)  # torch leaves `apply` untyped
    rows_BD = torch.cat([part[:size] for part, size in zip(stacked_RbD, sizes, strict=True)])
    return Gathered(rows_BD, sum(sizes[: dist.get_rank()]))


def _sizes(rows: Tensor) -> list[int]:
    """Return the number of rows of every rank."""
    own = torch.tensor([len(rows)], device=rows.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    return [int(size) for size in sizes]


class _AllGather(torch.autograd.Function):
    """Map (b, D), of one size on every rank, to (R, b, D).

    torch.distributed.nn's own all-gather is deprecated.
    """

    @staticmethod
    def forward(ctx: Any, rows_bD: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_bD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_bD.contiguous())
        return torch.stack(parts)

    @staticmethod
    def backward(ctx: Any, grad_RbD: Tensor) -> Tensor:
        total_RbD = grad_RbD.contiguous().clone()  # gloo has no reduce_scatter
        dist.all_reduce(total_RbD)
        return total_RbD[dist.get_rank()]
