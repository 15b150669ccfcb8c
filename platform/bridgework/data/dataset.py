"""Datasets on disk: Parquet shards with a manifest, written atomically and read by row group.

Row groups are small because rows are read at random. Images are stored uncompressed because they
are JPEG, PNG or WebP already. Pages carry checksums, so a flipped bit is an error, not a different
image. All paths go through fsspec.
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
from bridgework.storage import cached_file, find_store, move_files, unreachable
from bridgework.storage.node_cache import CachedFile

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
# files that operating systems and notebooks leave in a folder
JUNK = re.compile(r"\._.*|\.DS_Store|Thumbs\.db|desktop\.ini|\.ipynb_checkpoints|__MACOSX")
DRAFT = f"{FILE}.part"  # manifest of a folder whose shards are not all moved yet
SHARDS = "shard-[0-9][0-9][0-9][0-9][0-9].parquet"
GROUP_ROWS = 32  # rows that are read together: few, because rows are drawn at random
CHUNK_BYTES = 1 << 20
OPEN_SHARDS = 8  # open files per Dataset: lanes read from different shards at the same time

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
    """Write `samples` as a new dataset at `dest` (a folder or a URL).

    On any error nothing is written. `quarantine` holds the rows that the caller rejected: its
    counts go into the manifest, and its limit is checked before the dataset is published. Raises
    DataError for an occupied `dest`, no samples, or too many bad rows.
    """
    if group_rows < 1 or shard_rows % group_rows:
        raise DataError(
            f"{dest}: shard_rows is not a multiple of group_rows. "
            f"Got shard_rows={shard_rows}, group_rows={group_rows}. Fix: change one of them"
        )
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
            raise DataError(
                f"{dest}: not written, because {source} has no usable samples. "
                "Fix: check the source and the quarantined rows"
            )
        manifest = Manifest(
            rows=rows,
            group_rows=group_rows,
            shards=shards,
            source=source,
            license=license,
            made_by=made_by,
            parameters=dict(parameters or {}),
            parents=tuple(parents),
            quarantined=count_quarantined(quarantine),
        )
        publish(fs, stage, dest, manifest)
    finally:
        if fs.exists(stage):
            fs.rm(stage, recursive=True)
    return manifest


def count_quarantined(quarantine: Quarantine | None) -> dict[str, int]:
    """Return the number of quarantined rows per reason, as the manifest stores it."""
    reasons = {} if quarantine is None else quarantine.reasons
    return dict(sorted((reason.value, rows) for reason, rows in reasons.items()))


def publish(fs: fsspec.AbstractFileSystem, stage: str, dest: str, manifest: Manifest) -> None:
    """Move the shards from `stage` to `dest`: a draft of the manifest first, the manifest last.

    Shards that an earlier attempt already moved stay, and its other shards are deleted.
    Raises DataError if `dest` holds anything else.
    """
    refuse_occupied(dest)
    root = find_store(dest)[1]
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{DRAFT}", manifest.to_json().encode())
    names = {shard.file: None for shard in manifest.shards}
    for path in map(str, fs.glob(f"{root}/{SHARDS}")):
        if path.rsplit("/", 1)[1] not in names:
            fs.rm(path)
    present = {str(path).rsplit("/", 1)[1] for path in fs.glob(f"{stage}/*")}
    # A listing may lack a new object. A moved one is in no listing.
    staged = [name for name in names if name in present or fs.exists(f"{stage}/{name}")]
    move_files(fs, [(f"{stage}/{name}", f"{root}/{name}") for name in staged])
    fs.mv(f"{root}/{DRAFT}", f"{root}/{FILE}")


def refuse_occupied(dest: str) -> None:
    """Raise DataError if `dest` is a dataset, a file, or a folder with other files in it."""
    check_place(dest)
    fs, root = find_store(dest)
    if not fs.exists(root):
        return
    if not fs.isdir(root):
        raise DataError(f"{dest} is a file; expected a folder. Fix: choose another destination")
    # some stores list the folder itself, as ""
    entries = {str(path).removeprefix(root).strip("/") for path in fs.ls(root, detail=False)}
    names = sorted(name for name in entries if name and not JUNK.fullmatch(name))
    if FILE in names:
        raise DataError(
            f"{dest} already holds a dataset. Fix: delete it or choose another destination"
        )
    others = [name for name in names if name.partition(".")[0] not in NOTES]
    if others and DRAFT not in names:  # a draft is from an interrupted `publish`
        raise DataError(f"{dest} holds {others[0]}; expected an empty folder. Fix: choose another")


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
    """Write one shard, row group by row group; at most one group is in memory."""
    rows, samples = 0, iter(samples)
    with fs.open(path, "wb") as file:
        sink = _Hashed(file)
        with pq.ParquetWriter(sink, SCHEMA, **_PARQUET) as writer:
            while group := [to_row(sample) for sample in islice(samples, group_rows)]:
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))
                rows += len(group)
    return Shard(path.rsplit("/", 1)[1], rows, sink.size, sink.sha256.hexdigest())


def read_shard(fs: fsspec.AbstractFileSystem, path: str) -> Iterator[Sample]:
    """Yield the samples of one shard, in order, without checking them against a manifest."""
    with (
        fs.open(path, "rb") as file,
        pq.ParquetFile(file, page_checksum_verification=True) as shard,
    ):
        for group in range(shard.num_row_groups):
            yield from (from_row(row) for row in shard.read_row_group(group).to_pylist())


class _Hashed(io.RawIOBase):
    """Write through to `file`, and count the size and sha256 of the bytes."""

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
    """A dataset that is open for reading, row group by row group. It is not thread-safe."""

    def __init__(self, path: str) -> None:
        """Raises DataError if there is no valid manifest at `path`."""
        self.path = path.rstrip("/")
        self.manifest = read_manifest(self.path)
        sizes = [divmod(shard.rows, self.manifest.group_rows) for shard in self.manifest.shards]
        self._ends = list(accumulate(shard.rows for shard in self.manifest.shards))
        self._full_ends = list(accumulate(full for full, _ in sizes))  # full row groups
        self._short_ends = list(accumulate(short for _, short in sizes))  # rows of short groups
        self._files: OrderedDict[int, pq.ParquetFile] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.rows

    def locate(self, row: int) -> tuple[int, int, int]:
        """Return (shard, row group, offset in the group) of a row, in O(log shards).

        Raises DataError for a row out of range.
        """
        self._check(row)
        shard = bisect_right(self._ends, row)
        first = self._ends[shard] - self.manifest.shards[shard].rows
        return shard, *divmod(row - first, self.manifest.group_rows)

    def locate_planned(self, row: int) -> tuple[int, int, int]:
        """Return the same for the plan's numbering, with the rows of short row groups last.

        In it, row groups begin at multiples of `group_rows`, so neighbors in the plan are read
        together, however many rows the shards have. If only the last row group is short, both
        numberings are equal.
        """
        self._check(row)
        group, place = divmod(row, self.manifest.group_rows)
        if group < self._full_ends[-1]:
            shard = bisect_right(self._full_ends, group)
            return shard, group - (self._full_ends[shard - 1] if shard else 0), place
        row -= self._full_ends[-1] * self.manifest.group_rows
        shard = bisect_right(self._short_ends, row)
        group = self.manifest.shards[shard].rows // self.manifest.group_rows
        return shard, group, row - (self._short_ends[shard - 1] if shard else 0)

    def _check(self, row: int) -> None:
        if not 0 <= row < len(self):
            raise DataError(f"{self.path} has {len(self)} rows; row {row} is out of range")

    def read_group(self, shard: int, group: int) -> list[Sample]:
        """Return the samples of one row group.

        Raises DataError, with the file, if it differs from the manifest; ResourceError if its store
        is unreachable.
        """
        entry, group_rows = self.manifest.shards[shard], self.manifest.group_rows
        expected = min(group_rows, entry.rows - group * group_rows)
        with self._reading(f"{entry.file}, row group {group}"):
            file = self._file(shard)
            if suspects := check_group(file.metadata, group, entry.bytes, self._peek(entry)):
                check_dictionaries(self._parquet(entry, suspects), group, entry.bytes)
            table = file.read_row_group(group)
            if table.num_rows != expected:
                raise DataError(f"Got {table.num_rows} rows; the manifest says {expected}")
            return [from_row(row) for row in table.to_pylist()]

    def keys(self) -> Iterator[list[str]]:
        """Yield the keys of every shard, in order, without reading the other columns."""
        for number, entry in enumerate(self.manifest.shards):
            with self._reading(entry.file):
                file = self._file(number)
                for group in range(file.num_row_groups):
                    check_group(file.metadata, group, entry.bytes, self._peek(entry), ("key",))
                keys = file.read(columns=["key"])["key"].to_pylist()
            yield keys

    @contextmanager
    def _reading(self, file: str) -> Iterator[None]:
        """Convert errors of the file's content to DataError and all others to ResourceError."""
        try:
            yield
        except (ConnectionError, TimeoutError) as error:
            raise unreachable(f"{self.path}/{file}", error) from None
        # ValueError: not UTF-8
        except (pa.ArrowException, OSError, ValueError, IndexError, TypeError) as error:
            raise DataError(
                f"{self.path}/{file}: {' '.join(str(error).split())}. Fix: run "
                f"`bridgework data verify {self.path}`, then fetch or write the dataset again"
            ) from None
        except Exception as error:  # from the client library of the store
            raise unreachable(f"{self.path}/{file}", error) from None

    def samples(self) -> Iterator[Sample]:
        """Yield all samples, in order."""
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
        """Open a shard and check its size, row count and schema.

        This is cheap; `verify` reads every byte.
        """
        fs, root = find_store(self.path)
        size = fs.size(f"{root}/{shard.file}")
        if size != shard.bytes:
            raise DataError(f"Got {size} bytes; the manifest says {shard.bytes}")
        file = self._parquet(shard)
        if file.metadata.num_rows != shard.rows:
            raise DataError(f"Got {file.metadata.num_rows} rows; the manifest says {shard.rows}")
        if not file.schema_arrow.equals(SCHEMA):
            raise DataError("the columns are not those of a bridgework shard")
        return file

    def _peek(self, shard: Shard) -> Callable[[int, int], bytes]:
        if (cached := self._cached(shard)) is not None:
            return cached.range
        fs, root = find_store(self.path)
        return partial(fs.cat_file, f"{root}/{shard.file}")

    def _parquet(self, shard: Shard, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
        options: Any = {"read_dictionary": list(dictionaries), "page_checksum_verification": True}
        if (cached := self._cached(shard)) is not None:
            return pq.ParquetFile(cached, **options)
        fs, root = find_store(self.path)
        return pq.ParquetFile(f"{root}/{shard.file}", filesystem=fs, **options)

    def _cached(self, shard: Shard) -> CachedFile | None:
        return cached_file(f"{self.path}/{shard.file}", shard.bytes, f"sha256:{shard.sha256}")


def open_dataset(path: str) -> Dataset:
    """Open the dataset at `path` (a folder or a URL) for reading.

    Raises DataError if there is none.
    """
    return Dataset(path)


# --- verification ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """A defect that `verify` found, and its file."""

    file: str
    what: str


def verify(
    path: str, *, images: bool = True, progress: Callable[[int, int], None] | None = None
) -> list[Problem]:
    """Return every problem of the dataset at `path`; an empty list means that it is valid.

    Finds missing and unlisted files, truncated, changed and swapped shards, wrong counts and row
    groups, duplicate keys and images that cannot be decoded. `images=False` skips decoding, which
    takes most of the time. `progress` is called with (rows done, total rows).
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
        Problem(name, "is not in the manifest. Fix: delete it or move it out of the dataset")
        for name in names
        if name not in known
        and not name.startswith(NOTES)
        and not any(map(JUNK.fullmatch, name.split("/")))
    ]


def _changed(dataset: Dataset, shard: Shard) -> list[Problem]:
    """Return the problems that the size and sha256 of a shard show."""
    fs, root = find_store(dataset.path)
    path = f"{root}/{shard.file}"
    if not fs.exists(path):
        return [Problem(shard.file, "is missing")]
    size = fs.size(path)
    if size != shard.bytes:
        return [Problem(shard.file, f"has {size} bytes; the manifest says {shard.bytes}")]
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
    """Return the problems in the rows of an unchanged shard.

    `keys` maps every key seen so far to its file.
    """
    shard, group_rows = dataset.manifest.shards[number], dataset.manifest.group_rows
    problems: list[Problem] = []
    for group, first in enumerate(range(0, shard.rows, group_rows)):
        try:
            rows = dataset.read_group(number, group)
        except DataError as error:
            return [*problems, Problem(shard.file, str(error))]
        if len(rows) != min(group_rows, shard.rows - first):
            problems.append(Problem(shard.file, f"row group {group} has {len(rows)} rows"))
        for sample in rows:
            if sample.key in keys:
                duplicate = f"duplicate key {sample.key!r}, also in {keys[sample.key]}"
                problems.append(Problem(shard.file, duplicate))
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
