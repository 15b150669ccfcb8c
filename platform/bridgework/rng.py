"""Counter-based random numbers: draws depend on (seed, step, place in the global batch).

A generator's stream depends on earlier draws: on the rank, the rows of a micro-batch and padding.
Here every draw is a hash of its element's coordinates (Salmon et al. 2011, "Parallel Random
Numbers: As Easy as 1, 2, 3"), so dropout masks are the same for any number of workers and any size
of micro-batch. `Placed` is a torch function mode that does this for dropout, dropout inside
attention, `torch.rand` and `bernoulli_`.
"""

# R rows of a forward  B sequences of a batch  N images (squares) of a batch

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# constants of SplitMix64 (Steele et al. 2014)
ODD = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_MASK = 2**64 - 1
_ACTIVE: ContextVar["Placed | None"] = ContextVar("placed", default=None)

log = logging.getLogger(__name__)


def derive(*parts: int) -> int:
    """Return a 63-bit hash of integers, e.g. of (seed, step); it is the same in every process."""
    state = 0
    for part in parts:
        state = _mix((state ^ (part & _MASK)) + ODD[0])
    return state >> 1


def _mix(state: int) -> int:
    state &= _MASK
    state = (state ^ state >> 30) * ODD[1] & _MASK
    state = (state ^ state >> 27) * ODD[2] & _MASK
    return state ^ state >> 31


def mix(state: Tensor) -> Tensor:
    """Return SplitMix64's finalizer of each int64 element."""
    state = state ^ (state >> 30 & (1 << 34) - 1)
    state = state * _signed(ODD[1])
    state ^= state >> 27 & (1 << 37) - 1
    state *= _signed(ODD[2])
    state ^= state >> 31 & (1 << 33) - 1
    return state


def unit(hashed: Tensor) -> Tensor:
    """Return float64 in (0, 1), from hashed int64."""
    return ((hashed >> 11 & (1 << 53) - 1).double() + 0.5) / 2**53


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def step_seed() -> int:
    """Return the active `Placed`'s number of (seed, step), or torch's seed outside of training."""
    active = _ACTIVE.get()
    return torch.initial_seed() if active is None else active.step


@contextmanager
def images() -> Iterator[None]:
    """Run the block with the images of the batch, in order, as rows, instead of its sequences."""
    with _rows(lambda active: active.images_N):
        yield


@contextmanager
def repeated(times: int) -> Iterator[None]:
    """Run the block with the rows repeated `times` times, each repetition with its own draws."""

    def repeat(active: "Placed") -> Tensor:
        copies = torch.arange(1, times + 1, device=active.rows_R.device).unsqueeze(1)
        return mix(active.rows_R + copies * _signed(ODD[2])).flatten()

    with _rows(repeat):
        yield


@contextmanager
def _rows(new_rows: Callable[["Placed"], Tensor]) -> Iterator[None]:
    """Run the block with other rows in the active mode, if there is one."""
    active = _ACTIVE.get()
    if active is None:
        yield
        return
    previous, active.rows_R = active.rows_R, new_rows(active)
    try:
        yield
    finally:
        active.rows_R = previous


