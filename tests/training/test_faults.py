"""Injected faults: broken memory after an update, out of memory, failed writes."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bridgework import artifacts
from bridgework.config import override
from bridgework.data.collate import collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.errors import ResourceError, RunError
from bridgework.system import System
from bridgework.training import checkpoint, loop, notices
from bridgework.training.engine import Engine
from bridgework.training.flight_recorder import FlightRecorder, read_step
from bridgework.training.metrics import progress_bar
from tests.training.support import Stop, go, llava, losses, same, stop_at, weights


def both(steps: int, zero: int) -> System:
    """Return a stage that also trains matrices of the language model."""
    trains = {"bridge.*": 1.0, "language.*": 1.0}
    return override(llava(steps, stages__align__zero__stage=zero), {"stages.align.trains": trains})


def in_weights(engine: Any) -> None:
    learning = (p for p in engine._step.parameters() if p.requires_grad and p.ndim > 1)
    next(learning).data.view(-1)[0] = math.nan


def in_optimizer(engine: Any) -> None:
    """Put a NaN into the first moments, which the next step reads."""
    optimizer = getattr(engine._backend.optimizer, "optimizer", engine._backend.optimizer)
    next(iter(optimizer.state.values()))["exp_avg"].view(-1)[0] = math.inf


def in_a_buffer(engine: Any) -> None:
    engine._step.register_buffer("queue", torch.tensor([1.0, math.nan]))


def plant(monkeypatch: pytest.MonkeyPatch, step: int, fault: Callable[[Any], None]) -> None:
    """Inject a fault after the update of this process's `step`-th step, counted from 1."""
    real, taken = Engine.train_step, list[int]()

    def train_step(self: Engine, *given: Any, **more: Any) -> Any:
        found = real(self, *given, **more)
        taken.append(1)
        if len(taken) == step:
            fault(self)
        return found

    monkeypatch.setattr(Engine, "train_step", train_step)


@pytest.mark.parametrize(
    ("fault", "zero"),
    [
        (in_weights, 0),
        (in_weights, 2),
        (in_optimizer, 0),
        (in_optimizer, 1),
        (in_optimizer, 3),
        (in_a_buffer, 2),
    ],
)
def test_nonfinite_weights_are_not_saved_and_the_run_recovers(
    home: Path, run: str, fault: Callable[[Any], None], zero: int
) -> None:
    system, stage = both(6, zero), home / "runs" / run / "align"
    go(system, home, f"{run}-whole")
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, 4, fault)
        with pytest.raises(
            RunError, match=r"NaN or infinite after step 3.*the same command resumes at step 2"
        ):
            go(system, home, run, checkpoint_every=2)
    assert [found.step for found in checkpoint.checkpoints(stage)] == [2]
    go(system, home, run, checkpoint_every=2)
    assert same(weights(home, run), weights(home, f"{run}-whole"))


def test_nonfinite_weights_at_the_end_leave_no_artifact(
    home: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, 3, in_weights)
    with pytest.raises(
        RunError, match=r"NaN or infinite after step 2.*the same command begins again"
    ):
        go(both(3, 0), home, run)
    assert not (home / "runs" / run / "align" / "artifact").exists()


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_nonfinite_checkpoint_of_an_older_version_is_damage(
    home: Path, run: str, zero: int, caplog: pytest.LogCaptureFixture
) -> None:
    system, taken, stage = both(7, zero), list[int](), home / "runs" / run / "align"
    go(system, home, f"{run}-whole")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Engine, "finite", lambda self: True)
        plant(patch, 4, in_optimizer)
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(4))
    go(
        system,
        home,
        run,
        checkpoint_every=2,
        evaluate_every=1,
        report=lambda metrics, done: taken.append(done),
    )
    # the evaluation of the checkpoint's step is reported again
    assert taken == [2, 3, 4, 5, 6, 7]
    assert (
        "checkpoint of step 4 is damaged: it holds values that are not finite; resuming from the one"
        in caplog.text
    )
    assert [place.name[:8] for place in (stage / "checkpoints/damaged").iterdir()] == ["00000004"]
    assert same(weights(home, run), weights(home, f"{run}-whole"))


def test_stage_with_only_a_nonfinite_checkpoint_starts_over_only_on_request(
    home: Path, run: str
) -> None:
    system = both(7, 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Engine, "finite", lambda self: True)
        plant(patch, 2, in_weights)
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(2))
    for _ in range(2):
        with pytest.raises(RunError, match=r"no checkpoint can be used.*--start-over"):
            go(system, home, run, checkpoint_every=2)
    go(system, home, run, checkpoint_every=2, start_over=True)
    assert (home / "runs" / run / "align" / "artifact").exists()
    assert len(list((home / "runs" / run / "align").glob("checkpoints-*"))) == 1


