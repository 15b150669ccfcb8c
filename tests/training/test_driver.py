"""Driver: rejected runs, finished stages, failures of workers, and any number of workers."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from bridgework import artifacts
from bridgework.config import override
from bridgework.errors import DataError, ResourceError, RunError, SpecError, WeightsError
from bridgework.evaluation import VQA, FewShot, HeldOutLoss, LinearProbe
from bridgework.evaluation.few_shot import Shots
from bridgework.system import EvalSpec
from bridgework.training import checkpoint
from bridgework.training.driver import train
from bridgework.training.engine import Engine
from bridgework.training.options import RunOptions
from bridgework.training.ray_train import FailFastCallback
from tests.training.support import Stop, go, llava, losses, same, stop_at, weights
from tests.training.test_faults import in_optimizer, plant


def folder(home: Path, run: str) -> Path:
    return home / "runs" / run


def test_stage_2_holds_the_bridge_of_stage_1(home: Path, run: str) -> None:
    system = override(llava(2), {"stages.instruct.trains": {"language.*": 1.0}})
    go(system, home, run, stages=None)
    bridge = {n: t for n, t in weights(home, run).items() if n.startswith("bridge.")}
    after = {n: t for n, t in weights(home, run, "instruct").items() if n.startswith("bridge.")}
    assert bridge
    assert same(after, bridge)


def test_finished_stage_is_not_trained_again(home: Path, run: str) -> None:
    first = go(llava(2), home, run)["align"]
    written = (first.artifact / "artifact.json").stat()
    both = go(llava(2), home, run, stages=None)
    assert (first.artifact / "artifact.json").stat().st_mtime_ns == written.st_mtime_ns
    assert both["align"].metrics == first.metrics
    assert len(losses(home, run)) == 2


def test_run_with_another_recipe_is_rejected_without_changes(home: Path, run: str) -> None:
    go(llava(2), home, run)
    before = weights(home, run)
    with pytest.raises(RunError, match=r"stages\.align\.seed was 0, is 7"):
        go(llava(2, stages__align__seed=7), home, run)
    assert same(weights(home, run), before)


def test_unknown_stage_is_rejected_before_any_write(home: Path, run: str) -> None:
    with pytest.raises(SpecError, match="no stage 'alig'; did you mean 'align'"):
        go(llava(), home, run, stages=["alig"])
    assert not folder(home, run).exists()


def test_missing_dataset_is_rejected_before_any_write(home: Path, run: str) -> None:
    system = llava(stages__instruct__data__sources__gqa__dataset="synthetic-shape")
    with pytest.raises(DataError, match=r"dataset 'synthetic-shape' not found.*did you mean"):
        go(system, home, run, stages=None)
    assert not folder(home, run).exists()


@pytest.mark.parametrize(
    "judge",
    [
        HeldOutLoss(name="heldout", dataset="not-here", rows=4),
        FewShot(dataset="synthetic:shapes", support="not-here"),
        VQA(dataset="synthetic:shapes", shots=Shots(support="not-here")),
        LinearProbe(dataset="synthetic:shapes", train="not-here"),
    ],
)
def test_missing_dataset_of_an_evaluation_is_rejected_before_any_write(
    judge: EvalSpec, home: Path, run: str
) -> None:
    system = llava(stages__align__evals=(judge,))
    with pytest.raises(DataError, match="dataset 'not-here' not found"):
        go(system, home, run)
    assert not folder(home, run).exists()


def test_more_workers_than_lanes_are_rejected_before_any_write(home: Path, run: str) -> None:
    with pytest.raises(SpecError, match="4 lanes for 5 workers"):
        go(llava(), home, run, workers=5)
    assert not folder(home, run).exists()


def test_stage_before_its_parent_is_rejected_before_any_write(home: Path, run: str) -> None:
    with pytest.raises(
        RunError, match=r"starts from align, which this run has not trained\. Fix: train it first"
    ):
        go(llava(), home, run, stages=["instruct"])
    assert not folder(home, run).exists()


def test_parent_that_is_not_an_artifact_is_rejected_before_any_write(
    home: Path, run: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match="is not an artifact"):
        go(llava(stages__align__starts_from=str(tmp_path)), home, run)
    assert not folder(home, run).exists()


def test_a_stage_may_start_from_the_artifact_of_another_run(home: Path, run: str) -> None:
    parent = go(llava(2), home, f"{run}-parent")["align"].artifact
    system = llava(2, stages__instruct__starts_from=str(parent))
    child = go(system, home, run, stages=["instruct"])["instruct"].artifact
    assert artifacts.describe(child).parent == artifacts.describe(parent).digest


def test_edited_parent_is_rejected(home: Path, run: str) -> None:
    parent = go(llava(2), home, run)["align"].artifact
    file = parent / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(WeightsError, match="sha256 differs"):
        go(llava(2), home, run, stages=["instruct"])
    assert not (folder(home, run) / "instruct" / "artifact").exists()


def test_incomplete_checkpoint_of_another_number_of_workers_is_rejected(
    home: Path, run: str
) -> None:
    system = llava(4)
    made = checkpoint.begin(folder(home, run) / "align", 2, "old")
    checkpoint.complete(
        made, step=2, world=3, attempt="old", fingerprint=system.fingerprint(), keep=2
    )
    with pytest.raises(RunError, match="cannot be read by another number of workers"):
        go(system, home, run)


def test_metrics_are_those_of_the_last_step_and_of_the_evaluations(home: Path, run: str) -> None:
    evals = (HeldOutLoss(name="heldout", dataset="synthetic:shapes", rows=4),)
    found = go(llava(2, stages__align__evals=evals), home, run)["align"].metrics
    assert found["loss"] == losses(home, run)[-1][1]
    assert found["heldout.loss"] == losses(home, run, key="heldout.loss")[0][1]


# --- Ray Train -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_two_workers_match_in_process_training(home: Path, run: str) -> None:
    system = llava(6, stages__align__budget__micro=4)
    go(system, home, f"{run}-alone")
    go(system, home, run, workers=2)
    assert dict(losses(home, run)) == pytest.approx(dict(losses(home, f"{run}-alone")), rel=1e-5)
    alone = weights(home, f"{run}-alone")
    for name, tensor in weights(home, run).items():
        assert tensor.allclose(alone[name], rtol=0, atol=1e-5), name
    assert not (folder(home, run) / "align" / "ray").exists()


@pytest.mark.usefixtures("ray_session")
def test_error_that_a_user_must_fix_is_not_retried(home: Path, run: str) -> None:
    system = llava(6, stages__align__optim__peak_lr=1e30, stages__align__optim__clip=0.0)
    with pytest.raises(
        RunError, match=r"not finite at step \d\. Got (nan|inf).*no checkpoint was written"
    ):
        go(system, home, run, workers=1, checkpoint_every=6)
    steps = [step for step, _ in losses(home, run)]
    assert steps == list(range(len(steps))) and steps  # a second start would write them again


def test_resource_error_is_retried() -> None:
    ends = FailFastCallback()
    for passing in (ResourceError("the store is gone"), RuntimeError("gloo: connection closed")):
        ends.after_exception(None, {0: passing})
    with pytest.raises(DataError, match="another dataset"):
        ends.after_exception(
            None, {0: RuntimeError("a rank was left alone"), 1: DataError("another dataset")}
        )


def workers() -> list[int]:
    """Return the training workers of this session's own Ray, from the process tree."""
    status = {int(p.name): p for p in Path("/proc").iterdir() if p.name.isdigit()}
    found = []
    for pid, place in status.items():
        try:
            title = (place / "cmdline").read_bytes()
            raylet = parent(pid)
            if b"RayTrainWorker" in title and parent(raylet) == os.getpid():
                found.append(pid)
        except OSError:  # it ended meanwhile
            continue
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def kill_one(stage: Path, after: int, done: list[int]) -> None:
    """Send SIGKILL to a worker as soon as the stage has a checkpoint of at least `after` steps."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        found = checkpoint.checkpoints(stage)
        if found and found[0].step >= after and (pids := workers()):
            os.kill(pids[-1], signal.SIGKILL)
            done.append(pids[-1])
            return
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_killed_worker_repeats_only_steps_since_the_checkpoint(home: Path, run: str) -> None:
    every, killed = 5, list[int]()
    system = llava(60, stages__align__budget__micro=4)
    go(system, home, f"{run}-whole", workers=2, checkpoint_every=every)
    killer = threading.Thread(target=kill_one, args=(folder(home, run) / "align", 20, killed))
    killer.start()
    go(system, home, run, workers=2, checkpoint_every=every)
    killer.join()
    assert killed
    assert same(weights(home, run), weights(home, f"{run}-whole"))
    steps = [step for step, _ in losses(home, run)]
    assert sorted(set(steps)) == list(range(60))
    assert len(steps) - len(set(steps)) <= every


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_warnings_of_workers_reach_the_console(home: Path, run: str) -> None:
    """Damaged files, and a checkpoint with valid files and values that are not finite."""
    system, stage, console = llava(9), folder(home, run) / "align", Console(record=True, width=300)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Engine, "finite", lambda self: True)
        plant(patch, 4, in_optimizer)
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(4))
    made = checkpoint.begin(stage, 5, "old")
    (made / "state.pt").write_bytes(b"x")
    done = checkpoint.complete(
        made, step=5, world=1, attempt="old", fingerprint=system.fingerprint(), keep=3
    )
    (done.folder / "state.pt").write_bytes(b"y")
    options = RunOptions(workers=1, checkpoint_every=2)
    train(system, home=home, run=run, options=options, stages=["align"], console=console)
    said = console.export_text()
    assert (
        "checkpoint of step 5 is damaged: state.pt has changed since it was written (sha256); resuming"
        in said
    )
    assert (
        "checkpoint of step 4 is damaged: it holds values that are not finite; resuming from the one before"
        in said
    )
    assert sorted({step for step, _ in losses(home, run)}) == list(range(9))
    assert sorted(place.name[:8] for place in (stage / "checkpoints/damaged").iterdir()) == [
        "00000004",
        "00000005",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_run_with_workers_resumes_with_the_same_command(home: Path, run: str) -> None:
    go(llava(6), home, run, workers=2, checkpoint_every=2)
    unbroken = weights(home, run)
    (
        folder(home, run) / "align/artifact/artifact.json"
    ).unlink()  # as if the driver had died at the very end
    go(llava(6), home, run, workers=2, checkpoint_every=2)
    assert same(weights(home, run), unbroken)
    assert [step for step, _ in losses(home, run)] == [0, 1, 2, 3, 4, 5, 4, 5]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_run_resumes_with_another_number_of_workers(home: Path, run: str, zero: int) -> None:
    system = llava(6, stages__align__budget__micro=4, stages__align__zero__stage=zero)
    go(system, home, f"{run}-whole", workers=2, checkpoint_every=2)
    whole = dict(losses(home, f"{run}-whole"))
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(4))
    go(system, home, run, workers=2)  # from one process to two workers
    assert dict(losses(home, run)) == pytest.approx(whole, rel=1e-4)
    (
        folder(home, f"{run}-whole") / "align/artifact/artifact.json"
    ).unlink()  # as if its driver had died
    go(system, home, f"{run}-whole")  # from two workers to one process
    again = losses(home, f"{run}-whole")
    assert [step for step, _ in again] == [0, 1, 2, 3, 4, 5, 4, 5]
    assert dict(again) == pytest.approx(whole, rel=1e-4)
