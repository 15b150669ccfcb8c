"""Nodes that join, are lost or are taken away after a notice: the run continues with what is there."""

import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray import cloudpickle
from ray.exceptions import RayActorError
from ray.train import WorkerGroupError
from ray.train.v2._internal.execution.controller.state import InitializingState, RestartingState
from ray.util import placement_group, placement_group_table

from bridgework import __version__, ray_utils
from bridgework.config import override
from bridgework.errors import Interrupted, ResourceError, RunError, SpecError
from bridgework.training import checkpoint, notices
from bridgework.training.options import RunOptions
from bridgework.training.process_group import DeviceTorchConfig, WorkerFacts, _backend, _probe
from bridgework.training.ray_train import PlacementCallback, WorkerGroupCallback, release
from bridgework.training.stopping import Preemption, Stop
from tests.training import elastic_run
from tests.training.support import go, job, llava, losses, train_ranks


def on_nodes(
    home: Path, run: str, steps: int, workers: tuple[int, int], *events: str, timeout_s: float = 60
) -> str:
    """Train on a cluster of its own process, where `events` happen one after the other; returns what was said."""
    words = [str(home), run, str(steps), *map(str, workers), str(timeout_s), *events]
    env = os.environ | {"RAY_TMPDIR": tempfile.mkdtemp(prefix="bw-")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.elastic_run", *words],
        capture_output=True,
        text=True,
        env=env,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1_800)  # two complete runs, next to other tests
def test_elastic_run_grows_and_shrinks_with_the_same_losses(home: Path, run: str) -> None:
    """One worker, two at a checkpoint when a node joins, one after its loss; with dropout."""
    steps, stage = 800, elastic_run.STAGE  # enough for a node that joins slowly
    events = ("train=10", "add", "until=2 workers instead of 1", "train=10", "kill")
    said = on_nodes(home, run, steps, (1, 2), *events)
    assert "room for 2 workers instead of 1: they start again after a checkpoint" in said
    assert "1 workers instead of 2 train from now on" in said
    found = losses(home, run, stage)
    go(elastic_run.system(steps), home, f"{run}-whole", stages=(stage,))
    assert sorted({step for step, _ in found}) == list(range(steps))
    whole = dict(losses(home, f"{run}-whole", stage))
    assert all(loss == pytest.approx(whole[step], rel=1e-5) for step, loss in found)
    taken = [step for step, _ in found]
    repeated = sorted({step for step in taken if taken.count(step) > 1})
    again = [step for step, after in itertools.pairwise(taken) if after <= step]
    assert len(again) == 1 and repeated[-1] == again[0]  # the loss of the node, not the growth


@pytest.mark.slow
def test_fixed_number_of_workers_waits_and_gives_up_after_the_loss_of_a_node(
    home: Path, run: str
) -> None:
    events = ("add", "train=5", "kill")
    said = on_nodes(home, run, 5_000, (2, 2), *events, timeout_s=15)
    assert "the workers start again from the newest checkpoint, because" in said
    assert "waiting for 2 x GPU: 1 of 2 in the cluster" in said
    assert (
        "error instruct: the cluster did not have the resources within 15 s. Got 2 x GPU: 1 of 2"
        in said
    )


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_notice_of_preemption_saves_checkpoints_before_the_node_is_gone(
    home: Path, run: str
) -> None:
    steps, stage = 1_200, elastic_run.STAGE
    events = ("train=5", "add", "until=2 workers", "train=5", "drain")
    said = on_nodes(home, run, steps, (1, 2), *events)
    assert "a node is taken away soon: a checkpoint of step" in said
    taken = [step for step, _ in losses(home, run, stage)]
    assert sorted(set(taken)) == list(range(steps))


def test_checkpoints_after_a_notice_halve_the_remaining_time() -> None:
    deadline: list[float | None] = [None]
    preemption = Preemption(lambda: deadline[0])
    assert not preemption.due()
    deadline[0] = time.time() + 60
    assert preemption.due()
    with preemption.saving():
        pass
    assert not preemption.due()  # the next one in 30 s
    deadline[0] = time.time() + 50  # another node
    assert preemption.due()
    deadline[0] = time.time() + 1
    assert not preemption.due()  # too late


@pytest.mark.usefixtures("process_group")
def test_a_notice_saves_a_checkpoint_and_training_continues(home: Path, tmp_path: Path) -> None:
    one = override(llava(4), {"stages": llava(4).stages[:1]})
    given = job(one, home, tmp_path)
    end = time.time() + 600
    assert set(train_ranks(given, preemption=Preemption(lambda: end))) == {0, 1, 2, 3}
    assert [found.step for found in checkpoint.checkpoints(given.folder)] == [1]


