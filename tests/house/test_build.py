"""What a machine gets: pinned releases, a version that is one, and a cluster that Ray accepts."""

import re
import tomllib
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

import bridgework
from bridgework.cli import diagnostics
from tests.house import source

PROJECT = tomllib.loads((source.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = [
    Requirement(r)
    for rs in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for r in rs
]
PINS = [
    line
    for line in (source.ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]


def test_every_constraint_is_one_public_release() -> None:
    """No path, no URL, and no local tag: `torch==2.13.0+cpu` could not be had on a machine with a GPU."""
    odd = [line for line in PINS if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*==\d[0-9a-z.]*", line)]
    assert not odd


def test_every_requirement_is_pinned_to_a_release_that_it_accepts() -> None:
    pins = {
        canonicalize_name(name): version
        for name, _, version in (line.partition("==") for line in PINS)
    }
    for requirement in REQUIRED:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt does not pin {name}"
        assert Version(pins[name]) in requirement.specifier


def test_the_pinned_releases_pass_the_doctors_floors() -> None:
    for line in PINS:
        name, _, version = line.partition("==")
        if name in diagnostics.FLOORS:
            assert Version(version) in Requirement(f"{name}{diagnostics.FLOORS[name]}").specifier


def test_the_changelog_knows_the_version() -> None:
    changelog = (source.ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(bridgework.__version__)}\]", changelog, re.MULTILINE)


@pytest.fixture
def cluster() -> dict[str, Any]:
    """cluster.yaml with Ray's defaults filled in, as `ray up` reads it; no cloud is asked."""
    return prepare_config(
        yaml.safe_load((source.ROOT / "cluster.yaml").read_text(encoding="utf-8"))
    )


def test_ray_accepts_the_cluster(cluster: dict[str, Any]) -> None:
    validate_config(cluster)


def test_the_cluster_has_the_pools_that_its_guide_names(cluster: dict[str, Any]) -> None:
    guide = (source.ROOT / "docs/cluster-machines.md").read_text(encoding="utf-8")
    pools = cluster["available_node_types"]
    assert set(re.findall(r"^\| `(\w+)` \|", guide, re.MULTILINE)) == set(pools)
    assert all(pool["min_workers"] == 0 for pool in pools.values())


def test_spot_nodes_train_and_prepare_data_only(cluster: dict[str, Any]) -> None:
    market = {
        name: "InstanceMarketOptions" in p["node_config"]
        for name, p in cluster["available_node_types"].items()
    }
    assert market == {"head": False, "data": True, "train": True, "serve": False}


def test_the_cluster_starts_with_tokens_and_a_dashboard_on_loopback(
    cluster: dict[str, Any],
) -> None:
    assert "~/.ray/auth_token" in cluster["file_mounts"]
    assert any("export RAY_AUTH_MODE=token" in line for line in cluster["setup_commands"])
    assert any("--dashboard-host=127.0.0.1" in line for line in cluster["head_start_ray_commands"])
