"""Our two readers: in the training process, and the same plan through Ray Data."""

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.ingest.store import Store
from benchmarks.ingest.work import BATCH, MODEL, Case
from bridgework.data.collate import Batch, Row, collate
from bridgework.data.dataset import open_dataset
from bridgework.data.reader import Reader, ReaderConfig, local
from bridgework.data.row_groups import StoredRow
from bridgework.data.tokenization import SampleEncoder

EPOCHS = 10  # no run gets near the end, so the read-ahead is the same throughout


class Bytes(ReaderConfig):
    """Reader config of a case that only reads."""

    def open(self) -> Reader:
        return BytesReader(self, self.plan(), [open_dataset(path) for path in self.datasets])


class BytesReader(Reader):
    """Returns the stored files undecoded, as pixels of an image of height 1."""

    def _row(self, planned: Any, stored: StoredRow) -> Row:
        file = np.frombuffer(stored.sample.images[0], np.uint8).reshape(1, 1, 1, -1)
        return Row(-1, -1, stored.sample.key, planned.source, [0], [0], file)


def feed(case: Case, store: Store) -> ReaderConfig:
    """Return the reader config of a case; creates missing datasets."""
    steps = EPOCHS * store.rows // BATCH
    kind = ReaderConfig if case.decodes else Bytes
    paths = tuple(str(store.dataset(part)) for part in case.parts)
    digests = tuple(open_dataset(path).manifest.digest for path in paths)
    return kind(
        mixture=case.mixture,
        datasets=paths,
        digests=digests,
        batch=BATCH,
        steps=steps,
        seed=0,
        model=MODEL,
    )


def in_process(case: Case, store: Store, start: int = 0) -> Iterator[Batch | Sequence[Row]]:
    yield from _batches(case, local(feed(case, store), rank=0, world=1, start=start))


def through_ray(case: Case, store: Store, start: int = 0) -> Iterator[Batch | Sequence[Row]]:
    """Yield the batches of a running Ray."""
    from bridgework.data.ray_ingest import PlanIngest, from_ray, prefetch

    [split] = PlanIngest(feed(case, store), lambda: start).configure({}, 1)
    yield from _batches(case, from_ray(prefetch(split["train"]), rank=0, world=1, start=start))


def _batches(case: Case, steps: Iterator[list[Row]]) -> Iterator[Batch | Sequence[Row]]:
    pad = SampleEncoder.of(MODEL, case.mixture).tokenizer.pad_token_id
    for rows in steps:
        yield collate(rows, pad_id=pad) if case.decodes else rows


def start_ray() -> None:
    import ray

    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
