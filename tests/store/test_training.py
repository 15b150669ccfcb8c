"""Runs whose home is in a store (S3): the same bits as on a local disk, and the same recovery."""

from pathlib import Path

from bridgework import artifacts, storage
from bridgework.training import checkpoint
from tests.training.support import go, llava, losses, same, weights


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


def test_two_workers_resume_from_a_store(
    ray_session: None, home: Path, store_home: Path, run: str
) -> None:
    system = llava(6)
    go(system, home, run, checkpoint_every=2)
    go(system, store_home, run, workers=2, checkpoint_every=2)
    before = weights(store_home, run)
    folder = store_home / "runs" / run / "align"
    storage.remove(folder / "artifact", first=artifacts.FILE)
    go(system, store_home, run, workers=2, checkpoint_every=2)
    assert same(weights(store_home, run), before)
    steps = [step for step, _ in losses(store_home, run)]
    assert steps == [0, 1, 2, 3, 4, 5, 4, 5]
    local = weights(home, run)
    assert all((local[n] - t).abs().max() < 1e-5 for n, t in before.items())
    assert not [name for name in storage.names(folder) if name == "ray"]
