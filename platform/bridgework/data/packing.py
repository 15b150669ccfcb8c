"""Pack the rows of a lane's window into sequences and balance the cost of its steps.

Both depend on the rows and their order only. Every lane has its most expensive step at the same
position of the window, so the remaining differences occur on all ranks at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BinLimits:
    """Maximum content of a packed sequence."""

    tokens: int
    samples: int
    images: int | None = None


@dataclass
class _Bin:
    rows: list[int]
    tokens: int
    images: int


def first_fit(tokens: Sequence[int], images: Sequence[int], limits: BinLimits) -> list[list[int]]:
    """Return the rows of every sequence, as indices into `tokens`: first-fit decreasing by length.

    A row that exceeds a limit by itself has a sequence of its own.
    """
    bins: list[_Bin] = []
    for row in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        bin_ = next((b for b in bins if _fits(b, tokens[row], images[row], limits)), None)
        if bin_ is None:
            bins.append(_Bin([row], tokens[row], images[row]))
        else:
            bin_.rows.append(row)
            bin_.tokens += tokens[row]
            bin_.images += images[row]
    return [sorted(b.rows) for b in bins]


def _fits(bin_: _Bin, tokens: int, images: int, limits: BinLimits) -> bool:
    return (
        bin_.tokens + tokens <= limits.tokens
        and len(bin_.rows) < limits.samples
        and (limits.images is None or bin_.images + images <= limits.images)
    )


def balance(costs: Sequence[int], steps: int) -> list[list[int]]:
    """Return the indices into `costs` for each of `steps`, most expensive step first.

    All steps have the same number of items, or one fewer, and similar sums. In each round every
    step takes one item: the step with the lowest sum so far takes the most expensive item.
    """
    expensive_first = sorted(range(len(costs)), key=lambda i: -costs[i])
    items: list[list[int]] = [[] for _ in range(steps)]
    sums = [0] * steps
    for first in range(0, len(costs), steps):
        cheapest_first = sorted(range(steps), key=sums.__getitem__)
        batch = expensive_first[first : first + steps]
        for step, item in zip(cheapest_first, batch, strict=False):
            items[step].append(item)
            sums[step] += costs[item]
    return [items[step] for step in sorted(range(steps), key=lambda step: -sums[step])]
