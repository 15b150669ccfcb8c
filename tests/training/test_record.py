"""Run tracking, and runs that continue after the tracker fails."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgework import artifacts
from bridgework.errors import TrackingError
from bridgework.tracking.tracker import MemoryRun, MemoryTracker
from tests.training.support import Stop, go, llava, stop_at

CALLS = ("start", "params", "inputs", "points", "file", "output", "finish")
STEPS = 3


class Silent(MemoryTracker):
    """A tracker that fails for calls of one name while it is down, from the `after`th call on."""

    def __init__(self, call: str, after: int = 0) -> None:
        super().__init__()
        self.down, self._left, real = True, after, getattr(self, call)

        def answer(*args: Any, **words: Any) -> Any:
            self._left -= 1
            if self.down and self._left < 0:
                raise TrackingError(f"the tracker does not answer to {call}")
            return real(*args, **words)

        setattr(self, call, answer)


def by_name(tracker: MemoryTracker) -> dict[str, MemoryRun]:
    """Return the runs of the system and of its stages; each evaluation is a run below its stage."""
    runs = [run for run in tracker.runs.values() if run.tags.get("kind") != "evaluation"]
    assert len({run.name for run in runs}) == len(runs)
    return {run.name: run for run in runs}


def assert_all_recorded(tracker: MemoryTracker, run: str) -> None:
    runs = by_name(tracker)
    assert {name: r.status for name, r in runs.items()} == dict.fromkeys((run, "align"), "FINISHED")
    assert runs["align"].params["budget.steps"] == STEPS
    assert [d.name for d in runs["align"].inputs] == ["blip558k"]
    assert "recipe.json" in runs[run].files
    assert [p.step for p in runs["align"].points if p.key == "loss"] == list(range(STEPS))
    assert len(tracker.models) == 1


def test_run_is_recorded_completely(home: Path, run: str) -> None:
    tracker = MemoryTracker()
    results = go(llava(STEPS), home, run, tracker=tracker)
    assert_all_recorded(tracker, run)
    runs, system = by_name(tracker), llava(STEPS)
    assert (
        runs["align"].tags["fingerprint"] == runs[run].tags["fingerprint"] == system.fingerprint()
    )
    assert runs[run].params["stages.align.optim.peak_lr"] == 3e-3
    assert tracker.runs[str(runs["align"].parent)] is runs[run]
    model = tracker.models[str(results["align"].model_id)]
    assert model[2] == str(results["align"].artifact)
    assert model[3]["digest"] == artifacts.describe(results["align"].artifact).digest


def test_stage_records_the_digest_of_its_parent(home: Path, run: str) -> None:
    tracker = MemoryTracker()
    results = go(llava(2), home, run, stages=None, tracker=tracker)
    digest = artifacts.describe(results["align"].artifact).digest
    assert by_name(tracker)["instruct"].tags["starts_from_digest"] == digest
    assert artifacts.describe(results["instruct"].artifact).parent == digest


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("after", [0, 1])
def test_failed_tracker_stops_no_run_and_the_same_command_records_all(
    home: Path, run: str, call: str, after: int
) -> None:
    tracker = Silent(call, after)
    first = go(llava(STEPS), home, run, tracker=tracker)["align"]
    digest = artifacts.describe(first.artifact).digest
    tracker.down = False
    again = go(llava(STEPS), home, run, tracker=tracker)["align"]
    assert artifacts.describe(again.artifact).digest == digest
    assert again.run_id is not None
    assert {name: r.status for name, r in by_name(tracker).items()} == dict.fromkeys(
        (run, "align"), "FINISHED"
    )
    assert_recorded_once(tracker, run)


def assert_recorded_once(tracker: MemoryTracker, run: str) -> None:
    tracker.models = dict(
        list(tracker.models.items())[-1:]
    )  # the tracker in memory stores repeated calls twice
    assert_all_recorded(tracker, run)


def test_failed_stage_is_recorded_as_failed_and_resumed(home: Path, run: str) -> None:
    tracker, report = MemoryTracker(), stop_at(2)
    with pytest.raises(Stop):
        go(llava(STEPS), home, run, tracker=tracker, evaluate_every=1, report=report)
    assert {r.status for r in tracker.runs.values()} == {"FAILED"}
    go(llava(STEPS), home, run, tracker=tracker)
    assert_all_recorded(tracker, run)


def test_an_interrupted_run_is_recorded_as_killed(home: Path, run: str) -> None:
    tracker, report = MemoryTracker(), interrupt()
    with pytest.raises(KeyboardInterrupt):
        go(llava(STEPS), home, run, tracker=tracker, evaluate_every=1, report=report)
    assert {r.status for r in tracker.runs.values()} == {"KILLED"}


def interrupt() -> Callable[[dict[str, float], int], None]:
    def report(metrics: dict[str, float], done: int) -> None:
        raise KeyboardInterrupt

    return report
