"""One import, from its first chunk to the dataset: what lies half done beside it, and how it becomes whole.

DEST.part/<address>/ holds the chunks. The address names the source, the importer and its parameters, so that another
import never takes them for its own; a changed source has another address.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import numpy as np

from bridgework import __version__
from bridgework.data.chunks import HASH_DIGITS, ChunkStore, Done
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import BadSample, Quarantine, Reason, clear
from bridgework.data.shards import GROUP_ROWS, publish, put_aside, refuse_occupied
from bridgework.errors import DataError
from bridgework.stores import find_store

ADDRESS = re.compile("[0-9a-f]{16}")  # names of what is half done: what else lies there is not ours to drop


@dataclass(frozen=True)
class Job:
    """What every try at one import knows."""

    source: str
    dest: str
    licence: str
    made_by: str
    parameters: Mapping[str, Any]
    chunk_rows: int

    @property
    def store(self) -> ChunkStore:
        """Where its chunks are made."""
        told = [self.source, self.made_by, self.parameters, self.chunk_rows, GROUP_ROWS, __version__]
        address = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return ChunkStore(f"{self.dest}.part/{address}", self.dest)

    @classmethod
    def begin(cls, source: str, dest: str, **told: Any) -> Self:
        """Drops what lies half done of other imports to `dest`. Raises DataError where there is something else."""
        refuse_occupied(dest)
        job = cls(source, dest.rstrip("/"), **told)
        tidy(dest, but=job.store.folder)
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
            quarantine.add(self.source, bad.key, bad.row, error, digest=self.parameters.get("sha256", ""))
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
                raise DataError(f"{self.source}: no samples came out of it, so {self.dest} is not written{why}")
        except DataError:
            self._forget(done)
            raise
        manifest = Manifest(
            rows=sum(shard.rows for shard in shards),
            group_rows=GROUP_ROWS,
            shards=shards,
            source=self.source,
            licence=self.licence,
            made_by=self.made_by,
            parameters=dict(self.parameters),
            quarantined=put_aside(quarantine),
            left_out=left_out,
        )
        fs, folder = find_store(self.store.folder)
        publish(fs, folder, self.dest, manifest)
        tidy(self.dest)
        return manifest

    def _check_files(self, done: Sequence[Done], quarantine: Quarantine, files: int) -> None:
        lost = [bad.detail for one in done for bad in one.bad if bad.lost_file]
        if len(lost) > quarantine.limit * files:
            raise DataError(
                f"{len(lost)} of {files} files cannot be read to their end, and how many rows they held is not known: "
                f"{lost[0]}; {quarantine.limit:.2%} of files is allowed; read {quarantine.folder}, then fetch them "
                "again or allow a larger share with max_bad"
            )

    def _done(self, number: int) -> Done:
        done = self.store.done(number)
        if done is None:
            raise DataError(
                f"{self.dest}.part lacks chunk {number}: it was deleted, or lies on the disk of another machine; "
                "give a DEST that all machines see, and run the same import again"
            )
        return done

    def _without_repetitions(self, done: Sequence[Done]) -> list[Done]:
        """No key stands in two chunks: the row that comes first in the source stays."""
        if not any(one.keys for one in done):
            return list(done)
        names = np.frombuffer(bytes.fromhex("".join(one.keys for one in done)), f"S{HASH_DIGITS // 2}")
        repeated = np.ones(len(names), dtype=np.bool_)
        repeated[np.unique(names, return_index=True)[1]] = False
        ends = np.cumsum([len(one.keys) // HASH_DIGITS for one in done])[:-1]
        return [self.store.without(one, of.tolist()) for one, of in zip(done, np.split(repeated, ends), strict=True)]

    def _forget(self, done: Sequence[Done]) -> None:
        if all(one.bad for one in done):
            tidy(self.dest)
        else:
            self.store.forget(one for one in done if one.bad)


def tidy(dest: str, *, but: str = "") -> None:
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
