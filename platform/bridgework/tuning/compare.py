"""Intervals of a sweep's scores, and the paired comparison of the winner with the runner-up.

With repeats, an interval is over the seeds of a trial. With one seed it is over the rows of the
evaluation: it then shows how well the rows decide, and nothing about other seeds.
"""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path

import numpy as np

from bridgework.errors import DataError
from bridgework.evaluation import results
from bridgework.evaluation.statistics import Difference, Interval, RowValues, difference, interval
from bridgework.tuning.space import Metric
from bridgework.tuning.study import TrialRow


def values_of(row: TrialRow, metric: Metric, folder: Path, stage: str) -> RowValues | None:
    """Return what a trial's score is the mean of: its seeds, or the rows of its evaluation.

    folder: of the sweep. Returns None for a cost, and for an evaluation that keeps no rows.
    """
    if not row.finished or metric.cost:
        return None
    if len(row.repeats) > 1:
        names = tuple(f"seed {number}" for number in range(len(row.repeats)))
        seeds = np.array([float(repeat[metric.name]) for repeat in row.repeats])
        return RowValues(names, names, seeds, np.ones_like(seeds))
    for file in sorted((folder / row.trial / stage / results.FOLDER).glob("*.parquet")):
        try:
            rows = results.read(file).rows
        except DataError:  # of another version
            continue
        if metric.name in rows:
            return rows[metric.name]
    return None


def score_interval(row: TrialRow, metric: Metric, folder: Path, stage: str) -> Interval | None:
    """Return a trial's score with its 95 % interval; None if there is none."""
    values = values_of(row, metric, folder, stage)
    found = None if values is None else interval(values)
    return found if found is not None and isfinite(found.low) else None


def score_intervals(
    row: TrialRow, metrics: Sequence[Metric], folder: Path, stage: str
) -> tuple[Interval | None, ...]:
    """Return the 95 % interval of each of a trial's scores; None where there is none."""
    return tuple(score_interval(row, metric, folder, stage) for metric in metrics)


def score_cells(
    row: TrialRow, intervals: Sequence[Interval | None], *, missing: str = "-"
) -> list[str]:
    """Return a cell for each objective, e.g. `0.41 [0.3119, 0.5081]`, for a table of trials.

    A stopped trial has its last score of the first objective, without an interval.
    """
    scores = row.scores or ((row.score,) if row.score is not None else ())
    cells = [
        f"{score:.4g}" + (f" [{found.low:.4g}, {found.high:.4g}]" if found else "")
        for score, found in zip(scores, intervals, strict=False)
    ]
    return [*cells, *[missing] * (len(intervals) - len(cells))]


def origin_cell(row: TrialRow) -> str:
    """Return the checkpoint that a trial of a population started from, e.g. `003@16, perturbed`."""
    if row.origin is None:
        return ""
    values = ", perturbed" if row.origin.copied else ""
    return f"{row.origin.trial}@{row.origin.step}{values}"


def verdict(rows: Sequence[TrialRow], metric: Metric, folder: Path, stage: str) -> str:
    """Compare the winner with the runner-up by the first metric, in one sentence.

    rows: best first.
    """
    finished = [row for row in rows if row.finished]
    if not finished:
        return ""
    if len(finished) == 1:
        return f"{finished[0].trial} is the only finished trial, so nothing was compared"
    first, second = finished[:2]
    names = f"{first.trial} against the runner-up {second.trial}"
    mine, other = (values_of(row, metric, folder, stage) for row in (first, second))
    gap = first.scores[0] - second.scores[0]
    if mine is None or other is None:
        return f"{names}: {metric.name} differs by {gap:+.4g}, without an interval"
    found = difference(other, mine)
    seeds = len(first.repeats)
    over = f"over {seeds} seeds" if seeds > 1 else f"over {found.n:,} rows of one seed"
    shown = f"{metric.name} {found.value:+.4g} [{found.low:.4g}, {found.high:.4g}], paired {over}"
    if decided(found, metric):
        return f"{names}: better beyond the interval, {shown}"
    needed = (
        f"; {found.rows_needed:,} {'seeds' if seeds > 1 else 'rows'} would decide"
        if found.rows_needed
        else ""
    )
    return f"{names}: not decided, {shown}{needed}"


def decided(found: Difference, metric: Metric) -> bool:
    """Return True if a difference is better beyond its interval."""
    if not isfinite(found.low):
        return False
    return found.low > 0 if metric.mode == "max" else found.high < 0
