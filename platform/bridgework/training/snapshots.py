"""Snapshots: weights of a stage before its end, to evaluate in a task or to keep the best step.

`<stage>/snapshots/00000040-<attempt>/` has the form of a stage's folder: the artifact, `evals/`,
metrics.json of the step before, and figures.json, which is written last: the snapshot is evaluated,
and its figures are in the journal. At the end of the stage, the best snapshot or the last one
becomes the stage's result, and the others are removed.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bridgework import artifacts, storage
from bridgework.errors import RunError, SpecError, suggest
from bridgework.evaluation import results
from bridgework.evaluation.results import EvaluationRecord
from bridgework.mixture import DatasetInput
from bridgework.system import Direction, Stage, System
from bridgework.training import run_dir

METRICS = "metrics.json"
MOST_WAITING = 4  # for a task; beyond, the loop evaluates, because they would fill the disk
BEST_STEP = "best_step"  # metric of a stage whose result is its best snapshot
_NAME = re.compile(r"(\d{8,})-\w+")


@dataclass(frozen=True)
class Snapshot:
    """The weights after `step` steps, in `folder`."""

    folder: Path
    step: int

    @property
    def artifact(self) -> Path:
        return self.folder / "artifact"

    def has_weights(self) -> bool:
        """Return True if the weights are complete and were not removed."""
        return (self.artifact / artifacts.FILE).is_file()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of the last step."""
        values: dict[str, float] = json.loads((self.folder / METRICS).read_text())
        return values

    def figures(self) -> dict[str, float] | None:
        """Return the figures of its evaluations; None before they have ended."""
        try:
            values: dict[str, float] = json.loads((self.folder / run_dir.FIGURES).read_text())
        except FileNotFoundError:
            return None
        return values

    def records(self) -> list[EvaluationRecord]:
        """Return the stored evaluations of these weights."""
        weights = artifacts.describe(self.artifact).digest
        files = sorted((self.folder / results.FOLDER).glob("*.parquet"))
        return [record for file in files if (record := results.read(file)).weights == weights]

    def finish(self, figures: Mapping[str, float]) -> None:
        """Record that the evaluations have ended."""
        storage.write_atomic(self.folder / run_dir.FIGURES, json.dumps(dict(figures), indent=1))


