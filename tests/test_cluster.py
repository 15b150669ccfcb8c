"""Resource requests: a cluster whose pools start at zero nodes still trains on its GPUs."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgework import __version__, ray_utils
from bridgework.data.quarantine import BadSample
from bridgework.errors import DataError, ResourceError, SpecError
from bridgework.training.feature_cache import TooLarge
from bridgework.training.options import RunOptions
from bridgework.training.ray_train import _needs
from tests.house.source import ROOT

FAKE = """
import json, os, subprocess, sys
os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
import ray
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2
from bridgework import ray_utils
from bridgework.training.ray_train import RunOptions, _needs
ray_utils.SAY_EVERY_S = 1.0
said, results, folder = [], {}, sys.argv[1]

def record(name, value):
    results[name] = value

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
ray.init(address=nodes.address, log_to_driver=False)
record("without", [ray_utils.gpus_each(), _needs(RunOptions())["GPU"], ray_utils.grows("GPU")])

# what an autoscaler reports at its start
group = autoscaler_pb2.NodeGroupConfig(name="train", resources={"GPU": 4, "CPU": 8}, max_count=2)
config = autoscaler_pb2.ClusterConfig(node_group_configs=[group])
ray._raylet.GcsClient(address=nodes.address).report_cluster_config(config.SerializeToString())
needs, most = _needs(RunOptions()), ray_utils.potential()["GPU"]
record("pools at zero", [ray_utils.gpus_each(), needs, ray_utils.grows("GPU"), most])
record("asked for none", _needs(RunOptions(gpus_per_worker=0))["GPU"])

try:
    ray_utils.wait_for("align", [{"CPU": 1, "GPU": 1}] * 4, timeout_s=2.5, say=said.append)
except ray_utils.ResourceError as error:
    record("timed out", str(error))
record("said", said[:1])

try:
    ray_utils.wait_for("align", [{"CPU": 1, "GPU": 1}] * 9, timeout_s=60, say=said.append)
except ray_utils.ResourceError as error:
    record("never", str(error))

def stopped():
    raise KeyboardInterrupt

try:
    ray_utils.wait_for("align", [{"GPU": 1}], timeout_s=60, say=said.append, stopped=stopped)
except KeyboardInterrupt:
    record("stopped", True)

joined = []

def join(text):
    if not joined:
        joined.append(nodes.add_node(num_cpus=4, num_gpus=2))

ray_utils.wait_for("align", [{"CPU": 1, "GPU": 1}] * 2, timeout_s=120, say=join)
record("joined", len(joined))

class Work:
    def __call__(self, item):
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        open(os.path.join(folder, str(item)), "w").write(",".join(gpus))

ray_utils.map_on_actors(Work, range(3), 8, gpus=True, what="the judges")
record("actors", [open(os.path.join(folder, str(item))).read() for item in range(3)])

# Ray's own autoscaler reports nothing: its file is named in a command line on the head
ray_utils._Session.node_types = ("", 0.0, {})
flags = [f"--gcs-address={nodes.address}", "--autoscaling-config=" + sys.argv[2]]
with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)", *flags]) as monitor:
    elsewhere = ray.remote(num_gpus=1)(lambda: ray_utils._head_node_types())
    record("of the file", [ray_utils._head_node_types(), ray.get(elsewhere.remote())])
    monitor.kill()
