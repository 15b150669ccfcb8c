"""Lineage graphs: upstream from an answer to its data, downstream from a dataset to deployments.

Upstream: response -> deployment -> model version -> weights -> run of the stage -> the stages
before it -> datasets -> their parents. Downstream is the reverse, from a sample, a shard, a dataset
or weights. `Reader` is the protocol of the tracker's queries; `lineage_views` renders a graph.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Protocol

from bridgework import artifacts, storage
from bridgework.data.dataset import open_dataset
from bridgework.data.manifest import Manifest, read_manifest
from bridgework.errors import DataError, TrackingError, suggest
from bridgework.mixture import DatasetInput
from bridgework.tracking import registry
from bridgework.tracking.tracker import Version

RESPONSE = re.compile(r"(?:chatcmpl|embd|clas|rank|capt)-(?P<deployment>.+)-[0-9a-f]{12}")
DIGEST = re.compile(r"[0-9a-f]{8,64}")  # of weights, or the beginning of it
MAX_METRICS = 12  # of a run that are printed: its evaluations, then its training
# tag of a run -> title of the line below it
FACTS = {
    "run": "run",
    "fingerprint": "recipe",
    "command": "command",
    "git_commit": "git commit",
    "seed": "seed",
    "execution": "execution",
    "versions": "versions",
    "hardware": "hardware",
    "ray_job_id": "ray job",
    "forked_from": "forked from",
}


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

    def named(self, name: str) -> list[RunView]:
        """Find the runs of a folder <home>/runs/<name>, without those of their stages."""

    def run_names(self) -> list[str]:
        """Return the names of the newest runs that have no parent."""

    def children(self, run_id: str) -> list[RunView]: ...

    def started_from(self, digests: Collection[str]) -> list[RunView]:
        """Find the runs that started from weights of one of these digests."""

    def producers(self, digest: str) -> list[RunView]:
        """Find the runs whose output has this digest, or one that begins with it."""

    def readers(self, dataset: str) -> list[RunView]:
        """Find the runs that read a dataset, by its name, digest or a prefix of the digest."""

    def dataset_names(self) -> list[str]:
        """Return the names of the datasets that the newest runs read, sorted."""

    def version(self, name: str, which: str) -> Version: ...

    def versions(self, name: str) -> list[Version]: ...

    def registered(self, run_ids: Collection[str]) -> list[Version]:
        """Find the versions of these runs' weights, sorted by name and number."""

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


@dataclass(frozen=True)
class Node:
    """One thing of a lineage graph.

    kind: e.g. "run"; with `id` it identifies the node.
    title, name, about: its line, e.g. "dataset", "emoji", ("1c72ce3c427c", "1,117 rows").
    facts: (title, text) of the lines below it.
    """

    kind: str
    id: str
    title: str
    name: str
    about: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.kind} {self.id}"


@dataclass
class Lineage:
    """A graph of nodes. An edge leads from a node to one that is printed below it."""

    subject: str
    direction: str  # "upstream" or "downstream"
    nodes: dict[str, Node] = field(default_factory=dict)
    roots: list[str] = field(default_factory=list)
    edges: list[tuple[str, str]] = field(default_factory=list)

    def add(self, node: Node, below: Node | None) -> bool:
        """Add a node below another one, or as a root; returns False if it is known already."""
        new = node.key not in self.nodes
        self.nodes.setdefault(node.key, node)
        if below is None:
            self.roots.append(node.key)
        elif (below.key, node.key) not in self.edges:
            self.edges.append((below.key, node.key))
        return new


def trace(what: str, reader: Reader, home: Path) -> Lineage:
    """Return the upstream lineage of `what`.

    what: id of a response, a deployment or a run; `model`, `model@alias` or `model:version`; name
    of a run; folder of an artifact or a dataset; digest of weights or a dataset, or its first 8 or
    more digits; name of a dataset. Raises TrackingError, with a suggestion, for any other text.
    """
    return _Upstream(what, "upstream", reader, home).build()


