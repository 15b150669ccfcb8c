"""The plan: which rows make the global batch of step s, as a pure function of seed, mixture, manifests and s.

The batch is V lanes side by side, b = batch / V rows of each. A lane walks its own part of every source in windows of
`window` steps; the W = b * window rows of one window are shuffled and laid out on its steps. World size, readers and
timing play no part, so the whole cursor of a run is its next step. `mixing` says how many rows of each source a lane
takes, `dealing` which.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from bridgework.data.plan.lane_order import LaneOrder
from bridgework.data.plan.permutation import derive, key_of, shuffle
from bridgework.data.plan.shares import Counts, Share, ShareSchedule, divide, requested
from bridgework.errors import DataError, SpecError
from bridgework.mixture import Mixture, unique

# S sources  R rows  V lanes  b rows of a lane and step  W rows of a lane and window

OWN_ROWS = 64  # of an epoch for each lane; of a smaller source, lanes take turns at all streams
_SPARE = 64  # substitutes looked up at a time


@dataclass(frozen=True)
class SourceRows:
    """What the plan knows of a dataset."""

    name: str  # of the source in the mixture
    digest: str  # of the dataset's manifest
    rows: int
    group_rows: int  # rows that are stored, and so read, together


class Rows(NamedTuple):
    """Rows of one lane in the order of use; three arrays of one length."""

    source: npt.NDArray[np.int32]  # place in the mixture
    epoch: npt.NDArray[np.int32]  # pass over the source, from 0
    row: npt.NDArray[np.int64]  # of the dataset


class Plan:
    """The order of one stage's rows. `sources` are those of the mixture, in its order.

    An order is keyed by (seed, name and digest of the source), never by its place: another source
    in the mixture changes how many rows are taken of this one, not which come next. In one epoch no
    row comes twice, and no row of an epoch comes after one of the next: of a source alone, N rows
    from a multiple of N are every row once. In a mixture the same holds to the window for a source
    of fewer than OWN_ROWS rows for each lane, and to two rows of a lane for a larger one.

    Raises SpecError for a batch that is not a multiple of the lanes, for sources that are not the mixture's, and for
    caps that cannot fill the budget; DataError for an empty source.
    """

    shares: tuple[Share, ...]  # one per source, in order
    window_rows: int  # W
    step_rows: int  # b

    def __init__(
        self, sources: Sequence[SourceRows], mixture: Mixture, *, batch: int, steps: int, seed: int
    ) -> None:
        _check(sources, mixture, batch, steps)
        rows = [source.rows for source in sources]
        weights, capped = divide(mixture, rows, steps=steps, batch=batch)
        self.shares = tuple(
            Share(
                source.name,
                float(asked),
                float(weight),
                float(weight * steps * batch / source.rows),
                d in capped,
            )
            for d, (source, asked, weight) in enumerate(
                zip(sources, requested(mixture, rows), weights, strict=True)
            )
        )
        self.window_rows = batch // mixture.lanes * mixture.window
        self._lanes = mixture.lanes
        self.step_rows = batch // mixture.lanes
        self._ledger = ShareSchedule(weights, mixture.lanes, self.window_rows)
        self._end = steps * self.step_rows
        self._last = self._ledger.last(self._end)
        keys = [key_of(seed, source.name, source.digest) for source in sources]
        self._sizes = rows
        self._own = np.array([n >= OWN_ROWS * mixture.lanes for n in rows])
        self._deal = LaneOrder(rows, [source.group_rows for source in sources], keys, mixture.lanes)
        self._key = np.array([key_of(seed, "layout")], dtype=np.uint64)
        self._order = (
            seed,
            tuple(sources),
            tuple(weights),
            mixture.lanes,
            self.step_rows,
            mixture.window,
        )

    def lanes_of(self, rank: int, world: int) -> range:
        """The lanes of a rank. Raises SpecError where a rank would have none."""
        return lanes_of(self._lanes, rank, world)

    def window(self, lane: int, t: int) -> Rows:
        """The W rows of a lane for steps t * window .. (t + 1) * window - 1: b for the first step, b for the next.

        Fewer in the window of the last step, if that ends before the window does.
        """
        return self._rows(lane, t * self.window_rows, self.window_rows)

    def substitutes(self, lane: int, t: int, place: int) -> Iterator[tuple[int, int, int]]:
        """(source, epoch, row) to try, in order, when the row at `place` of the window is bad.

        First the other rows of its source in the window, cyclically from `place` on: they are read already. Then those
        that the lane takes of it next, as many as the source has rows, and at last all its rows, cyclically from the
        bad one on. Never the bad row itself; ends when all fail.
        """
        window = self.window(lane, t)
        source, bad = int(window.source[place]), int(window.row[place])
        same = np.flatnonzero(window.source == source)
        for at in np.roll(same, -int(np.searchsorted(same, place))):
            if window.row[at] != bad:
                yield source, int(window.epoch[at]), int(window.row[at])
        after_VS = self._counts(self._period_of(t * self.window_rows)[1])
        turns = int(after_VS[:, source].sum()) + lane
        first = int(after_VS[lane, source]) if self._own[source] else turns // self._lanes
        last = first + self._sizes[source]
        for start in range(first, last, _SPARE):
            index = np.arange(start, min(start + _SPARE, last))
            epochs, rows = self._deal.locate(
                np.full_like(index, source), np.full_like(index, lane), index
            )
            yield from (
                (source, int(e), int(r)) for e, r in zip(epochs, rows, strict=True) if r != bad
            )
        size, epoch = self._sizes[source], int(window.epoch[place])
        yield from ((source, epoch, (bad + further) % size) for further in range(1, size))

    def shared(self, other: "Plan") -> int:
        """Count the first steps that train on the same rows in both plans, which may differ in their steps.

        The last period of a plan is laid out for its end: what comes after its beginning is not shared.
        """
        if self._order != other._order:
            return 0
        whole_windows = min(self._last, other._last) // self.window_rows
        return whole_windows * (self.window_rows // self.step_rows)

    def realized(self, steps: int) -> dict[str, int]:
        """Rows of each source in the first `steps` global batches: arithmetic, but for a period that is cut short."""
        rows = steps * self.step_rows
        begin, end = self._period_of(max(rows - 1, 0))
        whole = rows in (begin, end)
        counts = self._counts(rows if whole else begin).sum(0)
        if not whole:
            for lane in range(self._lanes):
                drawn = self._rows(lane, begin, rows - begin).source
                counts += np.bincount(drawn, minlength=len(counts))
        return {share.name: int(count) for share, count in zip(self.shares, counts, strict=True)}

    def _rows(self, lane: int, first: int, count: int) -> Rows:
        """Rows `first` .. of a lane, inside one period.

        A period, nearly always one window, is shuffled as one (see `Ledger`): which place has a row
        of which source, and the rows of a source in each epoch, but never two epochs. The last one
        ends with the stage, so that shares and caps hold there to the row.
        """
        if not 0 <= lane < self._lanes or not 0 <= first < self._end:
            raise SpecError(
                f"lane {lane}, row {first} is not in the plan: lanes are 0 .. {self._lanes - 1}, rows of a lane "
                f"0 .. {self._end - 1}"
            )
        begin, end = self._period_of(first)
        before_VS, after_VS = self._counts(begin), self._counts(end)
        drawn_by = np.array([begin // self._ledger.period * self._lanes + lane], dtype=np.uint64)
        place_R = shuffle(end - begin, derive(self._key, drawn_by))
        ends_S = np.cumsum(after_VS[lane] - before_VS[lane])
        source_R = np.searchsorted(ends_S, place_R, side="right")
        nth_R = (
            place_R - np.concatenate(([0], ends_S))[source_R]
        )  # of the lane's rows of its source
        stream_R, index_R = np.full_like(source_R, lane), before_VS[lane, source_R] + nth_R
        shared = np.flatnonzero(~self._own[source_R])
        number = _numbers(before_VS, after_VS, lane, source_R[shared], nth_R[shared])
        stream_R[shared] = self._lanes - 1 - number % self._lanes
        index_R[shared] = number // self._lanes
        epoch_R, row_R = self._deal.locate(source_R, stream_R, index_R)
        order_R = np.empty_like(place_R)
        order_R[np.argsort(source_R, kind="stable")] = np.lexsort((epoch_R, source_R))
        some = order_R[first - begin :][:count]
        return Rows(source_R[some].astype(np.int32), epoch_R[some], row_R[some])

    def _counts(self, rows: int) -> Counts:
        """(V, S) at the begin or the end of a period, the last of which ends with the stage."""
        return self._ledger.end(rows) if rows == self._end else self._ledger.counts(rows)

    def _period_of(self, row: int) -> tuple[int, int]:
        """The rows of a lane, from and to, that are shuffled together with row `row`."""
        if row >= self._last:
            return self._last, self._end
        begin = row // self._ledger.period * self._ledger.period
        return begin, begin + self._ledger.period


def _numbers(
    before_VS: Counts, after_VS: Counts, lane: int, source_R: Counts, nth_R: Counts
) -> Counts:
    """The numbers (`dealing`) of a lane's draws among those of all lanes.

    First come all first draws of the period, then all second ones, from the last lane to the first.
    """
    drawn_VR = (after_VS - before_VS)[:, source_R]
    earlier_R = np.minimum(drawn_VR, nth_R).sum(0) + (drawn_VR[lane + 1 :] > nth_R).sum(0)
    number_R: Counts = before_VS[:, source_R].sum(0) + earlier_R
    return number_R


def lanes_of(lanes: int, rank: int, world: int) -> range:
    """Which of `lanes` a rank owns. Raises SpecError where it would have none."""
    if not 0 <= rank < world <= lanes:
        raise SpecError(
            f"rank {rank} of {world} has no lane: data.lanes is {lanes}; "
            "use at most as many workers as lanes, or raise data.lanes"
        )
    return range(rank, lanes, world)


def _check(sources: Sequence[SourceRows], mixture: Mixture, batch: int, steps: int) -> None:
    names, asked = [s.name for s in sources], [s.name for s in mixture.leaves]
    unique("sources", names)
    if names != asked:
        raise SpecError(
            f"the plan got sources {', '.join(names)}, the mixture names {', '.join(asked)}; "
            "give one SourceRows for each source of the mixture, in its order"
        )
    for source in sources:
        if source.rows < 1 or source.group_rows < 1:
            raise DataError(
                f"sources.{source.name}: {source.rows} rows in row groups of {source.group_rows}; "
                "a source needs at least one row: import its data again or drop it from the mixture"
            )
    if steps < 1:
        raise SpecError(f"a plan has at least 1 step. Got {steps}. Fix: set a larger budget")
    if batch < 1 or batch % mixture.lanes:
        raise SpecError(
            f"batches of {batch} over {mixture.lanes} lanes are not possible: every lane gives equally many "
            "rows. Fix: make the batch a multiple of data.lanes, or change data.lanes"
        )
