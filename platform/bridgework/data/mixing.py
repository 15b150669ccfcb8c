"""How many rows each source gives: from sizes, alpha, factors and caps to exact counts of every lane.

Weights become whole numbers of 2**-60, and all counting is in Python's integers: counts never go backwards and are
exact at any length of training, on every machine.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from fractions import Fraction
from itertools import count

from bridgework.errors import SpecError
from bridgework.mixture import Group, Mixture

_UNIT = 1 << 60  # weights are whole numbers of 1 / _UNIT
_POWER = Context(prec=50)  # done in software: the last bit of float's `**` depends on the machine's maths library


@dataclass(frozen=True)
class Share:
    """Why a source has the share that it has."""

    name: str
    requested: float  # share of the rows by size**alpha * factor
    weight: float  # the same after the caps
    epochs: float  # how often the run passes over the source
    capped: bool  # held back by max_epochs; the others share what it leaves


def divide(mixture: Mixture, rows: Sequence[int], *, steps: int, batch: int) -> tuple[list[Fraction], frozenset[int]]:
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
        raise SpecError(
            f"max_epochs lets the sources give {budget - missing} rows, but {steps} steps of {batch} take {budget}: "
            f"{missing} too few; raise max_epochs, add a source, or take {(budget - missing) // batch} steps"
        )
    both = held | level
    return [both[d] for d in range(len(weights))], frozenset(held)


def requested(mixture: Mixture, rows: Sequence[int]) -> list[Fraction]:
    """size**alpha * factor of each source, as shares that sum to one; a group's share is shared out inside it."""
    return _shares(mixture, iter(rows))[0]


def _shares(node: Mixture | Group, rows: Iterator[int]) -> tuple[list[Fraction], int]:
    """The share of every source below `node`, which sum to one, and the rows of all; takes its sizes from `rows`."""
    below = [_shares(n, rows) if isinstance(n, Group) else _alone(next(rows)) for n in node.sources]
    alpha = Decimal(node.alpha)
    weights = [
        Fraction(_POWER.power(Decimal(size), alpha)) * Fraction(inner.factor)
        for inner, (_, size) in zip(node.sources, below, strict=True)
    ]
    total = sum(weights)
    shares = [share * weight / total for weight, (inner, _) in zip(weights, below, strict=True) for share in inner]
    return shares, sum(size for _, size in below)


def _alone(rows: int) -> tuple[list[Fraction], int]:
    return [Fraction(1)], rows


class Ledger:
    """How many rows of each source a lane has taken, at any length.

    Through n rows, lane v of V has taken floor(w n + (2v + 1) / 2V) of a source with weight w. By Hermite's identity
    the lanes together then hold w n V rounded to the nearest row, with no random draws. The heaviest source takes
    what is left instead: it is the one that can give way. It is off by at most half a row for each other source.
    """

    def __init__(self, shares: Sequence[Fraction], lanes: int) -> None:
        self._lanes = lanes
        self._heaviest = max(range(len(shares)), key=lambda d: shares[d])
        self._weights = [int(share * _UNIT) for share in shares]
        self._weights[self._heaviest] += _UNIT - sum(self._weights)

    def taken(self, lane: int, rows: int) -> list[int]:
        """Rows of each source among the first `rows` of a lane; see `period` for where this may be asked."""
        phase = (2 * lane + 1) * _UNIT
        span = 2 * self._lanes
        return self._complete([(span * w * rows + phase) // (span * _UNIT) for w in self._weights], rows)

    def total(self, rows: int) -> list[int]:
        """The sum of `taken` over the lanes, at once."""
        counts = [(2 * self._lanes * w * rows + _UNIT) // (2 * _UNIT) for w in self._weights]
        return self._complete(counts, rows * self._lanes)

    def period(self, window_rows: int) -> int:
        """The fewest rows of a lane, in whole windows, after which no source has ever to give back a row.

        It is one window unless the heaviest source has fewer rows in a window than there are others: of 20 equal
        sources, 19 could fall due at once in a window of 8 rows.
        """
        rows = window_rows
        while self._most_due(rows) > rows:
            rows += window_rows
        return rows

    def tail(self, rows: int, period: int) -> tuple[int, int]:
        """Where a lane's last period begins and ends, if it takes `rows` in all.

        It ends there, and takes in the periods before it where it would be too short for `period`'s promise. What is
        too short as a whole ends behind its rows, and is cut there.
        """
        begin = (rows - 1) // period * period
        while begin and self._most_due(rows - begin) > rows - begin:
            begin -= period
        return begin, begin + next(n for n in count(rows - begin) if self._most_due(n) <= n)

    def _most_due(self, rows: int) -> int:
        return sum(-(-w * rows // _UNIT) for d, w in enumerate(self._weights) if d != self._heaviest)

    def _complete(self, counts: list[int], rows: int) -> list[int]:
        counts[self._heaviest] += rows - sum(counts)
        return counts
