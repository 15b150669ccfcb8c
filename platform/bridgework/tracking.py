"""The tracker's protocol: what training, sweeps and promotion tell whoever keeps the lineage. No MLflow here.

`lineage.store.MLflowTracker` is the real one, `MemoryTracker` its twin for tests and notebooks. Metrics take a detour
through a journal of files (`Journal`), written by the workers and relayed by the driver, so that a tracker that is
down neither stops nor slows a run and loses no point.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from bridgework.errors import TrackingError, suggest

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class DatasetInput:
    """A dataset as a run saw it."""

    name: str
    digest: str  # of its manifest: names the dataset
    path: str
    rows: int


@dataclass(frozen=True)
class Point:
    """One metric at one step; `at` in milliseconds since the epoch."""

    key: str
    value: float
    step: int
    at: int


@dataclass(frozen=True)
class Version:
    """A registered version of a model: `artefact` is the folder of its weights."""

    name: str
    version: str
    artefact: str
    run_id: str
    aliases: tuple[str, ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)


class Tracker(Protocol):
    """Where runs, inputs, outputs and versions are kept. Every method may raise TrackingError."""

    def start(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        """A new run's id; `parent` nests it. A run of the same name, parent and `run_key` tag is taken up again."""

    def params(self, run_id: str, values: Mapping[str, Any]) -> None: ...
    def inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None: ...
    def points(self, run_id: str, points: Sequence[Point]) -> None: ...
    def file(self, run_id: str, path: Path, folder: str = "") -> None:
        """Keep a file (a picture, the resolved recipe) with the run."""

    def output(self, run_id: str, name: str, artefact: str, tags: Mapping[str, str]) -> str:
        """A logged model for the weights under `artefact`; returns its id."""

    def finish(self, run_id: str, status: Status = "FINISHED") -> None: ...

    def register(self, name: str, model_id: str, run_id: str, artefact: str, tags: Mapping[str, str]) -> Version: ...
    def registered(self, run_id: str) -> list[Version]:
        """Versions of a run's weights, oldest first."""

    def alias(self, name: str, alias: str, version: str) -> None: ...
    def version(self, name: str, which: str) -> Version:
        """By number or alias."""


class Journal:
    """Points of one run as files of JSON lines, one file a flush, each complete or absent.

    `append` is free of I/O. Parts are named so that each sorts after all before it, on whichever machine it was
    written. A step that was redone after a failure stands twice; the relay hands each (key, step) on once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: list[Point] = []

    def append(self, values: Mapping[str, float], step: int) -> None:
        at = int(time.time() * 1000)
        self._pending += [Point(k, float(v), step, at) for k, v in values.items()]

    def flush(self) -> None:
        if not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        newest = max((int(p.name[:20]) for p in self.folder.glob("*.jsonl")), default=0)  # this clock may be behind
        part = self.folder / f"{max(time.time_ns(), newest + 1):020d}-{uuid4().hex[:6]}.jsonl"
        temporary = part.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(vars(p)) + "\n" for p in self._pending))
        temporary.rename(part)
        self._pending = []

    def points(self, after: str = "") -> Iterator[tuple[str, list[Point]]]:
        """(part, its points) for every part written after the one named."""
        for part in sorted(self.folder.glob("*.jsonl")):
            if part.name > after:
                yield part.name, [Point(**json.loads(line)) for line in part.read_text().splitlines()]


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

    def start(self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None) -> str:
        key = (tags or {}).get("run_key")
        for run_id, run in self.runs.items():
            if key is not None and (run.name, run.parent, run.tags.get("run_key")) == (name, parent, key):
                run.status = "RUNNING"
                return run_id
        run_id = uuid4().hex
        self.runs[run_id] = MemoryRun(name, parent, dict(tags or {}))
        return run_id

    def params(self, run_id: str, values: Mapping[str, Any]) -> None:
        self._run(run_id).params |= dict(values)

    def inputs(self, run_id: str, datasets: Sequence[DatasetInput]) -> None:
        run = self._run(run_id)
        run.inputs += [d for d in datasets if d not in run.inputs]

    def points(self, run_id: str, points: Sequence[Point]) -> None:
        self._run(run_id).points += points

    def file(self, run_id: str, path: Path, folder: str = "") -> None:
        self._run(run_id).files.append(f"{folder}/{path.name}".lstrip("/"))

    def output(self, run_id: str, name: str, artefact: str, tags: Mapping[str, str]) -> str:
        model_id = f"m-{uuid4().hex}"
        self._run(run_id)
        self.models[model_id] = (run_id, name, artefact, dict(tags))
        return model_id

    def finish(self, run_id: str, status: Status = "FINISHED") -> None:
        self._run(run_id).status = status

    def register(self, name: str, model_id: str, run_id: str, artefact: str, tags: Mapping[str, str]) -> Version:
        known = self.versions.setdefault(name, [])
        known.append(Version(name, str(len(known) + 1), artefact, run_id, (), dict(tags)))
        return known[-1]

    def registered(self, run_id: str) -> list[Version]:
        return [v for versions in self.versions.values() for v in versions if v.run_id == run_id]

    def alias(self, name: str, alias: str, version: str) -> None:
        self.version(name, version)
        self.versions[name] = [
            Version(v.name, v.version, v.artefact, v.run_id, _aliases(v, alias, version), v.tags)
            for v in self.versions[name]
        ]

    def version(self, name: str, which: str) -> Version:
        if name not in self.versions:
            raise TrackingError(f"no model {name!r} is registered" + suggest(name, self.versions))
        for version in self.versions[name]:
            if which == version.version or which in version.aliases:
                return version
        known = [w for v in self.versions[name] for w in (v.version, *v.aliases)]
        raise TrackingError(f"model {name!r} has no version or alias {which!r}" + suggest(which, known))

    def _run(self, run_id: str) -> MemoryRun:
        if run_id not in self.runs:
            raise TrackingError(f"no run {run_id!r}" + suggest(run_id, self.runs))
        return self.runs[run_id]


def _aliases(version: Version, alias: str, holder: str) -> tuple[str, ...]:
    others = tuple(a for a in version.aliases if a != alias)
    return (*others, alias) if version.version == holder else others
