"""Evaluations in the tracker: a run per evaluation of some weights, nested in the run that made them.

The run has the figures with their intervals as metrics, which are also metrics of the logged model
on the dataset; the evaluation's fields as parameters; and the rows as a Parquet file.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bridgework import artifacts
from bridgework.config import flat, from_dict
from bridgework.errors import TrackingError
from bridgework.evaluation import results
from bridgework.evaluation.base import Figure, Result
from bridgework.evaluation.results import EvaluationRecord
from bridgework.inference.pipeline import Pipeline
from bridgework.tracking import environment
from bridgework.tracking.openlineage_events import Artifact, Event, emit
from bridgework.tracking.tracker import Point, Tracker

KIND = "evaluation"  # tag `kind` of the runs


def evaluate(
    artifact: str,
    evaluations: Sequence[Any],
    home: Path,
    *,
    tracker: Tracker | None = None,
    pipeline: Pipeline | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> list[tuple[Result, EvaluationRecord]]:
    """Evaluate an artifact, keep the records under the home and log them to the tracker.

    A tracker that does not answer is reported, and the records are kept all the same.
    """
    pipeline = pipeline or Pipeline.load(artifact)
    weights = artifacts.describe(artifact).digest
    done = []
    for spec in evaluations:
        say(f"{spec.name}: evaluating on {spec.dataset}")
        result, record = results.evaluate(spec, pipeline, home, weights)
        files = results.save(result, record, results.folder_of(weights, home))
        _emit(home, artifact, record, files[0])
        for image in files[1:]:
            say(f"figure    {image}")
        if tracker is not None:
            try:
                log(tracker, record, files, artifact)
            except TrackingError as error:
                say(f"{error}; the evaluation is only in {files[0]}")
                tracker = None
        done.append((result, record))
    return done


def _emit(home: Path, artifact: str, record: EvaluationRecord, file: Path) -> None:
    read = [Artifact(d.path, d.digest, d.rows) for d in record.datasets]
    event = Event(
        "EVALUATION",
        f"evaluation/{record.name}",
        "COMPLETE",
        run=f"{record.weights}/{record.evaluation}/{record.created}",
        inputs=[*read, Artifact(artifact, record.weights)],
        outputs=[Artifact(str(file), record.evaluation)],
    )
    emit(home, event)


def log(
    tracker: Tracker, record: EvaluationRecord, files: Iterable[Path], artifact: str = ""
) -> str:
    """Log an evaluation; returns the id of its run. The same evaluation again is the same run."""
    made = tracker.produced(record.weights, artifact)
    tags = environment.tags() | {
        "kind": KIND,
        "digest": record.weights,
        "evaluation": record.evaluation,
        "run_key": f"{KIND}/{record.weights}/{record.evaluation}",
        "machine": record.machine,
        "bridgework": record.version,
    }
    run = tracker.start(f"eval {record.name}", parent=made.run_id if made else None, tags=tags)
    tracker.params(run, flat(from_dict(record.spec)), resumed=True)
    tracker.inputs(
        run, record.datasets, models=[made.model_id] if made else [], context="evaluation"
    )
    tracker.points(
        run,
        points(record.figures, at=int(record.created * 1000)),
        model_id=made.model_id if made else None,
        dataset=record.datasets[0],
    )
    for file in files:
        tracker.file(run, file, "eval")
    tracker.finish(run)
    return run


def points(figures: Iterable[Figure], step: int = 0, at: int | None = None) -> list[Point]:
    """Return the points of figures: their values, intervals and numbers of rows."""
    now = int(time.time() * 1000) if at is None else at
    return [Point(key, value, step, now) for key, value in results.with_intervals(figures).items()]
