"""Lineage trees: upstream from an answer to its data, downstream from a dataset to its deployments.

Upstream: response -> deployment -> model version -> run of the stage -> the stages before it ->
datasets -> their parents. `Reader` is the protocol of the tracker's queries.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol

from rich.text import Text
from rich.tree import Tree

from bridgework import storage
from bridgework.data.manifest import Manifest, read_manifest
from bridgework.errors import DataError, TrackingError, suggest
from bridgework.mixture import DatasetInput
from bridgework.tracking import registry
from bridgework.tracking.tracker import Version

RESPONSE = re.compile(r"(?:chatcmpl|embd|clas|rank|capt)-(?P<deployment>.+)-[0-9a-f]{12}")


@dataclass(frozen=True)
class Weights:
    """Output weights of a run."""

    name: str
    artifact: str
    digest: str


@dataclass(frozen=True)
class RunView:
    """A recorded run; `parent` of a stage's run is the run of the system."""

    id: str
    name: str
    status: str
    parent: str | None
    tags: Mapping[str, str]
    metrics: Mapping[str, float]  # the last value of each
    inputs: tuple[DatasetInput, ...]
    outputs: tuple[Weights, ...]


class Reader(Protocol):
    """Lineage queries. Lists are oldest first, and empty without results."""

    def run(self, run_id: str) -> RunView: ...

    def children(self, run_id: str) -> list[RunView]: ...

    def started_from(self, digest: str) -> list[RunView]:
        """Find the runs that started from the weights of this digest."""

    def producers(self, digest: str) -> list[RunView]:
        """Find the runs whose output has this digest."""

    def readers(self, dataset: str) -> list[RunView]:
        """Find the runs that read a dataset, by its name, digest or a prefix of the digest."""

    def dataset_names(self) -> list[str]:
        """Return the names of the datasets that runs read, sorted."""

    def version(self, name: str, which: str) -> Version: ...

    def versions(self, name: str) -> list[Version]: ...

    def registered(self, run_id: str) -> list[Version]:
        """Find the versions of the run's weights."""

    def models(self) -> list[str]: ...


@dataclass(frozen=True)
class Deployment:
    """A deployment, as serving writes it to <home>/deployments/<id>.json when an app starts."""

    id: str
    app: str
    model: str
    version: str  # "" for weights that are served from a plain folder
    artifact: str
    digest: str
    started: str


def trace(what: str, reader: Reader, home: Path) -> Tree:
    """Return the upstream lineage of `what`.

    what: a response id, a deployment id, `model`, `model@alias`, `model:version` or a run id.
    Raises TrackingError, with a suggestion, for any other text.
    """
    return _Upstream(reader, home).of(what)


def uses(dataset: str, reader: Reader, home: Path) -> Tree:
    """Return the downstream lineage of a dataset and of the datasets derived from it.

    It holds their runs, the weights and versions of these, the runs that started from them, and
    deployments. dataset: a name, a digest or a prefix of the digest. Raises TrackingError, with a
    suggestion, for a dataset that is neither in the store nor in <home>/datasets.
    """
    return _Downstream(reader, home).of(dataset)


