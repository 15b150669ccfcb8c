"""The plan through Ray Data: one item (rank, window) goes to a reader actor and comes back as one row, its own block.

Ray Train calls `PlanIngest.configure` at every start of a worker group, with the world size of that moment. The blocks
of rank 0, 1, .., 0, 1, .. come in order and hold a row each, so the split, which hands the next block to the rank with
the fewest rows, hands each rank its own. Every block says whose it is, and `from_ray` believes nothing else.

Ray unpickles what is here in a handful of processes at every stage; only readers and workers bring torch, which takes
seconds to import: for all others the feed is sealed.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray.data
from ray import cloudpickle
from ray.train import DataConfig

from bridgework.data.plan.plan import lanes_of
from bridgework.errors import RunError
from bridgework.system import Layout

if TYPE_CHECKING:
    from bridgework.data.collate import Row
    from bridgework.data.reader import Reader, ReaderConfig

READER_CPUS = 0.25  # `readers` is the knob: on a small machine a whole CPU each would not fit beside the workers
COUNTER_CPUS = 0.01
STRETCH = 1_024  # items that enter Ray together: CLIP on 256 GPUs has 6 million
FIELDS = pa.struct(  # of a Row, as they are
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
        ("shown", pa.int32()),
        ("stands_for", pa.string()),
    ]
)
IMAGES = pa.struct(
    [
        ("shape", pa.list_(pa.int32())),  # four sizes are uint8 pixels, three are float16 features
        (
            "images",
            pa.large_list(pa.uint8()),
        ),  # bytes of the array, C order; a window can exceed the 2 GB of `list`
    ]
)
ROW = pa.struct([*FIELDS, *IMAGES])
BLOCK = pa.schema([("rank", pa.int32()), ("world", pa.int32()), ("rows", pa.large_list(ROW))])


class PlanIngest(DataConfig):
    """Feeds the workers of one stage; the `datasets` that a trainer was given only name the split ("train").

    `start` is asked at every start of a worker group for the next step: that of the newest complete checkpoint.
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
        """One iterator per rank, for `ahead`. Raises SpecError where there are more ranks than lanes."""
        start = self.start()
        lanes_of(self.lanes, world_size - 1, world_size)
        items = max((-(-self.steps // self.span) - start // self.span) * world_size, 0)
        blocks = range_dataset(items).map_batches(
            _Windows,
            fn_constructor_args=(self.feed, world_size, start),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self.readers),
            num_cpus=READER_CPUS,
        )
        blocks.context.execution_options.preserve_order = True
        blocks.context.target_max_block_size = (
            1  # byte: each row is handed on at once, as a block of its own
        )
        return [{"train": split} for split in blocks.streaming_split(world_size, equal=False)]


def range_dataset(items: int) -> ray.data.Dataset:
    """The numbers from 0 on in a column `item`; they leave one by one where the context's blocks are of a byte.

    They enter by the stretch: what enters alone costs a millisecond before the first is read.
    """
    first = range(0, max(items, 1), STRETCH)
    stretches = [
        pa.table({"item": np.arange(start, min(start + STRETCH, items))}) for start in first
    ]
    # not `ray.data.range`, which would read each number in a task that asks for a whole CPU
    entered: ray.data.Dataset = ray.data.from_blocks(stretches)
    # one task at a time, or thousands of them would wait side by side, each in a process of its own
    return entered.map_batches(
        _identity,
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=COUNTER_CPUS,
        compute=ray.data.TaskPoolStrategy(size=1),
    )


def _identity(item: pa.Table) -> pa.Table:
    """Ray breaks up what a task gives, and holds the task back where the readers are behind: nothing else is to do."""
    return item


class _Windows:
    """The actor: item i is window start // span + i // world of rank i % world."""

    def __init__(self, feed: bytes, world: int, start: int) -> None:
        self.reader: Reader = cloudpickle.loads(feed).open()
        self.world = world
        self.start = start

    def __call__(self, item: pa.Table) -> pa.Table:
        plan = self.reader.plan
        window, rank = divmod(item["item"][0].as_py(), self.world)
        t = self.start // self.reader.feed.mixture.window + window
        steps = self.reader.window(plan.lanes_of(rank, self.world), t, first_step=self.start)
        return to_block([row for rows in steps for row in rows], rank=rank, world=self.world)


def to_block(rows: "list[Row]", *, rank: int, world: int) -> pa.Table:
    """`rows` as a table of one row, BLOCK."""
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
    """The blocks of one rank. The first is asked for now, in a thread: only then does Ray start the readers."""
    whole: Any = None  # a block at a time; Ray's annotation knows numbers alone
    blocks = iter(shard.iter_batches(batch_size=whole, batch_format="pyarrow"))
    asking = ThreadPoolExecutor(1)
    first = asking.submit(next, blocks, None)
    asking.shutdown(wait=False)

    def all_blocks() -> Iterator[pa.Table]:
        block = first.result()
        while block is not None:
            yield block
            block = next(blocks, None)

    return all_blocks()


def from_ray(
    blocks: Iterable[pa.Table], *, rank: int, world: int, start: int
) -> "Iterator[list[Row]]":
    """The rows of one rank for each step from `start` on, from its blocks: what `local` gives.

    Raises RunError for a block of another rank, world or step: the run must stop rather than train on other data.
    """
    step = start
    for block in blocks:
        owners = [
            (r.as_py(), w.as_py()) for r, w in zip(block["rank"], block["world"], strict=True)
        ]
        if set(owners) != {(rank, world)}:
            raise RunError(
                f"rank {rank} of {world} was handed rows of (rank, world) {sorted(set(owners))}: not its own"
            )
        for found, rows in groupby(_rows(block), key=lambda row: row.step):
            if found != step:
                raise RunError(
                    f"rank {rank} was handed rows of step {found} where step {step} is next"
                )
            yield list(rows)
            step += 1


def _rows(block: pa.Table) -> "Iterator[Row]":
    """The rows of a block; their images are read-only views that keep the block's memory."""
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
