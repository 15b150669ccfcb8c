"""Row groups as a reader sees them: found by row, joined with cached features, kept until their rows are used.

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
from bridgework.storage import find_store, unreachable

KEPT_BYTES = 1 << 30  # of rows
ROW_BYTES = 4096  # of a row, beside its images, features and letters
REMEMBERED = 1 << 16  # groups that had to go: some 10 MB


class Group(NamedTuple):
    """Where rows are stored together. Groups sort in the order of storage."""

    source: int
    shard: int
    number: int


class StoredRow(NamedTuple):
    """One row as it is stored; `features` are those of its images, float16 in C order, empty for a bad image."""

    sample: Sample
    features: tuple[bytes, ...] | None
    size: int  # in memory, bytes or so

    @classmethod
    def of(cls, sample: Sample, features: tuple[bytes, ...] | None) -> "StoredRow":
        data = sum(map(len, (*sample.images, *(features or ()))))
        return cls(sample, features, data + len(sample.text) + ROW_BYTES)


class Features:
    """Cached features of one dataset: a Parquet file per shard, with the same rows in the same row groups.

    <folder>/features.json                 {"patches": P, "width": D}
    <folder>/<dataset digest>/<shard>      key string, features list<binary>: float16 (P, D) in C order, one an image
    """

    def __init__(self, folder: str, dataset: Dataset) -> None:
        """Raises DataError where there is no such cache, ResourceError where its store is gone."""
        fs, root = find_store(folder)
        self.path = f"{folder.rstrip('/')}/{dataset.manifest.digest}"
        try:
            shape = json.loads(fs.cat_file(f"{root}/features.json"))
            self.shape: tuple[int, int] = (int(shape["patches"]), int(shape["width"]))
            if min(self.shape) < 1:
                raise ValueError(f"patches and width are at least 1, and here {self.shape}")
        except (ConnectionError, TimeoutError) as error:
            raise unreachable(f"{folder}/features.json", error) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder} is no cache of features ({type(error).__name__}: {error}); make it again"
            ) from None
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def read(self, shard: str, number: int, samples: Sequence[Sample]) -> list[tuple[bytes, ...]]:
        """The features of each of `samples`, the rows of one row group.

        Raises DataError if they are of other rows, ResourceError where the cache's store is gone.
        """
        try:
            table = self._open(shard).read_row_group(number, columns=["key", "features"])
        except (ConnectionError, TimeoutError) as error:
            raise unreachable(f"{self.path}/{shard}", error) from None
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}/{shard}: {error}; make the cached features again"
            ) from None
        features = [tuple(of_row) for of_row in table["features"].to_pylist()]
        sizes = {0, 2 * self.shape[0] * self.shape[1]}
        if (
            table["key"].to_pylist() != [sample.key for sample in samples]
            or [len(of_row) for of_row in features] != [len(sample.images) for sample in samples]
            or any(len(data) not in sizes for of_row in features for data in of_row)
        ):
            raise DataError(
                f"{self.path}/{shard}: group {number} holds features of other images; make them again"
            )
        return features

    def _open_shard(self, shard: str) -> pq.ParquetFile:
        fs, root = find_store(self.path)
        return pq.ParquetFile(f"{root}/{shard}", filesystem=fs)


class Groups:
    """The row groups of all sources. A row that is read stays in memory until it is used, or newer ones fill
    `kept_bytes`: a lane goes on in its next window where it left a group, and small sources are read once an epoch.

    Which rows of a group were not yet used when it had to go is remembered; else it would come back with all of them,
    and stay for some that nobody wants.
    """

    def __init__(
        self,
        datasets: Sequence[Dataset],
        features: Sequence[Features] | None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._datasets = datasets
        self._features = features
        self._kept: OrderedDict[Group, dict[int, StoredRow]] = (
            OrderedDict()
        )  # the unused rows of each, by their places
        self._gone: OrderedDict[Group, int] = (
            OrderedDict()
        )  # bit p: the row at place p was not used
        self._kept_bytes = kept_bytes
        self._bytes = 0

    def locate(self, source: int, row: int) -> tuple[Group, int]:
        """The group of a row of a source, and the row's place in it."""
        shard, number, place = self._datasets[source].locate_dealt(row)
        return Group(source, shard, number), place

    def take(self, group: Group, places: Collection[int]) -> dict[int, StoredRow]:
        """The rows of a group at `places`, which are used now: to have one again is to read the group again.

        Raises DataError for a corrupt shard.
        """
        rest = self._kept.pop(group, {})
        self._bytes -= _size(rest)
        if not rest.keys() >= set(places):
            rows = dict(enumerate(self._fetch(group)))
            unused = {
                place: row for place, row in rows.items() if self._gone.get(group, 0) >> place & 1
            }
            self._gone.pop(group, None)
            rest = unused if unused.keys() >= set(places) else rows
        taken = {place: rest.pop(place) for place in set(places)}
        if rest:
            self._keep(group, rest)
        return taken

    def look(self, group: Group, place: int) -> StoredRow:
        """One row of a group, which counts as used no more than before. Raises DataError for a corrupt shard."""
        row = self._kept.get(group, {}).get(place)
        return self._fetch(group)[place] if row is None else row

    def _keep(self, group: Group, rest: dict[int, StoredRow]) -> None:
        self._kept[group] = rest
        self._bytes += _size(rest)
        while self._bytes > self._kept_bytes:
            oldest, rows = self._kept.popitem(last=False)
            self._bytes -= _size(rows)
            self._gone[oldest] = sum(1 << place for place in rows)
        if len(self._gone) > REMEMBERED:
            self._gone.popitem(last=False)

    def _fetch(self, group: Group) -> list[StoredRow]:
        dataset = self._datasets[group.source]
        samples = dataset.read_group(group.shard, group.number)
        if self._features is None:
            return [StoredRow.of(sample, None) for sample in samples]
        shard = dataset.manifest.shards[group.shard].file
        features = self._features[group.source].read(shard, group.number, samples)
        return [StoredRow.of(*pair) for pair in zip(samples, features, strict=True)]


def _size(rows: Mapping[int, StoredRow]) -> int:
    return sum(row.size for row in rows.values())