class _Graph:
    """Base of both directions: the datasets and deployments under `home`, and the tree nodes."""

    def __init__(self, reader: Reader, home: Path) -> None:
        self._reader = reader
        self._stored = dict(_datasets(home))
        self._deployments = {d.id: d for d in _deployments(home)}
        # Ids of runs with a node. Without it, a run with weights equal to its start would recurse.
        self._seen: set[str] = set()

    def _run(self, at: Tree, run: RunView) -> Tree | None:
        """Add the node of a run, with its details.

        A repeated run gets a reference to its first node instead, and None is returned.
        """
        stage = run.tags.get("stage")
        kind = f"stage {run.name} of {run.tags.get('system', '?')}" if stage else f"run {run.name}"
        if run.id in self._seen:
            at.add(_label(kind, run.id, "see above"))
            return None
        self._seen.add(run.id)
        node = at.add(_label(kind, run.id, run.status.lower()))
        for title, tag in (
            ("recipe", "fingerprint"),
            ("git commit", "git_commit"),
            ("ray job", "ray_job_id"),
        ):
            if run.tags.get(tag):
                node.add(_label(title, run.tags[tag]))
        if run.metrics:
            node.add(
                _label("metrics", ", ".join(f"{k} {v:.4g}" for k, v in sorted(run.metrics.items())))
            )
        return node

    def _version(self, at: Tree, version: Version) -> Tree:
        node = at.add(
            _label(f"model {version.name}", f"version {version.version}", *version.aliases)
        )
        node.add(_weights(version.tags.get("digest", ""), version.artifact))
        return node

    def _dataset(self, at: Tree, dataset: DatasetInput) -> tuple[Tree, Manifest | None]:
        """Add the node of a dataset, with details of its manifest if that still exists."""
        node = at.add(
            _label(f"dataset {dataset.name}", dataset.digest[:12], f"{dataset.rows:,} rows")
        )
        manifest = self._manifest(dataset)
        if manifest is None:
            node.add(_label("manifest", f"no longer at {dataset.path}"))
            return node, None
        shards = (
            f"{len(manifest.shards)} with {sum(s.bytes for s in manifest.shards) / 1e6:,.1f} MB"
        )
        parameters = ", ".join(f"{k}={v}" for k, v in manifest.parameters.items())
        node.add(_label("source", manifest.source))
        node.add(_label("license", manifest.license))
        node.add(_label("made by", f"{manifest.made_by}({parameters})"))
        node.add(_label("shards", f"{shards}, in {dataset.path}"))
        return node, manifest

    def _manifest(self, dataset: DatasetInput) -> Manifest | None:
        if dataset.digest in self._stored:
            return self._stored[dataset.digest][1]
        try:
            manifest = read_manifest(dataset.path)
        except (DataError, OSError):
            return None
        return manifest if manifest.digest == dataset.digest else None

    def _known(self, digest: str) -> DatasetInput | None:
        """Return the dataset of this digest under <home>/datasets; None if there is none."""
        if digest not in self._stored:
            return None
        path, manifest = self._stored[digest]
        return DatasetInput(path.name, digest, str(path), manifest.rows)


class _Upstream(_Graph):
    """Adds the sources of a node below it, down to the parents of datasets."""

    def of(self, what: str) -> Tree:
        root = Tree("", hide_root=True)
        answer = RESPONSE.fullmatch(what)
        if answer:
            self._add_deployment(
                root.add(_label("response", what)), self._find(answer["deployment"])
            )
        elif what in self._deployments:
            self._add_deployment(root, self._deployments[what])
        elif re.fullmatch(r"[0-9a-f]{32}", what):
            self._add_run(root, self._reader.run(what))
        else:
            self._add_version(root, self._find_version(what))
        return root

    def _find(self, deployment: str) -> Deployment:
        if deployment not in self._deployments:
            raise TrackingError(
                f"there is no deployment {deployment!r}" + suggest(deployment, self._deployments)
            )
        return self._deployments[deployment]

    def _find_version(self, what: str) -> Version:
        """Find `model@alias`, `model:version` or `model`: its champion, else its newest version."""
        name, which = registry.split(what)
        if name != what:
            return self._reader.version(name, which)
        known = self._reader.versions(what)
        if not known:
            raise TrackingError(
                f"{what!r} is not a response, deployment, model or run"
                + suggest(what, [*self._reader.models(), *self._deployments])
            )
        return next((v for v in known if which in v.aliases), known[-1])

    def _add_deployment(self, at: Tree, deployment: Deployment) -> None:
        node = at.add(_deployment(deployment))
        if deployment.version:
            try:
                version = self._reader.version(deployment.model, deployment.version)
                return self._add_version(node, version)
            except TrackingError as error:
                # The registry no longer has the version, but a run may still have its weights.
                node.add(_label("model", deployment.model, str(error)))
        self._add_weights(node, deployment.digest, deployment.artifact)

    def _add_version(self, at: Tree, version: Version) -> None:
        self._add_run(self._version(at, version), self._reader.run(version.run_id))

    def _add_weights(self, at: Tree, digest: str, artifact: str = "") -> None:
        # Equal digests are equal weights, so the newest run is enough.
        runs = self._reader.producers(digest)[-1:]
        folders = [w.artifact for run in runs for w in run.outputs if w.digest == digest]
        node = at.add(_weights(digest, artifact or "".join(folders[:1])))
        for run in runs:
            self._add_run(node, run)
        if not runs:
            node.add(_label("origin", "no run of this store made these weights"))

    def _add_run(self, at: Tree, run: RunView) -> None:
        node = self._run(at, run)
        if node is None:
            return
        for dataset in run.inputs:
            self._add_dataset(node, dataset)
        for stage in self._reader.children(run.id):
            self._add_run(node, stage)
        start = run.tags.get("starts_from_digest")
        if start:
            self._add_weights(node, start)

    def _add_dataset(self, at: Tree, dataset: DatasetInput) -> None:
        node, manifest = self._dataset(at, dataset)
        for digest in manifest.parents if manifest else ():
            parent = self._known(digest)
            if parent:
                self._add_dataset(node, parent)
            else:
                node.add(
                    _label("dataset", digest[:12], "made elsewhere, not under <home>/datasets")
                )


