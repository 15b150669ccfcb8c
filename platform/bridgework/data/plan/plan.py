"""The plan: the rows of the batch of step s, a pure function of seed, mixture, manifests and s.

A batch consists of V lanes with b = batch / V rows each. A lane reads its own part of every source
in windows of `window` steps; the W = b * window rows of a window are shuffled and distributed over
its steps. The plan does not depend on world size, readers or timing, so the cursor of a run is its
next step. `shares` computes how many rows of each source a lane takes, `lane_order` which ones.

# S sources  R rows  V lanes  b rows of a lane and step  W rows of a lane and window
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

# rows of an epoch per lane from which a lane has its own stream; lanes share the streams of a
# smaller source
OWN_ROWS = 64
_LOOKUP = 64  # substitutes computed at a time


@dataclass(frozen=True)
class SourceRows:
    """Size and identity of a source's dataset."""

    name: str  # of the source in the mixture
    digest: str  # of the dataset's manifest
    rows: int
    group_rows: int  # rows that are stored, and so read, together


class Rows(NamedTuple):
    """Rows of one lane in the order of use; three arrays of the same length."""

    source: npt.NDArray[np.int32]  # index in the mixture
    epoch: npt.NDArray[np.int32]  # pass over the source, from 0
    row: npt.NDArray[np.int64]  # index in the dataset


