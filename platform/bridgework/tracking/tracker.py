"""The tracker's protocol: what training, sweeps and promotion tell whoever keeps the lineage. No MLflow here.

`lineage.store.MLflowTracker` is the real one, `MemoryTracker` its twin for tests and notebooks. Metrics take a detour
through a journal of files (`Journal`), written by the workers and relayed by the driver, so that a tracker that is
down neither stops nor slows a run and loses no point.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol
from uuid import uuid4

from bridgework import storage
from bridgework.errors import TrackingError, suggest
from bridgework.mixture import DatasetInput

GROWING = ".log.jsonl"  # files of a journal that are appended to; those of older versions are not
FILE_BYTES = 8_000_000  # a writer opens the next file after one of this size
PIECE = 10_000  # points that are read at a time
MAX_PENDING = 10_000  # steps that wait in memory while the disk refuses them

log = logging.getLogger(__name__)

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class Point:
    """One metric at one step; `at` in milliseconds since the epoch."""

    key: str
    value: float
    step: int
    at: int


@dataclass(frozen=True)
class Version:
    """A registered version of a model: `artifact` is the folder of its weights."""

    name: str
    version: str
    artifact: str
    run_id: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Where runs, inputs, outputs and versions are kept. Every method may raise TrackingError."""

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """A new run's id; `parent` nests it. A run of the same name, parent and `run_key` tag is taken up again."""

    def params(self, run_id: str, values: Mapping[str, Any], *, resumed: bool = False) -> None:
        """Parameters, which keep their first value: another one, of a `resumed` run, becomes the tag `now.NAME`."""

    def inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None: ...
    def points(self, run_id: str, points: Sequence[Point]) -> None: ...
    def file(self, run_id: str, path: Path, folder: str = "") -> None:
        """Keep a file (a picture, the resolved recipe) with the run."""

    def output(self, run_id: str, name: str, artifact: str, tags: Mapping[str, str]) -> str:
        """A logged model for the weights under `artifact`; returns its id."""

    def finish(self, run_id: str, status: Status = "FINISHED") -> None: ...

    def register(
        self, name: str, model_id: str, run_id: str, artifact: str, tags: Mapping[str, str]
    ) -> Version: ...
    def registered(self, run_id: str) -> list[Version]:
        """Versions of a run's weights, oldest first."""

    def alias(self, name: str, alias: str, version: str) -> None: ...
    def version(self, name: str, which: str) -> Version:
        """By number or alias."""


