"""The other libraries in typical use: an endless stream of shuffled epochs, mixed from sources.

Each shuffles by its default: webdataset and datasets the order of shards and a buffer of 1,000
samples, mosaicml-streaming complete shards. Each decodes in the collate function of its DataLoader,
in the worker if any.
"""

import importlib.util
import io
import os
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from benchmarks.ingest.store import SHARDS, Raw, in_shards
from benchmarks.ingest.work import BATCH

BUFFER = 1_000  # samples

Finish = Callable[[list[Raw]], Any]  # makes a batch of samples


class Peer(Protocol):
    """A library."""

    module: str  # required import
    how_to_resume: str

    def load(self) -> Any:
        """Import the library."""

    def write(self, raws: Iterable[Raw], folder: Path) -> None:
        """Write samples in the format of the library."""

    def stream(
        self, folders: Sequence[Path], sizes: Sequence[int], finish: Finish, workers: int
    ) -> Iterator[Any]:
        """Yield batches endlessly, from sources in proportion to the square root of their sizes."""

    def state(self, folder: Path, step: int) -> Any:
        """Return the state for a checkpoint after `step` batches of the first epoch."""

    def resumed(self, folder: Path, state: Any, finish: Finish) -> Iterator[Any]:
        """Yield the remaining batches of the first epoch."""


def _loader(
    samples: Any, raw: Callable[[Any], Raw], finish: Finish, workers: int = 0
) -> Iterator[Any]:
    return iter(
        DataLoader(
            samples,
            BATCH,
            num_workers=workers,
            collate_fn=lambda batch: finish([raw(each) for each in batch]),
        )
    )


def _shares(sizes: Sequence[int]) -> list[float]:
    roots = [size**0.5 for size in sizes]
    return [root / sum(roots) for root in roots]