def test_recipe_for_gpus_is_not_trained_on_cpus_unless_requested(home: Path, run: str) -> None:
    system = llava(1, stages__align__zero__precision="bf16")
    with pytest.raises(
        ResourceError, match=r"align: the recipe trains in bfloat16.*--gpus-per-worker 0"
    ):
        go(system, home, run)
    assert not (home / "runs" / run / "align").exists()
    go(system, home, run, gpus_per_worker=0)


@pytest.mark.usefixtures("ray_session")
def test_recipe_for_gpus_is_refused_by_a_cluster_without_any(home: Path, run: str) -> None:
    with pytest.raises(ResourceError, match=r"the cluster has none and can start none.*Fix: "):
        go(llava(1, stages__align__zero__precision="bf16"), home, run, workers=1)


@pytest.mark.parametrize("workers", [-1, (0, 2), (3, 2)])
def test_wrong_range_of_workers_is_rejected(workers: int | tuple[int, int]) -> None:
    with pytest.raises(SpecError, match="workers: not a number or a range"):
        RunOptions(workers=workers)


def test_nodes_of_the_gpu_pool_without_a_gpu_are_named(tmp_path: Path) -> None:
    pool = DeviceTorchConfig(folder=tmp_path / "align", gpus=1, needs_gpus=True)
    good, bad = WorkerFacts("a", True), WorkerFacts("b", False)
    assert _backend([good, good], pool) == "nccl"
    for found in ([good, bad], [bad]):
        with pytest.raises(
            RunError, match=r"align: workers got 1 GPUs each of Ray.*on the nodes b\. Fix"
        ):
            _backend(found, pool)
    (tmp_path / "align").mkdir()
    tiny = DeviceTorchConfig(folder=tmp_path / "align", gpus=1)
    follower = notices.Follower(tmp_path / "align")
    assert _backend([bad], tiny) == "gloo"
    assert "on the nodes b: they train on the CPU" in follower.new()[0]


def test_worker_on_a_node_with_another_version_is_named() -> None:
    node, _, version = cloudpickle.loads(cloudpickle.dumps(_probe()))()
    ray_utils.check_version(__version__, version, node)
    for found, got in (("0.0.9", "0.0.9"), ("", "none")):
        with pytest.raises(RunError, match=rf"^b: .*Got {got}; expected {__version__}\. Fix: "):
            ray_utils.check_version(__version__, found, "b")


def callback(folder: Path, timeout_s: float) -> WorkerGroupCallback:
    folder.mkdir()
    options = RunOptions(workers=(2, 4), resource_timeout_s=timeout_s)
    return WorkerGroupCallback(folder, {"CPU": 1.0, "GPU": 1.0}, options, steps=60)


@pytest.mark.usefixtures("ray_session")
def test_wait_for_lost_nodes_ends_after_a_time_and_on_request(tmp_path: Path) -> None:
    lost = RestartingState(WorkerGroupError("x", {1: RayActorError()}))
    with pytest.raises(
        ResourceError, match=r"within 0 s\. Got 2 x GPU: 0 of 2.*the same command resumes"
    ):
        callback(tmp_path / "align", 0.0).after_controller_state_update(InitializingState(), lost)
    waiting = callback(tmp_path / "instruct", 60.0)
    waiting.after_controller_state_update(lost, lost)
    Stop(tmp_path / "instruct").ask("SIGTERM")
    with pytest.raises(Interrupted, match="instruct: stopped by SIGTERM"):
        waiting.after_controller_state_update(lost, lost)


def test_workers_of_a_killed_controller_are_freed(tmp_path: Path, ray_session: None) -> None:
    """As those of a trial that Tune stops; Ray's own clean-up takes a dashboard."""

    @ray.remote(num_cpus=0)
    class Controller:
        def start(self, folder: Path) -> str:
            group = placement_group([{"CPU": 0.5}])
            ray.get(group.ready())
            handle = SimpleNamespace(placement_group=group)
            state = SimpleNamespace(placement_group_handle=handle)
            workers = SimpleNamespace(get_worker_group_state=lambda: state)
            PlacementCallback(folder).after_worker_group_start(workers)
            return str(group.id.hex())

    controller = Controller.remote()
    name = ray.get(controller.start.remote(tmp_path))

    def state() -> str:
        return str(placement_group_table()[name]["state"])

    waiting = threading.Thread(target=release, args=(tmp_path,))
    waiting.start()
    waiting.join(1)
    assert waiting.is_alive() and state() == "CREATED", "its controller is alive"
    ray.kill(controller)
    waiting.join(60)
    while state() != "REMOVED":
        time.sleep(0.1)
    assert not (tmp_path / "ray").exists()
    release(tmp_path)  # nothing is left
