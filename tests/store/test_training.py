"""Runs whose home is in a store (S3): the same bits as on a local disk, and the same recovery."""

from pathlib import Path

import pytest

from bridgework import artifacts, storage
from bridgework.errors import ResourceError, RunError
from bridgework.training import checkpoint
from tests.store.faults import FaultyStore
from tests.training.support import Stop, go, llava, losses, same, stop_at, weights


def test_a_run_in_a_store_gives_the_bits_of_a_local_run(
    home: Path, store_home: Path, run: str
) -> None:
    system = llava(6)
    local = go(system, home, run, checkpoint_every=2)["align"]
    remote = go(system, store_home, run, checkpoint_every=2)["align"]
    assert str(remote.artifact) == f"{store_home}/runs/{run}/align/artifact"
    assert same(weights(store_home, run), weights(home, run))
    assert losses(store_home, run) == losses(home, run)
    assert {k: v for k, v in remote.metrics.items() if "_s" not in k}.keys() == {
        k: v for k, v in local.metrics.items() if "_s" not in k
    }.keys()
    kept = checkpoint.checkpoints(store_home / "runs" / run / "align")
    assert [found.step for found in kept] == [4, 2]