class WebDataset:
    """webdataset: tar shards. Sources are mixed by its RandomMix."""

    module = "webdataset"
    how_to_resume = "reads and drops"

    def load(self) -> Any:
        return importlib.import_module("webdataset")

    def write(self, raws: Iterable[Raw], folder: Path) -> None:
        folder.mkdir()
        stored = list(raws)
        for number, shard in in_shards(stored, -(-len(stored) // SHARDS)):
            with tarfile.open(folder / f"{number:03d}.tar", "w") as tar:
                for raw in shard:
                    for suffix, content in (("img", raw.image), ("txt", raw.text.encode())):
                        entry = tarfile.TarInfo(f"{raw.key}.{suffix}")
                        entry.size = len(content)
                        tar.addfile(entry, io.BytesIO(content))

    def stream(
        self, folders: Sequence[Path], sizes: Sequence[int], finish: Finish, workers: int
    ) -> Iterator[Any]:
        sources = [self._epoch(folder).repeat() for folder in folders]
        mixed = sources[0] if len(sources) == 1 else self.load().RandomMix(sources, _shares(sizes))
        return _loader(mixed, self._raw, finish, workers)

    def state(self, folder: Path, step: int) -> int:
        return step

    def resumed(self, folder: Path, state: int, finish: Finish) -> Iterator[Any]:
        rest = islice(self._epoch(folder), state * BATCH, None)  # not decoded
        while batch := list(islice(rest, BATCH)):
            yield finish([self._raw(each) for each in batch])

    def _epoch(self, folder: Path) -> Any:
        urls = sorted(str(path) for path in folder.glob("*.tar"))
        shards = self.load().WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        return shards.shuffle(BUFFER, seed=0)

    @staticmethod
    def _raw(sample: dict[str, Any]) -> Raw:
        return Raw(sample["__key__"], sample["img"], sample["txt"].decode())


class Datasets:
    """Hugging Face datasets: Parquet files, streamed. Sources are mixed by interleave_datasets."""

    module = "datasets"
    how_to_resume = "state_dict"

    def load(self) -> Any:
        os.environ["HF_HUB_OFFLINE"] = "1"
        library = importlib.import_module("datasets")
        # the default is 5 s at the end of an epoch; these epochs take seconds
        library.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
        return library

    def write(self, raws: Iterable[Raw], folder: Path) -> None:
        folder.mkdir()
        stored = list(raws)
        for number, shard in in_shards(stored, -(-len(stored) // SHARDS)):
            table = pa.Table.from_pylist([raw._asdict() for raw in shard])
            # the row group size of `push_to_hub`
            pq.write_table(table, folder / f"{number:03d}.parquet", row_group_size=100)

    def stream(
        self, folders: Sequence[Path], sizes: Sequence[int], finish: Finish, workers: int
    ) -> Iterator[Any]:
        sources = [self._epoch(folder) for folder in folders]
        if len(sources) > 1:
            endless = [source.repeat(None) for source in sources]
            mixed = self.load().interleave_datasets(endless, _shares(sizes), seed=0)
            yield from _loader(mixed, self._raw, finish, workers)
        for epoch in count():
            sources[0].set_epoch(epoch)
            yield from _loader(sources[0], self._raw, finish, workers)

    def state(self, folder: Path, step: int) -> Any:
        samples = self._epoch(folder)
        for _ in islice(_loader(samples, self._raw, list), step):
            pass
        return samples.state_dict() if step else None

    def resumed(self, folder: Path, state: Any, finish: Finish) -> Iterator[Any]:
        samples = self._epoch(folder)
        if state is not None:
            samples.load_state_dict(state)
        yield from _loader(samples, self._raw, finish)

    def _epoch(self, folder: Path) -> Any:
        files = sorted(str(path) for path in folder.glob("*.parquet"))
        rows = self.load().load_dataset("parquet", data_files=files, split="train", streaming=True)
        return rows.shuffle(0, buffer_size=BUFFER)

    @staticmethod
    def _raw(sample: dict[str, Any]) -> Raw:
        return Raw(**sample)


class Streaming:
    """mosaicml-streaming: local MDS shards. Sources are mixed by the proportions of its streams."""

    module = "streaming"
    how_to_resume = "state_dict"

    def load(self) -> Any:
        """Import `streaming.base` alone, because the package's __init__ imports torchvision."""
        if "streaming" not in sys.modules:
            found = importlib.util.find_spec("streaming")
            assert found is not None
            sys.modules["streaming"] = importlib.util.module_from_spec(found)
        return importlib.import_module("streaming.base")

    def write(self, raws: Iterable[Raw], folder: Path) -> None:
        columns = {"key": "str", "image": "bytes", "text": "str"}
        with self.load().MDSWriter(out=str(folder), columns=columns) as out:
            for raw in raws:
                out.write(raw._asdict())

    def stream(
        self, folders: Sequence[Path], sizes: Sequence[int], finish: Finish, workers: int
    ) -> Iterator[Any]:
        samples = self._samples(folders, sizes)
        while True:
            yield from _loader(samples, self._raw, finish, workers)

    def state(self, folder: Path, step: int) -> Any:
        samples = self._samples([folder], [1])
        for _ in islice(_loader(samples, self._raw, list), max(step, 1)):
            pass
        return samples.state_dict(num_samples=step * BATCH, from_beginning=True)

    def resumed(self, folder: Path, state: Any, finish: Finish) -> Iterator[Any]:
        samples = self._samples([folder], [1])
        samples.load_state_dict(state)
        yield from _loader(samples, self._raw, finish)

    def _samples(self, folders: Sequence[Path], sizes: Sequence[int]) -> Any:
        base = self.load()
        options: dict[str, Any] = {
            "batch_size": BATCH,
            "shuffle": True,
            "shuffle_seed": 0,
            "num_canonical_nodes": 1,
        }
        if len(folders) == 1:
            return base.StreamingDataset(local=str(folders[0]), **options)
        shares = zip(folders, _shares(sizes), strict=True)
        streams = [base.Stream(local=str(folder), proportion=share) for folder, share in shares]
        return base.StreamingDataset(streams=streams, epoch_size=sum(sizes), **options)

    @staticmethod
    def _raw(sample: dict[str, Any]) -> Raw:
        return Raw(**sample)


PEERS: dict[str, Peer] = {
    "webdataset": WebDataset(),
    "datasets": Datasets(),
    "streaming": Streaming(),
}


def installed(peer: Peer) -> bool:
    return importlib.util.find_spec(peer.module) is not None
