"""Rows of a source in chunks: each is read, checked and written on its own, and none that is whole is done again.

<folder>/shard-00003.parquet    the good rows of chunk 3, one shard of the dataset to be
<folder>/shard-00003.json       what became of each of its rows; written last
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain, count, islice
from typing import NamedTuple, Self
from uuid import uuid4

import fsspec
import pyarrow as pa

from bridgework.data.manifest import Shard
from bridgework.data.quarantine import BadSample, LeftOut, LostFile, Reason
from bridgework.data.samples import SCHEMA, Sample, to_row
from bridgework.data.shards import CHUNK_BYTES, GROUP_ROWS, read_shard, write_shard
from bridgework.data.transforms import MAX_BYTES, decode
from bridgework.stores import find_store

CHUNK_ROWS = 4096  # of the source: some 200 MB of photographs
HASH_DIGITS = 32  # of a key, in hex: among 10^10 keys two agree once in 10^18 imports

Row = tuple[str, Callable[[], Sample]]  # a key, and what makes the sample, or raises BadSample or LeftOut


class Chunk(NamedTuple):
    """Neighbours in the source, from its row `first` on."""

    number: int
    first: int
    rows: tuple[Row, ...]


class Bad(NamedTuple):
    """A row of the source that is not in the dataset."""

    row: int
    key: str
    reason: str
    detail: str
    lost_file: bool = False


@dataclass(frozen=True)
class Done:
    """What became of the rows of a chunk."""

    number: int
    first: int
    rows: int  # of the source
    asked: str  # sha256 of the rows' keys as the source gave them
    shard: Shard | None  # None when no row was good
    keys: str  # HASH_DIGITS of every key in the shard, in order
    bad: tuple[Bad, ...]
    left_out: tuple[tuple[int, str], ...] = ()  # row of the source, and what it is

    @classmethod
    def from_json(cls, text: bytes) -> Self:
        """Raises ValueError, KeyError or TypeError for half a file."""
        fields = json.loads(text)
        shard = None if fields["shard"] is None else Shard(**fields["shard"])
        bad, left_out = tuple(Bad(*bad) for bad in fields["bad"]), tuple((row, why) for row, why in fields["left_out"])
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
        shard = self._write(chunk.number, _sound(chunk, found))
        told = ("".join(found.keys), tuple(found.bad), tuple(found.left_out))
        self._record(Done(chunk.number, chunk.first, len(chunk.rows), _asked(chunk), shard, *told))

    def holds(self, chunk: Chunk) -> bool:
        """Whether this very chunk is done, and its shard lies there as it was written."""
        done = self.done(chunk.number)
        if done is None or done.asked != _asked(chunk):
            return False
        return done.shard is None or _sha256(*self._find(done.shard.file)) == done.shard.sha256

    def done(self, number: int) -> Done | None:
        """What became of a chunk; None where nothing or half of it is known."""
        fs, folder = find_store(self.folder)
        try:
            return Done.from_json(fs.cat_file(f"{folder}/shard-{number:05d}.json"))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def without(self, done: Done, repeated: list[bool]) -> Done:
        """The same chunk without those rows of its shard that are `repeated`: they are bad. Changes the files too."""
        if done.shard is None or not any(repeated):
            return done
        missing = {bad.row for bad in done.bad} | {row for row, _ in done.left_out}
        rows = [row for row in range(done.first, done.first + done.rows) if row not in missing]
        file, bad = done.shard.file, list(done.bad)

        def kept() -> Iterator[Sample]:
            for row, sample, again in zip(rows, read_shard(*self._find(file)), repeated, strict=True):
                if again:
                    bad.append(Bad(row, sample.key, Reason.DUPLICATE_KEY, f"{sample.key!r} stood before"))
                else:
                    yield sample

        shard = self._write(done.number, kept())
        places = range(0, len(done.keys), HASH_DIGITS)
        keys = "".join(done.keys[p : p + HASH_DIGITS] for p, again in zip(places, repeated, strict=True) if not again)
        less = replace(done, shard=shard, keys=keys, bad=tuple(sorted(bad)))
        self._record(less)
        return less

    def forget(self, done: Iterable[Done]) -> None:
        """Chunks to do again."""
        fs, folder = find_store(self.folder)
        for one in done:
            fs.rm(f"{folder}/shard-{one.number:05d}.json")

    def _find(self, file: str) -> tuple[fsspec.AbstractFileSystem, str]:
        """A shard: among the others, or moved already."""
        fs, folder = find_store(self.folder)
        moved = f"{find_store(self.dest)[1]}/{file}"
        return fs, moved if fs.exists(moved) and not fs.exists(f"{folder}/{file}") else f"{folder}/{file}"

    def _write(self, number: int, samples: Iterator[Sample]) -> Shard | None:
        head = next(samples, None)
        if head is None:
            return None
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        name = f"shard-{number:05d}.parquet"
        begun = f"{folder}/{name}-{uuid4().hex[:8]}"  # two that make one chunk never write to one file
        try:
            shard = write_shard(fs, begun, chain([head], samples), GROUP_ROWS)
            fs.mv(begun, f"{folder}/{name}")
        finally:
            if fs.exists(begun):
                fs.rm(begun)
        return replace(shard, file=name)

    def _record(self, done: Done) -> None:
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        fs.pipe_file(f"{folder}/shard-{done.number:05d}.json", json.dumps(asdict(done)).encode())


class _Found(NamedTuple):
    """What becomes known of a chunk while its samples are written."""

    keys: dict[str, None]  # hashes, of the good ones
    bad: list[Bad]
    left_out: list[tuple[int, str]]


def _sound(chunk: Chunk, found: _Found) -> Iterator[Sample]:
    """The good samples of a chunk; what becomes of every row goes to `found`."""
    for row, (key, read) in enumerate(chunk.rows, chunk.first):
        try:
            sample = read()
            _check(sample)
            name = hashlib.sha256(sample.key.encode()).hexdigest()[:HASH_DIGITS]
            if name in found.keys:
                raise BadSample(Reason.DUPLICATE_KEY, f"{sample.key!r} stood before")
        except BadSample as error:
            lost_file = isinstance(error, LostFile)
            found.bad.append(Bad(row, _writable(key), error.reason, _writable(error.detail), lost_file))
        except LeftOut as why:
            found.left_out.append((row, str(why)))
        else:
            found.keys[name] = None
            yield sample


def _check(sample: Sample) -> None:
    """Raises BadSample for images that cannot be decoded, and for what no row of a shard can hold."""
    if (size := sum(map(len, sample.images))) > MAX_BYTES:
        raise BadSample(Reason.TOO_MANY_BYTES, f"the images have {size} bytes; a sample has at most {MAX_BYTES}")
    for image in sample.images:
        decode(image)
    try:
        pa.RecordBatch.from_pylist([to_row(sample) | {"images": []}], SCHEMA)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError) as error:  # half a surrogate, ..
        raise BadSample(Reason.BAD_ROW, f"it does not fit the columns of a shard: {error}") from None


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