def test_stage_with_a_valid_checkpoint_never_starts_over(home: Path, run: str) -> None:
    taken: list[int] = []
    with pytest.raises(Stop):
        go(llava(7), home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(5))
    go(
        llava(7),
        home,
        run,
        evaluate_every=1,
        report=lambda metrics, done: taken.append(done),
        start_over=True,
    )
    # the evaluation of the checkpoint's step is reported again
    assert taken[0] == 4


# --- memory ----------------------------------------------------------------------------------------------------------


def test_out_of_memory_error_has_the_longest_samples(home: Path) -> None:
    stage = llava()["align"]
    rows = next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    batches = [collate(rows[i : i + 4], pad_id=0) for i in (0, 4)]
    longest = max(rows, key=lambda row: len(row.ids))
    with (
        pytest.raises(
            ResourceError,
            match=rf"longest samples of this worker are .*{longest.key} \(\d+ tokens\)",
        ) as no,
        loop._memory(stage, batches),
    ):
        torch.empty(2**60)
    assert "set stages.align.budget.micro=4" in str(no.value) and "the same run resumes" in str(
        no.value
    )
    with pytest.raises(ResourceError, match="longest samples"), loop._memory(stage, batches):
        raise MemoryError
    with pytest.raises(RuntimeError, match="a rank was left alone"), loop._memory(stage, batches):
        raise RuntimeError("a rank was left alone")


# --- a disk that refuses ---------------------------------------------------------------------------------------------


def test_failed_writes_of_records_never_end_a_run(
    home: Path, run: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Metrics, the flight recorder, and the ledger of points posted to the tracker."""
    stage = home / "runs" / run / "align"
    stage.mkdir(parents=True)
    for name in ("journal", "flight_recorder"):
        (stage / name).write_text("a file where a folder should be")
    go(llava(3), home, run)
    assert (stage / "artifact").exists()
    assert "metrics are kept in memory" in caplog.text
    assert "the record of steps is kept in memory" in caplog.text
    assert "metrics are not tracked" in caplog.text


def test_steps_are_recorded_after_the_disk_is_back(home: Path, tmp_path: Path) -> None:
    batch = collate(
        next(local(ReaderConfig.of(llava()["align"], home), rank=0, world=1, start=0)), pad_id=0
    )
    with FlightRecorder(tmp_path, "attempt", 0, start=0) as written:
        for step in range(4):
            written.step(step, [batch], [float(step)] * 8, [1.0] * 8)
            if step == 1:
                written.flush()
                (tmp_path / "flight_recorder").rename(tmp_path / "aside")
                written._close()
                (tmp_path / "flight_recorder").write_text("the disk is away")
            if step == 2:
                written.flush()
                (tmp_path / "flight_recorder").unlink()
                shutil.move(tmp_path / "aside", tmp_path / "flight_recorder")
    for step in range(4):
        assert [each.loss for each in read_step(tmp_path, step)] == [float(step)] * 8


def test_attempts_are_ordered_for_any_clocks(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(
        next(local(ReaderConfig.of(llava()["align"], home), rank=0, world=1, start=0)), pad_id=0
    )
    for number, attempt in enumerate(("cc", "bb", "aa")):
        monkeypatch.setattr(
            "bridgework.training.flight_recorder.time.time_ns",
            lambda number=number: 10**18 - number * 10**15,
        )
        for rank in (1, 0):
            with FlightRecorder(tmp_path, attempt, rank, start=0) as written:
                written.step(0, [batch], [float(number)] * 8, [1.0] * 8)
        assert {each.loss for each in read_step(tmp_path, 0)} == {float(number)}
        assert len(read_step(tmp_path, 0)) == 16
    files = sorted(file.stem.split("-")[1] for file in (tmp_path / "flight_recorder").iterdir())
    assert files == ["aa", "aa", "bb", "bb", "cc", "cc"]


# --- what the person at the command sees -----------------------------------------------------------------------------


def test_a_warning_of_a_worker_reaches_the_console(tmp_path: Path) -> None:
    console = Console(record=True, width=300)
    with progress_bar(tmp_path, "align", 10, console), notices.to_file(tmp_path):
        for _ in range(2):  # of two workers
            loop.log.warning("checkpoint of step %d is damaged", 4)
    assert console.export_text().count("checkpoint of step 4 is damaged") == 1
    with progress_bar(tmp_path, "align", 10, console):
        pass
    assert "damaged" not in console.export_text()


def test_a_warning_of_the_driver_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    with notices.to_console(said.append):
        loop.log.warning("something to know")
    assert said == ["something to know"]
    assert "something" not in capsys.readouterr().err


def test_an_artifact_of_a_run_is_finite(home: Path, run: str) -> None:
    go(llava(2), home, run)
    assert all(
        tensor.isfinite().all()
        for tensor in artifacts.weights(home / "runs" / run / "align/artifact").values()
    )
    assert len(losses(home, run)) == 2
