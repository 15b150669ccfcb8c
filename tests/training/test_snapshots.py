"""The best step as the result of a stage, and evaluations in Ray tasks on snapshots."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from rich.console import Console

from bridgework import artifacts
from bridgework.config import config_class
from bridgework.errors import Interrupted, SpecError
from bridgework.evaluation import Ranking, results
from bridgework.evaluation.base import Better, Result, build_result
from bridgework.inference.pipeline import Pipeline
from bridgework.system import System
from bridgework.tracking.tracker import Journal, MemoryTracker
from bridgework.training import loop, snapshots
from bridgework.training.driver import train
from bridgework.training.metrics import progress_bar
from bridgework.training.options import RunOptions
from bridgework.training.snapshots import BestBy, Snapshot
from tests.training.support import (
    HELD_OUT,
    Stop,
    fresh,
    go,
    job,
    judged,
    losses,
    same,
    stop_at,
    train_ranks,
    weights,
)

LOSS = "heldout.loss"
LOWEST = BestBy(LOSS, "lower")
STEPS = 6


def place(home: Path, run: str) -> Path:
    return home / "runs" / run / "align"


def of_steps(home: Path, run: str, key: str = LOSS) -> dict[int, float]:
    """Return step -> figure; equal figures of repeated evaluations occur once."""
    return dict(losses(home, run, key=key))


# --- the best step


@config_class
class Drift:
    """Mean distance of the bridge's weights from their initial values, compared with a target."""

    better: ClassVar[Better] = {"distance": "lower", "closeness": "higher"}
    name: str = "drift"
    dataset: str = "synthetic:shapes"
    target: float = 0.2  # twice the rate of `judged`: a step changes a weight by at most the rate

    def tiny(self) -> "Drift":
        return self

    def run(self, pipeline: Any, home: Path) -> Result:
        before, now = (
            model.bridge.state_dict() for model in (fresh(pipeline.stage), pipeline.model)
        )
        moved = torch.cat([(now[name] - before[name]).abs().flatten() for name in now]).mean()
        distance = abs(float(moved) - self.target)
        return build_result(self, {"distance": distance, "closeness": -distance})


DRIFT = "drift.distance"


@pytest.mark.parametrize(("metric", "choose"), [(DRIFT, min), ("drift.closeness", max)])
def test_best_step_by_a_metric_is_the_result(
    home: Path, run: str, metric: str, choose: Callable[..., int]
) -> None:
    tracker = MemoryTracker()
    system = judged(evals=(Drift(),))
    result = go(system, home, run, evaluate_every=1, keep_best=metric, tracker=tracker)["align"]
    figures = of_steps(home, run, metric)
    best = choose(figures, key=lambda step: figures[step])
    assert list(figures) == [1, 2, 3, 4, 5, 6]
    assert 1 <= best < STEPS
    assert result.metrics["best_step"] == best
    assert result.metrics[metric] == figures[best]
    assert result.metrics["loss"] == dict(losses(home, run))[best - 1]
    assert artifacts.describe(result.artifact).steps == best
    assert len(set(figures.values())) == STEPS
    again = Drift().run(Pipeline.load(result.artifact), home)
    assert again.metrics[metric] == figures[best]
    assert not (place(home, run) / "snapshots").exists()
    ((_, _, _, tags),) = tracker.models.values()
    assert tags["steps"] == str(best)
    digest = artifacts.describe(result.artifact).digest
    (record,) = results.records_of(result.artifact, digest, home)
    assert record.metrics[metric] == figures[best]


def test_of_equal_steps_the_earliest_is_kept(home: Path, run: str) -> None:
    frozen = judged(4, lr=1e-30)  # no float32 weight changes
    result = go(frozen, home, run, evaluate_every=1, keep_best=LOSS)["align"]
    assert len(set(of_steps(home, run).values())) == 1
    assert result.metrics["best_step"] == 1


