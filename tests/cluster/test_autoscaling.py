"""The pools of cluster.yaml: which of them starts a node for which work, and a day on all of them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import validate_config
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

from bridgework.ray_utils import ACTOR_CPUS
from tests.cluster.fake_cloud import HEAD_TYPE, POOLS, autoscaling_config
from tests.house.source import ROOT

FILES = ("cluster.yaml", "deploy/cluster-gcp.yaml", "deploy/cluster-azure.yaml")
SERVED = """
import json, ray
from bridgework.serving.models import deployment, replica_resources
from bridgework.serving.options import Options

options = Options(model="m", cpus=2)
before = replica_resources(options)
ray.init("local", num_cpus=1, num_gpus=1, resources={"serve": 100}, include_dashboard=False)
given = deployment("champion", options).ray_actor_options
print(json.dumps([before, replica_resources(options), given]))
"""


def started(file: str, needs: dict[str, float]) -> list[str]:
    """Return the pools of which Ray's autoscaler starts a node for a request, from zero nodes."""
    given = yaml.safe_load((ROOT / file).read_text())
    for pool in given["available_node_types"].values():
        pool["node_config"] = {}
    given["auth"] = {"ssh_user": "none"}  # else a key file of the user is read
    config = AutoscalingConfig(given, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(needs)]),
    )
    return [
        launch.instance_type for launch in ResourceDemandScheduler().schedule(request).to_launch
    ]


@pytest.mark.parametrize("file", FILES)
def test_work_starts_a_node_of_its_pool(file: str) -> None:
    assert started(file, {"CPU": ACTOR_CPUS}) == ["data"]
    assert started(file, {"CPU": 1.0, "GPU": 1.0}) == ["train"]
    assert started(file, {"CPU": 1.0, "GPU": 1.0, "serve": 1.0}) == ["serve"]


@pytest.fixture(scope="module")
def served() -> Iterator[list[dict[str, Any]]]:
    """Resources of a replica: without a Ray, with a Ray that has a pool, and of its deployment."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SERVED], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2_000:]
    yield json.loads(done.stdout.splitlines()[-1])


def test_replica_stays_on_the_nodes_for_endpoints(served: list[dict[str, Any]]) -> None:
    """A GPU alone would start a node of the pool `train`, which may be preempted."""
    without, on_pool, deployment = served
    assert without == {"CPU": 2.0, "GPU": 0.0}
    assert on_pool == {"CPU": 2.0, "GPU": 1.0, "serve": 1.0}
    assert deployment == {"num_cpus": 2.0, "num_gpus": 1.0, "resources": {"serve": 1.0}}


def test_fake_cloud_has_the_pools_of_the_cluster() -> None:
    ours = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    fake = autoscaling_config("127.0.0.1:1", Path("/tmp"), idle_s=15)
    types = fake["available_node_types"]
    assert set(types) == {*POOLS, HEAD_TYPE}
    for pool in POOLS:
        for name in ("resources", "min_workers", "max_workers"):
            assert types[pool][name] == ours["available_node_types"][pool][name]
    assert fake["max_workers"] == ours["max_workers"]
    assert fake["idle_timeout_minutes"] == 0.25
    validate_config(fake)
