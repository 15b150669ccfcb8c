"""Imports in chunks: each chunk of rows is read, validated and written once, and becomes a shard.

DEST.part/<address>/shard-00003.parquet    the good rows of chunk 3, a shard of the dataset
DEST.part/<address>/shard-00003.json       the result for each of its rows; written last

The address identifies the source, the importer and its parameters, so that no other import takes
the chunks for its own; a changed source has another address.
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
_UNWRITABLE = (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError)
HASH_DIGITS = 32  # of a key, in hex: among 10^10 keys two agree once in 10^18 imports

ADDRESS = re.compile("[0-9a-f]{16}")  # of unfinished imports; anything else in DEST.part stays

# A key, and a function that reads the sample, or raises BadSample or SkippedRow.
Row = tuple[str, Callable[[], Sample]]


class Chunk(NamedTuple):
    """Consecutive rows of the source, from row `first` on."""

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
    """The result for every row of a chunk."""

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
        """Read a result. Raises ValueError, KeyError or TypeError for an incomplete file."""
        fields = json.loads(text)
        shard = None if fields["shard"] is None else Shard(**fields["shard"])
        bad = tuple(RejectedRow(*bad) for bad in fields["bad"])
        left_out = tuple((row, why) for row, why in fields["left_out"])
        return cls(**{**fields, "shard": shard, "bad": bad, "left_out": left_out})


def chunks(rows: Iterable[Row], size: int) -> Iterator[Chunk]:
    """Yield the rows of a source in chunks of `size`."""
    iterator = iter(rows)
    for number in count():
        chunk = tuple(islice(iterator, size))
        if not chunk:
            return
        yield Chunk(number, number * size, chunk)


@dataclass(frozen=True)
class ChunkStore:
    """The folder where chunks are written, and the one to which their shards are moved."""

    folder: str
    dest: str

    def make(self, chunk: Chunk) -> None:
        """Read, validate and write the rows of a chunk.

        An error that does not belong to one row leaves the chunk without a result.
        """
        outcome = _Outcome({}, [], [])
        shard = self._write(chunk.number, _good_samples(chunk, outcome))
        self._record(
            ChunkResult(
                chunk.number,
                chunk.first,
                len(chunk.rows),
                _keys_digest(chunk),
                shard,
                "".join(outcome.keys),
                tuple(outcome.bad),
                tuple(outcome.left_out),
            )
        )

    def holds(self, chunk: Chunk) -> bool:
        """Return True if this very chunk is complete, with its shard as it was written."""
        done = self.done(chunk.number)
        if done is None or done.asked != _keys_digest(chunk):
            return False
        return done.shard is None or _sha256(*self._find(done.shard.file)) == done.shard.sha256

    def done(self, number: int) -> ChunkResult | None:
        """Return the result of a chunk, or None if it is missing or incomplete."""
        fs, folder = find_store(self.folder)
        try:
            return ChunkResult.from_json(fs.cat_file(f"{folder}/shard-{number:05d}.json"))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def without(self, done: ChunkResult, repeated: list[bool]) -> ChunkResult:
        """Rewrite a chunk without the `repeated` rows of its shard, which are bad.

        Returns its new result.
        """
        if done.shard is None or not any(repeated):
            return done
        missing = {bad.row for bad in done.bad} | {row for row, _ in done.left_out}
        rows = [row for row in range(done.first, done.first + done.rows) if row not in missing]
        file, bad = done.shard.file, list(done.bad)

        def first_ones() -> Iterator[Sample]:
            samples = read_shard(*self._find(file))
            for row, sample, again in zip(rows, samples, repeated, strict=True):
                if again:
                    detail = f"{sample.key!r} occurs before"
                    bad.append(RejectedRow(row, sample.key, Reason.DUPLICATE_KEY, detail))
                else:
                    yield sample

        shard = self._write(done.number, first_ones())
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
        """Delete the results of chunks, so that the next import reads them again."""
        fs, folder = find_store(self.folder)
        for one in done:
            fs.rm(f"{folder}/shard-{one.number:05d}.json")

    def _find(self, file: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """Return the place of a shard, which may be at the destination already."""
        fs, folder = find_store(self.folder)
        moved = f"{find_store(self.dest)[1]}/{file}"
        return fs, moved if fs.exists(moved) and not fs.exists(
            f"{folder}/{file}"
        ) else f"{folder}/{file}"

    def _write(self, number: int, samples: Iterator[Sample]) -> Shard | None:
        first = next(samples, None)
        if first is None:
            return None
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        name = f"shard-{number:05d}.parquet"
        temporary = f"{folder}/{name}-{uuid4().hex[:8]}"  # two writers of a chunk share no file
        try:
            shard = write_shard(fs, temporary, chain([first], samples), GROUP_ROWS)
            fs.mv(temporary, f"{folder}/{name}")
        finally:
            if fs.exists(temporary):
                fs.rm(temporary)
        return replace(shard, file=name)

    def _record(self, done: ChunkResult) -> None:
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(f"{folder}/shard-{done.number:05d}.json", json.dumps(asdict(done)).encode())


class _Outcome(NamedTuple):
    """Keys and rejected rows of a chunk, collected while its samples are written."""

    keys: dict[str, None]  # hashes, of the good ones
    bad: list[RejectedRow]
    left_out: list[tuple[int, str]]


def _good_samples(chunk: Chunk, outcome: _Outcome) -> Iterator[Sample]:
    """Yield the good samples of a chunk; the result of every row goes to `outcome`."""
    for row, (key, read) in enumerate(chunk.rows, chunk.first):
        try:
            sample = read()
            _check(sample)
            name = hashlib.sha256(sample.key.encode()).hexdigest()[:HASH_DIGITS]
            if name in outcome.keys:
                raise BadSample(Reason.DUPLICATE_KEY, f"{sample.key!r} occurs before")
        except BadSample as error:
            lost_file = isinstance(error, UnreadableFile)
            outcome.bad.append(
                RejectedRow(row, _writable(key), error.reason, _writable(error.detail), lost_file)
            )
        except SkippedRow as why:
            outcome.left_out.append((row, str(why)))
        else:
            outcome.keys[name] = None
            yield sample


def _check(sample: Sample) -> None:
    """Raise BadSample for images that cannot be decoded, and for values that no shard can hold."""
    if (size := sum(map(len, sample.images))) > MAX_BYTES:
        raise BadSample(
            Reason.TOO_MANY_BYTES, f"the images have {size} bytes; a sample has at most {MAX_BYTES}"
        )
    for image in sample.images:
        decode(image)
    try:
        pa.RecordBatch.from_pylist([to_row(sample) | {"images": []}], SCHEMA)
    except _UNWRITABLE as error:
        raise BadSample(
            Reason.BAD_ROW, f"it does not fit the columns of a shard: {error}"
        ) from None


def _writable(text: str) -> str:
    """Return `text` as UTF-8 can hold it, because the name of a file may be any bytes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _keys_digest(chunk: Chunk) -> str:
    keys = json.dumps([chunk.first, *(key for key, _ in chunk.rows)])
    return hashlib.sha256(keys.encode()).hexdigest()