def uses(what: str, reader: Reader, home: Path) -> Lineage:
    """Return the downstream lineage of `what`: everything that was derived from it.

    what: a dataset (name, digest, folder); a shard (its file, or its sha256); key of a sample, or
    DATASET/KEY; a run, weights or a model as for `trace`. Datasets derived from it, runs, weights,
    versions, the runs that started from them, and deployments. Raises TrackingError, with a
    suggestion, for any other text.
    """
    return _Downstream(what, "downstream", reader, home).build()


class _Walk(ABC):
    """Base of both directions: names, datasets and deployments under `home`, and the nodes."""

    def __init__(self, what: str, direction: str, reader: Reader, home: Path) -> None:
        self._what = what
        self._reader = reader
        self._home = home
        self._stored = dict(_datasets(home))
        self._deployments = {d.id: d for d in _deployments(home)}
        self.graph = Lineage(what, direction)

    def build(self) -> Lineage:
        self._start(self._what)
        return self.graph

    @abstractmethod
    def _start(self, what: str) -> None: ...

    @abstractmethod
    def _add_run(self, below: Node | None, run: RunView) -> None: ...

    @abstractmethod
    def _add_version(self, below: Node | None, version: Version) -> None: ...

    @abstractmethod
    def _add_weights(
        self, below: Node | None, digest: str, artifact: str = "", near: RunView | None = None
    ) -> None: ...

    def _start_from_model(self, what: str) -> bool:
        """Start from a run, a model or weights; returns False if `what` is none of them."""
        if re.fullmatch(r"[0-9a-f]{32}", what):
            self._add_run(None, self._reader.run(what))
            return True
        folder = storage.locate(what)
        if folder.is_dir() and (folder / artifacts.FILE).is_file():
            self._add_weights(None, artifacts.describe(folder).digest, str(folder))
            return True
        name, which = registry.split(what)
        if name != what and name in self._reader.models():
            self._add_version(None, self._reader.version(name, which))
            return True
        if "/" not in what and (known := self._reader.versions(what)):
            # its champion, else its newest version
            champion = next((v for v in known if which in v.aliases), known[-1])
            self._add_version(None, champion)
            return True
        if runs := self._reader.named(what):
            self._add_run(None, runs[-1])
            return True
        if DIGEST.fullmatch(what) and (runs := self._reader.producers(what)):
            digests = {w.digest for run in runs for w in run.outputs if w.digest.startswith(what)}
            for digest in sorted(digests):
                self._add_weights(None, digest)
            return True
        return False

    def _named_datasets(self, what: str) -> list[DatasetInput]:
        """Return the datasets of this name, folder or digest that are stored or that runs read."""
        known = [self._known(digest) for digest in self._stored]
        path = str(storage.locate(what).resolve())
        found = {
            d.digest: d
            for d in known
            if d is not None and (_names(d, what) or str(storage.locate(d.path).resolve()) == path)
        }
        if not found and storage.locate(what).is_dir():
            try:
                manifest = read_manifest(what)
                found[manifest.digest] = DatasetInput(
                    Path(what).name, manifest.digest, what, manifest.rows
                )
            except DataError:
                pass
        for run in self._reader.readers(what):
            found |= {d.digest: d for d in run.inputs if _names(d, what)}
        return list(found.values())

    def _dataset_names(self) -> list[str]:
        stored = (path.name for path, _ in self._stored.values())
        return sorted({*stored, *self._reader.dataset_names()})

    def _run_node(self, run: RunView) -> Node:
        stage = run.tags.get("stage")
        title = f"stage {run.name} of {run.tags.get('system', '?')}" if stage else f"run {run.name}"
        facts = [(title, run.tags[tag]) for tag, title in FACTS.items() if run.tags.get(tag)]
        if not stage:
            facts = [fact for fact in facts if fact[0] != "run"]
        if run.metrics:
            decisive = sorted(run.metrics, key=lambda key: ("." not in key, key))[:MAX_METRICS]
            more = len(run.metrics) - len(decisive)
            text = ", ".join(f"{key} {run.metrics[key]:.4g}" for key in decisive)
            facts.append(("metrics", f"{text} and {more} more in MLflow" if more else text))
        return Node("run", run.id, title, run.id, (run.status.lower(),), tuple(facts))

    def _version_node(self, version: Version) -> Node:
        key = f"{version.name}:{version.version}"
        number = f"version {version.version}"
        return Node("version", key, f"model {version.name}", number, version.aliases)

    def _dataset_node(self, dataset: DatasetInput) -> tuple[Node, Manifest | None]:
        """Return the node of a dataset, with facts of its manifest if that still exists."""
        about = (f"{dataset.rows:,} rows",)
        manifest = self._manifest(dataset)
        if manifest is None:
            facts = [("manifest", f"no longer at {dataset.path}")]
        else:
            size = sum(shard.bytes for shard in manifest.shards) / 1e6
            parameters = ", ".join(f"{k}={v}" for k, v in manifest.parameters.items())
            path = self._stored[dataset.digest][0] if dataset.digest in self._stored else None
            facts = [
                ("source", manifest.source),
                ("license", manifest.license),
                ("made by", f"{manifest.made_by}({parameters})"),
                (
                    "shards",
                    f"{len(manifest.shards)} with {size:,.1f} MB, in {path or dataset.path}",
                ),
            ]
        title, digest = f"dataset {dataset.name}", dataset.digest
        return Node("dataset", digest, title, digest[:12], about, tuple(facts)), manifest

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


