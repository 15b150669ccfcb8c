"""Row groups of the sources, with cached features; kept in memory until their rows are used.

# P patches  D width
"""

import json
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bridgework.data.dataset import OPEN_SHARDS, Dataset
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.storage import cached_file, find_store, unreachable

KEPT_BYTES = 1 << 30  # of rows in memory
ROW_BYTES = 4096  # overhead of a row, in addition to its images, features and text
REMEMBERED = 1 << 16  # evicted groups of which the unused rows are known: about 10 MB


class RowGroup(NamedTuple):
    """A row group of a source. Groups sort in the order of storage."""

    source: int
    shard: int
    number: int


class StoredRow(NamedTuple):
    """One stored row.

    `features` holds bytes per image, float16 in C order, empty for a bad image.
    """

    sample: Sample
    features: tuple[bytes, ...] | None
    size: int  # approximate bytes in memory

    @classmethod
    def of(cls, sample: Sample, features: tuple[bytes, ...] | None) -> "StoredRow":
        data = sum(map(len, (*sample.images, *(features or ()))))
        return cls(sample, features, data + len(sample.text) + ROW_BYTES)


class Features:
    """Cached features of one dataset: a Parquet file per shard, with the same row groups.

    <folder>/features.json             {"patches": P, "width": D}
    <folder>/<dataset digest>/<shard>  key string, features list<binary>: float16 (P, D) per image
    """

    def __init__(self, folder: str, dataset: Dataset) -> None:
        """Raises DataError if there is no such cache, ResourceError if its store is unreachable."""
        fs, root = find_store(folder)
        self.path = f"{folder.rstrip('/')}/{dataset.manifest.digest}"
        try:
            shape = json.loads(fs.cat_file(f"{root}/features.json"))
            self.shape: tuple[int, int] = (int(shape["patches"]), int(shape["width"]))
            if min(self.shape) < 1:
                raise ValueError(f"got patches, width {self.shape}; expected at least 1")
        except (ConnectionError, TimeoutError) as error:
            raise unreachable(f"{folder}/features.json", error) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder}: not a feature cache ({type(error).__name__}: {error}). "
                "Fix: compute the features again"
            ) from None
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def read(self, shard: str, number: int, samples: Sequence[Sample]) -> list[tuple[bytes, ...]]:
        """Return the features of each of `samples`, the rows of one row group.

        Raises DataError if they belong to other rows, ResourceError if the cache's store is
        unreachable.
        """
        try:
            table = self._open(shard).read_row_group(number, columns=["key", "features"])
        except (ConnectionError, TimeoutError) as error:
            raise unreachable(f"{self.path}/{shard}", error) from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}/{shard}: {error}. Fix: compute the features again"
            ) from None
        features = [tuple(row) for row in table["features"].to_pylist()]
        sizes = {0, 2 * self.shape[0] * self.shape[1]}  # bytes
        if (
            table["key"].to_pylist() != [sample.key for sample in samples]
            or [len(row) for row in features] != [len(sample.images) for sample in samples]
            or any(len(data) not in sizes for row in features for data in row)
        ):
            raise DataError(
                f"{self.path}/{shard}: row group {number} holds features of other images. "
                "Fix: compute the features again"
            )
        return features

    def _open_shard(self, shard: str) -> pq.ParquetFile:
        if (cached := cached_file(f"{self.path}/{shard}")) is not None:
            return pq.ParquetFile(cached)
        fs, root = find_store(self.path)
        return pq.ParquetFile(f"{root}/{shard}", filesystem=fs)


class Groups:
    """Cache of the row groups of all sources. A row stays in memory until it is used or evicted.

    The oldest group is evicted when newer ones fill `kept_bytes`. A lane continues in the group
    that its last window ended in, and small sources are read once per epoch. On eviction the unused
    rows of the group are remembered, so that a second read keeps only those rows.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        features: Sequence[Features] | None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._datasets = datasets
        self._features = features
        self._unused: OrderedDict[RowGroup, dict[int, StoredRow]] = OrderedDict()  # rows by place
        self._evicted: OrderedDict[RowGroup, int] = OrderedDict()  # bit p: row p was not used
        self._kept_bytes = kept_bytes
        self._bytes = 0

    def locate(self, source: int, row: int) -> tuple[RowGroup, int]:
        """Return the group of a row of a source, and the row's place in it."""
        shard, number, place = self._datasets[source].locate_planned(row)
        return RowGroup(source, shard, number), place

    def take(self, group: RowGroup, places: Collection[int]) -> dict[int, StoredRow]:
        """Return the rows of a group at `places` and drop them.

        A row that is taken again is read again.

        Raises DataError for a corrupt shard.
        """
        rest = self._unused.pop(group, {})
        self._bytes -= _size(rest)
        if not rest.keys() >= set(places):
            rows = dict(enumerate(self._fetch(group)))
            bits = self._evicted.pop(group, 0)
            unused = {place: row for place, row in rows.items() if bits >> place & 1}
            rest = unused if unused.keys() >= set(places) else rows
        taken = {place: rest.pop(place) for place in set(places)}
        if rest:
            self._keep(group, rest)
        return taken

    def peek(self, group: RowGroup, place: int) -> StoredRow:
        """Return one row of a group without marking it as used.

        Raises DataError for a corrupt shard.
        """
        row = self._unused.get(group, {}).get(place)
        return self._fetch(group)[place] if row is None else row

    def _keep(self, group: RowGroup, rest: dict[int, StoredRow]) -> None:
        self._unused[group] = rest
        self._bytes += _size(rest)
        while self._bytes > self._kept_bytes:
            oldest, rows = self._unused.popitem(last=False)
            self._bytes -= _size(rows)
            self._evicted[oldest] = sum(1 << place for place in rows)
        if len(self._evicted) > REMEMBERED:
            self._evicted.popitem(last=False)

    def _fetch(self, group: RowGroup) -> list[StoredRow]:
        dataset = self._datasets[group.source]
        samples = dataset.read_group(group.shard, group.number)
        if self._features is None:
            return [StoredRow.of(sample, None) for sample in samples]
        shard = dataset.manifest.shards[group.shard].file
        features = self._features[group.source].read(shard, group.number, samples)
        return [StoredRow.of(*pair) for pair in zip(samples, features, strict=True)]


def _size(rows: Mapping[int, StoredRow]) -> int:
    return sum(row.size for row in rows.values())
