"""How many rows each source gives: from sizes, alpha, factors and caps to exact counts of every lane.

Weights become integers of 2**-60 and are multiplied as Python's integers, so that counts are
the same at any length of training and on every machine.

# V lanes  S sources
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from bridgework.errors import SpecError
from bridgework.mixture import Group, Mixture

Counts = npt.NDArray[np.int64]

_UNIT = 1 << 60  # weights are whole numbers of 1 / _UNIT
_COUNT_BITS = 61  # of all rows up to the horizon: their sums fit into 64 bits
_KEPT = 256  # counts that stay in memory: a lookup takes about 40, its neighbor one or two more
_POWER = Context(
    prec=50
)  # done in software: the last bit of float's `**` depends on the machine's maths library


@dataclass(frozen=True)
class Share:
    """Why a source has the share that it has."""

    name: str
    requested: float  # share of the rows by size**alpha * factor
    weight: float  # the same after the caps
    epochs: float  # how often the run passes over the source
    capped: bool  # held back by max_epochs; the others share what it leaves


def divide(
    mixture: Mixture, rows: Sequence[int], *, steps: int, batch: int
) -> tuple[list[Fraction], frozenset[int]]:
    """The share of each source after the caps, and which are capped; `rows` holds the sizes of the sources.

    Water-filling: a source above its cap gets max_epochs * rows, and what it leaves is shared again by weight among
    the others. Raises SpecError if all are capped and the stage takes more.
    """
    weights = requested(mixture, rows)
    budget = steps * batch
    caps = {
        d: Fraction(source.max_epochs) * rows[d] / budget
        for d, source in enumerate(mixture.leaves)
        if source.max_epochs is not None
    }
    held: dict[int, Fraction] = {}
    while True:
        room = 1 - sum(held.values())
        free = [d for d in range(len(weights)) if d not in held]
        total = sum(weights[d] for d in free)
        level = {d: weights[d] * room / total for d in free}
        over = {d: caps[d] for d in free if d in caps and level[d] > caps[d]}
        if not over:
            break
        held |= over
    missing = 0 if free else int(room * budget)
    if missing:
        fewer = (budget - missing) // batch
        raise SpecError(
            f"max_epochs lets the sources give {budget - missing} rows, but {steps} steps of {batch} take {budget}: "
            f"{missing} too few; raise max_epochs, add a source, or take "
            + (f"{fewer} steps" if fewer else "smaller batches")
        )
    both = held | level
    return [both[d] for d in range(len(weights))], frozenset(held)


def requested(mixture: Mixture, rows: Sequence[int]) -> list[Fraction]:
    """size**alpha * factor of each source, as shares that sum to one; a group's share is shared out inside it."""
    return _shares(mixture, iter(rows))[0]


def _shares(node: Mixture | Group, rows: Iterator[int]) -> tuple[list[Fraction], int]:
    """The share of every source below `node`, which sum to one, and the rows of all; takes its sizes from `rows`."""
    below = [
        _shares(n, rows) if isinstance(n, Group) else _sole_source(next(rows)) for n in node.sources
    ]
    alpha = Decimal(node.alpha)
    weights = [
        Fraction(_POWER.power(Decimal(size), alpha)) * Fraction(inner.factor)
        for inner, (_, size) in zip(node.sources, below, strict=True)
    ]
    total = sum(weights)
    shares = [
        share * weight / total
        for weight, (inner, _) in zip(weights, below, strict=True)
        for share in inner
    ]
    return shares, sum(size for _, size in below)


def _sole_source(rows: int) -> tuple[list[Fraction], int]:
    return [Fraction(1)], rows


