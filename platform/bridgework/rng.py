"""Randomness by place: what a forward pass draws depends on (seed, step, place in the global batch).

A generator's stream depends on what was drawn before: on the rank, on the rows of a micro-batch, on
padding. Here every element's draw is a hash of its coordinates (a counter-based generator; Salmon et
al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3"), so dropout masks are the same for any number
of workers and any size of micro-batch. `Placed` is a mode of torch that does this for the functions
that models draw with: dropout, dropout inside attention, `torch.rand` and `bernoulli_`.
"""

# R rows of a forward  B sequences of a batch  N images (squares) of a batch

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

ODD = (
    0x9E3779B97F4A7C15,
    0xBF58476D1CE4E5B9,
    0x94D049BB133111EB,
)  # SplitMix64 (Steele et al. 2014)
_MASK = 2**64 - 1
_ACTIVE: ContextVar["Placed | None"] = ContextVar("placed", default=None)

log = logging.getLogger(__name__)


def derive(*parts: int) -> int:
    """A 63-bit number from whole numbers, the same in every process: seeds of (seed, step), of (seed, step, place)."""
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
    """SplitMix64's finalizer of int64 numbers, element by element."""
    state = state ^ (state >> 30 & (1 << 34) - 1)
    state = state * _signed(ODD[1])
    state ^= state >> 27 & (1 << 37) - 1
    state *= _signed(ODD[2])
    state ^= state >> 31 & (1 << 33) - 1
    return state


def unit(hashed: Tensor) -> Tensor:
    """float64 in (0, 1) from hashed int64 numbers."""
    return ((hashed >> 11 & (1 << 53) - 1).double() + 0.5) / 2**53


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number


def step_seed() -> int:
    """The number of (seed, step) that the active `Placed` holds; torch's own seed outside of training."""
    active = _ACTIVE.get()
    return torch.initial_seed() if active is None else active.step


@contextmanager
def images() -> Iterator[None]:
    """Inside, the rows of a forward are the images of the batch, in order, and not its sequences."""
    with _rows(lambda active: active.images_N):
        yield


@contextmanager
def repeated(times: int) -> Iterator[None]:
    """Inside, the rows are those of outside, `times` times one after the other, with draws of their own each."""

    def stacked(active: "Placed") -> Tensor:
        turns = torch.arange(1, times + 1, device=active.rows_R.device).unsqueeze(1)
        return mix(active.rows_R + turns * _signed(ODD[2])).flatten()

    with _rows(stacked):
        yield


@contextmanager
def _rows(made: Any) -> Iterator[None]:
    active = _ACTIVE.get()
    if active is None:
        yield
        return
    outside, active.rows_R = active.rows_R, made(active)
    try:
        yield
    finally:
        active.rows_R = outside


class Placed(TorchFunctionMode):
    """Inside, the draws of a forward are those of (step, place, call, coordinates).

    step: a number of (seed, step), see `derive`. places_B: (B,) int64, the place in the global batch of
    each sequence. owners_N: (N,) int64, the sequence that each image belongs to.
    """

    def __init__(self, step: int, places_B: Tensor, owners_N: Tensor) -> None:
        super().__init__()
        self.step = step
        self._calls = (
            0  # of a forward: every rank and micro-batch makes the same, in the same order
        )
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
        own = _DRAWS.get(func)
        given = kwargs or {}
        return func(*args, **given) if own is None else own(self, func, *args, **given)

    # --- draws -------------------------------------------------------------------------------------------------------

    def _hashed(self, shape: torch.Size, device: torch.device, words: int) -> Tensor:
        """int64 of `shape`, its last dimension being `words`: a hash of call, row and coordinates."""
        self._calls += 1
        call = derive(self.step, self._calls)
        if self.rows_R.device != device:
            self.rows_R = self.rows_R.to(device)
        rows_R = self.rows_R
        outer, each = self._row_shape(shape[0], len(rows_R))
        if outer == len(rows_R) and outer:
            hashed = mix(rows_R + call)
        else:  # of no row: of the step alone, or of the batch at hand where the rows are not known
            own = call if shape[0] == 1 else call + int(rows_R[0]) if len(rows_R) else call
            hashed = mix(torch.arange(outer, device=device) + _signed(own & _MASK))
        for size in (*each, *shape[1:-1], words):
            hashed = mix(hashed.unsqueeze(-1) + torch.arange(size, device=device) * _signed(ODD[0]))
        return hashed.view(*shape[:-1], words)

    def _row_shape(self, first: int, rows: int) -> tuple[int, tuple[int, ...]]:
        """Split the first dimension into rows and what each has, as in (B * T, D) and (B * H, T, T)."""
        if first == rows or (first == 1 and rows != 1):
            return first, ()
        if rows and first % rows == 0:
            return rows, (first // rows,)
        if not _reported:
            _reported.append(first)
            log.warning(
                "dropout over %d rows that are not those of the %d samples of a micro-batch: there, masks depend on "
                "how the batch is cut, and so does the loss. Fix: set the dropout of that part of the model to 0",
                first,
                rows,
            )
        return first, ()

    def keep(self, shape: torch.Size, device: torch.device, p: float) -> tuple[Tensor, float]:
        """Which elements dropout keeps, bool, and their share: `p` rounded to 1 / 65536, of which it is exact."""
        dropped = round(p * 65_536)
        width = shape[-1]
        hashed = self._hashed(shape, device, -(-width // 4))  # four numbers of 16 bits each
        kept = hashed.view(torch.int16)[..., :width] >= dropped - 32_768
        return kept, 1 - dropped / 65_536

    def dropout(self, given: Tensor, p: float) -> Tensor:
        """The tensor with elements set to 0 with probability `p`, the others scaled up."""
        if p >= 1.0 or not given.numel():
            return given * 0.0
        if not given.ndim:
            return self.dropout(given.view(1, 1), p).view(())
        shape = given.shape if given.ndim > 1 else torch.Size((*given.shape, 1))
        kept, share = self.keep(shape, given.device, p)
        return (given * (1 / share)).masked_fill(~kept.view(given.shape), 0.0)

    def uniform(self, shape: torch.Size, device: torch.device) -> Tensor:
        """float64 in (0, 1): of its row where the first dimension is the rows, else of the step alone."""
        if not shape:
            return unit(self._hashed(torch.Size((1, 1)), device, 1)).view(())
        whole = torch.Size((*shape, 1))
        return unit(self._hashed(whole, device, 1)).view(shape)


_reported: list[int] = []  # a process reports once what it cannot place


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
    """`scaled_dot_product_attention` as its documentation spells it out, where it has dropout."""
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
    scores = (
        query @ key.transpose(-2, -1) * (1 / math.sqrt(query.size(-1)) if scale is None else scale)
    )
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = torch.ops.aten._safe_softmax(scores.float(), -1).to(
        query.dtype
    )  # 0 for a row that sees nothing
    return mode.dropout(weights, dropout_p) @ value


def _rand(mode: Placed, func: Any, *size: Any, **options: Any) -> Tensor:
    if options.get("generator") is not None or options.get("out") is not None or "names" in options:
        drawn: Tensor = func(*size, **options)
        return drawn
    shape = options.pop("size", size)
    shape = torch.Size(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
    made = torch.empty(shape, **options)
    with torch.no_grad():
        return made.copy_(mode.uniform(shape, made.device)).clamp_(
            max=1 - torch.finfo(made.dtype).eps
        )


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
