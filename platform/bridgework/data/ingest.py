"""The plan through Ray Data: one item (rank, window) goes to a reader actor and comes back as one block of rows.

Ray Train calls `PlanIngest.configure` at every start of a worker group, with the world size of that moment. The blocks
of rank 0, 1, .., 0, 1, .. come in order and have equal row counts, so the split, which hands the next block to the rank
with the fewest rows, hands each rank its own. Every block says whose it is, and `from_ray` believes nothing else.
"""

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from ray.train import DataConfig

from bridgework.data.batch import Row
from bridgework.data.reader import Feed
from bridgework.errors import RunError
from bridgework.system import Layout

PADDING = Row(-1, 0, "", 0, [], [], np.empty(0, np.uint8))  # only makes the blocks of all ranks equally long
READER_CPUS = 0.25  # `readers` is the knob: on a small machine a whole CPU each would not fit beside the workers
BLOCK = pa.schema(
    [
        ("rank", pa.int32()),
        ("world", pa.int32()),
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
        ("shape", pa.list_(pa.int32())),  # of the images: four sizes are uint8 pixels, three are float16 features
        ("images", pa.large_list(pa.uint8())),  # bytes of the array, C order; a window can exceed the 2 GB of `list`
    ]
)
FIELDS = tuple(name for name in BLOCK.names if name not in ("rank", "world", "shape", "images"))  # of a Row


class PlanIngest(DataConfig):
    """Feeds the workers of one stage; the `datasets` that a trainer was given only name the split ("train").

    `start` is asked at every start of a worker group for the next step: that of the newest complete checkpoint.
    """

    def __init__(self, feed: Feed, start: Callable[[], int], readers: int = 1) -> None:
        super().__init__()
        self.feed = feed
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
        """One iterator per rank, for `from_ray`. Raises SpecError where there are more ranks than lanes."""
        start = self.start()
        self.feed.plan().lanes_of(world_size - 1, world_size)
        span = self.feed.mixture.window
        windows = -(-self.feed.steps // span) - start // span
        items = max(windows * world_size, 0)
        # not `range`, which would read each number in a task that asks for a whole CPU
        blocks = ray.data.from_items(list(range(items)), override_num_blocks=items or None).map_batches(
            _Windows,
            fn_constructor_args=(self.feed, world_size, start),
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=self.readers),
            num_cpus=READER_CPUS,
        )
        blocks.context.execution_options.preserve_order = True
        blocks.context.target_max_block_size = None  # a window stays one block, however large
        return [{"train": split} for split in blocks.streaming_split(world_size, equal=False)]


class _Windows:
    """The actor: item i is window start // span + i // world of rank i % world."""

    def __init__(self, feed: Feed, world: int, start: int) -> None:
        self.reader = feed.open()
        self.world = world
        self.start = start

    def __call__(self, item: pa.Table) -> pa.Table:
        feed, plan = self.reader.feed, self.reader.plan
        window, rank = divmod(item["item"][0].as_py(), self.world)
        t, span = self.start // feed.mixture.window + window, feed.mixture.window
        steps = self.reader.window(plan.lanes_of(rank, self.world), t, first_step=self.start)
        # the rows of all steps of the window: packed, those that are left of it may hold more than their share
        in_window = min(span, feed.steps - t * span) * feed.batch // feed.mixture.lanes
        most = len(plan.lanes_of(0, self.world)) * in_window
        return to_block([row for rows in steps for row in rows], rank=rank, world=self.world, length=most)


def to_block(rows: list[Row], *, rank: int, world: int, length: int) -> pa.Table:
    """`rows` as a table of `length` rows of BLOCK; what is missing is padding."""
    rows = rows + [PADDING] * (length - len(rows))
    ends = np.cumsum([0] + [row.images.nbytes for row in rows])
    pixels = np.concatenate([np.frombuffer(row.images, np.uint8) for row in rows])
    columns = {
        "rank": [rank] * length,
        "world": [world] * length,
        **{name: [getattr(row, name) for row in rows] for name in FIELDS},
        "shape": [row.images.shape for row in rows],
        "images": pa.LargeListArray.from_arrays(ends, pixels),
    }
    return pa.table(columns, BLOCK)


def from_ray(shard: ray.data.DataIterator, *, rank: int, world: int, start: int) -> Iterator[list[Row]]:
    """The rows of one rank for each step from `start` on: what `local` gives.

    Raises RunError for a block of another rank, world or step: the run must stop rather than train on other data.
    """
    step = start
    whole: Any = None  # a block at a time; Ray's annotation knows numbers alone
    for block in shard.iter_batches(batch_size=whole, batch_format="pyarrow"):
        owners = {(r.as_py(), w.as_py()) for r, w in zip(block["rank"], block["world"], strict=True)}
        if owners != {(rank, world)}:
            raise RunError(f"rank {rank} of {world} was handed rows of (rank, world) {sorted(owners)}: not its own")
        for found, rows in groupby(_rows(block), key=lambda row: row.step):
            if found != step:
                raise RunError(f"rank {rank} was handed rows of step {found} where step {step} is next")
            yield list(rows)
            step += 1


def _rows(block: pa.Table) -> Iterator[Row]:
    """The rows of a block, without padding; their images are read-only views that keep the block's memory."""
    for part in block.to_batches():
        flat = np.split(part["images"].values.to_numpy(), part["images"].offsets.to_numpy())[1:-1]
        fields = part.select([*FIELDS, "shape"]).to_pylist()
        for image, row in zip(flat, fields, strict=True):
            if row["step"] != PADDING.step:
                shape, rejected = row.pop("shape"), row.pop("rejected")
                typed = image.view(np.uint8 if len(shape) == 4 else np.float16)
                yield Row(
                    **{**row, "layouts": tuple(Layout(*layout) for layout in row["layouts"])},
                    images=typed.reshape(shape),
                    rejected=None if rejected is None else (rejected[0], rejected[1]),
                )
