"""Rows of a source in chunks: each is read, checked and written on its own, and none that is whole is done again.

<folder>/shard-00003.parquet    the good rows of chunk 3, one shard of the dataset to be
<folder>/shard-00003.json       what became of each of its rows; written last

One import, from its first chunk to the dataset: what lies half done beside it, and how it becomes whole.

DEST.part/<address>/ holds the chunks. The address names the source, the importer and its parameters, so that another
import never takes them for its own; a changed source has another address.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from typing import Any, NamedTuple, Self
from uuid import uuid4

import fsspec
import numpy as np
import pyarrow as pa

from bridgework import __version__
from bridgework.data.dataset import (
    CHUNK_BYTES,
    GROUP_ROWS,
    count_quarantined,
    publish,
    read_shard,
    refuse_occupied,
    write_shard,
)
from bridgework.data.images import MAX_BYTES, decode
from bridgework.data.manifest import Manifest, Shard
from bridgework.data.quarantine import (
    BadSample,
    Quarantine,
    Reason,
    SkippedRow,
    UnreadableFile,
    clear,
)
from bridgework.data.samples import SCHEMA, Sample, to_row
from bridgework.errors import DataError
from bridgework.storage import find_store

CHUNK_ROWS = 4096  # of the source: some 200 MB of photographs
HASH_DIGITS = 32  # of a key, in hex: among 10^10 keys two agree once in 10^18 imports

Row = tuple[
    str, Callable[[], Sample]
]  # a key, and what makes the sample, or raises BadSample or LeftOut


class Chunk(NamedTuple):
    """Neighbors in the source, from its row `first` on."""

    number: int
    first: int
    rows: tuple[Row, ...]


class RejectedRow(NamedTuple):
    """A row of the source that is not in the dataset."""

    row: int
    key: str
    reason: str
    detail: str
    lost_file: bool = False


@dataclass(frozen=True)
class ChunkResult:
    """What became of the rows of a chunk."""

    number: int
    first: int
    rows: int  # of the source
    asked: str  # sha256 of the rows' keys as the source gave them
    shard: Shard | None  # None when no row was good
    keys: str  # HASH_DIGITS of every key in the shard, in order
    bad: tuple[RejectedRow, ...]
    left_out: tuple[tuple[int, str], ...] = ()  # row of the source, and what it is

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises ValueError, KeyError or TypeError for half a file."""
        fields = json.loads(text)
        shard = None if fields["shard"] is None else Shard(**fields["shard"])
        bad, left_out = (
            tuple(RejectedRow(*bad) for bad in fields["bad"]),
            tuple((row, why) for row, why in fields["left_out"]),
        )
        return cls(**{**fields, "shard": shard, "bad": bad, "left_out": left_out})


def chunks(rows: Iterable[Row], size: int) -> Iterator[Chunk]:
    """The rows of a source, `size` at a time."""
    rest = iter(rows)
    for number in count():
        taken = tuple(islice(rest, size))
        if not taken:
            return
        yield Chunk(number, number * size, taken)


