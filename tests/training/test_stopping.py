"""A run stopped by a signal saves a checkpoint, is recorded as killed, and resumes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridgework.errors import Interrupted
from bridgework.tracking.tracker import MemoryTracker
from bridgework.training import checkpoint
from bridgework.training.stopping import FILE, Stop
from tests.training.support import go, llava, losses, same, weights


def signal_at(step: int, *numbers: int) -> Callable[[dict[str, float], int], None]:
    """Return a report, for evaluate_every=1, that sends this process signals after `step` steps."""

    def report(metrics: dict[str, float], done: int) -> None:
        if done == step:
            for number in numbers:
                os.kill(os.getpid(), number)

    return report


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_resumes(home: Path, run: str, number: int) -> None:
    system, tracker = llava(7), MemoryTracker()
    go(system, home, f"{run}-whole")
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(
        Interrupted,
        match=r"align: stopped by SIG\w+; a checkpoint of step 4 is saved. The same comm",
    ):
        go(
            system,
            home,
            run,
            tracker=tracker,
            checkpoint_every=6,
            evaluate_every=1,
            report=signal_at(3, number),
        )
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == before
    assert [found.step for found in checkpoint.checkpoints(home / "runs" / run / "align")] == [4]
    assert {each.status for each in tracker.runs.values()} == {"KILLED"}
    go(system, home, run, tracker=tracker, checkpoint_every=6)
    assert same(weights(home, run), weights(home, f"{run}-whole"))
    assert [step for step, _ in losses(home, run)] == list(range(7))
    assert {each.status for each in tracker.runs.values()} == {"FINISHED"}


def test_a_second_signal_stops_at_once(home: Path, run: str) -> None:
    tracker = MemoryTracker()
    with pytest.raises(KeyboardInterrupt):
        go(
            llava(7),
            home,
            run,
            tracker=tracker,
            evaluate_every=1,
            report=signal_at(3, signal.SIGINT, signal.SIGINT),
        )
    assert checkpoint.checkpoints(home / "runs" / run / "align") == []
    assert {each.status for each in tracker.runs.values()} == {"KILLED"}


def test_a_request_to_stop_is_seen_by_another_process(tmp_path: Path) -> None:
    asking, looking = Stop(tmp_path), Stop(tmp_path)
    asking.ask("SIGTERM")
    assert looking.asked == "SIGTERM"
    asking.clear()
    assert Stop(tmp_path).asked == ""


@pytest.mark.slow
def test_stopped_driver_lets_workers_save_a_checkpoint(home: Path, run: str) -> None:
    """With Ray, only the driver receives the signal."""
    words = ["train", "llava", "--tiny", "--stage", "align", "--workers", "2", "--run", run]
    words += ["--set", "stages.align.budget.steps=100000", "--set", "stages.*.evals=()"]
    command = [sys.executable, "-m", "bridgework.cli", *words]
    stage = home / "runs" / run / "align"
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "300"}
    ) as driver:
        deadline = time.monotonic() + 300
        while not losses(home, run) and time.monotonic() < deadline:
            time.sleep(0.2)
        driver.send_signal(signal.SIGTERM)
        _, said = driver.communicate(timeout=120)
    (kept,) = checkpoint.checkpoints(stage)
    assert driver.returncode == 130
    assert f"a checkpoint of step {kept.step} is saved. The same command resumes" in said
    assert "Traceback" not in said
    assert not (stage / FILE).exists()
