"""Read amplification of our reader, and row groups per batch.

python -m benchmarks.ingest.reading      2 minutes; --quick: half a minute, the smallest files alone

The real plan and reader run on a simulated dataset (a manifest, and files of one size that are
never written); a fetch of a row group is counted instead of done. Bytes read per byte used are
measured in the middle of a run, after the first windows. They are given for a reader of all lanes
(one worker, or Ray's one reader) and of a quarter of them (one of four workers that read in
process). Row groups are those of the rows of one batch.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean

from rich.console import Console
from rich.table import Table

from benchmarks.ingest.feeding import Bytes, BytesReader
from benchmarks.ingest.work import MODEL
from bridgework.data.dataset import Dataset
from bridgework.data.manifest import FILE, Manifest, Shard
from bridgework.data.samples import Sample, pair
from bridgework.system import Mixture, Source

BATCH, GROUP_ROWS, SHARD_ROWS = 256, 32, 4_096
WARM, COUNTED = 4, 8  # windows
FILE_BYTES = (2_000, 70_000, 220_000)  # of benchmarks.ingest: clip art, photos, large
SOURCES = {"one source": (1_000_000,), "four sources at sqrt": (600_000, 250_000, 100_000, 50_000)}
WINDOWS = (16, 64)  # steps


class Simulated(Dataset):
    """A dataset that consists of a manifest; it counts the rows of all requested row groups."""

    def __init__(self, path: str, file: bytes) -> None:
        super().__init__(path)
        self.file = file
        self.fetched = 0  # rows

    def read_group(self, shard: int, group: int) -> list[Sample]:
        rows = min(GROUP_ROWS, self.manifest.shards[shard].rows - group * GROUP_ROWS)
        self.fetched += rows
        return [
            pair(f"{self.path}/{shard}/{group}/{row}", self.file, "a picture")
            for row in range(rows)
        ]


@dataclass(frozen=True)
class Found:
    """Result for one mixture and the reader of one rank."""

    read_per_used: float
    groups: float  # of the rank's part of a batch, on average
    fewest: int


def manifest(rows: int, shard_rows: int = SHARD_ROWS) -> Manifest:
    """Return the manifest of a simulated dataset."""
    sizes = [min(shard_rows, rows - first) for first in range(0, rows, shard_rows)]
    shards = tuple(
        Shard(f"shard-{n:05d}.parquet", size, 0, f"{n:064x}") for n, size in enumerate(sizes)
    )
    return Manifest(rows, GROUP_ROWS, shards, "simulated", "none", "benchmarks.ingest.reading")


def simulated(folder: Path, rows: tuple[int, ...], file: bytes) -> Iterator[Simulated]:
    for number, size in enumerate(rows):
        path = folder / f"{number}-{size}"
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(manifest(size).to_json())
        yield Simulated(str(path), file)


def read(
    folder: Path, rows: tuple[int, ...], file_bytes: int, window: int, world: int = 1
) -> Found:
    """Read some windows of the lanes of rank 0."""
    datasets = list(simulated(folder, rows, bytes(file_bytes)))
    sources = tuple(Source(name=f"source-{n}", dataset="-") for n in range(len(rows)))
    feed = Bytes(
        mixture=Mixture(sources=sources, alpha=0.5, window=window),
        datasets=tuple(dataset.path for dataset in datasets),
        digests=tuple(dataset.manifest.digest for dataset in datasets),
        batch=BATCH,
        steps=10_000,
        seed=0,
        model=MODEL,
    )
    reader = BytesReader(feed, feed.plan(), datasets)
    lanes = reader.plan.lanes_of(0, world)
    for t in range(WARM):
        reader.window(lanes, t)
    before = sum(dataset.fetched for dataset in datasets)
    steps = [step for t in range(WARM, WARM + COUNTED) for step in reader.window(lanes, t)]
    groups = [len({row.key.rsplit("/", 1)[0] for row in step}) for step in steps]
    used = sum(len(step) for step in steps)
    return Found(
        (sum(dataset.fetched for dataset in datasets) - before) / used, mean(groups), min(groups)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    heads = (
        "bytes read / used: all lanes",
        "a quarter",
        f"row groups a batch of {BATCH}",
        "fewest",
    )
    table = Table("sources", "a file", "window", *heads, box=None)
    runs = []
    sizes = FILE_BYTES[:1] if given.quick else FILE_BYTES
    for sources, file_bytes, window in product(SOURCES, sizes, WINDOWS):
        with tempfile.TemporaryDirectory() as folder:
            full, quarter = (
                read(Path(folder), SOURCES[sources], file_bytes, window, world) for world in (1, 4)
            )
        table.add_row(
            sources,
            f"{file_bytes / 1e3:.0f} kB",
            f"{window} steps",
            f"{full.read_per_used:.3f}",
            f"{quarter.read_per_used:.3f}",
            f"{full.groups:.0f}",
            str(full.fewest),
        )
        case = {"sources": sources, "file_bytes": file_bytes, "window": window}
        runs += [{**case, "world": 1, **vars(full)}, {**case, "world": 4, **vars(quarter)}]
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
