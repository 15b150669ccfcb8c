"""Launcher files of Google Cloud and Azure: Ray accepts them, and only their machines differ from those of AWS."""

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.house import source

VARIANTS = {"gcp": "deploy/cluster-gcp.yaml", "azure": "deploy/cluster-azure.yaml"}


def load(path: str) -> dict[str, Any]:
    """A launcher's file with Ray's defaults filled in, as `ray up` reads it; no cloud is asked."""
    return prepare_config(yaml.safe_load((source.ROOT / path).read_text(encoding="utf-8")))


@pytest.mark.parametrize("cloud", VARIANTS)
def test_ray_accepts_the_cluster(cloud: str) -> None:
    config = load(VARIANTS[cloud])
    validate_config(config)
    assert config["provider"]["type"] == cloud


@pytest.mark.parametrize("cloud", VARIANTS)
def test_a_variant_differs_by_its_machines_alone(cloud: str) -> None:
    aws, config = load("cluster.yaml"), load(VARIANTS[cloud])
    for name in ("cluster_name", "max_workers", "idle_timeout_minutes", "head_node_type"):
        assert config[name] == aws[name]
    for name in ("head_start_ray_commands", "worker_start_ray_commands", "rsync_filter"):
        assert config[name] == aws[name]
    assert config["file_mounts"] == aws["file_mounts"]
    assert [line.replace(f"EXTRAS={cloud}", "EXTRAS=aws") for line in config["setup_commands"]] == (
        aws["setup_commands"]
    )
    pools, ours = aws["available_node_types"], config["available_node_types"]
    assert pools.keys() == ours.keys()
    for name, pool in pools.items():
        for limit in ("min_workers", "max_workers"):
            assert ours[name].get(limit) == pool.get(limit)
        assert ours[name]["resources"].keys() == pool["resources"].keys()
        assert ours[name]["resources"].get("GPU") == pool["resources"].get("GPU")


@pytest.mark.parametrize("cloud", VARIANTS)
def test_spot_nodes_train_and_prepare_data_only(cloud: str) -> None:
    pools = load(VARIANTS[cloud])["available_node_types"]
    spot = {name: "spot" in str(pool["node_config"]).lower() for name, pool in pools.items()}
    assert spot == {"head": False, "data": True, "train": True, "serve": False}
