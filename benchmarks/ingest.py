"""Our reader against webdataset: the same pictures, the same decoder, tokenizer and collation, paired runs.

pip install -e '.[bench]'
python -m benchmarks.ingest                    about three minutes on two idle cores
python -m benchmarks.ingest --json             one line of JSON instead of the table

local        bridgework.data.reader.local, in the process that trains
ray          the same plan through Ray Data with one reader actor (ray.init is not in its times)
wds-0        webdataset under a torch DataLoader, num_workers=0: in the process that trains
wds-1        the same with num_workers=1

CPU-ms an image are user + system time of the whole process tree, Ray's daemons included, from the warm-up on. Each run
is a process of its own; a round runs every pipeline once, the next in reverse order; ratios are taken inside a round.
Ours shuffles the whole dataset exactly and can resume anywhere; webdataset shuffles shards and a buffer of 1,000.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader

from bridgework.data.batch import Batch, Row, collate
from bridgework.data.ingest import PlanIngest, from_ray
from bridgework.data.reader import Feed, local
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.shards import open_dataset, write
from bridgework.data.streams import Streams
from bridgework.data.tokens import load_tokenizer
from bridgework.data.transforms import read_square
from bridgework.models import EfficientNetConfig, LanguageConfig, Linear, PrefixVLM
from bridgework.system import Mixture, Source

ROWS = 4_000
DISTINCT = 500  # pictures; the rows repeat them
SIDE = 256  # pixels of a stored picture
LM = LanguageConfig(width=32, depth=1, heads=2, kv_heads=2, ffn=64, vocab=320, context=512, tokenizer="bytes")
MODEL = PrefixVLM(vision=EfficientNetConfig(image_size=224, grid=2, fit="crop"), bridge=Linear(), language=LM)
BATCH = 32
WINDOW = 16  # steps: a reader decodes 512 rows before it gives the first
MIXTURE = Mixture(sources=(Source(name="pictures", dataset="-"),), template="plain", lanes=16, window=WINDOW)
TAR_ROWS = 1_000
WARM = 32  # batches before the clock starts: two windows
TIMED = 96
PIPELINES = ("local", "wds-0", "wds-1", "ray")
CLIPART = Path("examples/data/clipart")


@dataclass(frozen=True)
class Figures:
    """One run of one pipeline."""

    cpu_ms: float  # per image, user + system, of the process tree
    images_per_s: float
    first_s: float  # from the call that builds the pipeline to the first batch


# --- the same data, twice --------------------------------------------------------------------------------------------


def pictures() -> Iterator[Sample]:
    """ROWS pairs of a JPEG (about 20 kB) and a caption: waves and grain, so that it costs what a photograph costs."""
    draw = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    files = []
    for _ in range(DISTINCT):
        turns, phase = draw.uniform(1, 9, (2, 3)), draw.uniform(0, 6, 3)
        waves = 127 + 80 * np.sin(6 * (turns[0] * x[..., None] + turns[1] * y[..., None]) + phase)
        grain = draw.normal(0, 9, (SIDE, SIDE, 1))
        file = io.BytesIO()
        Image.fromarray((waves + grain).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=88)
        files.append(file.getvalue())
    for row in range(ROWS):
        yield pair(f"{row:06d}", files[row % DISTINCT], f"picture {row} of waves in three colours, under fine grain")


def store(folder: Path, dataset: Path | None) -> str:
    """Writes tar shards of the dataset's pairs into `folder`, and the synthetic dataset itself if none is given."""
    if dataset is None:
        dataset = folder / "dataset"
        write(pictures(), str(dataset), source="benchmarks.ingest", licence="CC0-1.0", made_by="benchmarks.ingest")
    samples = open_dataset(str(dataset)).samples()
    shard = 0
    while rows := list(islice(samples, TAR_ROWS)):
        with tarfile.open(folder / f"pictures-{shard:03d}.tar", "w") as tar:
            for row, sample in enumerate(rows, shard * TAR_ROWS):
                for suffix, content in (("img", sample.images[0]), ("txt", sample.text.encode())):
                    entry = tarfile.TarInfo(f"{row:06d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
        shard += 1
    return str(dataset)


# --- the pipelines ---------------------------------------------------------------------------------------------------


def feed(dataset: str) -> Feed:
    return Feed(
        mixture=MIXTURE,
        datasets=(dataset,),
        digests=(open_dataset(dataset).manifest.digest,),
        batch=BATCH,
        steps=10 * (WARM + TIMED),  # no run gets near the end: what a pipeline reads ahead is the same before and after
        seed=0,
        model=MODEL,
    )


def ours(steps: Iterator[list[Row]]) -> Iterator[Batch]:
    pad = load_tokenizer("bytes").pad_token_id
    for rows in steps:
        yield collate(rows, pad_id=pad)


def through_ray(dataset: str) -> Iterator[Batch]:
    [split] = PlanIngest(feed(dataset), lambda: 0).configure({}, 1)
    return ours(from_ray(split["train"], rank=0, world=1, start=0))


class ToBatch:
    """What a webdataset user would write: rows of `samples` through the same functions as ours."""

    def __init__(self) -> None:
        self.streams = Streams.of(MODEL, MIXTURE)

    def row(self, sample: dict[str, Any]) -> Row:
        parts = [Part("caption", image=0), Part("caption", text=sample["txt"].decode())]
        encoded = self.streams.train(parts)
        images = read_square(sample["img"], MODEL.pixels)[None]
        return Row(0, 0, sample["__key__"], 0, encoded.ids, encoded.labels, images)

    def collate(self, rows: list[Row]) -> Batch:
        return collate(rows, pad_id=self.streams.tokenizer.pad_token_id)


def by_webdataset(folder: Path, workers: int) -> Iterator[Batch]:
    to_batch = ToBatch()
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    samples = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
    rows = samples.repeat().shuffle(1_000).map(to_batch.row)
    return iter(DataLoader(rows, batch_size=BATCH, num_workers=workers, collate_fn=to_batch.collate))


def pipeline(name: str, folder: Path, dataset: str) -> Callable[[], Iterator[Batch]]:
    """What builds the pipeline; what it may take for granted, such as Ray, runs when this returns."""
    if name.startswith("wds"):
        return lambda: by_webdataset(folder, int(name[-1]))
    if name == "local":
        return lambda: ours(local(feed(dataset), rank=0, world=1, start=0))
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return lambda: through_ray(dataset)


# --- measuring -------------------------------------------------------------------------------------------------------


def cpu_s() -> float:
    """User and system time of this process, its descendants that live, and those that were waited for."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


def measure(build: Callable[[], Iterator[Batch]]) -> Figures:
    torch.set_num_threads(1)
    began = time.perf_counter()
    batches = build()
    next(batches)
    first_s = time.perf_counter() - began
    taken(batches, WARM - 1)
    wall, cpu = time.perf_counter(), cpu_s()
    images = taken(batches, TIMED)
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    return Figures(1e3 * cpu / images, images / wall, first_s)


def taken(batches: Iterator[Batch], count: int) -> int:
    """Takes `count` batches; how many images they held."""
    return sum(len(batch.keys) for batch in islice(batches, count))


def run(name: str, folder: Path, dataset: str) -> Figures:
    """One run in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--only", name, "--folder", str(folder), "--data", dataset]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    [said] = [line for line in done.stdout.splitlines() if line.startswith("{")]  # Ray has its say there too
    return Figures(**json.loads(said))


def spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f}  ({min(values):.{digits}f} .. {max(values):.{digits}f})"


def table(rounds: list[dict[str, Figures]]) -> Table:
    """Median and range over the rounds; ratios are those of the pairs."""
    shown = Table("pipeline", "CPU-ms / image", "/ wds-0", "/ wds-1", "images / s", "first batch, s", box=None)
    for name in PIPELINES:
        runs = [figures[name] for figures in rounds]
        ratios = [[r[name].cpu_ms / r[base].cpu_ms for r in rounds] for base in ("wds-0", "wds-1")]
        shown.add_row(
            name,
            spread([r.cpu_ms for r in runs], 2),
            *(spread(ratio, 2) for ratio in ratios),
            spread([r.images_per_s for r in runs], 0),
            spread([r.first_s for r in runs], 2),
        )
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=CLIPART if CLIPART.is_dir() else None, help="a dataset of pairs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    parser.add_argument("--only", choices=PIPELINES, help="one run of one pipeline, in this process")
    parser.add_argument("--folder", type=Path, help="with --only: where the tar shards are")
    given = parser.parse_args()
    if given.only:
        print(json.dumps(vars(measure(pipeline(given.only, given.folder, str(given.data))))))
        return
    rounds = []
    with tempfile.TemporaryDirectory() as folder:
        dataset = store(Path(folder), given.data)
        for number in range(given.rounds):
            order = PIPELINES if number % 2 == 0 else PIPELINES[::-1]
            rounds.append({name: run(name, Path(folder), dataset) for name in order})
    if given.json:
        print(json.dumps([{name: vars(figures) for name, figures in one.items()} for one in rounds]))
    else:
        Console().print(table(rounds))


if __name__ == "__main__":
    main()
