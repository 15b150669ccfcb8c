"""Datasets on disk: a folder of Parquet shards with a manifest; written whole or not at all, read by row group.

Row groups are small (what a reader fetches at random), images lie uncompressed (they are JPEG, PNG or WebP already),
and pages carry checksums, so that a flipped bit is an error and not a different picture. All paths go through fsspec.
"""

import hashlib
import io
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain, count, islice
from typing import IO, Any
from uuid import uuid4

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from bridgework.data.arrow_bounds import check_dictionaries, check_group
from bridgework.data.images import decode
from bridgework.data.manifest import FILE, Manifest, Shard, read_manifest
from bridgework.data.names import check_place
from bridgework.data.quarantine import BadSample, Quarantine
from bridgework.data.samples import LICENSE, SCHEMA, Sample, from_row, to_row
from bridgework.errors import DataError
from bridgework.storage import find_store, unreachable

__all__ = [
    "Dataset",
    "Manifest",
    "Problem",
    "Shard",
    "count_quarantined",
    "open_dataset",
    "publish",
    "read_manifest",
    "read_shard",
    "refuse_occupied",
    "verify",
    "write",
    "write_shard",
]

NOTES = ("LICENSE", "NOTICE", "README")  # files that may be next to the shards
JUNK = re.compile(
    r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini|\.ipynb_checkpoints|__MACOSX"
)  # what systems leave
DRAFT = f"{FILE}.part"  # stands in a folder whose shards are not all there yet
SHARDS = "shard-[0-9][0-9][0-9][0-9][0-9].parquet"
GROUP_ROWS = 32  # rows that are read at once: few, because rows are drawn at random
CHUNK_BYTES = 1 << 20
OPEN_SHARDS = (
    8  # footers and handles that a Dataset keeps: lanes read side by side from different shards
)

_TEXTS = ("key", "parts.list.element.text", "rejected", "ocr", "provenance.key_value.value")
_NAMES = ("parts.list.element.role", "language", LICENSE, "provenance.key_value.key")
_PARQUET: dict[str, Any] = {
    "compression": dict.fromkeys(_TEXTS, "ZSTD"),
    "use_dictionary": list(_NAMES),
    "write_statistics": ["key"],
    "write_page_checksum": True,
}


def write(
    samples: Iterable[Sample],
    dest: str,
    *,
    source: str,
    license: str,
    made_by: str,
    parameters: Mapping[str, Any] | None = None,
    parents: Sequence[str] = (),
    group_rows: int = GROUP_ROWS,
    shard_rows: int = 4096,
    quarantine: Quarantine | None = None,
) -> Manifest:
    """Write `samples` as a new dataset at `dest` (a folder or a URL): all of it, or on any error nothing.

    `quarantine` holds what the samples' maker left out: its counts go into the manifest, and its limit is checked
    before anything appears. Raises DataError for a `dest` that holds anything, for no samples and too many bad ones.
    """
    if group_rows < 1 or shard_rows % group_rows:
        raise DataError(f"shard_rows {shard_rows} is no multiple of group_rows {group_rows}")
    fs, root = find_store(dest)
    refuse_occupied(dest)
    stage = f"{root}.part-{uuid4().hex[:8]}"
    try:
        shards = tuple(_write_shards(fs, stage, iter(samples), group_rows, shard_rows))
        rows = sum(shard.rows for shard in shards)
        if quarantine is not None:
            quarantine.flush()
            quarantine.check(rows + len(quarantine))
        if not rows:
            raise DataError(f"{source}: no samples came out of it, so {dest} is not written")
        manifest = Manifest(
            rows, group_rows, shards, source, license, made_by, dict(parameters or {}), tuple(parents),
            count_quarantined(quarantine),
        )  # fmt: skip
        publish(fs, stage, dest, manifest)
    finally:
        if fs.exists(stage):
            fs.rm(stage, recursive=True)
    return manifest


def count_quarantined(quarantine: Quarantine | None) -> dict[str, int]:
    """How many rows were put aside, by reason, as a manifest counts them."""
    reasons = {} if quarantine is None else quarantine.reasons
    return dict(sorted((reason.value, rows) for reason, rows in reasons.items()))


