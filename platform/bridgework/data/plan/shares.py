"""Compute the rows that each lane takes of each source, from sizes, alpha, factors and caps.

Weights are converted to integer multiples of 2**-60 and multiplied as Python integers, so the
counts are exact at any length of training and equal on every machine.

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

_UNIT = 1 << 60  # weights are integer multiples of 1 / _UNIT
_COUNT_BITS = 61  # of all rows up to the horizon, so that their sums fit into 64 bits
_CACHE_SIZE = 256  # counts in memory: a lookup needs about 40, its neighbor one or two more
# in software, because the last bit of a float's `**` depends on the machine's math library
_POWER = Context(prec=50)


@dataclass(frozen=True)
class Share:
    """Share of one source in a plan, and its origin."""

    name: str
    requested: float  # share of the rows by size**alpha * factor
    weight: float  # the same after the caps
    epochs: float  # passes over the source in the run
    capped: bool  # limited by max_epochs; the remainder is distributed over the others


def divide(
    mixture: Mixture, rows: Sequence[int], *, steps: int, batch: int
) -> tuple[list[Fraction], frozenset[int]]:
    """Return the share of each source after the caps, and the indices of the capped sources.

    `rows` holds the sizes of the sources. Water-filling: a source above its cap gets max_epochs *
    rows, and the remaining budget is redistributed by weight. Raises SpecError if the caps of all
    sources give too few rows.
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
            f"max_epochs: the sources have too few rows. Got {budget - missing}; {steps} steps "
            f"of {batch} need {budget}, {missing} more. "
            "Fix: raise max_epochs, add a source, or use "
            + (f"{fewer} steps" if fewer else "smaller batches")
        )
    both = held | level
    return [both[d] for d in range(len(weights))], frozenset(held)


def requested(mixture: Mixture, rows: Sequence[int]) -> list[Fraction]:
    """Return size**alpha * factor of each source, as shares that sum to one.

    The share of a group is divided inside it in the same way.
    """
    return _shares(mixture, iter(rows))[0]


def _shares(node: Mixture | Group, rows: Iterator[int]) -> tuple[list[Fraction], int]:
    """Return the shares of the sources below `node`, which sum to one, and their total rows.

    The sizes come from `rows`.
    """
    below = [
        _shares(n, rows) if isinstance(n, Group) else ([Fraction(1)], next(rows))
        for n in node.sources
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


class ShareSchedule:
    """Cumulative rows of every source in every lane, at any length of training, in O(1) time.

    The counts at a far horizon are apportioned by the shares. Between two known counts, the counts
    halfway are again the integers nearest to the shares that never decrease a count: first for
    all lanes together, then for every second lane, every fourth, down to each lane. A lane
    always has exactly its number of rows. All lanes together are within one row of the shares
    (with sources of very different sizes occasionally within 1.1), and a lane is within about two
    rows of its part.
    """

    def __init__(self, shares: Sequence[Fraction], lanes: int, window_rows: int) -> None:
        """Compute the weights and the period.

        `window_rows` is the number of rows of a lane and window.
        """
        self._lanes = lanes
        self._weights = [int(share * _UNIT) for share in shares]
        heaviest = max(range(len(shares)), key=lambda d: shares[d])
        self._weights[heaviest] += _UNIT - sum(self._weights)
        # with fewer rows per lane, counts cannot be even over sources, lanes and time at once
        self._min_rows = 4 * (len(shares) - 1)
        self.period = max(1, -(-self._min_rows // window_rows)) * window_rows  # rows of a lane
        self._horizon = 1 << (_COUNT_BITS - (self.period * lanes).bit_length())  # in periods
        self._at = lru_cache(_CACHE_SIZE)(self._count)

    def counts(self, rows: int) -> Counts:
        """Return the rows of each source among the first `rows` of each lane, (V, S).

        `rows` is a multiple of `period`. Raises SpecError beyond the horizon.
        """
        if rows // self.period > self._horizon:
            raise SpecError(
                f"the plan is too long. Got {rows * self._lanes:,} rows; expected at most "
                f"{self._horizon * self.period * self._lanes:,}. Fix: use fewer steps"
            )
        return self._at(rows // self.period)

    def last(self, rows: int) -> int:
        """Return the rows of a lane before the last period of a stage of `rows` rows.

        That period is never short.
        """
        before = (rows - 1) // self.period * self.period
        return before - self.period if before and rows - before < self._min_rows else before

    def end(self, rows: int) -> Counts:
        """Return the counts (V, S) at the end of a stage, at any number of rows.

        No later count limits them.
        """
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
        """Return the counts at `rows` rows of a lane, all between `low` and `high`."""
        exact = [divmod(weight * rows * self._lanes, _UNIT) for weight in self._weights]
        floor_S = np.array([floor for floor, _ in exact], np.int64)
        rest_S = np.array([rest / _UNIT for _, rest in exact])
        low_S, high_S = low_VS.sum(0), high_VS.sum(0)
        totals_S = apportion(rows * self._lanes, floor_S, rest_S, low_S, high_S)
        return _split(rows, totals_S, low_VS, high_VS)


def _split(rows: int, totals_S: Counts, low_VS: Counts, high_VS: Counts) -> Counts:
    """Split the totals of several lanes into counts of `rows` per lane, between `low` and `high`.

    Each half consists of every second lane, so that ranks, which own lanes in turn, have similar
    counts. If the limits of single lanes allow no such counts, the totals change by a row.
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
    counts_VS[::2] = _split(rows, first_S, low_VS[::2], high_VS[::2])
    counts_VS[1::2] = _split(rows, second_S, low_VS[1::2], high_VS[1::2])
    return counts_VS


def apportion(
    total: int,
    floor_S: Counts,
    rest_S: npt.NDArray[np.floating[Any]],
    low_S: Counts,
    high_S: Counts,
) -> Counts:
    """Return the integers between `low` and `high` that sum to `total`, nearest to `floor + rest`.

    `rest` is in [0, 1). Requires sum(low) <= total <= sum(high).
    """
    counts_S = np.clip(floor_S, low_S, high_S)
    while missing := total - int(counts_S.sum()):
        sign = 1 if missing > 0 else -1
        open_ = np.flatnonzero(counts_S < high_S if missing > 0 else counts_S > low_S)
        lag = sign * ((floor_S - counts_S)[open_] + rest_S[open_])
        chosen = open_[np.argsort(-lag, kind="stable")[: abs(missing)]]
        counts_S[chosen] += sign
    return counts_S
