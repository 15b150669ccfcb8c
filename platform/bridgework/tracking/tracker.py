"""Tracker protocol of training, sweeps and promotion; the metrics journal; a tracker in memory.

`mlflow_store.MLflowTracker` implements the protocol with MLflow, `MemoryTracker` in memory, e.g.
for tests and notebooks. Metrics go through a journal of files (`Journal`), written by the workers
and relayed by the driver. A tracker that is down therefore neither stops nor slows a run, and no
point is lost.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol
from uuid import uuid4

from bridgework import storage
from bridgework.errors import TrackingError, suggest
from bridgework.mixture import DatasetInput

GROWING = ".log.jsonl"  # suffix of files that are appended to; those of older versions are not
FILE_BYTES = 8_000_000  # size after which a writer opens the next file
PIECE = 10_000  # points that are read at a time
MAX_PENDING = 10_000  # steps that wait in memory while the disk cannot be written

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"  # aliases of versions

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


@dataclass(frozen=True)
class Produced:
    """Run that made some weights, and their logged model."""

    run_id: str
    model_id: str


class Tracker(Protocol):
    """Store of runs, inputs, outputs and versions. Every method may raise TrackingError."""

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Start a run, nested in `parent`, and return its id.

        A run of the same name, parent and `run_key` tag is resumed instead.
        """

    def params(self, run_id: str, values: Mapping[str, Any], *, resumed: bool = False) -> None:
        """Log parameters. They keep their first value.

        A different value in a `resumed` run is logged as the tag `now.NAME`.
        """

    def inputs(
        self,
        run_id: str,
        datasets: Sequence[DatasetInput],
        *,
        models: Sequence[str] = (),
        context: str = "training",
    ) -> None:
        """Log the datasets and the logged models (their ids) that a run reads, and what for."""

    def points(
        self,
        run_id: str,
        points: Sequence[Point],
        *,
        model_id: str | None = None,
        dataset: DatasetInput | None = None,
    ) -> None:
        """Log points of a run; also as metrics of a logged model on a dataset if they are given."""

    def file(self, run_id: str, path: Path, folder: str = "") -> None:
        """Log a file with the run, e.g. an image or the resolved recipe."""

    def output(self, run_id: str, name: str, artifact: str, tags: Mapping[str, str]) -> str:
        """Log a model for the weights under `artifact`; returns its id."""

    def produced(self, digest: str, artifact: str = "") -> Produced | None:
        """Return the newest run and logged model of the weights with this digest.

        Several runs may make equal weights: the one of the folder `artifact` has precedence.
        """

    def find(self, tags: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        """Return (run id, tags) of the runs with all these tags, oldest first."""

    def finish(self, run_id: str, status: Status = "FINISHED") -> None: ...

    def register(
        self,
        name: str,
        model_id: str,
        run_id: str,
        artifact: str,
        tags: Mapping[str, str],
        description: str = "",
    ) -> Version: ...

    def registered(self, run_ids: Collection[str]) -> list[Version]:
        """Return the versions of these runs' weights, sorted by name and number."""

    def alias(self, name: str, alias: str, version: str | None) -> None:
        """Move an alias to a version; None removes it."""

    def champions(self, name: str) -> tuple[str, ...]:
        """Return the versions that a rollback goes through: the last is the champion."""

    def set_champions(self, name: str, champions: Sequence[str], expected: Sequence[str]) -> bool:
        """Replace the champions and move the aliases, if they are still those `expected`.

        Of two promotions at the same time, one returns True and the other False.
        """

    def tag_version(self, name: str, version: str, tags: Mapping[str, str]) -> None: ...

    def version(self, name: str, which: str) -> Version:
        """Return a version by number or alias."""


JOURNAL = "journal"  # folder of a stage's run


class Journal:
    """Metric points of one run, in append-only files with a JSON line per step.

    `append` does no I/O. A writer lists the folder only when it opens its first file, so a flush
    costs the same after a week as after a minute. Its files sort after all earlier ones, also those
    of other machines. Files of older versions, with a line per point, are read as well. A step that
    was repeated after a failure occurs twice; the relay forwards each (key, step) once.
    """

    def __init__(self, folder: Path, into: Path | None = None) -> None:
        """into: local folder to write to, e.g. of a mirror; default: `folder`."""
        self.folder = folder
        self._into = into or folder
        self._pending: list[str] = []
        self._lost = 0
        self._failing = False
        self._file: Path | None = None

    def append(self, values: Mapping[str, float], step: int) -> None:
        """Add the values of one step; the next `flush` writes them."""
        at, numbers = int(time.time() * 1000), {k: float(v) for k, v in values.items()}
        self._pending.append(json.dumps({"step": step, "at": at, "values": numbers}) + "\n")
        if len(self._pending) > MAX_PENDING:
            del self._pending[0]
            self._lost += 1

    def flush(self) -> None:
        """Write the pending steps to the disk.

        A failed write never ends a run: up to MAX_PENDING steps wait for the next flush.
        """
        if not self._pending:
            return
        try:
            storage.append(self._open(), "".join(self._pending))
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s: metrics are kept in memory until they can be written: %s",
                    self.folder,
                    error,
                )
            self._failing, self._file = True, None
            return
        if self._failing:
            log.warning(
                "%s: metrics are written again; those of %d steps were lost",
                self.folder,
                self._lost,
            )
        self._failing, self._lost, self._pending = False, 0, []

    def close(self) -> None:
        """Flush; `contextlib.closing` calls it at any end of a run."""
        self.flush()

    def _open(self) -> Path:
        """Return the file to append to; a new one after a failed write and at full size."""
        if (
            self._file is not None
            and self._file.exists()
            and self._file.stat().st_size < FILE_BYTES
        ):
            return self._file
        if self._file is None:
            self._into.mkdir(parents=True, exist_ok=True)
            newest = max((int(name[:20]) for name in self.names()), default=0)
        else:
            newest = int(self._file.name[:20])
        order = max(time.time_ns(), newest + 1)  # another machine's clock may be ahead
        self._file = self._into / f"{order:020d}-{uuid4().hex[:6]}{GROWING}"
        return self._file

    def names(self) -> list[str]:
        """Return the names of the files, in the order in which they were opened."""
        return [name for name in storage.names(self.folder) if name.endswith(".jsonl")]

    def points(self, after: str = "") -> Iterator[tuple[str, list[Point]]]:
        """Yield (position, points) of the files; `after` is a position at which to continue.

        With the name of a file as `after`, it continues with the next file.
        """
        known, _, at = after.partition("@")
        for name in sorted(name for name in self.names() if name >= known):
            start = 0 if name != known else int(at) if at else sys.maxsize
            for end, points in self.read(name, start, PIECE):
                yield f"{name}@{end}", points

    def read(
        self, name: str, start: int = 0, most: int = sys.maxsize
    ) -> Iterator[tuple[int, list[Point]]]:
        """Yield (end, points) of one file from byte `start` on.

        Each item has at most `most` points, or those of one line. An incomplete last line is being
        written, or was truncated, so it is not read. `start` inside a line means the beginning of
        the line. A line that is not JSON has no points.
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
        """Return the files with bytes after their given offset, in the order of writing.

        Files of an older version never grow, so one with an offset is not read again. Neither is
        one whose offset is sys.maxsize.
        """
        return [
            name
            for name in self.names()
            if name not in offsets or (name.endswith(GROWING) and offsets[name] < sys.maxsize)
            if (self.folder / name).stat().st_size > offsets.get(name, 0)
        ]


def _points(line: bytes) -> list[Point]:
    try:
        item = json.loads(line)
        if "values" in item:
            step, at = item["step"], item["at"]
            return [Point(key, value, step, at) for key, value in item["values"].items()]
        return [Point(**item)]
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def _line_start(file: BinaryIO, at: int) -> int:
    """Move to the beginning of the line with byte `at`, or to the end of the file."""
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
    """A run of a MemoryTracker."""

    name: str
    parent: str | None
    tags: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    inputs: list[DatasetInput] = field(default_factory=list)
    models: list[str] = field(default_factory=list)  # ids of logged models that it reads
    points: list[Point] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    status: Status = "RUNNING"


class MemoryTracker:
    """A Tracker in memory, with its data in public dictionaries."""

    def __init__(self) -> None:
        self.runs: dict[str, MemoryRun] = {}
        self.models: dict[str, tuple[str, str, str, dict[str, str]]] = {}
        self.versions: dict[str, list[Version]] = {}
        self.descriptions: dict[tuple[str, str], str] = {}  # (model, version) -> its card
        self.histories: dict[str, tuple[str, ...]] = {}  # champions per model, oldest first
        self._lock = threading.Lock()

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        key = (tags or {}).get("run_key")
        for run_id, run in self.runs.items():
            known = (run.name, run.parent, run.tags.get("run_key"))
            if key is not None and known == (name, parent, key):
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

    def inputs(
        self,
        run_id: str,
        datasets: Sequence[DatasetInput],
        *,
        models: Sequence[str] = (),
        context: str = "training",
    ) -> None:
        run = self._run(run_id)
        run.inputs += [d for d in datasets if d not in run.inputs]
        run.models += [m for m in models if m not in run.models]

    def points(
        self,
        run_id: str,
        points: Sequence[Point],
        *,
        model_id: str | None = None,
        dataset: DatasetInput | None = None,
    ) -> None:
        self._run(run_id).points += points

    def produced(self, digest: str, artifact: str = "") -> Produced | None:
        found = [
            (folder == artifact, Produced(run_id, model_id))
            for model_id, (run_id, _, folder, tags) in self.models.items()
            if tags.get("digest") == digest
        ]
        own = [made for same, made in found if same] or [made for _, made in found]
        return own[-1] if own else None

    def find(self, tags: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        return [
            (run_id, run.tags)
            for run_id, run in self.runs.items()
            if tags.items() <= run.tags.items()
        ]

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
        self,
        name: str,
        model_id: str,
        run_id: str,
        artifact: str,
        tags: Mapping[str, str],
        description: str = "",
    ) -> Version:
        known = self.versions.setdefault(name, [])
        self.descriptions[name, str(len(known) + 1)] = description
        known.append(Version(name, str(len(known) + 1), artifact, run_id, (), dict(tags)))
        return known[-1]

    def registered(self, run_ids: Collection[str]) -> list[Version]:
        return [
            version
            for _, versions in sorted(self.versions.items())
            for version in versions
            if version.run_id in run_ids
        ]

    def champions(self, name: str) -> tuple[str, ...]:
        if name not in self.versions:
            self.version(name, "")  # raises
        return followed(self.histories.get(name, ()), holders(self.versions[name]))

    def set_champions(self, name: str, champions: Sequence[str], expected: Sequence[str]) -> bool:
        with self._lock:
            if self.champions(name) != tuple(expected):
                return False
            self.histories[name] = tuple(champions)
            for alias, version in aliases_of(champions).items():
                self.alias(name, alias, version)
            return True

    def tag_version(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        self.versions[name] = [
            replace(v, tags={**v.tags, **tags}) if v.version == version else v
            for v in self.versions[name]
        ]

    def alias(self, name: str, alias: str, version: str | None) -> None:
        if version is not None:
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
        known = [label for v in self.versions[name] for label in (v.version, *v.aliases)]
        raise TrackingError(
            f"model {name!r} has no version or alias {which!r}" + suggest(which, known)
        )

    def _run(self, run_id: str) -> MemoryRun:
        if run_id not in self.runs:
            raise TrackingError(f"no run {run_id!r}" + suggest(run_id, self.runs))
        return self.runs[run_id]


def holders(versions: Sequence[Version]) -> dict[str, str]:
    """Return the version of each alias."""
    return {alias: version.version for version in versions for alias in version.aliases}


def followed(champions: Sequence[str], holders: Mapping[str, str]) -> tuple[str, ...]:
    """Return the champions as recorded, ended by the version that now holds the alias.

    Aliases that something else has moved, e.g. MLflow's UI or an older version, take precedence: an
    earlier champion is a rollback to it, and another version a promotion.
    """
    current = holders.get(CHAMPION)
    if current is None:
        return ()
    if current in champions:
        last = max(place for place, version in enumerate(champions) if version == current)
        return tuple(champions[: last + 1])
    before = champions or [v for v in [holders.get(PREVIOUS)] if v is not None and v != current]
    return (*before, current)


def aliases_of(champions: Sequence[str]) -> dict[str, str | None]:
    """Return the version of the aliases `previous` and `champion`; None removes the alias."""
    last: list[str | None] = [None, None, *champions]
    return {PREVIOUS: last[-2], CHAMPION: last[-1]}


def _aliases(version: Version, alias: str, holder: str | None) -> tuple[str, ...]:
    others = tuple(a for a in version.aliases if a != alias)
    return (*others, alias) if version.version == holder else others