class _Upstream(_Walk):
    """Adds the sources of a node below it, down to the parents of datasets."""

    def _start(self, what: str) -> None:
        answer = RESPONSE.fullmatch(what)
        if answer:
            response = Node("response", what, "response", what)
            self.graph.add(response, None)
            self._add_deployment(response, self._find(answer["deployment"]))
        elif what in self._deployments:
            self._add_deployment(None, self._deployments[what])
        elif self._start_from_model(what):
            pass
        elif datasets := self._named_datasets(what):
            for dataset in datasets:
                self._add_dataset(None, dataset)
        else:
            known = [
                *self._reader.models(),
                *self._deployments,
                *self._reader.run_names(),
                *self._dataset_names(),
            ]
            raise TrackingError(
                f"{what!r} is not a response, deployment, model, run, artifact or dataset"
                + suggest(what, known)
            )

    def _find(self, deployment: str) -> Deployment:
        if deployment not in self._deployments:
            raise TrackingError(
                f"there is no deployment {deployment!r}" + suggest(deployment, self._deployments)
            )
        return self._deployments[deployment]

    def _add_deployment(self, below: Node | None, deployment: Deployment) -> None:
        version, problem = None, ""
        if deployment.version:
            try:
                version = self._reader.version(deployment.model, deployment.version)
            except TrackingError as error:
                # The registry no longer has the version, but a run may still have its weights.
                problem = str(error)
        node = _deployment_node(deployment, problem)
        self.graph.add(node, below)
        if version is not None:
            self._add_version(node, version)
        else:
            self._add_weights(node, deployment.digest, deployment.artifact)

    def _add_version(self, below: Node | None, version: Version) -> None:
        node = self._version_node(version)
        if self.graph.add(node, below):
            weights = _weights_node(version.tags.get("digest", ""), version.artifact)
            self.graph.add(weights, node)
            if version.run_id:
                self._add_run(weights, self._reader.run(version.run_id))

    def _add_weights(
        self, below: Node | None, digest: str, artifact: str = "", near: RunView | None = None
    ) -> None:
        """Add weights with the run that made them.

        Several runs may have made equal weights. `near`, a run that started from them, recorded
        which one it was; without that record it is one of the same system's run, else the newest.
        """
        runs = self._reader.producers(digest)
        recorded = near.tags.get("starts_from_run") if near else None
        own = [run for run in runs if run.id == recorded] or [
            run for run in runs if near and run.parent == near.parent and run.id != near.id
        ]
        runs = (own or runs)[-1:]
        folders = [w.artifact for run in runs for w in run.outputs if w.digest == digest]
        node = _weights_node(digest, artifact or "".join(folders[:1]), made=bool(runs))
        if self.graph.add(node, below):
            for run in runs:
                self._add_run(node, run)

    def _add_run(self, below: Node | None, run: RunView) -> None:
        node = self._run_node(run)
        if not self.graph.add(node, below):
            return
        children = self._reader.children(run.id)
        read_by_stages = {d.digest for child in children for d in child.inputs}
        for dataset in run.inputs:
            if dataset.digest not in read_by_stages:
                self._add_dataset(node, dataset)
        for stage in children:
            self._add_run(node, stage)
        start = run.tags.get("starts_from_digest")
        if start:
            self._add_weights(node, start, near=run)

    def _add_dataset(self, below: Node | None, dataset: DatasetInput) -> None:
        node, manifest = self._dataset_node(dataset)
        if not self.graph.add(node, below):
            return
        for digest in manifest.parents if manifest else ():
            parent = self._known(digest)
            if parent:
                self._add_dataset(node, parent)
            else:
                about = ("written elsewhere, not under <home>/datasets",)
                self.graph.add(Node("dataset", digest, "dataset", digest[:12], about), node)