class Plan:
    """The order of one stage's rows. `sources` are those of the mixture, in its order.

    The order of a source is keyed by (seed, name and digest of the source), not by its index in the
    mixture: another source changes how many rows of this one are taken, but not which come next. No
    row occurs twice in an epoch, and no row of an epoch comes after one of the next. For a single
    source, N rows from a multiple of N contain every row once. In a mixture this is exact to the
    window for a source of fewer than OWN_ROWS rows per lane, and to two rows of a lane for a larger
    one.

    Raises SpecError for a batch that is not a multiple of the lanes, for sources that differ from
    the mixture's, and for caps that cannot fill the budget; DataError for an empty source.
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
        shares = zip(sources, requested(mixture, rows), weights, strict=True)
        self.shares = tuple(
            Share(
                source.name,
                float(share),
                float(weight),
                float(weight * steps * batch / source.rows),
                d in capped,
            )
            for d, (source, share, weight) in enumerate(shares)
        )
        self.window_rows = batch // mixture.lanes * mixture.window
        self._lanes = mixture.lanes
        self.step_rows = batch // mixture.lanes
        self._schedule = ShareSchedule(weights, mixture.lanes, self.window_rows)
        self._end = steps * self.step_rows
        self._last = self._schedule.last(self._end)
        keys = [key_of(seed, source.name, source.digest) for source in sources]
        group_rows = [source.group_rows for source in sources]
        self._sizes = rows
        self._own = np.array([n >= OWN_ROWS * mixture.lanes for n in rows])
        self._lane_order = LaneOrder(rows, group_rows, keys, mixture.lanes)
        self._key = np.array([key_of(seed, "layout")], dtype=np.uint64)
        self._identity = (
            seed,
            tuple(sources),
            tuple(weights),
            mixture.lanes,
            self.step_rows,
            mixture.window,
        )

    def lanes_of(self, rank: int, world: int) -> range:
        """Return the lanes of a rank. Raises SpecError if the rank would have none."""
        return lanes_of(self._lanes, rank, world)

    def window(self, lane: int, t: int) -> Rows:
        """Return the W rows of a lane for steps t * window .. (t + 1) * window - 1, b per step.

        The last window has fewer rows if the stage ends inside it.
        """
        return self._rows(lane, t * self.window_rows, self.window_rows)

    def substitutes(self, lane: int, t: int, place: int) -> Iterator[tuple[int, int, int]]:
        """Yield (source, epoch, row) to try, in order, if the row at `place` of the window is bad.

        First the other rows of its source in the window, cyclically from `place` on, because they
        are already read. Then the lane's next rows of the source, as many as the source has, and
        finally all its rows, cyclically from the bad one on. The bad row itself is excluded.
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
        for start in range(first, last, _LOOKUP):
            index = np.arange(start, min(start + _LOOKUP, last))
            epochs, rows = self._lane_order.locate(
                np.full_like(index, source), np.full_like(index, lane), index
            )
            yield from (
                (source, int(e), int(r)) for e, r in zip(epochs, rows, strict=True) if r != bad
            )
        size, epoch = self._sizes[source], int(window.epoch[place])
        yield from ((source, epoch, (bad + offset) % size) for offset in range(1, size))

    def shared(self, other: "Plan") -> int:
        """Return the number of first steps with the same rows in both plans.

        They may differ in their steps.

        The last period of a plan depends on its end, so its steps do not count.
        """
        if self._identity != other._identity:
            return 0
        windows = min(self._last, other._last) // self.window_rows
        return windows * (self.window_rows // self.step_rows)

    def realized(self, steps: int) -> dict[str, int]:
        """Return the rows of each source in the first `steps` global batches.

        Computed without drawing rows, except in a period that `steps` cuts.
        """
        rows = steps * self.step_rows
        begin, end = self._period_of(max(rows - 1, 0))
        at_boundary = rows in (begin, end)
        counts = self._counts(rows if at_boundary else begin).sum(0)
        if not at_boundary:
            for lane in range(self._lanes):
                drawn = self._rows(lane, begin, rows - begin).source
                counts += np.bincount(drawn, minlength=len(counts))
        return {share.name: int(count) for share, count in zip(self.shares, counts, strict=True)}

    def _rows(self, lane: int, first: int, count: int) -> Rows:
        """Return `count` rows of a lane from row `first` on, inside one period.

        A period, nearly always one window, is shuffled as a unit (see `ShareSchedule`): the source
        of each place, and the rows of a source within each epoch, but never across epochs. The last
        period ends with the stage, so that shares and caps are exact to the row there.
        """
        if not 0 <= lane < self._lanes or not 0 <= first < self._end:
            raise SpecError(
                f"lane {lane}, row {first} is not in the plan; expected a lane in "
                f"0 .. {self._lanes - 1} and a row in 0 .. {self._end - 1}"
            )
        begin, end = self._period_of(first)
        before_VS, after_VS = self._counts(begin), self._counts(end)
        number = np.array([begin // self._schedule.period * self._lanes + lane], dtype=np.uint64)
        place_R = shuffle(end - begin, derive(self._key, number))
        ends_S = np.cumsum(after_VS[lane] - before_VS[lane])
        source_R = np.searchsorted(ends_S, place_R, side="right")
        nth_R = place_R - np.concatenate(([0], ends_S))[source_R]  # among the rows of its source
        stream_R, index_R = np.full_like(source_R, lane), before_VS[lane, source_R] + nth_R
        shared = np.flatnonzero(~self._own[source_R])
        draws = _draw_numbers(before_VS, after_VS, lane, source_R[shared], nth_R[shared])
        stream_R[shared] = self._lanes - 1 - draws % self._lanes
        index_R[shared] = draws // self._lanes
        epoch_R, row_R = self._lane_order.locate(source_R, stream_R, index_R)
        order_R = np.empty_like(place_R)
        order_R[np.argsort(source_R, kind="stable")] = np.lexsort((epoch_R, source_R))
        chosen = order_R[first - begin :][:count]
        return Rows(source_R[chosen].astype(np.int32), epoch_R[chosen], row_R[chosen])

    def _counts(self, rows: int) -> Counts:
        """Return the counts (V, S) at the boundary of a period.

        The last period ends with the stage.
        """
        return self._schedule.end(rows) if rows == self._end else self._schedule.counts(rows)

    def _period_of(self, row: int) -> tuple[int, int]:
        """Return the first row of the period of row `row` of a lane, and the row after its last."""
        if row >= self._last:
            return self._last, self._end
        begin = row // self._schedule.period * self._schedule.period
        return begin, begin + self._schedule.period


def _draw_numbers(
    before_VS: Counts, after_VS: Counts, lane: int, source_R: Counts, nth_R: Counts
) -> Counts:
    """Return the numbers of a lane's draws (see `lane_order`) among those of all lanes.

    All first draws of the period come first, then all second ones, from the last lane to the first.
    """
    drawn_VR = (after_VS - before_VS)[:, source_R]
    earlier_R = np.minimum(drawn_VR, nth_R).sum(0) + (drawn_VR[lane + 1 :] > nth_R).sum(0)
    number_R: Counts = before_VS[:, source_R].sum(0) + earlier_R
    return number_R


def lanes_of(lanes: int, rank: int, world: int) -> range:
    """Return the numbers of the lanes of a rank. Raises SpecError if it would have none."""
    if not 0 <= rank < world <= lanes:
        raise SpecError(
            f"data.lanes: rank {rank} of {world} has no lane. Got {lanes} lanes. "
            "Fix: use at most as many workers as lanes, or raise data.lanes"
        )
    return range(rank, lanes, world)


def _check(sources: Sequence[SourceRows], mixture: Mixture, batch: int, steps: int) -> None:
    names, expected = [s.name for s in sources], [s.name for s in mixture.leaves]
    unique("sources", names)
    if names != expected:
        raise SpecError(
            f"sources: the plan and the mixture differ. Got {', '.join(names)}; expected "
            f"{', '.join(expected)}. Fix: give one SourceRows per source, in the mixture's order"
        )
    for source in sources:
        if source.rows < 1 or source.group_rows < 1:
            raise DataError(
                f"sources.{source.name}: {source.rows} rows in row groups of {source.group_rows}; "
                "expected at least one row. Fix: import its data again or drop it from the mixture"
            )
    if steps < 1:
        raise SpecError(f"a plan has at least 1 step. Got {steps}. Fix: set a larger budget")
    if batch < 1 or batch % mixture.lanes:
        raise SpecError(
            f"budget.batch: not a multiple of data.lanes. Got batch {batch}, "
            f"{mixture.lanes} lanes; "
            "expected the same number of rows per lane. Fix: change the batch or data.lanes"
        )