def test_without_keep_best_the_last_step_is_the_result(home: Path, run: str) -> None:
    result = go(judged(), home, run, evaluate_every=2)["align"]
    assert artifacts.describe(result.artifact).steps == STEPS
    assert result.metrics[LOSS] == of_steps(home, run)[STEPS]
    assert "best_step" not in result.metrics


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_resumed_run_has_the_best_step_of_an_unbroken_run(home: Path, run: str, stop: int) -> None:
    options: dict[str, Any] = {"evaluate_every": 1, "checkpoint_every": 2, "keep_best": DRIFT}
    system = judged(evals=(Drift(),))
    unbroken = go(system, home, f"{run}-unbroken", **options)["align"]
    with pytest.raises(Stop):
        go(system, home, run, report=stop_at(stop), **options)
    resumed = go(system, home, run, **options)["align"]
    assert of_steps(home, run, DRIFT) == of_steps(home, f"{run}-unbroken", DRIFT)
    assert same(weights(home, run), weights(home, f"{run}-unbroken"))
    for key in ("best_step", "loss", DRIFT):
        assert resumed.metrics[key] == unbroken.metrics[key]


def test_evaluation_of_the_step_of_a_stop_is_not_lost(home: Path, run: str) -> None:
    def interrupt(metrics: dict[str, float], done: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        go(judged(), home, run, evaluate_every=1, report=interrupt)
    assert list(of_steps(home, run)) == [1, 2]  # a checkpoint of step 3 is saved first
    go(judged(), home, run, evaluate_every=1)
    assert list(of_steps(home, run)) == [1, 2, 3, 4, 5, 6]


def test_stop_of_the_training_for_an_evaluation_is_recorded(home: Path, run: str) -> None:
    go(judged(), home, run, evaluate_every=2)
    stops = losses(home, run, key="evaluation_stop_s")
    assert [step for step, _ in stops] == [2, 4]
    assert all(seconds > 0 for _, seconds in stops)


# --- refusals


@pytest.mark.parametrize(
    ("metric", "text"),
    [
        ("heldout.los", "is not a metric of the evaluations of stage align; did you mean 'heldout.loss'"),
        ("heldout.loss_shuffled", "is a baseline, of which none is better"),
    ],
)  # fmt: skip
def test_metric_that_cannot_choose_is_refused_before_anything_starts(
    home: Path, run: str, metric: str, text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        go(judged(), home, run, evaluate_every=2, keep_best=metric)
    assert not place(home, run).parent.exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep_best": LOSS}, "keep_best: .* Got evaluate_every=0.* Fix: give --evaluate-every N"),
        ({"keep_best": LOSS, "evaluate_every": 2, "midway": "heldout"}, "Got midway='heldout'"),
        ({"evaluate_in_task": True, "workers": 0}, "evaluate_in_task: .* Got workers=0"),
        ({"evaluate_every": -1}, "evaluate_every: not a number of steps. Got -1"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(SpecError, match=text):
        RunOptions(**options)


def test_stage_without_the_metric_keeps_its_last_step(home: Path, run: str) -> None:
    align, console = judged(2).stages[0], Console(record=True, width=300)
    other = replace(align, name="other", evals=(replace(HELD_OUT, name="other"),))
    system = replace(judged(2), stages=(align, other))
    options = RunOptions(workers=0, evaluate_every=1, keep_best=LOSS)
    found = train(system, home=home, run=run, options=options, console=console)
    assert "best_step" in found["align"].metrics
    assert artifacts.describe(found["other"].artifact).steps == 2
    assert "other: no evaluation has heldout.loss, so its last step is kept" in (
        console.export_text()
    )


# --- snapshots on disk


def written(folder: Path, step: int, loss: float | None, attempt: str = "a") -> Snapshot:
    """Write a snapshot of one tensor, evaluated unless `loss` is None."""
    snapshot = snapshots.write(
        folder,
        step,
        attempt,
        {"x": torch.full((2,), float(step))},
        {"loss": 1.0},
        system=judged(),
        stage="align",
        parent=None,
        datasets=(),
    )
    if loss is not None:
        snapshot.finish({LOSS: loss})
    return snapshot


def kept(folder: Path) -> list[int]:
    return [s.step for s in snapshots.listed(folder) if s.has_weights()]


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (0, [4, 5]),  # a resumed run takes all steps again
        (3, [2, 4, 5]),  # if it resumes at 3, the best one is that of step 2
        (4, [4, 5]),
    ],
)
def test_best_weights_up_to_the_newest_checkpoint_are_kept(
    tmp_path: Path, saved: int, expected: list[int]
) -> None:
    for step, loss in enumerate((3.0, 2.0, 2.5, 1.0), 1):
        written(tmp_path, step, loss)
    written(tmp_path, 5, None)  # not evaluated yet
    snapshots.prune(tmp_path, LOWEST, saved=saved, last=STEPS)
    assert kept(tmp_path) == expected
    assert [s.step for s in snapshots.listed(tmp_path)][-1] == 5


def test_only_the_last_weights_are_kept_without_a_metric(tmp_path: Path) -> None:
    for step in (2, 4, STEPS):
        written(tmp_path, step, 1.0)
    snapshots.prune(tmp_path, None, saved=4, last=STEPS)
    assert kept(tmp_path) == [STEPS]
    # the evaluation of step 4 is not repeated if a run resumes there
    assert [s.step for s in snapshots.listed(tmp_path)] == [4, STEPS]


def test_snapshots_of_steps_that_are_taken_again_are_removed(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        written(tmp_path, step, 1.0)
    (written(tmp_path, 3, None).artifact / "artifact.json").unlink()  # as if the writer had died
    snapshots.remove_stale(tmp_path, 4)
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == [
        "00000002-a",
        "00000004-a",
    ]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_figure_that_is_not_finite_never_wins(tmp_path: Path, loss: float | None) -> None:
    written(tmp_path, 2, loss)
    written(tmp_path, STEPS, 5.0)
    assert snapshots.result(tmp_path, LOWEST, STEPS).step == STEPS


def test_publishing_after_a_crash_finishes_the_stage(tmp_path: Path) -> None:
    snapshot = written(tmp_path, 4, 1.0)
    (tmp_path / "evals").mkdir()
    (tmp_path / "metrics.json").write_text("{}")  # as if the first attempt had ended here
    metrics = snapshots.publish(snapshot, tmp_path, LOWEST)
    assert metrics == {"loss": 1.0, LOSS: 1.0, "best_step": 4.0}
    assert artifacts.describe(tmp_path / "artifact").steps == 4
    assert not (tmp_path / "snapshots").exists()


def test_progress_follows_the_workers_after_the_driver_wrote_figures(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    workers, driver = Journal(tmp_path / "journal"), Journal(tmp_path / "journal")
    with progress_bar(tmp_path, "align", 10, console):
        workers.append({"loss": 2.0}, 4)
        workers.flush()
        driver.append({LOSS: 1.0}, 4)
        driver.flush()
        time.sleep(1.2)  # two polls
        workers.append({"loss": 1.0}, 9)
        workers.flush()
    said = console.export_text()
    assert "align: 5 of 10 steps, loss 2.000" in said
    assert "align: 10 of 10 steps, loss 1.000" in said


# --- in a task


@config_class
class Dies:
    """An evaluation whose process is killed in the first attempt."""

    better: ClassVar[Better] = {"attempts": "lower"}
    name: str = "dies"
    dataset: str = "synthetic:shapes"
    flag: str = ""  # path of a file

    def tiny(self) -> "Dies":
        return self

    def run(self, pipeline: Any, home: Path) -> Result:
        flag = Path(self.flag)
        attempts = int(flag.read_text()) if flag.exists() else 0
        flag.write_text(str(attempts + 1))
        if not attempts:
            os._exit(1)
        return build_result(self, {"attempts": 1.0 + attempts})


def in_task(system: System, home: Path, folder: Path) -> loop.TrainJob:
    """Return the job of a stage that leaves its evaluations to tasks."""
    given = job(system, home, folder, every=2)
    return replace(given, evaluate_every=2, evaluate_in_task=True, keep_best=LOWEST)


def evaluated(given: loop.TrainJob) -> dict[str, float]:
    """Evaluate the snapshots as the driver does, and publish the result; returns its metrics."""
    from bridgework.training.ray_evaluation import SnapshotEvaluator

    with closing(SnapshotEvaluator(given, RunOptions(workers=1, threads=1))) as evaluator:
        evaluator.finish()
    return loop.publish_best(given)


def figures_in(folder: Path, key: str = LOSS) -> list[tuple[int, float]]:
    parts = Journal(folder / "journal").points()
    return [(p.step, p.value) for _, points in parts for p in points if p.key == key]


@pytest.mark.usefixtures("ray_session", "process_group")
def test_evaluations_in_tasks_match_those_of_the_loop(
    home: Path, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of them raises an error in its task, and the process of another is killed."""
    fails = Ranking(dataset="synthetic:shapes", rows=5_000, candidates=5_000)
    evals = (HELD_OUT, fails, Dies(flag=str(tmp_path / "flag")))
    inline = go(judged(), home, run, evaluate_every=2, keep_best=LOSS)["align"]
    given = in_task(judged(evals=evals), home, tmp_path)
    train_ranks(given)
    assert not (given.folder / "artifact").exists()
    metrics = evaluated(given)
    found = figures_in(given.folder)
    assert sorted(step for step, _ in found) == [2, 4, 6]  # each once
    assert dict(found) == pytest.approx(of_steps(home, run), rel=1e-5)
    assert metrics["best_step"] == inline.metrics["best_step"]
    assert same(artifacts.weights(given.folder / "artifact"), weights(home, run))
    assert figures_in(given.folder, f"{LOSS}.low")
    assert max(value for _, value in figures_in(given.folder, "dies.attempts")) >= 2
    assert "the evaluation ranking of step 6 failed, and the run continues without it" in (
        caplog.text
    )


@pytest.mark.usefixtures("ray_session", "process_group")
def test_evaluations_that_a_driver_left_are_run_by_the_next(home: Path, tmp_path: Path) -> None:
    from bridgework.training.ray_evaluation import SnapshotEvaluator

    given = in_task(judged(), home, tmp_path)
    train_ranks(given)
    SnapshotEvaluator(given, RunOptions(workers=1, threads=1)).close()
    assert not (given.folder / "artifact").exists()
    metrics = evaluated(given)
    found = figures_in(given.folder)
    assert sorted(step for step, _ in found) == [2, 4, 6]
    assert metrics["best_step"] == min(found, key=lambda point: point[1])[0]


@pytest.mark.usefixtures("process_group")
def test_loop_evaluates_if_too_many_snapshots_wait(
    home: Path, run: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    go(judged(), home, run, evaluate_every=1)
    given = replace(in_task(judged(), home, tmp_path), evaluate_every=1)
    train_ranks(given)
    assert dict(figures_in(given.folder)) == {5: of_steps(home, run)[5]}
    assert "4 snapshots wait for their evaluation in a task" in caplog.text
    assert kept(given.folder) == [1, 2, 3, 4, 5, STEPS]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_killed_run_with_tasks_ends_as_an_unbroken_one(home: Path, run: str) -> None:
    options: dict[str, Any] = {"evaluate_every": 2, "keep_best": LOSS, "threads": 1}
    unbroken = go(judged(), home, f"{run}-unbroken", **options)["align"]
    with pytest.raises(Stop):  # in one process, as if the workers had died
        go(judged(), home, run, checkpoint_every=2, report=stop_at(4), **options)
    tracker = MemoryTracker()
    tasks = {"workers": 2, "evaluate_in_task": True, "checkpoint_every": 2, **options}
    resumed = go(judged(), home, run, tracker=tracker, **tasks)["align"]
    assert resumed.metrics["best_step"] == unbroken.metrics["best_step"]
    assert of_steps(home, run) == pytest.approx(of_steps(home, f"{run}-unbroken"), rel=1e-3)
    stage = next(r for r in tracker.runs.values() if r.name == "align")
    points = [p.step for p in stage.points if p.key == LOSS]
    assert sorted(points) == [2, 4, 6]  # none is lost or doubled
    assert go(judged(), home, run, **tasks)["align"].metrics == resumed.metrics
