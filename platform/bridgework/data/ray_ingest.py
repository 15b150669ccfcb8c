"""Read the plan with Ray Data: actors turn each item (rank, window) into a block of one row.

Ray Train calls `PlanIngest.configure` at every start of a worker group, with the world size of that
moment. The blocks of rank 0, 1, .., 0, 1, .. arrive in order and hold one row each. The split gives
the next block to the rank with the fewest rows, so each rank gets its own blocks. Every block
contains its rank and world size, and `from_ray` checks them.

Ray unpickles this module's objects in several processes per stage. Only readers and workers need
torch, which takes seconds to import, so the config stays pickled bytes in all others.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
from ray import cloudpickle
from ray.train import DataConfig

from bridgework import __version__, ray_metrics, ray_utils
from bridgework.data.plan.plan import lanes_of
from bridgework.errors import ResourceError, RunError
from bridgework.system import Layout

if TYPE_CHECKING:
    from bridgework.data.collate import Row
    from bridgework.data.reader import Reader, ReaderConfig

# `readers` sets the number: on a small machine, one CPU per reader would not fit next to the
# workers
READER_CPUS = 0.25
COUNTER_CPUS = 0.01
ITEMS_PER_BLOCK = 1_024  # items that enter Ray together: CLIP on 256 GPUs has 6 million
FIELDS = pa.struct(  # fields of a Row, unchanged
    [
        ("step", pa.int64()),
        ("place", pa.int64()),
        ("key", pa.string()),
        ("source", pa.int32()),
        ("ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("layouts", pa.list_(pa.list_(pa.int32()))),
        ("instruction", pa.list_(pa.int32())),
        ("rejected", pa.list_(pa.list_(pa.int32()))),  # ids and labels, or null
        ("num_images", pa.int32()),
        ("replaces", pa.string()),
    ]
)
IMAGES = pa.struct(
    [
        ("shape", pa.list_(pa.int32())),  # four sizes: uint8 pixels; three: float16 features
        # bytes of the array, C order; large, because a window can exceed the 2 GB of `list`
        ("images", pa.large_list(pa.uint8())),
    ]
)
ROW = pa.struct([*FIELDS, *IMAGES])
BLOCK = pa.schema([("rank", pa.int32()), ("world", pa.int32()), ("rows", pa.large_list(ROW))])


class PlanIngest(DataConfig):
    """Feeds the workers of one stage; the `datasets` of the trainer only name the split ("train").

    `start` is called at every start of a worker group and returns the next step, from the newest
    complete checkpoint.
    """

    def __init__(self, feed: "ReaderConfig", start: Callable[[], int], readers: int = 1) -> None:
        super().__init__()
        self.feed: bytes = cloudpickle.dumps(feed)
        self.lanes, self.span, self.steps = feed.mixture.lanes, feed.mixture.window, feed.steps
        self.start = start
        self.readers = readers

    def configure(
        self,
        datasets: dict[str, Any],
        world_size: int,
        worker_handles: list[Any] | None = None,
        worker_node_ids: list[str] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Return one iterator per rank, for `prefetch`.

        Raises SpecError if there are more ranks than lanes.
        """
        start = self.start()
        lanes_of(self.lanes, world_size - 1, world_size)
        items = max((-(-self.steps // self.span) - start // self.span) * world_size, 0)
        blocks = range_dataset(items).map_batches(
            _Windows,
            fn_constructor_args=(self.feed, world_size, start, __version__),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self.readers),
            num_cpus=READER_CPUS,
        )
        blocks.context.execution_options.preserve_order = True
        # 1 byte, so that each row is passed on at once as a block of its own
        blocks.context.target_max_block_size = 1
        return [{"train": split} for split in blocks.streaming_split(world_size, equal=False)]


def range_dataset(items: int) -> ray.data.Dataset:
    """Return a dataset of the numbers 0 .. items - 1 in a column `item`.

    They enter in blocks of ITEMS_PER_BLOCK, because a block of one item costs a millisecond before
    the first read. They leave one by one if the context's maximum block size is 1 byte.
    """
    starts = range(0, max(items, 1), ITEMS_PER_BLOCK)
    blocks = [
        pa.table({"item": np.arange(start, min(start + ITEMS_PER_BLOCK, items))})
        for start in starts
    ]
    # not `ray.data.range`, which would read each number in a task that requests a CPU
    numbers: ray.data.Dataset = ray.data.from_blocks(blocks)
    # one task at a time; otherwise thousands would wait at once, each in its own process
    return numbers.map_batches(
        _identity,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=COUNTER_CPUS,
        compute=ray.data.TaskPoolStrategy(size=1),
    )


def _identity(item: pa.Table) -> pa.Table:
    """Return the item unchanged.

    Ray splits the task's output and applies backpressure from the readers.
    """
    return item


class _Windows:
    """Actor that reads item i: window start // span + i // world of rank i % world."""

    def __init__(self, feed: bytes, world: int, start: int, version: str) -> None:
        """version: of bridgework in the command; every call fails on a node with another."""
        self.world = world
        self.start = start
        self.version = version
        if version == __version__:
            self.reader: Reader = cloudpickle.loads(feed).open()

    def __call__(self, item: pa.Table) -> pa.Table:
        ray_utils.check_version(self.version)
        plan = self.reader.plan
        window, rank = divmod(item["item"][0].as_py(), self.world)
        t = self.start // self.reader.feed.mixture.window + window
        started = time.perf_counter()
        steps = self.reader.window(plan.lanes_of(rank, self.world), t, first_step=self.start)
        rows = [row for rows in steps for row in rows]
        ray_metrics.add("bridgework_data_read_seconds", time.perf_counter() - started)
        ray_metrics.add("bridgework_data_rows", len(rows))
        return to_block(rows, rank=rank, world=self.world)


def to_block(rows: "list[Row]", *, rank: int, world: int) -> pa.Table:
    """Return `rows` as a table of one row, with the schema BLOCK."""
    ends = np.cumsum([0] + [row.images.nbytes for row in rows])
    pixels = np.concatenate([np.frombuffer(row.images, np.uint8) for row in rows])
    columns = {
        **{field.name: [getattr(row, field.name) for row in rows] for field in FIELDS},
        "shape": [row.images.shape for row in rows],
        "images": pa.LargeListArray.from_arrays(ends, pixels),
    }
    struct = pa.StructArray.from_arrays(
        [pa.array(columns[f.name], f.type) for f in ROW], fields=list(ROW)
    )
    return pa.table(
        {
            "rank": [rank],
            "world": [world],
            "rows": pa.LargeListArray.from_arrays([0, len(rows)], struct),
        },
        BLOCK,
    )


def prefetch(shard: ray.data.DataIterator) -> Iterator[pa.Table]:
    """Return the blocks of one rank.

    A thread requests the first one now, because Ray then starts the readers.
    """
    batch_size: Any = None  # one block at a time; Ray's annotation only allows numbers
    blocks = iter(shard.iter_batches(batch_size=batch_size, batch_format="pyarrow"))
    executor = ThreadPoolExecutor(1)
    first = executor.submit(next, blocks, None)
    executor.shutdown(wait=False)

    def all_blocks() -> Iterator[pa.Table]:
        block = first.result()
        while block is not None:
            yield block
            block = next(blocks, None)

    return all_blocks()


def from_ray(
    blocks: Iterable[pa.Table], *, rank: int, world: int, start: int
) -> "Iterator[list[Row]]":
    """Yield the rows of one rank for each step from `start` on, as `reader.local` does.

    Raises RunError for a block of another rank, world size or step, so that the run never trains on
    other data; ResourceError, after which the workers start again, for blocks that begin at another
    step.
    """
    step, first = start, True
    for block in blocks:
        owners = [
            (r.as_py(), w.as_py()) for r, w in zip(block["rank"], block["world"], strict=True)
        ]
        if set(owners) != {(rank, world)}:
            raise RunError(
                f"rank {rank} of {world}: received rows of another rank. Got (rank, world) "
                f"{sorted(set(owners))}; expected {(rank, world)}. Fix: resume the run"
            )
        for number, rows in groupby(_rows(block), key=lambda row: row.step):
            if first and number != step:
                raise ResourceError(
                    f"rank {rank} of {world}: the rows begin at another step than this worker, "
                    f"because the newest checkpoint was listed late. Got step {number}; expected "
                    f"step {step}. Fix: resume the run"
                )
            if number != step:
                raise RunError(
                    f"rank {rank} of {world}: received rows out of order. Got step {number}; "
                    f"expected step {step}. Fix: resume the run"
                )
            yield list(rows)
            step, first = step + 1, False


def _rows(block: pa.Table) -> "Iterator[Row]":
    """Yield the rows of a block; their images are read-only views that keep the block in memory."""
    from bridgework.data.collate import Row

    for part in block["rows"].chunks:
        rows = pa.RecordBatch.from_struct_array(part.flatten())
        flat = np.split(rows["images"].values.to_numpy(), rows["images"].offsets.to_numpy())[1:-1]
        fields = rows.drop_columns("images").to_pylist()
        for image, row in zip(flat, fields, strict=True):
            shape, rejected = row.pop("shape"), row.pop("rejected")
            typed = image.view(np.uint8 if len(shape) == 4 else np.float16)
            yield Row(
                **{**row, "layouts": tuple(Layout(*layout) for layout in row["layouts"])},
                images=typed.reshape(shape),
                rejected=None if rejected is None else (rejected[0], rejected[1]),
            )