class Placed(TorchFunctionMode):
    """Mode in which a forward draws by (step, place, call, coordinates).

    step: a hash of (seed, step), see `derive`.
    places_B: (B,) int64, the place of each sequence in the global batch.
    owners_N: (N,) int64, the sequence that each image belongs to.
    """

    def __init__(self, step: int, places_B: Tensor, owners_N: Tensor) -> None:
        super().__init__()
        self.step = step
        self._calls = 0  # every rank and micro-batch makes the same calls in the same order
        self.rows_R = mix(places_B.long() * _signed(ODD[0]) + step)
        first_N = torch.searchsorted(owners_N, owners_N) if len(owners_N) else owners_N
        within_N = torch.arange(len(owners_N), device=owners_N.device) - first_N
        self.images_N = mix(self.rows_R[owners_N] + (within_N + 1) * _signed(ODD[1]))

    def __enter__(self) -> "Placed":
        self._token = _ACTIVE.set(self)
        cast(Any, super()).__enter__()  # torch leaves it untyped
        return self

    def __exit__(self, *error: Any) -> None:
        cast(Any, super()).__exit__(*error)
        _ACTIVE.reset(self._token)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        draw = _DRAWS.get(func)
        kwargs = kwargs or {}
        return func(*args, **kwargs) if draw is None else draw(self, func, *args, **kwargs)

    # --- draws ---

    def _hashed(self, shape: torch.Size, device: torch.device, words: int) -> Tensor:
        """Return int64 (*shape[:-1], words): a hash of call, row and coordinates."""
        self._calls += 1
        call = derive(self.step, self._calls)
        if self.rows_R.device != device:
            self.rows_R = self.rows_R.to(device)
        rows_R = self.rows_R
        outer, each = self._row_shape(shape[0], len(rows_R))
        if outer == len(rows_R) and outer:
            hashed = mix(rows_R + call)
        else:  # not of rows: of the step alone, or of this batch if its rows are unknown
            seed = call + int(rows_R[0]) if shape[0] != 1 and len(rows_R) else call
            hashed = mix(torch.arange(outer, device=device) + _signed(seed & _MASK))
        for size in (*each, *shape[1:-1], words):
            hashed = mix(hashed.unsqueeze(-1) + torch.arange(size, device=device) * _signed(ODD[0]))
        return hashed.view(*shape[:-1], words)

    def _row_shape(self, first: int, rows: int) -> tuple[int, tuple[int, ...]]:
        """Split the first dimension into rows and their parts, e.g. (B * T, D), (B * H, T, T)."""
        if first == rows or (first == 1 and rows != 1):
            return first, ()
        if rows and first % rows == 0:
            return rows, (first // rows,)
        if not _reported:
            _reported.append(first)
            log.warning(
                "dropout over %d rows that are not those of the %d samples of a micro-batch: its "
                "masks and the loss depend on the size of the micro-batch. "
                "Fix: set the dropout of that part of the model to 0",
                first,
                rows,
            )
        return first, ()

    def keep(self, shape: torch.Size, device: torch.device, p: float) -> tuple[Tensor, float]:
        """Return the mask of elements that dropout keeps, bool, and their share.

        `p` is rounded to a multiple of 1 / 65536; the share is exact for the rounded value.
        """
        dropped = round(p * 65_536)
        width = shape[-1]
        hashed = self._hashed(shape, device, -(-width // 4))  # four numbers of 16 bits each
        mask = hashed.view(torch.int16)[..., :width] >= dropped - 32_768
        return mask, 1 - dropped / 65_536

    def dropout(self, tensor: Tensor, p: float) -> Tensor:
        """Return `tensor` with elements set to 0 with probability `p`, and the others scaled up."""
        if p >= 1.0 or not tensor.numel():
            return tensor * 0.0
        if not tensor.ndim:
            return self.dropout(tensor.view(1, 1), p).view(())
        shape = tensor.shape if tensor.ndim > 1 else torch.Size((*tensor.shape, 1))
        mask, share = self.keep(shape, tensor.device, p)
        return (tensor * (1 / share)).masked_fill(~mask.view(tensor.shape), 0.0)

    def uniform(self, shape: torch.Size, device: torch.device) -> Tensor:
        """Return float64 in (0, 1), by row if the first dimension is the rows, else by step."""
        if not shape:
            return unit(self._hashed(torch.Size((1, 1)), device, 1)).view(())
        return unit(self._hashed(torch.Size((*shape, 1)), device, 1)).view(shape)


_reported: list[int] = []  # shapes of rows without a place; each process logs the first one


def _dropout(
    mode: Placed,
    func: Any,
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor:
    if not training or p == 0.0:
        return input
    dropped = mode.dropout(input, p)
    return input.copy_(dropped) if inplace else dropped


def _attention(
    mode: Placed,
    func: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Run `scaled_dot_product_attention`; with dropout, as its documentation defines it."""
    if dropout_p == 0.0:
        attended: Tensor = func(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        return attended
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    # 0 for a row that sees nothing
    weights = torch.ops.aten._safe_softmax(scores.float(), -1).to(query.dtype)
    return mode.dropout(weights, dropout_p) @ value


def _rand(mode: Placed, func: Any, *size: Any, **options: Any) -> Tensor:
    drawn: Tensor
    if options.get("generator") is not None or options.get("out") is not None or "names" in options:
        drawn = func(*size, **options)
        return drawn
    shape = options.pop("size", size)
    shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    drawn = torch.empty(shape, **options)
    largest = 1 - torch.finfo(drawn.dtype).eps
    with torch.no_grad():
        return drawn.copy_(mode.uniform(shape, drawn.device)).clamp_(max=largest)


def _bernoulli_(
    mode: Placed, func: Any, self: Tensor, p: Any = 0.5, *, generator: Any = None
) -> Tensor:
    if generator is not None:
        drawn: Tensor = func(self, p, generator=generator)
        return drawn
    with torch.no_grad():
        return self.copy_(mode.uniform(self.shape, self.device) < p)


_DRAWS: dict[Any, Any] = {
    F.dropout: _dropout,
    torch.dropout: lambda mode, func, input, p, train: _dropout(mode, func, input, p, train),
    F.scaled_dot_product_attention: _attention,
    torch.rand: _rand,
    torch.Tensor.bernoulli_: _bernoulli_,
}