def publish(fs: fsspec.AbstractFileSystem, stage: str, dest: str, manifest: Manifest) -> None:
    """Move the shards from the folder `stage` to `dest`, between the manifest's draft and the manifest itself.

    A shard that an earlier try moved already is left where it is, and what such a try left of others is dropped.
    Raises DataError for a `dest` that holds anything else.
    """
    refuse_occupied(dest)
    root = find_store(dest)[1]
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{DRAFT}", manifest.to_json().encode())
    names = [shard.file for shard in manifest.shards]
    for path in map(str, fs.glob(f"{root}/{SHARDS}")):
        if path.rsplit("/", 1)[1] not in names:
            fs.rm(path)
    for name in names:
        if fs.exists(f"{stage}/{name}"):
            fs.mv(f"{stage}/{name}", f"{root}/{name}")
    fs.mv(f"{root}/{DRAFT}", f"{root}/{FILE}")


def refuse_occupied(dest: str) -> None:
    """Raises DataError where no dataset can be written: over another, over somebody's files, in place of a file."""
    check_place(dest)
    fs, root = find_store(dest)
    if not fs.exists(root):
        return
    if not fs.isdir(root):
        raise DataError(f"{dest} is a file, and a dataset is a folder; choose another place")
    found = {str(path).removeprefix(root).strip("/") for path in fs.ls(root, detail=False)}
    names = sorted(
        name for name in found if name and not JUNK.fullmatch(name)
    )  # "": some stores list the folder itself
    if FILE in names:
        raise DataError(f"{dest} already holds a dataset; delete it or choose another place")
    others = [name for name in names if name.partition(".")[0] not in NOTES]
    if others and DRAFT not in names:  # where there is a draft, a writer of ours was cut off
        raise DataError(
            f"{dest} holds {others[0]}, and is no dataset; choose a folder where nothing is yet"
        )


def _write_shards(
    fs: fsspec.AbstractFileSystem,
    stage: str,
    samples: Iterator[Sample],
    group_rows: int,
    shard_rows: int,
) -> Iterator[Shard]:
    fs.makedirs(stage, exist_ok=True)
    for number in count():
        head = next(samples, None)
        if head is None:
            return
        rows = chain([head], islice(samples, shard_rows - 1))
        yield write_shard(fs, f"{stage}/shard-{number:05d}.parquet", rows, group_rows)


def write_shard(
    fs: fsspec.AbstractFileSystem, path: str, samples: Iterable[Sample], group_rows: int
) -> Shard:
    """Write one shard, row group by row group; no more than one group is in memory."""
    rows, samples = 0, iter(samples)
    with fs.open(path, "wb") as file:
        sink = _Hashed(file)
        with pq.ParquetWriter(sink, SCHEMA, **_PARQUET) as writer:
            while group := [to_row(sample) for sample in islice(samples, group_rows)]:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                rows += len(group)
    return Shard(path.rsplit("/", 1)[1], rows, sink.size, sink.sha256.hexdigest())


def read_shard(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Sample]:
    """The samples of one shard, in order, without a manifest to check them by."""
    with (
        fs.open(path, "rb") as file,
        pq.ParquetFile(file, page_checksum_verification=True) as shard,
    ):
        for group in range(shard.num_row_groups):
            yield from (from_row(row) for row in shard.read_row_group(group).to_pylist())