class _Downstream(_Walk):
    """Adds the uses of a node below it, down to deployments."""

    def _start(self, what: str) -> None:
        if datasets := self._named_datasets(what):
            for dataset in datasets:
                self._add_dataset(None, dataset)
        elif self._start_from_model(what) or self._start_from_shard(what):
            pass
        elif not self._start_from_sample(what):
            raise TrackingError(
                f"no run has read a dataset {what!r}, and none is stored; it is neither a shard or "
                "sample of a stored dataset, nor a run, model or artifact"
                + suggest(what, self._dataset_names())
            )

    def _start_from_shard(self, what: str) -> bool:
        found = False
        for digest, (path, manifest) in self._stored.items():
            for shard in manifest.shards:
                file = str(path / shard.file)
                same = what in (shard.file, file) or str(storage.locate(what).resolve()) == file
                if same or (DIGEST.fullmatch(what) and shard.sha256.startswith(what)):
                    about = (shard.sha256[:12], f"{shard.rows:,} rows")
                    node = Node("shard", file, "shard", shard.file, about)
                    self.graph.add(node, None)
                    self._add_known(node, digest)
                    found = True
        return found

    def _start_from_sample(self, what: str) -> bool:
        """Find a sample by its key in the stored datasets, whose key columns are read."""
        name, _, rest = what.partition("/")
        named = {d for d, (path, _) in self._stored.items() if rest and path.name == name}
        key = rest if named else what
        root = Node("sample", key, "sample", key)
        found = False
        for digest in named or self._stored:
            path, manifest = self._stored[digest]
            for shard, keys in zip(manifest.shards, open_dataset(str(path)).keys(), strict=True):
                if key not in keys:
                    continue
                if not found:
                    self.graph.add(root, None)
                found = True
                about = (shard.sha256[:12], f"row {keys.index(key):,}")
                node = Node("shard", str(path / shard.file), "shard", shard.file, about)
                self.graph.add(node, root)
                self._add_known(node, digest)
        return found

    def _add_known(self, below: Node, digest: str) -> None:
        dataset = self._known(digest)
        if dataset is not None:
            self._add_dataset(below, dataset)

    def _add_dataset(self, below: Node | None, dataset: DatasetInput) -> None:
        node, _ = self._dataset_node(dataset)
        if not self.graph.add(node, below):
            return
        runs = self._reader.readers(dataset.digest)
        parents = {run.parent for run in runs}
        # the stages of a parent are listed instead of it
        self._add_runs([(node, run) for run in runs if run.id not in parents])
        for digest, (_, manifest) in self._stored.items():
            child = self._known(digest)
            if child and dataset.digest in manifest.parents:
                self._add_dataset(node, child)

    def _add_run(self, below: Node | None, run: RunView) -> None:
        self._add_runs([(below, run)])
        if below is None:  # the subject itself, e.g. the run of a system
            node = self._run_node(run)
            self._add_runs([(node, child) for child in self._reader.children(run.id)])

    def _add_runs(self, runs: Sequence[tuple[Node | None, RunView]]) -> None:
        """Add runs, each below its node, and the uses of their weights.

        All runs of one distance are asked for together, because a store of many runs needs as long
        for one of them as for hundreds.
        """
        added = list[tuple[Node, RunView]]()
        for below, run in runs:
            node = self._run_node(run)
            if self.graph.add(node, below):
                added.append((node, run))
        made = [run.id for _, run in added if run.outputs]
        versions = dict[str, list[Version]]()
        for version in self._reader.registered(made) if made else ():
            versions.setdefault(version.run_id, []).append(version)
        self._add_outputs(
            [
                (node, weights, versions.get(run.id, []))
                for node, run in added
                for weights in run.outputs
            ]
        )

    def _add_outputs(
        self, outputs: Sequence[tuple[Node | None, Weights, Sequence[Version]]]
    ) -> None:
        """Add weights, each below its node, their versions and deployments, and the later runs."""
        branches = dict[str, Node]()
        for below, weights, versions in outputs:
            branch = _weights_node(weights.digest, weights.artifact)
            if not self.graph.add(branch, below):
                continue
            for version in versions:
                if version.tags.get("digest") == weights.digest:
                    self.graph.add(self._version_node(version), branch)
            for deployment in self._deployments.values():
                if deployment.digest == weights.digest:
                    self.graph.add(_deployment_node(deployment), branch)
            if weights.digest:
                branches[weights.digest] = branch
        later = self._reader.started_from(branches) if branches else []
        if later:
            self._add_runs([(branches[run.tags["starts_from_digest"]], run) for run in later])

    def _add_weights(
        self, below: Node | None, digest: str, artifact: str = "", near: RunView | None = None
    ) -> None:
        runs = self._reader.producers(digest)
        folders = [w.artifact for run in runs for w in run.outputs if w.digest == digest]
        versions = self._reader.registered([run.id for run in runs]) if runs else []
        weights = Weights("", artifact or "".join(folders[-1:]), digest)
        self._add_outputs([(below, weights, versions)])

    def _add_version(self, below: Node | None, version: Version) -> None:
        node = self._version_node(version)
        if self.graph.add(node, below):
            weights = Weights("", version.artifact, version.tags.get("digest", ""))
            self._add_outputs([(node, weights, [])])