class ShareSchedule:
    """Rows of every source that every lane has taken, at any length, in O(1) of that length.

    The counts at a far horizon are apportioned by the shares. Between two known counts, those
    halfway are again the integers nearest to the shares, among those that take back no row:
    first of all lanes together, then of every second lane, of every fourth, down to each. A lane
    always has exactly its rows, and the counts never fall. All lanes together are within one row
    of the shares (of sources of very unlike size now and then within 1.1), and a lane is within
    about two rows of its part.
    """

    def __init__(self, shares: Sequence[Fraction], lanes: int, window_rows: int) -> None:
        """`window_rows` is the number of rows of a lane and window."""
        self._lanes = lanes
        self._weights = [int(share * _UNIT) for share in shares]
        heaviest = max(range(len(shares)), key=lambda d: shares[d])
        self._weights[heaviest] += _UNIT - sum(self._weights)
        # with fewer rows of a lane, counts cannot be even over sources, lanes and time at once
        self._enough = 4 * (len(shares) - 1)
        self.period = max(1, -(-self._enough // window_rows)) * window_rows  # rows of a lane
        self._horizon = 1 << (_COUNT_BITS - (self.period * lanes).bit_length())  # in periods
        self._at = lru_cache(_KEPT)(self._count)

    def counts(self, rows: int) -> Counts:
        """(V, S): rows of each source among the first `rows` of each lane, a multiple of `period`.

        Raises SpecError beyond the horizon.
        """
        if rows // self.period > self._horizon:
            raise SpecError(
                f"a plan of {rows * self._lanes:,} rows is too long. At most "
                f"{self._horizon * self.period * self._lanes:,} can be counted. "
                "Fix: take fewer steps"
            )
        return self._at(rows // self.period)

    def last(self, rows: int) -> int:
        """Rows of a lane before the last period of a stage, which has `rows`: that period is not a short one."""
        before = (rows - 1) // self.period * self.period
        return before - self.period if before and rows - before < self._enough else before

    def end(self, rows: int) -> Counts:
        """(V, S): the same at the end of a stage, at any number of rows: no later count limits it."""
        before = self.last(rows)
        low = self.counts(before)
        return self._between(rows, low, low + (rows - before))

    def _count(self, period: int) -> Counts:
        if period == 0:
            counts = np.zeros((self._lanes, len(self._weights)), np.int64)
        elif period == self._horizon:
            rows = period * self.period
            counts = self._between(rows, self._at(0), np.full_like(self._at(0), rows))
        else:
            step = period & -period
            low, high = self._at(period - step), self._at(period + step)
            counts = self._between(period * self.period, low, high)
        counts.flags.writeable = False
        return counts

    def _between(self, rows: int, low_VS: Counts, high_VS: Counts) -> Counts:
        """The counts at `rows` rows of a lane, which are none below `low` and none above `high`."""
        exact = [divmod(weight * rows * self._lanes, _UNIT) for weight in self._weights]
        floor_S = np.array([floor for floor, _ in exact], np.int64)
        rest_S = np.array([rest / _UNIT for _, rest in exact])
        low_S, high_S = low_VS.sum(0), high_VS.sum(0)
        totals_S = apportion(rows * self._lanes, floor_S, rest_S, low_S, high_S)
        return _deal(rows, totals_S, low_VS, high_VS)


def _deal(rows: int, totals_S: Counts, low_VS: Counts, high_VS: Counts) -> Counts:
    """The totals of some lanes as counts of each: `rows` rows a lane, between `low` and `high`.

    Every second lane is a half, so that ranks, which own lanes in turn, have like counts. Where the
    limits of single lanes allow no such counts, the totals give way by a row.
    """
    lanes = len(low_VS)
    if lanes == 1:
        return totals_S[None]
    half = -(-lanes // 2)
    (low_S, rest_low_S), (high_S, rest_high_S) = (
        (limit[::2].sum(0), limit[1::2].sum(0)) for limit in (low_VS, high_VS)
    )
    each_S, left_S = np.divmod(totals_S, lanes)
    more_S, over_S = np.divmod(left_S * half, lanes)
    least_S = np.maximum(low_S, totals_S - rest_high_S)
    most_S = np.minimum(high_S, totals_S - rest_low_S)
    if least_S.sum() > rows * half or most_S.sum() < rows * half:
        least_S, most_S = low_S, high_S
    first_S = apportion(rows * half, each_S * half + more_S, over_S / lanes, least_S, most_S)
    second_S = totals_S - first_S
    if (second_S < rest_low_S).any() or (second_S > rest_high_S).any():
        none_S = np.zeros_like(over_S)
        second_S = apportion(rows * (lanes - half), second_S, none_S, rest_low_S, rest_high_S)
    counts_VS = np.empty_like(low_VS)
    counts_VS[::2] = _deal(rows, first_S, low_VS[::2], high_VS[::2])
    counts_VS[1::2] = _deal(rows, second_S, low_VS[1::2], high_VS[1::2])
    return counts_VS


def apportion(
    total: int,
    floor_S: Counts,
    rest_S: npt.NDArray[np.floating[Any]],
    low_S: Counts,
    high_S: Counts,
) -> Counts:
    """The integers between `low` and `high` that sum to `total`, nearest to `floor + rest`.

    `rest` is in [0, 1). There must be such numbers: sum(low) <= total <= sum(high).
    """
    counts_S = np.clip(floor_S, low_S, high_S)
    while missing := total - int(counts_S.sum()):
        sign = 1 if missing > 0 else -1
        open_ = np.flatnonzero(counts_S < high_S if missing > 0 else counts_S > low_S)
        lag = sign * ((floor_S - counts_S)[open_] + rest_S[open_])
        chosen = open_[np.argsort(-lag, kind="stable")[: abs(missing)]]
        counts_S[chosen] += sign
    return counts_S