class _Hashed(io.RawIOBase):
    """Writes through to `file`, and knows size and sha256 of what passed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self.size


class Dataset:
    """A dataset that is open for reading, row group by row group. Not for sharing between threads."""

    def __init__(self, path: str) -> None:
        """Raises DataError when there is no sound manifest at `path`."""
        self.path = path.rstrip("/")
        self.manifest = read_manifest(self.path)
        sizes = [divmod(shard.rows, self.manifest.group_rows) for shard in self.manifest.shards]
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        self._whole_ends = list(
            accumulate(whole for whole, _ in sizes)
        )  # row groups that are not short
        self._short_ends = list(accumulate(short for _, short in sizes))  # rows of those that are
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.rows

    def locate(self, row: int) -> tuple[int, int, int]:
        """(shard, row group in it, place in that) of a row, in O(log shards). Raises DataError out of range."""
        self._check(row)
        shard = bisect_right(self._ends, row)
        first = self._ends[shard] - self.manifest.shards[shard].rows
        return shard, *divmod(row - first, self.manifest.group_rows)

    def locate_dealt(self, row: int) -> tuple[int, int, int]:
        """The same for another order, in which the rows of short row groups come last: the plan deals by this one.

        Row groups then begin at multiples of `group_rows`, and neighbors that are dealt together are read together,
        however many rows the shards have. Where only the last row group is short, both orders are one.
        """
        self._check(row)
        group, place = divmod(row, self.manifest.group_rows)
        if group < self._whole_ends[-1]:
            shard = bisect_right(self._whole_ends, group)
            return shard, group - (self._whole_ends[shard - 1] if shard else 0), place
        row -= self._whole_ends[-1] * self.manifest.group_rows
        shard = bisect_right(self._short_ends, row)
        group = self.manifest.shards[shard].rows // self.manifest.group_rows
        return shard, group, row - (self._short_ends[shard - 1] if shard else 0)

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self):
            raise DataError(f"{self.path} has {len(self)} rows; row {row} is not one of them")

    def read_group(self, shard: int, group: int) -> list[Sample]:
        """The samples of one row group.

        Raises DataError, naming the file, when it is not what the manifest says, ResourceError where its store is gone.
        """
        entry, group_rows = self.manifest.shards[shard], self.manifest.group_rows
        expected = min(group_rows, entry.rows - group * group_rows)
        with self._reading(f"{entry.file}, row group {group}"):
            file = self._file(shard)
            if doubtful := check_group(file.metadata, group, entry.bytes, self._peek(entry)):
                check_dictionaries(self._parquet(entry, doubtful), group, entry.bytes)
            table = file.read_row_group(group)
            if table.num_rows != expected:
                raise DataError(f"has {table.num_rows} rows where the manifest says {expected}")
            return [from_row(row) for row in table.to_pylist()]

    def keys(self) -> Iterator[list[str]]:
        """The keys of every shard, in order; nothing else of it is read."""
        for number, entry in enumerate(self.manifest.shards):
            with self._reading(entry.file):
                file = self._file(number)
                for group in range(file.num_row_groups):
                    check_group(file.metadata, group, entry.bytes, self._peek(entry), ("key",))
                keys = file.read(columns=["key"])["key"].to_pylist()
            yield keys

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """What a file says wrong is the data's error, all else its store's."""
        try:
            yield
        except (ConnectionError, TimeoutError) as error:
            raise unreachable(f"{self.path}/{what}", error) from None
        except (
            pa.ArrowException,
            OSError,
            ValueError,
            IndexError,
            TypeError,
        ) as error:  # ValueError: not UTF-8
            raise DataError(
                f"{self.path}/{what}: {' '.join(str(error).split())}; "
                f"run `bridgework data verify {self.path}`, then fetch or write the dataset again"
            ) from None
        except Exception as error:  # of the package that speaks with the store
            raise unreachable(f"{self.path}/{what}", error) from None

    def samples(self) -> Iterator[Sample]:
        """All samples, in order."""
        for shard, entry in enumerate(self.manifest.shards):
            for group in range(-(-entry.rows // self.manifest.group_rows)):
                yield from self.read_group(shard, group)

    def _file(self, shard: int) -> pq.ParquetFile:
        if shard not in self._files:
            self._files[shard] = self._open(self.manifest.shards[shard])
            if len(self._files) > OPEN_SHARDS:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(shard)
        return self._files[shard]

    def _open(self, shard: Shard) -> pq.ParquetFile:
        """Size, rows and schema are cheap to check here; `verify` reads every byte."""
        fs, root = find_store(self.path)
        size = fs.size(f"{root}/{shard.file}")
        if size != shard.bytes:
            raise DataError(f"{size} bytes where the manifest says {shard.bytes}")
        file = self._parquet(shard)
        if file.metadata.num_rows != shard.rows:
            raise DataError(f"{file.metadata.num_rows} rows where the manifest says {shard.rows}")
        if not file.schema_arrow.equals(SCHEMA):
            raise DataError("its columns are not those of a bridgework shard")
        return file

    def _peek(self, shard: Shard) -> Callable[[int, int], bytes]:
        fs, root = find_store(self.path)
        return partial(fs.cat_file, f"{root}/{shard.file}")

    def _parquet(self, shard: Shard, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        fs, root = find_store(self.path)
        how: Any = {"read_dictionary": list(dictionaries), "page_checksum_verification": True}
        return pq.ParquetFile(f"{root}/{shard.file}", filesystem=fs, **how)


def open_dataset(path: str) -> Dataset:
    """The dataset at `path` (a folder or a URL), for reading. Raises DataError when there is none."""
    return Dataset(path)


# --- is it what the manifest says? -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and the file it is wrong in."""

    file: str
    what: str


