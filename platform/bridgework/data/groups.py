"""Row groups as a reader sees them: found by row, joined with cached features, kept while they have unused rows.

# P patches  D width
"""

import json
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bridgework.data.samples import Sample
from bridgework.data.shards import OPEN_SHARDS, Dataset
from bridgework.errors import DataError

KEPT_BYTES = 1 << 30  # of images or features; half-used groups of 64 lanes and four sources of 70 kB files: 600 MB
REMEMBERED = 1 << 16  # groups of which it is known how much was used: some 10 MB


class Group(NamedTuple):
    """Where rows are stored together. Groups sort in the order of storage."""

    source: int
    shard: int
    number: int


class Stored(NamedTuple):
    """One row as it is stored; `features` are those of its images, float16 in C order, empty for a bad image."""

    sample: Sample
    features: tuple[bytes, ...] | None


class Features:
    """Cached features of one dataset: a Parquet file per shard, with the same rows in the same row groups.

    <folder>/features.json                 {"patches": P, "width": D}
    <folder>/<dataset digest>/<shard>      key string, features list<binary>: float16 (P, D) in C order, one an image
    """

    def __init__(self, folder: str, dataset: Dataset) -> None:
        """Raises DataError where there is no such cache."""
        fs, root = fsspec.core.url_to_fs(folder)
        self.path = f"{folder.rstrip('/')}/{dataset.manifest.digest}"
        try:
            shape = json.loads(fs.cat_file(f"{root}/features.json"))
            self.shape: tuple[int, int] = (int(shape["patches"]), int(shape["width"]))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{folder} is no cache of features ({type(error).__name__}: {error}); make it again"
            ) from None
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def read(self, shard: str, number: int, samples: Sequence[Sample]) -> list[tuple[bytes, ...]]:
        """The features of each of `samples`, the rows of one row group. Raises DataError if they are of other rows."""
        try:
            table = self._open(shard).read_row_group(number, columns=["key", "features"])
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self.path}/{shard}: {error}; make the cached features again") from None
        features = [tuple(of_row) for of_row in table["features"].to_pylist()]
        sizes = {0, 2 * self.shape[0] * self.shape[1]}
        if (
            table["key"].to_pylist() != [sample.key for sample in samples]
            or [len(of_row) for of_row in features] != [len(sample.images) for sample in samples]
            or any(len(data) not in sizes for of_row in features for data in of_row)
        ):
            raise DataError(f"{self.path}/{shard}: group {number} holds features of other images; make them again")
        return features

    def _open_shard(self, shard: str) -> pq.ParquetFile:
        fs, root = fsspec.core.url_to_fs(self.path)
        return pq.ParquetFile(f"{root}/{shard}", filesystem=fs)


class Groups:
    """The row groups of all sources. A group stays in memory until each of its rows was used once, or newer ones fill
    `kept_bytes`: a lane goes on in its next window where it left a group, and small sources are read once an epoch.

    How much of a group was used is remembered when it is read again; else it would stay for rows that nobody wants.
    """

    def __init__(
        self, datasets: Sequence[Dataset], features: Sequence[Features] | None, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self._datasets = datasets
        self._features = features
        self._kept: OrderedDict[Group, list[Stored]] = OrderedDict()
        self._used: OrderedDict[Group, int] = OrderedDict()  # rows, of groups in memory and of those that had to go
        self._kept_bytes = kept_bytes
        self._bytes = 0

    def locate(self, source: int, row: int) -> tuple[Group, int]:
        """The group of a row of a source, and the row's place in it."""
        shard, number, place = self._datasets[source].locate_dealt(row)
        return Group(source, shard, number), place

    def read(self, group: Group, *, uses: int) -> list[Stored]:
        """The rows of a group, of which the caller now uses `uses`. Raises DataError for a corrupt shard."""
        rows = self._kept.pop(group, None)
        if rows is None:
            rows = self._fetch(group)
        else:
            self._bytes -= _size(rows)
        used = self._used.pop(group, 0) + uses
        if 0 < used < len(rows):
            self._kept[group], self._used[group] = rows, used
            self._bytes += _size(rows)
        while self._bytes > self._kept_bytes:
            self._bytes -= _size(self._kept.popitem(last=False)[1])
        if len(self._used) > REMEMBERED:
            self._used.popitem(last=False)
        return rows

    def _fetch(self, group: Group) -> list[Stored]:
        dataset = self._datasets[group.source]
        samples = dataset.read_group(group.shard, group.number)
        if self._features is None:
            return [Stored(sample, None) for sample in samples]
        shard = dataset.manifest.shards[group.shard].file
        features = self._features[group.source].read(shard, group.number, samples)
        return [Stored(*pair) for pair in zip(samples, features, strict=True)]


def _size(rows: Sequence[Stored]) -> int:
    return sum(len(data) for row in rows for data in (*row.sample.images, *(row.features or ())))