@dataclass(frozen=True)
class ChunkStore:
    """The folder where chunks are made, and the one to which their shards go at last."""

    folder: str
    dest: str

    def make(self, chunk: Chunk) -> None:
        """Read, check and write the rows of a chunk. An error that is not one row's own leaves the chunk undone."""
        found = _Found({}, [], [])
        shard = self._write(chunk.number, _complete(chunk, found))
        told = ("".join(found.keys), tuple(found.bad), tuple(found.left_out))
        self._record(
            ChunkResult(chunk.number, chunk.first, len(chunk.rows), _asked(chunk), shard, *told)
        )

    def holds(self, chunk: Chunk) -> bool:
        """Whether this very chunk is done, and its shard lies there as it was written."""
        done = self.done(chunk.number)
        if done is None or done.asked != _asked(chunk):
            return False
        return done.shard is None or _sha256(*self._find(done.shard.file)) == done.shard.sha256

    def done(self, number: int) -> ChunkResult | None:
        """What became of a chunk; None where nothing or half of it is known."""
        fs, folder = find_store(self.folder)
        try:
            return ChunkResult.from_json(fs.cat_file(f"{folder}/shard-{number:05d}.json"))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def without(self, done: ChunkResult, repeated: list[bool]) -> ChunkResult:
        """The same chunk without those rows of its shard that are `repeated`: they are bad. Changes the files too."""
        if done.shard is None or not any(repeated):
            return done
        missing = {bad.row for bad in done.bad} | {row for row, _ in done.left_out}
        rows = [row for row in range(done.first, done.first + done.rows) if row not in missing]
        file, bad = done.shard.file, list(done.bad)

        def kept() -> Iterator[Sample]:
            for row, sample, again in zip(
                rows, read_shard(*self._find(file)), repeated, strict=True
            ):
                if again:
                    bad.append(
                        RejectedRow(
                            row, sample.key, Reason.DUPLICATE_KEY, f"{sample.key!r} stood before"
                        )
                    )
                else:
                    yield sample

        shard = self._write(done.number, kept())
        places = range(0, len(done.keys), HASH_DIGITS)
        keys = "".join(
            done.keys[p : p + HASH_DIGITS]
            for p, again in zip(places, repeated, strict=True)
            if not again
        )
        less = replace(done, shard=shard, keys=keys, bad=tuple(sorted(bad)))
        self._record(less)
        return less

    def forget(self, done: Iterable[ChunkResult]) -> None:
        """Chunks to do again."""
        fs, folder = find_store(self.folder)
        for one in done:
            fs.rm(f"{folder}/shard-{one.number:05d}.json")

    def _find(self, file: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """A shard: among the others, or moved already."""
        fs, folder = find_store(self.folder)
        moved = f"{find_store(self.dest)[1]}/{file}"
        return fs, moved if fs.exists(moved) and not fs.exists(
            f"{folder}/{file}"
        ) else f"{folder}/{file}"

    def _write(self, number: int, samples: Iterator[Sample]) -> Shard | None:
        head = next(samples, None)
        if head is None:
            return None
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        name = f"shard-{number:05d}.parquet"
        begun = (
            f"{folder}/{name}-{uuid4().hex[:8]}"  # two that make one chunk never write to one file
        )
        try:
            shard = write_shard(fs, begun, chain([head], samples), GROUP_ROWS)
            fs.mv(begun, f"{folder}/{name}")
        finally:
            if fs.exists(begun):
                fs.rm(begun)
        return replace(shard, file=name)

    def _record(self, done: ChunkResult) -> None:
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(f"{folder}/shard-{done.number:05d}.json", json.dumps(asdict(done)).encode())


class _Found(NamedTuple):
    """What becomes known of a chunk while its samples are written."""

    keys: dict[str, None]  # hashes, of the good ones
    bad: list[RejectedRow]
    left_out: list[tuple[int, str]]


def _complete(chunk: Chunk, found: _Found) -> Iterator[Sample]:
    """The good samples of a chunk; what becomes of every row goes to `found`."""
    for row, (key, read) in enumerate(chunk.rows, chunk.first):
        try:
            sample = read()
            _check(sample)
            name = hashlib.sha256(sample.key.encode()).hexdigest()[:HASH_DIGITS]
            if name in found.keys:
                raise BadSample(Reason.DUPLICATE_KEY, f"{sample.key!r} stood before")
        except BadSample as error:
            lost_file = isinstance(error, UnreadableFile)
            found.bad.append(
                RejectedRow(row, _writable(key), error.reason, _writable(error.detail), lost_file)
            )
        except SkippedRow as why:
            found.left_out.append((row, str(why)))
        else:
            found.keys[name] = None
            yield sample


def _check(sample: Sample) -> None:
    """Raises BadSample for images that cannot be decoded, and for what no row of a shard can hold."""
    if (size := sum(map(len, sample.images))) > MAX_BYTES:
        raise BadSample(
            Reason.TOO_MANY_BYTES, f"the images have {size} bytes; a sample has at most {MAX_BYTES}"
        )
    for image in sample.images:
        decode(image)
    try:
        pa.RecordBatch.from_pylist([to_row(sample) | {"images": []}], SCHEMA)
    except (
        pa.ArrowException,
        TypeError,
        ValueError,
        OverflowError,
        AttributeError,
    ) as error:  # half a surrogate, ..
        raise BadSample(
            Reason.BAD_ROW, f"it does not fit the columns of a shard: {error}"
        ) from None


def _writable(text: str) -> str:
    """`text` as UTF-8 can hold it: a file may be named by any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _asked(chunk: Chunk) -> str:
    keys = json.dumps([chunk.first, *(key for key, _ in chunk.rows)])
    return hashlib.sha256(keys.encode()).hexdigest()


def _sha256(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """None where there is no file."""
    if not fs.exists(path):
        return None
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


ADDRESS = re.compile(
    "[0-9a-f]{16}"
)  # names of what is half done: what else lies there is not ours to drop


@dataclass(frozen=True)
class ImportJob:
    """What every try at one import knows."""

    source: str
    dest: str
    license: str
    made_by: str
    parameters: Mapping[str, Any]
    chunk_rows: int

    @property
    def store(self) -> ChunkStore:
        """Where its chunks are made."""
        told = [
            self.source,
            self.made_by,
            self.parameters,
            self.chunk_rows,
            GROUP_ROWS,
            __version__,
        ]
        address = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return ChunkStore(f"{self.dest}.part/{address}", self.dest)

    @classmethod
    def begin(cls, source: str, dest: str, **told: Any) -> Self:
        """Drops what lies half done of other imports to `dest`. Raises DataError where there is something else."""
        refuse_occupied(dest)
        job = cls(source, dest.rstrip("/"), **told)
        remove_stale(dest, but=job.store.folder)
        return job

    def finish(self, count: int, quarantine: Quarantine, files: int) -> Manifest:
        """The dataset of `count` chunks, in order; bad rows, and later ones of equal key, go to `quarantine`.

        Raises DataError for no good row, and for more bad rows, or lost ones of `files`, than `quarantine` allows: then
        the chunks that hold them are forgotten, so that a mended source is read again.
        """
        done = self._without_repetitions([self._done(number) for number in range(count)])
        clear(quarantine.folder)
        for bad in chain.from_iterable(one.bad for one in done):
            error = BadSample(Reason(bad.reason), bad.detail)
            quarantine.add(
                self.source, bad.key, bad.row, error, digest=self.parameters.get("sha256", "")
            )
        quarantine.flush()
        shards = tuple(one.shard for one in done if one.shard is not None)
        left_out = dict(sorted(Counter(why for one in done for _, why in one.left_out).items()))
        try:
            quarantine.check(sum(one.rows for one in done))
            self._check_files(done, quarantine, files)
            if not shards:
                counts = [f"left out: {number} {what}" for what, number in left_out.items()]
                counts += [f"{quarantine}; read {quarantine.folder}"] if len(quarantine) else []
                why = "".join(f"; {what}" for what in counts)
                raise DataError(
                    f"{self.source}: no samples came out of it, so {self.dest} is not written{why}"
                )
        except DataError:
            self._forget(done)
            raise
        manifest = Manifest(
            rows=sum(shard.rows for shard in shards),
            group_rows=GROUP_ROWS,
            shards=shards,
            source=self.source,
            license=self.license,
            made_by=self.made_by,
            parameters=dict(self.parameters),
            quarantined=count_quarantined(quarantine),
            left_out=left_out,
        )
        fs, folder = find_store(self.store.folder)
        publish(fs, folder, self.dest, manifest)
        remove_stale(self.dest)
        return manifest

    def _check_files(self, done: Sequence[ChunkResult], quarantine: Quarantine, files: int) -> None:
        lost = [bad.detail for one in done for bad in one.bad if bad.lost_file]
        if len(lost) > quarantine.limit * files:
            raise DataError(
                f"{len(lost)} of {files} files cannot be read to their end, and how many rows they held is not known: "
                f"{lost[0]}; {quarantine.limit:.2%} of files is allowed; read {quarantine.folder}, then fetch them "
                "again or allow a larger share with max_bad"
            )

    def _done(self, number: int) -> ChunkResult:
        done = self.store.done(number)
        if done is None:
            raise DataError(
                f"{self.dest}.part lacks chunk {number}: it was deleted, or lies on the disk of another machine; "
                "give a DEST that all machines see, and run the same import again"
            )
        return done

    def _without_repetitions(self, done: Sequence[ChunkResult]) -> list[ChunkResult]:
        """No key stands in two chunks: the row that comes first in the source stays."""
        if not any(one.keys for one in done):
            return list(done)
        names = np.frombuffer(
            bytes.fromhex("".join(one.keys for one in done)), f"S{HASH_DIGITS // 2}"
        )
        repeated = np.ones(len(names), dtype=np.bool_)
        repeated[np.unique(names, return_index=True)[1]] = False
        ends = np.cumsum([len(one.keys) // HASH_DIGITS for one in done])[:-1]
        return [
            self.store.without(one, of.tolist())
            for one, of in zip(done, np.split(repeated, ends), strict=True)
        ]

    def _forget(self, done: Sequence[ChunkResult]) -> None:
        if all(one.bad for one in done):
            remove_stale(self.dest)
        else:
            self.store.forget(one for one in done if one.bad)


def remove_stale(dest: str, *, but: str = "") -> None:
    """Drop what lies half done beside `dest`, `but` for one folder."""
    fs, part = find_store(f"{dest.rstrip('/')}.part")
    if not fs.isdir(part):
        return
    kept = but.rsplit("/", 1)[-1]
    for name in (str(path).rstrip("/").rsplit("/", 1)[1] for path in fs.ls(part, detail=False)):
        if ADDRESS.fullmatch(name) and name != kept:
            fs.rm(f"{part}/{name}", recursive=True)
    if fs.isdir(part) and not fs.ls(part, detail=False):  # a store of objects has no empty folders
        fs.rmdir(part)