@dataclass(frozen=True)
class BestBy:
    """The metric that chooses a stage's result among its snapshots."""

    metric: str
    better: Direction

    def score(self, figures: Mapping[str, float]) -> float:
        """Return a score of which higher is better; minus infinity without a finite value."""
        value = figures.get(self.metric, math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self.better == "higher" else -value

    def choose(self, snapshots: Sequence[Snapshot]) -> Snapshot | None:
        """Return the best snapshot that has its weights, and of equal ones the earliest."""
        scored = [
            (self.score(snapshot.figures() or {}), snapshot)
            for snapshot in snapshots
            if snapshot.has_weights()
        ]
        best, chosen = max(scored, key=lambda pair: pair[0], default=(-math.inf, None))
        return chosen if best > -math.inf else None


def best_by(stage: Stage, metric: str) -> BestBy | None:
    """Return the rule of a metric; None if it is not a metric of the stage's evaluations."""
    way = _directions([stage]).get(metric)
    return BestBy(metric, way) if way is not None else None


def check_metric(stages: Sequence[Stage], metric: str) -> None:
    """Raise SpecError if a metric cannot choose the best snapshot of any of the stages."""
    ways = _directions(stages)
    decisive = [name for name, way in ways.items() if way is not None]
    if metric in decisive:
        return
    where = f"keep_best: {metric!r}"
    if metric in ways:
        raise SpecError(
            f"{where} is a baseline, of which none is better{suggest(metric, decisive)}"
        )
    raise SpecError(
        f"{where} is not a metric of the evaluations of stage {', '.join(s.name for s in stages)}"
        + (
            suggest(metric, decisive)
            if decisive
            else ". Fix: add evaluations to the stage's evals in the recipe"
        )
    )


def _directions(stages: Sequence[Stage]) -> dict[str, Direction | None]:
    return {
        f"{spec.name}.{key}": way
        for stage in stages
        for spec in stage.evals
        for key, way in spec.better.items()
    }


def listed(stage_folder: Path) -> list[Snapshot]:
    """List the snapshots with complete weights or figures, earliest step first."""
    return [s for s in _named(stage_folder) if s.has_weights() or s.figures() is not None]


def waiting(stage_folder: Path) -> int:
    """Return the number of snapshots that are not evaluated."""
    return sum(s.has_weights() and s.figures() is None for s in _named(stage_folder))


def _named(stage_folder: Path) -> list[Snapshot]:
    root = stage_folder / run_dir.SNAPSHOTS
    named = [(name, match) for name in storage.names(root) if (match := _NAME.fullmatch(name))]
    return sorted((Snapshot(root / n, int(m[1])) for n, m in named), key=lambda s: s.step)


def write(
    stage_folder: Path,
    step: int,
    attempt: str,
    state: Mapping[str, Tensor],
    metrics: Mapping[str, float],
    *,
    system: System,
    stage: str,
    parent: str | None,
    datasets: Sequence[DatasetInput],
) -> Snapshot:
    """Write the snapshot of `step`; its weights appear complete or not at all.

    Raises WeightsError if they are not finite, and ResourceError if the disk is full.
    """
    folder = stage_folder / run_dir.SNAPSHOTS / f"{step:08d}-{attempt}"
    snapshot = Snapshot(folder, step)
    try:
        with storage.disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_atomic(folder / METRICS, json.dumps(dict(metrics), indent=1))
            artifacts.save(
                snapshot.artifact,
                state,
                system=system,
                stage=stage,
                parent=parent,
                datasets=datasets,
                steps=step,
            )
            storage.sync_tree(snapshot.artifact)
            storage.sync_folder(folder)
    except BaseException:
        _remove(snapshot)  # partial files would keep a disk full
        raise
    return snapshot


def remove_stale(stage_folder: Path, start: int) -> None:
    """Remove partial snapshots and those after `start`, because their steps are taken again.

    For rank 0, before the first step.
    """
    complete = listed(stage_folder)
    for snapshot in _named(stage_folder):
        if snapshot.step > start or snapshot not in complete:
            _remove(snapshot)


def prune(stage_folder: Path, best: BestBy | None, *, saved: int, last: int) -> None:
    """Remove the weights of evaluated snapshots that cannot become the result of the stage.

    A run that resumes takes the steps after `saved`, its newest checkpoint, again. The best one up
    to there is therefore kept in addition to the best one of all. last: the stage's last step,
    which is the result without `best`, or if no snapshot has the metric. The figures are kept as
    long as a run may resume at their step, because an evaluation is not repeated then.
    """
    evaluated = [s for s in listed(stage_folder) if s.figures() is not None]
    winner = best.choose(evaluated) if best else None
    kept = [winner] if winner else [s for s in evaluated if s.step == last]
    if best and (safe := best.choose([s for s in evaluated if s.step <= saved])):
        kept.append(safe)
    for snapshot in evaluated:
        if snapshot in kept:
            continue
        if snapshot.step < saved:
            _remove(snapshot)
        elif snapshot.has_weights():
            _remove_weights(snapshot)


def result(stage_folder: Path, best: BestBy | None, last: int) -> Snapshot:
    """Return the snapshot that becomes the stage's result.

    Raises RunError if there is none with its weights.
    """
    snapshots = listed(stage_folder)
    if best is not None and (chosen := best.choose(snapshots)) is not None:
        return chosen
    finals = [s for s in snapshots if s.step == last and s.has_weights()]
    if not finals:
        raise RunError(
            f"{stage_folder}: the weights of step {last} are missing. Fix: run it again, which "
            "resumes at the newest checkpoint"
        )
    return finals[-1]


def publish(snapshot: Snapshot, stage_folder: Path, best: BestBy | None) -> dict[str, float]:
    """Make a snapshot the result of its stage and remove the others; returns the metrics.

    The artifact appears last: its presence means that the stage is finished. Before that, a crash
    leaves the snapshot, and the same call finishes.
    """
    metrics = snapshot.metrics() | (snapshot.figures() or {})
    if best is not None:
        metrics[BEST_STEP] = float(snapshot.step)
    evals = stage_folder / results.FOLDER
    storage.remove(evals)
    for name in storage.names(snapshot.folder / results.FOLDER):
        evals.mkdir(exist_ok=True)
        file = snapshot.folder / results.FOLDER / name
        storage.write_atomic(evals / name, file.read_bytes())
    storage.write_atomic(stage_folder / METRICS, json.dumps(metrics, indent=1))
    artifacts.move(snapshot.artifact, stage_folder / "artifact")
    remove_all(stage_folder)
    return metrics


def remove_all(stage_folder: Path) -> None:
    """Remove all snapshots of a stage."""
    storage.remove(stage_folder / run_dir.SNAPSHOTS)


def _remove(snapshot: Snapshot) -> None:
    _remove_weights(snapshot)
    storage.remove(snapshot.folder)


def _remove_weights(snapshot: Snapshot) -> None:
    (snapshot.artifact / artifacts.FILE).unlink(missing_ok=True)  # a crash leaves no partial one
    storage.remove(snapshot.artifact)
