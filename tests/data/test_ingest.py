"""The Ray pipeline matches one process: any world size and readers, after any resume."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest

from bridgework import __version__
from bridgework.data import ray_ingest
from bridgework.data.ray_ingest import PlanIngest, from_ray, prefetch, to_block
from bridgework.data.reader import ReaderConfig, Row, local
from bridgework.errors import ResourceError, RunError, SpecError

pytestmark = pytest.mark.usefixtures("ray_session")


def comparable(steps: Iterable[list[Row]]) -> list[list[tuple[object, ...]]]:
    """Return all fields of the rows, comparable."""
    return [
        [
            (
                *(v for n, v in vars(r).items() if n != "images"),
                r.images.dtype,
                r.images.shape,
                r.images.tobytes(),
            )
            for r in rows
        ]
        for rows in steps
    ]


@pytest.mark.parametrize(
    ("world", "start", "readers"),
    [(1, 4, 1), (2, 0, 2), (3, 7, 1)],  # 3 ranks own 2, 1 and 1 of the 4 lanes
)
def test_ray_pipeline_matches_one_process(
    feed: ReaderConfig, world: int, start: int, readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ray_ingest, "ITEMS_PER_BLOCK", 3
    )  # items enter Ray in blocks and leave one by one
    splits = PlanIngest(feed, lambda: start, readers).configure({}, world)

    def consume(rank: int) -> list[list[tuple[object, ...]]]:
        return comparable(
            from_ray(prefetch(splits[rank]["train"]), rank=rank, world=world, start=start)
        )

    with ThreadPoolExecutor(world) as pool:
        ranks = list(pool.map(consume, range(world)))
    assert ranks == [
        comparable(local(feed, rank=rank, world=world, start=start)) for rank in range(world)
    ]
    assert [len(rank) for rank in ranks] == [feed.steps - start] * world


def test_more_workers_than_lanes_are_rejected_before_anything_starts(feed: ReaderConfig) -> None:
    with pytest.raises(SpecError, match="at most as many workers as lanes"):
        PlanIngest(feed, lambda: 0).configure({}, 5)


def test_rows_of_another_rank_world_size_or_step_stop_the_run(feed: ReaderConfig) -> None:
    rows = next(local(feed, rank=1, world=2, start=4))
    shard = [to_block(rows, rank=1, world=2)]
    assert comparable(from_ray(shard, rank=1, world=2, start=4)) == comparable([rows])
    for rank, world in ((0, 2), (1, 3)):
        with pytest.raises(RunError, match=r"Got \(rank, world\) \[\(1, 2\)\]; expected"):
            next(from_ray(shard, rank=rank, world=world, start=4))
    with pytest.raises(RunError, match="Got step 4; expected step 5"):
        list(from_ray([*shard, *shard], rank=1, world=2, start=4))


def test_late_listing_of_a_checkpoint_starts_the_workers_again(feed: ReaderConfig) -> None:
    """Rank 0 may find another newest checkpoint than the process that plans the rows."""
    shard = [to_block(next(local(feed, rank=1, world=2, start=4)), rank=1, world=2)]
    with pytest.raises(ResourceError, match="Got step 4; expected step 3"):
        next(from_ray(shard, rank=1, world=2, start=3))


def test_reader_on_a_node_with_another_version_reads_nothing() -> None:
    reader = ray_ingest._Windows(b"of another version", 1, 0, "0.0.9")
    with pytest.raises(RunError, match=rf"Got {__version__}; expected 0\.0\.9\. Fix: install"):
        reader(pa.table({"item": [0]}))
