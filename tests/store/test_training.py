"""Runs whose home is in a store (S3): the same bits as on a local disk, and the same recovery."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bridgework import artifacts, storage
from bridgework.errors import ResourceError
from bridgework.evaluation import results
from bridgework.training import checkpoint
from tests.training.support import Stop, go, judged, llava, losses, same, stop_at, weights

LOSS = "heldout.loss"


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


def test_best_step_in_a_store_is_that_of_a_local_run(
    home: Path, store_home: Path, run: str
) -> None:
    options: dict[str, Any] = {"evaluate_every": 2, "checkpoint_every": 2, "keep_best": LOSS}
    local = go(judged(), home, run, **options)["align"]
    with pytest.raises(Stop):
        go(judged(), store_home, run, report=stop_at(4), **options)
    remote = go(judged(), store_home, run, **options)["align"]
    assert remote.metrics["best_step"] == local.metrics["best_step"]
    assert same(weights(store_home, run), weights(home, run))
    assert not storage.names(store_home / "runs" / run / "align" / "snapshots")


@pytest.mark.slow
def test_tasks_evaluate_snapshots_in_a_store(
    ray_session: None, home: Path, store_home: Path, run: str
) -> None:
    options: dict[str, Any] = {"evaluate_every": 2, "keep_best": LOSS, "threads": 1}
    local = go(judged(), home, run, **options)["align"]
    remote = go(judged(), store_home, run, workers=1, evaluate_in_task=True, **options)["align"]
    assert remote.metrics["best_step"] == local.metrics["best_step"]
    figures = losses(store_home, run, key=LOSS)
    assert sorted(step for step, _ in figures) == [2, 4, 6]
    assert dict(figures) == pytest.approx(dict(losses(home, run, key=LOSS)), rel=1e-3)
    assert results.records_of(
        remote.artifact, artifacts.describe(remote.artifact).digest, store_home
    )


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


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bucket_that_is_deleted_ends_workers_with_one_line(
    ray_session: None, store_home: Path, run: str, bucket: str, workers: int
) -> None:
    """The workers are started again a few times, because a store may come back."""
    fs = storage.find_store("s3://")[0].fs

    def delete() -> None:
        until = time.monotonic() + 120
        while len(losses(store_home, run)) < 5 and time.monotonic() < until:
            time.sleep(0.2)
        fs.rm(bucket, recursive=True)  # with the bucket itself

    deleting = threading.Thread(target=delete)
    deleting.start()
    with pytest.raises(ResourceError, match=f"the bucket {bucket!r} does not exist") as raised:
        go(llava(2_000), store_home, run, workers=workers, checkpoint_every=200)
    deleting.join()
    assert "\n" not in str(raised.value)