class _Downstream(_Graph):
    """Adds the uses of a node below it, down to deployments."""

    def of(self, what: str) -> Tree:
        known = (self._known(d) for d in self._stored)
        found = {d.digest: d for d in known if d and (d.name == what or d.digest.startswith(what))}
        for run in self._reader.readers(what):
            found |= {
                d.digest: d for d in run.inputs if d.name == what or d.digest.startswith(what)
            }
        if not found:
            stored = (path.name for path, _ in self._stored.values())
            names = sorted({*stored, *self._reader.dataset_names()})
            raise TrackingError(
                f"no run has read a dataset {what!r}, and none is stored" + suggest(what, names)
            )
        root = Tree("", hide_root=True)
        for dataset in found.values():
            self._add_dataset(root, dataset)
        return root

    def _add_dataset(self, at: Tree, dataset: DatasetInput) -> None:
        node, _ = self._dataset(at, dataset)
        for run in self._reader.readers(dataset.digest):
            self._add_run(node, run)
        for digest, (_, manifest) in self._stored.items():
            child = self._known(digest)
            if child and dataset.digest in manifest.parents:
                self._add_dataset(node, child)

    def _add_run(self, at: Tree, run: RunView) -> None:
        node = self._run(at, run)
        if node is None:
            return
        versions = self._reader.registered(run.id)
        for weights in run.outputs:
            branch = node.add(_weights(weights.digest, weights.artifact))
            for version in versions:
                if version.tags.get("digest") == weights.digest:
                    self._version(branch, version)
            for deployment in self._deployments.values():
                if deployment.digest == weights.digest:
                    branch.add(_deployment(deployment))
            for later in self._reader.started_from(weights.digest):
                self._add_run(branch, later)


def _label(kind: str, name: str, *about: str) -> Text:
    """Return a node's line as plain text, because external names must not be parsed as markup."""
    return Text.assemble((f"{kind} ", "bold"), name, *[(f"  {a}", "dim") for a in about])


def _deployment(deployment: Deployment) -> Text:
    return _label("deployment", deployment.id, deployment.app, f"since {deployment.started}")


def _weights(digest: str, artifact: str) -> Text:
    return _label("weights", digest[:12] or "without a digest", artifact)


def _datasets(home: Path) -> Iterator[tuple[str, tuple[Path, Manifest]]]:
    """Yield (digest, (folder, manifest)) of the valid datasets under `home`."""
    place = home / "datasets"
    for folder in (place / name for name in storage.names(place)):
        try:
            manifest = read_manifest(str(folder))
        except DataError:
            continue  # incomplete or damaged: `bridgework data verify` reports which
        yield manifest.digest, (folder, manifest)


def _deployments(home: Path) -> Iterator[Deployment]:
    place = home / "deployments"
    for file in (place / name for name in storage.names(place) if name.endswith(".json")):
        try:
            data = json.loads(file.read_text())
            yield Deployment(**{f.name: data[f.name] for f in fields(Deployment)})
        except (ValueError, KeyError, TypeError) as error:
            raise TrackingError(
                f"{file} is not a deployment. Got {error!r}. Fix: delete it, or deploy again"
            ) from None