class Journal:
    """Metric points of one run, in files that only grow: a JSON line for each step.

    `append` does no I/O. A writer lists the folder once, when it opens its first file, so that a
    flush costs the same after a week as after a minute. Its files sort after all that were there
    before, on whichever machine they were written. Files of older versions, with a line for each
    point, are read as well. A step that was redone after a failure is there twice; the relay
    forwards each (key, step) once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: list[str] = []
        self._lost = 0
        self._trouble = False
        self._file: Path | None = None

    def append(self, values: Mapping[str, float], step: int) -> None:
        """Note the values of one step; the next `flush` writes them."""
        at, numbers = int(time.time() * 1000), {k: float(v) for k, v in values.items()}
        self._pending.append(json.dumps({"step": step, "at": at, "values": numbers}) + "\n")
        if len(self._pending) > MAX_PENDING:
            del self._pending[0]
            self._lost += 1

    def flush(self) -> None:
        """Write what is pending to the disk.

        A disk that refuses never ends a run: up to MAX_PENDING steps wait for the next flush.
        """
        if not self._pending:
            return
        try:
            storage.append(self._open(), "".join(self._pending))
        except OSError as error:
            if not self._trouble:
                log.warning(
                    "%s: metrics are kept in memory until they can be written: %s",
                    self.folder,
                    error,
                )
            self._trouble, self._file = True, None
            return
        if self._trouble:
            log.warning(
                "%s: metrics are written again; those of %d steps were lost",
                self.folder,
                self._lost,
            )
        self._trouble, self._lost, self._pending = False, 0, []

    def close(self) -> None:
        """The same as `flush`: whatever ends a run, its metrics are written."""
        self.flush()

    def _open(self) -> Path:
        """The file to append to: a new one at first, after trouble, and after one of full size."""
        if (
            self._file is not None
            and self._file.exists()
            and self._file.stat().st_size < FILE_BYTES
        ):
            return self._file
        if self._file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            newest = max((int(name[:20]) for name in self._names()), default=0)
        else:
            newest = int(self._file.name[:20])
        order = max(time.time_ns(), newest + 1)  # this clock may be slower than another machine's
        self._file = self.folder / f"{order:020d}-{uuid4().hex[:6]}{GROWING}"
        return self._file

    def _names(self) -> list[str]:
        try:
            return [name for name in os.listdir(self.folder) if name.endswith(".jsonl")]
        except (FileNotFoundError, NotADirectoryError):
            return []

    def points(self, after: str = "") -> Iterator[tuple[str, list[Point]]]:
        """(position, points) of every file with new ones; a position, as `after`, continues there.

        The name of a file as `after` continues with the next file.
        """
        known, _, at = after.partition("@")
        for name in sorted(name for name in self._names() if name >= known):
            start = 0 if name != known else int(at) if at else sys.maxsize
            for end, points in self.read(name, start, PIECE):
                yield f"{name}@{end}", points

    def end(self) -> str:
        """The position after all that is written now, for `points`."""
        newest = max(self._names(), default="")
        return f"{newest}@{(self.folder / newest).stat().st_size}" if newest else ""

    def read(
        self, name: str, start: int = 0, most: int = sys.maxsize
    ) -> Iterator[tuple[int, list[Point]]]:
        """(end, points) of one file from byte `start` on, in pieces of at most `most` points or one line.

        A last line without its end is being written, or was cut short: it is left. `start` inside a
        line means that line's beginning. A line that is not JSON has no points.
        """
        with (self.folder / name).open("rb") as file:
            end = _line_start(file, start)
            found: list[Point] = []
            for line in file:
                if not line.endswith(b"\n"):
                    break
                more = _points(line)
                if found and len(found) + len(more) > most:
                    yield end, found
                    found = []
                found += more
                end += len(line)
        if found:
            yield end, found

    def unread(self, offsets: Mapping[str, int]) -> list[str]:
        """The files that have bytes after the offset given for each, in the order of writing.

        A file of an older version never grows: one that has an offset is not looked at again.
        """
        names = sorted(
            name for name in self._names() if name not in offsets or name.endswith(GROWING)
        )
        return [
            name for name in names if (self.folder / name).stat().st_size > offsets.get(name, 0)
        ]


def _points(line: bytes) -> list[Point]:
    try:
        said = json.loads(line)
        if "values" in said:
            return [
                Point(key, value, said["step"], said["at"]) for key, value in said["values"].items()
            ]
        return [Point(**said)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _line_start(file: BinaryIO, at: int) -> int:
    """Move to the beginning of the line that byte `at` is in, or to the end of the file."""
    at = min(at, file.seek(0, os.SEEK_END))
    while at:
        piece = max(0, at - 4_096)
        file.seek(piece)
        found = file.read(at - piece).rfind(b"\n")
        if found >= 0:
            at = piece + found + 1
            break
        at = piece
    return file.seek(at)


@dataclass
class MemoryRun:
    name: str
    parent: str | None
    tags: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    inputs: list[DatasetInput] = field(default_factory=list)
    points: list[Point] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    status: Status = "RUNNING"


class MemoryTracker:
    """A Tracker that keeps everything in dictionaries."""

    def __init__(self) -> None:
        self.runs: dict[str, MemoryRun] = {}
        self.models: dict[str, tuple[str, str, str, dict[str, str]]] = {}
        self.versions: dict[str, list[Version]] = {}

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        key = (tags or {}).get("run_key")
        for run_id, run in self.runs.items():
            if key is not None and (run.name, run.parent, run.tags.get("run_key")) == (
                name,
                parent,
                key,
            ):
                run.status = "RUNNING"
                return run_id
        run_id = uuid4().hex
        self.runs[run_id] = MemoryRun(name, parent, dict(tags or {}))
        return run_id

    def params(self, run_id: str, values: Mapping[str, Any], *, resumed: bool = False) -> None:
        run = self._run(run_id)
        if not resumed:
            run.params |= dict(values)
            return
        run.tags |= {f"now.{k}": str(v) for k, v in values.items() if run.params.get(k, v) != v}
        run.params = dict(values) | run.params

    def inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        run = self._run(run_id)
        run.inputs += [d for d in datasets if d not in run.inputs]

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        self._run(run_id).points += points

    def file(self, run_id: str, path: Path, folder: str = "") -> None:
        self._run(run_id).files.append(f"{folder}/{path.name}".lstrip("/"))

    def output(self, run_id: str, name: str, artifact: str, tags: Mapping[str, str]) -> str:
        model_id = f"m-{uuid4().hex}"
        self._run(run_id)
        self.models[model_id] = (run_id, name, artifact, dict(tags))
        return model_id

    def finish(self, run_id: str, status: Status = "FINISHED") -> None:
        self._run(run_id).status = status

    def register(
        self, name: str, model_id: str, run_id: str, artifact: str, tags: Mapping[str, str]
    ) -> Version:
        known = self.versions.setdefault(name, [])
        known.append(Version(name, str(len(known) + 1), artifact, run_id, (), dict(tags)))
        return known[-1]

    def registered(self, run_id: str) -> list[Version]:
        return [v for versions in self.versions.values() for v in versions if v.run_id == run_id]

    def alias(self, name: str, alias: str, version: str) -> None:
        self.version(name, version)
        self.versions[name] = [
            Version(v.name, v.version, v.artifact, v.run_id, _aliases(v, alias, version), v.tags)
            for v in self.versions[name]
        ]

    def version(self, name: str, which: str) -> Version:
        if name not in self.versions:
            raise TrackingError(f"no model {name!r} is registered" + suggest(name, self.versions))
        for version in self.versions[name]:
            if which == version.version or which in version.aliases:
                return version
        known = [w for v in self.versions[name] for w in (v.version, *v.aliases)]
        raise TrackingError(
            f"model {name!r} has no version or alias {which!r}" + suggest(which, known)
        )

    def _run(self, run_id: str) -> MemoryRun:
        if run_id not in self.runs:
            raise TrackingError(f"no run {run_id!r}" + suggest(run_id, self.runs))
        return self.runs[run_id]


def _aliases(version: Version, alias: str, holder: str) -> tuple[str, ...]:
    others = tuple(a for a in version.aliases if a != alias)
    return (*others, alias) if version.version == holder else others