print("RESULTS" + json.dumps(results))
ray.shutdown()
nodes.shutdown()
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Results of a process on its own cluster with fake GPUs."""
    folder = tmp_path_factory.mktemp("seen")
    env = {**os.environ, "RAY_TMPDIR": tempfile.mkdtemp(prefix="bw-")}
    done = subprocess.run(
        [sys.executable, "-c", FAKE, str(folder), str(ROOT / "cluster.yaml")],
        capture_output=True,
        text=True,
        env=env,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    found: dict[str, Any] = json.loads(done.stdout.split("RESULTS")[1].splitlines()[0])
    return found


def test_no_gpu_is_requested_of_a_cluster_without_gpus(results: dict[str, Any]) -> None:
    assert results["without"] == [0.0, 0.0, False]


def test_gpu_is_requested_if_the_autoscaler_can_start_one(results: dict[str, Any]) -> None:
    assert results["pools at zero"] == [1.0, {"CPU": 1.0, "GPU": 1.0}, True, 8.0]
    assert results["asked for none"] == 0.0


def test_node_types_of_rays_own_autoscaler_are_known_on_all_nodes(results: dict[str, Any]) -> None:
    """4 nodes of 4 GPUs and 4 of one; 16 nodes at most, of 48, 16 and 8 CPUs."""
    here, elsewhere = results["of the file"]
    assert here == elsewhere == {"CPU": 352.0, "GPU": 20.0, "serve": 400.0}


def test_wait_reports_missing_resources_and_times_out(results: dict[str, Any]) -> None:
    (first,) = results["said"]
    assert first.startswith(
        "align: waiting for 4 x GPU: 0 of 4 in the cluster, 0 free; the autoscaler may start nodes"
    )
    assert "up to 8" in first
    assert "did not have the resources within 2.5 s. Got 4 x GPU: 0 of 4" in results["timed out"]
    assert (
        "--gpus-per-worker" in results["timed out"] and "--resource-timeout" in results["timed out"]
    )


def test_more_than_the_autoscaler_may_start_is_refused_at_once(results: dict[str, Any]) -> None:
    assert "align: the cluster cannot run it, with all nodes" in results["never"]
    assert "Got 9 x GPU: 0 of 9 in the cluster" in results["never"]
    assert "max_workers of a node type" in results["never"]


def test_wait_can_be_stopped_and_ends_when_nodes_join(results: dict[str, Any]) -> None:
    assert results["stopped"] and results["joined"] == 1


def test_actors_get_the_gpus_that_the_cluster_may_have(results: dict[str, Any]) -> None:
    """Eight actors are requested and the cluster may have eight GPUs; the work begins with its two."""
    assert set(results["actors"]) <= {"0", "1"} and all(results["actors"])


@pytest.mark.usefixtures("ray_session")
def test_own_ray_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_utils._Session, "own", True)
    with pytest.raises(
        ResourceError,
        match=r"this machine cannot run it\. Got 2 x GPU: 0 of 2 in the cluster.*Fix: ",
    ):
        ray_utils.wait_for("align", [{"CPU": 1.0, "GPU": 1.0}] * 2)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("gpus", [-1.0, 1.5, float("inf"), float("nan")])
def test_gpu_count_that_ray_cannot_allocate_is_rejected(gpus: float) -> None:
    with pytest.raises(SpecError, match=r"--gpus-per-worker: Ray cannot allocate that\. Got"):
        _needs(RunOptions(gpus_per_worker=gpus))


def test_folder_of_the_command_is_entered_where_it_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nodes of other machines do not have it, and work by URLs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "project").mkdir()
    for folder in ("project", "elsewhere"):
        ray_utils.enter_folder(str(tmp_path / folder))
    assert Path.cwd() == tmp_path / "project"


def test_relative_paths_are_valid_in_actors(tmp_path: Path) -> None:
    seen: list[int] = []
    ray_utils.map_on_actors(lambda: seen.append, [1, 2], 0)
    assert seen == [1, 2]


def too_large(item: int) -> None:
    raise TooLarge(f"item {item} is too large")


def unreadable(item: int) -> None:
    raise BadSample("image", f"item {item} cannot be read")


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(("work", "raised"), [(too_large, TooLarge), (unreadable, DataError)])
def test_bridgework_error_keeps_its_class_across_actors(
    work: Callable[[int], None], raised: type[DataError]
) -> None:
    """`feature_cache.prepare` must tell TooLarge from any other DataError of a worker."""
    with pytest.raises(DataError, match="item 1") as caught:
        ray_utils.map_on_actors(lambda: work, [1], 1)
    assert type(caught.value) is raised


def test_actor_on_a_node_with_another_version_fails_before_its_work() -> None:
    made = list[bool]()
    actor = ray_utils._Actor(lambda: made.append, os.getcwd(), 1, "the judges", "0.0.9")
    answer = actor({"item": True})
    assert answer["error"] == "bridgework.errors:RunError" and not made
    assert f"Got {__version__}; expected 0.0.9. Fix: install 0.0.9 there" in answer["message"]


def test_refused_token_differs_from_a_cluster_that_is_down() -> None:
    """Ray reports both as a failed connection; digits of a port are not the status 401 or 403."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        error = ConnectionError(f"Failed to connect to Ray cluster at 10.0.0.1:{port}")
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            line = str(ray_utils.not_joined(address, error))
            assert "its port answers" in line and "RAY_AUTH_MODE=token" in line
    for address in (f"127.0.0.1:{port}", "127.0.0.1:40310", "no port"):
        line = str(
            ray_utils.not_joined(address, ConnectionError(f"Failed to connect to {address}"))
        )
        assert "check that the cluster runs" in line and "token" not in line
    line = str(ray_utils.not_joined("http://h:8265", RuntimeError("status code 401: Unauthorized")))
    assert "RAY_AUTH_MODE=token" in line


def test_closed_port_of_a_ray_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself would try for minutes."""
    monkeypatch.setattr(ray_utils, "JOIN_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
        with pytest.raises(ResourceError, match=rf"^{address}: .*nothing listens .*Fix: check"):
            ray_utils.join(address)