def _names(dataset: DatasetInput, what: str) -> bool:
    return dataset.name == what or (
        DIGEST.fullmatch(what) is not None and dataset.digest.startswith(what)
    )


def _deployment_node(deployment: Deployment, problem: str = "") -> Node:
    about = (deployment.app, f"since {deployment.started}")
    facts = (("model", f"{deployment.model}  {problem}"),) if problem else ()
    return Node("deployment", deployment.id, "deployment", deployment.id, about, facts)


def _weights_node(digest: str, artifact: str, *, made: bool = True) -> Node:
    facts = () if made else (("origin", "no run of this store made these weights"),)
    about = (artifact,) if artifact else ()
    # Weights of old versions have no digest: their folder identifies them.
    name = digest[:12] or "without a digest"
    return Node("weights", digest or artifact, "weights", name, about, facts)


def _datasets(home: Path) -> Iterator[tuple[str, tuple[Path, Manifest]]]:
    """Yield (digest, (folder, manifest)) of the valid datasets under `home`."""
    place = home / "datasets"
    for folder in (place / name for name in storage.names(place)):
        try:
            manifest = read_manifest(str(folder))
        except DataError:
            continue  # incomplete or damaged: `bridgework data verify` reports which
        yield manifest.digest, (folder, manifest)


def _deployments(home: Path) -> Iterable[Deployment]:
    place = home / "deployments"
    for file in (place / name for name in storage.names(place) if name.endswith(".json")):
        try:
            data = json.loads(file.read_text())
            yield Deployment(**{f.name: data[f.name] for f in fields(Deployment)})
        except (ValueError, KeyError, TypeError) as error:
            raise TrackingError(
                f"{file} is not a deployment. Got {error!r}. Fix: delete it, or deploy again"
            ) from None
