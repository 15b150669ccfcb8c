"""A sweep that is killed and run again is the unbroken sweep; its winner's command repeats it."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import tune

from bridgework import artifacts
from bridgework.tracking.tracker import Journal, MemoryTracker
from bridgework.tuning import report, search
from bridgework.tuning.space import Metric, SweepBudget
from bridgework.tuning.space import load as load_space
from bridgework.tuning.study import FILE

ROOT = Path(__file__).parents[2]
SWEEP = ["sweep", "tiny_bridge", "--trials", "6", "--run", "s"]


def command(home: Path, *words: str) -> "subprocess.Popen[str]":
    environment = {
        **os.environ,
        "BRIDGEWORK_HOME": str(home),
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "bridgework.cli", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def complete(home: Path, *words: str) -> str:
    process = command(home, *words)
    output, _ = process.communicate(timeout=420)
    assert process.returncode == 0, output[-3000:]
    return output


def reports(home: Path) -> int:
    """Return the values that the study holds so far."""
    if not (home / "runs/s" / FILE).is_file():
        return 0
    try:
        study = optuna.load_study(study_name="s", storage=f"sqlite:///{home}/runs/s/{FILE}")
        trials = study.get_trials(deepcopy=False)
    except Exception:  # it is just being created
        return 0
    return sum(len(trial.intermediate_values) + trial.state.is_finished() for trial in trials)


def kill_when(home: Path, condition: Callable[[], bool], words: Sequence[str] = SWEEP) -> None:
    """Start the sweep and kill its process, as the machine would, once the condition holds."""
    process = command(home, *words)
    while not condition() and process.poll() is None:
        time.sleep(0.2)
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.communicate()


def results(home: Path) -> list[Any]:
    rows = sorted(report.load(home, "s").rows, key=lambda row: row.trial)
    return [(r.trial, dict(r.changes), r.status, r.score, dict(r.curve), r.repeats) for r in rows]


def finished(home: Path, stage: str = "align") -> dict[str, int]:
    """Return when the artifacts of the finished trials were written."""
    files = (home / "runs/s").glob(f"0*/{stage}/artifact/artifact.json")
    return {str(file): file.stat().st_mtime_ns for file in files}


def losses(folder: Path) -> dict[int, float]:
    points = [p for _, points in Journal(folder / "journal").points() for p in points]
    return {p.step: p.value for p in points if p.key == "loss"}


@pytest.mark.slow
def test_a_sweep_killed_three_times_is_the_unbroken_sweep(tmp_path: Path) -> None:
    complete(tmp_path / "unbroken", *SWEEP)
    home, kept = tmp_path / "killed", dict[str, int]()
    for count in (2, 7, 13):
        kill_when(home, lambda count=count: reports(home) >= count)
        now = finished(home)
        assert kept.items() <= now.items()
        kept = now
    output = complete(home, *SWEEP)
    assert kept.items() <= finished(home).items()
    unbroken = [tuple(row[:5]) for row in results(tmp_path / "unbroken")]
    assert [tuple(row[:5]) for row in results(home)] == unbroken
    assert not list((home / "runs/s").glob("0*/*/checkpoints"))

    # the winner's command trains the same weights
    again = next(line for line in output.splitlines() if line.startswith("again"))
    words = shlex.split(again.removeprefix("again"))
    complete(home, *words[1:], "--run", "again")
    best = report.load(home, "s").rows[0].trial
    assert losses(home / "runs/again/align") == losses(home / "runs/s" / best / "align")
    digests = [
        artifacts.describe(home / "runs" / run / "align/artifact").digest
        for run in ("again", f"s/{best}")
    ]
    assert digests[0] == digests[1]
    shutil.rmtree(home)


WORKERS = replace(
    load_space("tests.tuning.tiny"),
    stages=("align",),
    fixed={"stages.align.budget.steps": 8},
    space={"stages.align.optim.peak_lr": tune.loguniform(1e-3, 1e-2)},
    metrics=(Metric(name="heldout.loss", mode="min"), Metric(name="cost.tokens", mode="min")),
    budget=SweepBudget(trials=2, concurrent=1, workers=2, gpus=0, judgments=2),
)


@pytest.mark.slow
def test_trials_through_ray_train_match_trials_in_process(home: Path, ray_session: None) -> None:
    tracker = MemoryTracker()
    spread = search.sweep(WORKERS, home=home, run="workers", tracker=tracker)
    alone = search.sweep(
        replace(WORKERS, budget=replace(WORKERS.budget, workers=0, cpus=0.5)),
        home=home,
        run="alone",
    )
    for one, other in zip(spread.rows, alone.rows, strict=True):
        assert (one.trial, one.changes, one.status) == (other.trial, other.changes, "finished")
        assert one.scores == pytest.approx(other.scores, rel=1e-4)
        assert list(one.curve) == list(other.curve)
    assert {run.status for run in tracker.runs.values()} == {"FINISHED"}
    assert set(spread.front) <= {row.trial for row in spread.rows}


REPEATS = replace(
    load_space("tests.tuning.tiny"),
    fixed={"stages.align.budget.steps": 3, "stages.instruct.budget.steps": 4},
    space={"stages.instruct.optim.peak_lr": tune.choice([1e-3, 1e-2, 1e30])},
    budget=SweepBudget(trials=8, concurrent=2, cpus=0.5, repeats=2, judgments=2, stopper="none"),
)


def test_repeats_share_stages_and_failures_are_said(
    home: Path, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = MemoryTracker()
    outcome = search.sweep(REPEATS, home=home, run="repeats", tracker=tracker)
    folder = home / "runs/repeats"
    assert [row.status for row in outcome.rows] == ["finished", "finished", "failed"]
    for row in outcome.rows[:2]:
        values = [repeat["heldout.loss"] for repeat in row.repeats]
        assert len(set(values)) == 2
        assert row.score == pytest.approx(sum(values) / 2)
    assert "paired over 2 seeds" in outcome.verdict
    # one shared stage for each seed: the first recipe is the same in all trials
    assert len([p for p in (folder / "shared").iterdir() if p.is_dir()]) == 2
    (reason,) = search.failures(outcome.rows)
    assert "the loss is not finite" in reason and "\n" not in reason
    said = capsys.readouterr().err
    assert "every configuration of the space was tried: 3 instead of 8 trials" in said
    # a losing trial is in the lineage as well: its datasets, commit and weights
    names = {run.name: (run_id, run) for run_id, run in tracker.runs.items()}
    for row in outcome.rows:
        run_id, run = names[f"repeats/{row.trial}"]
        assert run.inputs and run.tags["git_commit"]
        assert run.status == ("FINISHED" if row.finished else "FAILED")
        stages = [i for i, r in tracker.runs.items() if r.parent == run_id]
        models = [m for m in tracker.models.values() if m[0] in stages]
        assert len(models) == (2 if row.finished else 0)


def test_the_report_is_one_page_without_a_network(home: Path, ray_session: None) -> None:
    outcome = search.sweep(REPEATS, home=home, run="repeats")
    assert outcome.report is not None
    text = outcome.report.read_text()
    assert "<script src=" not in text and "cdn.plot.ly" not in text.partition("</head>")[0]
    assert len(text) > 1_000_000  # plotly's script is in it
    for row in outcome.rows:
        assert row.trial in text
    for part in (outcome.command[:40], "Not shown by this sweep", "1 failed trials", "2 seeds"):
        assert part in text
    pictures = {file.name for file in outcome.report.parent.glob("*.png")}
    assert {"scores.png", "curves.png", "slices.png"} <= pictures
