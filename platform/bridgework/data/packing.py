"""How a lane's window becomes steps: rows are packed into sequences, sequences laid out so that steps cost alike.

Both are functions of the rows and their order alone. Every lane puts its dearest step at the same place of the window,
so what is left of the differences falls on all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What a sequence holds at most."""

    tokens: int
    samples: int
    images: int | None = None


@dataclass
class _Bin:
    rows: list[int]
    tokens: int
    images: int


def first_fit(tokens: Sequence[int], images: Sequence[int], limits: Limits) -> list[list[int]]:
    """The rows of every sequence, as places in `tokens`: longest first, each into the first sequence with room.

    A row that is over a limit by itself has a sequence of its own.
    """
    bins: list[_Bin] = []
    for row in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        found = next((b for b in bins if _fits(b, tokens[row], images[row], limits)), None)
        if found is None:
            bins.append(_Bin([row], tokens[row], images[row]))
        else:
            found.rows.append(row)
            found.tokens += tokens[row]
            found.images += images[row]
    return [sorted(b.rows) for b in bins]


def _fits(found: _Bin, tokens: int, images: int, limits: Limits) -> bool:
    return (
        found.tokens + tokens <= limits.tokens
        and len(found.rows) < limits.samples
        and (limits.images is None or found.images + images <= limits.images)
    )


def balance(costs: Sequence[int], steps: int) -> list[list[int]]:
    """The places in `costs` of every step, dearest step first: equally many each (one less in some), of like cost.

    Round by round, dearest first, every step takes one: the step that cost least so far takes the dearest.
    """
    dearest = sorted(range(len(costs)), key=lambda i: -costs[i])
    laid: list[list[int]] = [[] for _ in range(steps)]
    sums = [0] * steps
    for first in range(0, len(dearest), steps):
        cheapest = sorted(range(steps), key=sums.__getitem__)
        for step, item in zip(cheapest, dearest[first : first + steps], strict=False):
            laid[step].append(item)
            sums[step] += costs[item]
    return [laid[step] for step in sorted(range(steps), key=lambda step: -sums[step])]