def verify(
    path: str, *, images: bool = True, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Every problem of the dataset at `path`; none means that it is sound.

    Finds missing and unlisted files, truncated, changed and swapped shards, wrong counts and row groups, keys that
    stand twice and, unless `images` is off (decoding is most of the time), images that cannot be decoded.
    `progress` is told (rows done, rows in all).
    """
    try:
        dataset = Dataset(path)
    except DataError as error:
        return [Problem(FILE, str(error))]
    problems = _unlisted(dataset)
    keys: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(dataset.manifest.shards):
        problems += _changed(dataset, shard) or _wrong_rows(dataset, number, keys, images)
        done += shard.rows
        if progress is not None:
            progress(done, len(dataset))
    return problems


def _unlisted(dataset: Dataset) -> list[Problem]:
    fs, root = find_store(dataset.path)
    known = {FILE, *(shard.file for shard in dataset.manifest.shards)}
    names = sorted(str(name).removeprefix(root).lstrip("/") for name in fs.find(root))
    return [
        Problem(name, "is not in the manifest; delete it, or find out whose it is")
        for name in names
        if name not in known
        and not name.startswith(NOTES)
        and not any(map(JUNK.fullmatch, name.split("/")))
    ]


def _changed(dataset: Dataset, shard: Shard) -> list[Problem]:
    """What the file's bytes alone tell."""
    fs, root = find_store(dataset.path)
    path = f"{root}/{shard.file}"
    if not fs.exists(path):
        return [Problem(shard.file, "is missing")]
    size = fs.size(path)
    if size != shard.bytes:
        return [Problem(shard.file, f"has {size} bytes where the manifest says {shard.bytes}")]
    sha256 = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            sha256.update(chunk)
    if sha256.hexdigest() == shard.sha256:
        return []
    owner = next(
        (other.file for other in dataset.manifest.shards if other.sha256 == sha256.hexdigest()),
        None,
    )
    return [
        Problem(
            shard.file,
            f"holds the bytes of {owner}" if owner else "was changed: its sha256 does not match",
        )
    ]


def _wrong_rows(dataset: Dataset, number: int, keys: dict[str, str], images: bool) -> list[Problem]:
    """What the rows tell, in a file whose bytes are as they were written. `keys`: key -> the file it was seen in."""
    shard, group_rows, problems = (
        dataset.manifest.shards[number],
        dataset.manifest.group_rows,
        list[Problem](),
    )
    for group, first in enumerate(range(0, shard.rows, group_rows)):
        try:
            rows = dataset.read_group(number, group)
        except DataError as error:
            return [*problems, Problem(shard.file, str(error))]
        if len(rows) != min(group_rows, shard.rows - first):
            problems.append(Problem(shard.file, f"row group {group} has {len(rows)} rows"))
        for sample in rows:
            if sample.key in keys:
                problems.append(
                    Problem(
                        shard.file, f"the key {sample.key!r} stood already in {keys[sample.key]}"
                    )
                )
            keys[sample.key] = shard.file
            problems += _undecodable(shard.file, sample) if images else []
    return problems


def _undecodable(file: str, sample: Sample) -> list[Problem]:
    problems = []
    for place, image in enumerate(sample.images):
        try:
            decode(image)
        except BadSample as error:
            problems.append(Problem(file, f"image {place} of {sample.key!r}: {error}"))
    return problems