def _sha256(fs: fsspec.AbstractFileSystem, path: str) -> str | None:
    """Return the sha256 (hex) of a file, or None if there is none."""
    if not fs.exists(path):
        return None
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while part := file.read(CHUNK_BYTES):
            digest.update(part)
    return digest.hexdigest()


@dataclass(frozen=True)
class ImportJob:
    """One import, the same for every attempt: its source, its destination and its parameters."""

    source: str
    dest: str
    license: str
    made_by: str
    parameters: Mapping[str, Any]
    chunk_rows: int

    @property
    def store(self) -> ChunkStore:
        """Return the store of its chunks."""
        identity = [
            self.source,
            self.made_by,
            self.parameters,
            self.chunk_rows,
            GROUP_ROWS,
            __version__,
        ]
        address = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return ChunkStore(f"{self.dest}.part/{address}", self.dest)

    @classmethod
    def begin(cls, source: str, dest: str, **fields: Any) -> Self:
        """Start or resume an import; unfinished ones of others to `dest` are removed.

        Raises DataError if `dest` holds anything else.
        """
        refuse_occupied(dest)
        job = cls(source, dest.rstrip("/"), **fields)
        remove_stale(dest, but=job.store.folder)
        return job

    def finish(self, count: int, quarantine: Quarantine, files: int) -> Manifest:
        """Publish `count` chunks in order; bad rows and later ones of equal key are quarantined.

        Raises DataError if no row is good, and for more bad rows or unreadable `files` than
        `quarantine` allows. The chunks that hold them are then read again by the next attempt, so
        that it sees a repaired source.
        """
        done = self._without_duplicates([self._done(number) for number in range(count)])
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
                counts = [f"left out: {number} {kind}" for kind, number in left_out.items()]
                counts += [f"{quarantine}; read {quarantine.folder}"] if len(quarantine) else []
                why = "".join(f"; {text}" for text in counts)
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
                f"{len(lost)} of {files} files cannot be read to their end, and the number "
                f"of their rows is unknown: {lost[0]}; {quarantine.limit:.2%} of files is allowed; "
                f"read {quarantine.folder}, then fetch them again or allow more with max_bad"
            )

    def _done(self, number: int) -> ChunkResult:
        done = self.store.done(number)
        if done is None:
            raise DataError(
                f"{self.dest}.part lacks chunk {number}: it was deleted, or is on the disk of "
                "another machine. Fix: give a DEST that all machines see, and run the same import "
                "again"
            )
        return done

    def _without_duplicates(self, done: Sequence[ChunkResult]) -> list[ChunkResult]:
        """Return the chunks without keys of earlier ones: the first row with a key stays."""
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
    """Remove the unfinished imports to `dest`, except the folder `but`."""
    fs, part = find_store(f"{dest.rstrip('/')}.part")
    if not fs.isdir(part):
        return
    current = but.rsplit("/", 1)[-1]
    for name in (str(path).rstrip("/").rsplit("/", 1)[1] for path in fs.ls(part, detail=False)):
        if ADDRESS.fullmatch(name) and name != current:
            fs.rm(f"{part}/{name}", recursive=True)
    if fs.isdir(part) and not fs.ls(part, detail=False):  # a store of objects has no empty folders
        fs.rmdir(part)
