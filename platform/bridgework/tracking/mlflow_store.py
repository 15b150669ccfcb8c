"""MLflow store: the tracker and the lineage queries on MLflow. Only mlflow_tables.py imports it too.

An experiment is a project, a parent run is a system's run, a child run a stage or a trial. Datasets
are inputs. Weights are logged models that refer to their folder by the tag `artifact`, without a
copy. A registered version is a model that may be served. `artifact_of` finds the artifact's folder
of a model name.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from mlflow import MlflowClient, entities
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.db.db_types import DATABASE_ENGINES
from mlflow.store.entities import PagedList
from mlflow.utils import mlflow_tags
from mlflow.utils.validation import (
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
)
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from bridgework import old_names, storage
from bridgework.artifacts import FILE
from bridgework.errors import TrackingError, suggest
from bridgework.mixture import DatasetInput
from bridgework.tracking import mlflow_tables
from bridgework.tracking.lineage import RunView, Weights
from bridgework.tracking.registry import is_folder, split
from bridgework.tracking.tracker import (
    Point,
    Produced,
    Status,
    Version,
    aliases_of,
    followed,
    holders,
)

# MLflow reads these at import or at each request; the user's own values have precedence.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # INFO reports every table that it creates
# Seconds and retries: by default a call to a dead server takes 246 s.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")

T = TypeVar("T")
# Hex digits of a digest in MLflow's own field, which has at most 36 and is in every table of the
# UI.
SHORT = 12
DESCRIPTION_CHARS = 5_000  # of a version
REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED")  # of MLflow, for HTTP 401 and 403
POSTGRESQL_LOCK = 7_246_571_009  # number of the lock while tables are created
NEWEST = 200  # runs that a suggestion of names considers
# The UI opens an experiment of this kind with its training runs, not with traces of prompts.
TRAINING = {"mlflow.experimentKind": "custom_model_development"}
DATA = frozenset(
    {"data_wait_share", "padding", "quarantined", "replaced", "samples", "share", "tokens"}
)
# Ends of the points with which a figure's interval and number of rows are logged
INTERVAL = (".low", ".high", ".n")
_GROUP = re.compile(r"^(?:train|data|eval)/")


class MLflowReader:
    """`lineage.Reader` on an MLflow store, over all its projects.

    uri: a server (`http://...`) or a database; the default is MLFLOW_TRACKING_URI, else
    sqlite:///<home>/mlflow.db if the home is a local folder. It must be opened before any worker
    starts, because it creates the tables of a new database, under a lock.
    """

    def __init__(self, uri: str | None, home: Path) -> None:
        self._home = home.resolve()
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or _database(home)
        logging.getLogger("mlflow.store").setLevel(logging.WARNING)  # tables of a new store
        with self._call("open the store"), _locked(self.uri):
            self._client = MlflowClient(self.uri, registry_uri=self.uri)
            # Tracking and registry create their own tables at the first request.
            self._client.search_experiments(max_results=1)
            self._client.search_registered_models(max_results=1)
        # None for a server, whose tables only its own process reads
        is_database = urlsplit(self.uri).scheme.partition("+")[0] in DATABASE_ENGINES
        self._database = self.uri if is_database else None

    def run(self, run_id: str) -> RunView:
        with self._call(f"read run {run_id}"):
            return self._views([self._client.get_run(run_id)])[0]

    def named(self, name: str) -> list[RunView]:
        with self._call(f"find the run {name!r}"):
            return self._runs(f"tags.run_key = '{_quoted(name)}'")[::-1]

    def run_names(self) -> list[str]:
        with self._call("list the runs"):
            newest = self._client.search_runs(self._everywhere(), max_results=NEWEST)
            return [
                str(run.info.run_name)
                for run in newest
                if mlflow_tags.MLFLOW_PARENT_RUN_ID not in run.data.tags
            ]

    def history(self, run_id: str, metric: str) -> dict[int, float]:
        """Return step -> value of a metric of a run."""
        with self._call(f"read {metric} of run {run_id}"):
            return {m.step: m.value for m in self._client.get_metric_history(run_id, metric)}

    def text(self, run_id: str, file: str) -> str | None:
        """Return the content of a file that was logged with a run; None if there is none."""
        with self._call(f"read {file} of run {run_id}"), TemporaryDirectory() as folder:
            try:
                return Path(self._client.download_artifacts(run_id, file, folder)).read_text()
            except (MlflowException, OSError) as error:
                if isinstance(error.__context__, requests.RequestException):
                    raise
                return None

    def children(self, run_id: str) -> list[RunView]:
        with self._call(f"read the stages of run {run_id}"):
            return self._runs(f"tags.`{mlflow_tags.MLFLOW_PARENT_RUN_ID}` = '{run_id}'")[::-1]

    def started_from(self, digests: Collection[str]) -> list[RunView]:
        with self._call(f"find the runs that start from {len(digests)} weights"):
            if self._database is None:
                conditions = [f"tags.starts_from_digest = '{digest}'" for digest in digests]
            else:
                ids = mlflow_tables.runs_with_tag(self._database, "starts_from_digest", digests)
                conditions = [
                    f"attributes.run_id IN {_listed(some)}" for some in mlflow_tables.chunks(ids)
                ]
            where = self._everywhere()
            found = [run for c in conditions for run in _pages(self._client.search_runs, where, c)]
            return self._views(sorted(found, key=lambda run: run.info.start_time))

    def producers(self, digest: str) -> list[RunView]:
        with self._call(f"find the run that made weights {digest}"):
            return [
                self.run(m.source_run_id)
                for m in self._logged(f"tags.digest LIKE '{_quoted(digest)}%'")[::-1]
                if m.source_run_id
            ]

    def readers(self, dataset: str) -> list[RunView]:
        with self._call(f"find the runs that read {dataset}"):
            named = self._runs(f"dataset.name = '{_quoted(dataset)}'") + self._runs(
                f"dataset.digest LIKE '{_quoted(dataset[:SHORT])}%'"
            )
            hits = {
                r.id: r
                for r in named
                if any(d.name == dataset or d.digest.startswith(dataset) for d in r.inputs)
            }
            return list(hits.values())[::-1]

    def dataset_names(self) -> list[str]:
        """Return the names of the datasets that the newest runs read, sorted."""
        with self._call("list the datasets of runs"):
            runs = self._client.search_runs(self._everywhere(), max_results=NEWEST)
            return sorted(
                {d.dataset.name for r in runs if r.inputs for d in r.inputs.dataset_inputs}
            )

    def versions(self, name: str) -> list[Version]:
        with self._call(f"read the versions of {name!r}"):
            if name not in self.models():
                return []
            aliases = self._client.get_registered_model(name).aliases
            found = _pages(self._client.search_model_versions, f"name = '{name}'")
            return [self._version(v, aliases) for v in sorted(found, key=lambda v: int(v.version))]

    def registered(self, run_ids: Collection[str]) -> list[Version]:
        with self._call(f"find the versions of {len(run_ids)} runs"):
            found = [
                version
                for some in mlflow_tables.chunks(run_ids)
                for version in _pages(
                    self._client.search_model_versions, f"run_id IN {_listed(some)}"
                )
            ]
            names = {version.name for version in found}
            aliases = {name: self._client.get_registered_model(name).aliases for name in names}
            found.sort(key=lambda v: (v.name, int(v.version)))
            return [self._version(v, aliases[v.name]) for v in found]

    def models(self) -> list[str]:
        with self._call("list the registered models"):
            return [m.name for m in _pages(self._client.search_registered_models)]

    def version(self, name: str, which: str) -> Version:
        known = self.versions(name)
        if not known:
            raise TrackingError(f"no model {name!r} is registered" + suggest(name, self.models()))
        for version in known:
            if which == version.version or which in version.aliases:
                return version
        labels = [label for v in known for label in (v.version, *v.aliases)]
        raise TrackingError(
            f"model {name!r} has no version or alias {which!r}" + suggest(which, labels)
        )

    def _everywhere(self) -> list[str]:
        """Return the ids of all projects. They are few, and asked for by every query."""
        return [e.experiment_id for e in _pages(self._client.search_experiments)]

    def _runs(self, condition: str, *experiments: str) -> list[RunView]:
        """Find runs, newest first; by default in all projects."""
        where = list(experiments) or self._everywhere()
        return self._views(_pages(self._client.search_runs, where, condition))

    def _logged(self, condition: str) -> list[entities.LoggedModel]:
        return _pages(self._client.search_logged_models, self._everywhere(), condition)

    def _views(self, runs: Sequence[entities.Run]) -> list[RunView]:
        outputs = [
            [m.model_id for m in run.outputs.model_outputs] if run.outputs else [] for run in runs
        ]
        models = self._models([model for ids in outputs for model in ids])
        return [
            self._view(run, [models[model] for model in ids])
            for run, ids in zip(runs, outputs, strict=True)
        ]

    def _models(self, ids: Sequence[str]) -> dict[str, tuple[str, dict[str, str]]]:
        """Return model id -> (name, tags) of logged models."""
        if self._database is not None:
            return mlflow_tables.logged_models(self._database, ids)
        found = [self._client.get_logged_model(model) for model in ids]
        return {model.model_id: (model.name, dict(model.tags)) for model in found}

    def _view(self, run: entities.Run, outputs: Sequence[tuple[str, Mapping[str, str]]]) -> RunView:
        return RunView(
            id=run.info.run_id,
            name=run.info.run_name,
            status=run.info.status,
            parent=run.data.tags.get(mlflow_tags.MLFLOW_PARENT_RUN_ID),
            tags={k: v for k, v in run.data.tags.items() if not k.startswith("mlflow.")},
            metrics={
                _GROUP.sub("", key): value
                for key, value in run.data.metrics.items()
                if not key.startswith("interval/")
            },
            inputs=tuple(_read_input(d) for d in (run.inputs.dataset_inputs if run.inputs else ())),
            outputs=tuple(
                Weights(name, self._artifact(tags), tags.get("digest", ""))
                for name, tags in outputs
            ),
        )

    def _artifact(self, tags: Mapping[str, str]) -> str:
        """Return the artifact's folder from the tags of a version or model, also by the old tag.

        A folder that does not exist is looked for under this home, which may be a copy.
        """
        written = tags.get("artifact") or tags.get(old_names.ARTIFACT_TAG, "")
        if not written or "://" in written or Path(written).is_dir():
            return written
        parts = Path(written).parts
        here = (self._home.joinpath(*parts[start:]) for start in range(1, len(parts)))
        return next((str(folder) for folder in here if (folder / FILE).is_file()), written)

    def _version(self, found: ModelVersion, aliases: Mapping[str, Any]) -> Version:
        """Convert a version.

        aliases: alias -> version of the model, which a search does not return.
        """
        tags, number = dict(found.tags), str(found.version)
        own = tuple(alias for alias, version in aliases.items() if str(version) == number)
        return Version(found.name, number, self._artifact(tags), found.run_id or "", own, tags)

    @contextmanager
    def _call(self, what: str) -> Iterator[None]:
        """Convert errors of MLflow in the block to TrackingError."""
        try:
            yield
        except (MlflowException, SQLAlchemyError, OSError) as error:
            where = _without_password(self.uri)
            if isinstance(error, requests.RequestException) or isinstance(
                error.__context__, requests.RequestException
            ):
                raise TrackingError(
                    f"cannot {what}: MLflow at {where} does not answer. Fix: start the server "
                    "again, or unset MLFLOW_TRACKING_URI to track under $BRIDGEWORK_HOME"
                ) from error
            if (code := getattr(error, "error_code", "")) in REFUSED:
                raise TrackingError(
                    f"cannot {what}: MLflow at {where} refuses access. Got {code}. "
                    "Fix: set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and "
                    "MLFLOW_TRACKING_PASSWORD"
                ) from error
            reason = " ".join(str(error).replace(self.uri, where).split())[:300].rstrip(".")
            raise TrackingError(f"cannot {what}: MLflow at {where} reports: {reason}") from error


class MLflowTracker(MLflowReader):
    """`tracker.Tracker` on an MLflow store, for the driver; workers write journals.

    experiment: the project.
    """

    def __init__(self, uri: str | None, home: Path, experiment: str) -> None:
        super().__init__(uri, home)
        self._home.mkdir(parents=True, exist_ok=True)
        with self._call(f"open the experiment {experiment!r}"):
            self._experiment = self._open(experiment, home)

    def start(
        self, name: str, *, parent: str | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Start a run and return its id.

        The newest run of the same name, parent and `run_key` tag is resumed instead.
        """
        own = dict(tags or {})
        key = own.get("run_key")
        with self._call(f"start the run {name!r}"):
            for run in self._runs(f"tags.run_key = '{key}'", self._experiment) if key else []:
                if (run.name, run.parent) == (name, parent):
                    self._client.update_run(run.id, status="RUNNING")
                    return run.id
            created = self._client.create_run(
                self._experiment, run_name=name, tags=own | _ui_tags(own, parent)
            )
            return str(created.info.run_id)

    def params(self, run_id: str, values: Mapping[str, Any], *, resumed: bool = False) -> None:
        """Log parameters by dotted path.

        Names and values that MLflow cannot store (a `*` in a name, a long value) are complete in
        params.json. MLflow rejects a second value of a parameter; in a `resumed` run it is logged
        as the tag `now.NAME`.
        """
        texts = {_name(k): str(v) for k, v in values.items()}
        with self._call(f"log {len(texts)} parameters of run {run_id}"):
            known = self._client.get_run(run_id).data.params if resumed else {}
            short = {k: v[:MAX_PARAM_VAL_LENGTH] for k, v in texts.items()}
            batch = [entities.Param(k, v) for k, v in short.items() if k not in known]
            for k, v in short.items():
                if known.get(k, v) != v:
                    self._client.set_tag(run_id, f"now.{k}", v)
            for some in _batches(batch, MAX_PARAMS_TAGS_PER_BATCH):
                self._client.log_batch(run_id, params=some)
            if (
                any(len(v) > MAX_PARAM_VAL_LENGTH for v in texts.values())
                or not texts.keys() >= values.keys()
            ):
                self._client.log_dict(run_id, {k: str(v) for k, v in values.items()}, "params.json")

    def inputs(
        self,
        run_id: str,
        datasets: Sequence[DatasetInput],
        *,
        models: Sequence[str] = (),
        context: str = "training",
    ) -> None:
        with self._call(f"log {len(datasets)} datasets of run {run_id}"):
            self._client.log_inputs(
                run_id,
                [_input(d, context) for d in datasets],
                [entities.LoggedModelInput(model) for model in models],
            )

    def points(
        self,
        run_id: str,
        points: Sequence[Point],
        *,
        model_id: str | None = None,
        dataset: DatasetInput | None = None,
    ) -> None:
        """Log points, at most 1000 per call. Equal points are stored once, so repeats are safe."""
        about = {} if model_id is None else {"model_id": model_id, "run_id": run_id}
        if model_id is not None and dataset is not None:
            about |= {"dataset_name": dataset.name, "dataset_digest": dataset.digest[:SHORT]}
        metrics = [
            entities.Metric(f"{group(p.key)}/{_name(p.key)}", p.value, p.at, p.step, **about)
            for p in points
        ]
        with self._call(f"log {len(points)} points of run {run_id}"):
            for some in _batches(metrics, MAX_METRICS_PER_BATCH):
                self._client.log_batch(run_id, metrics=some)

    def file(self, run_id: str, path: Path, folder: str = "") -> None:
        with self._call(f"keep the file {path} with run {run_id}"), storage.local_copy(path) as own:
            self._client.log_artifact(run_id, str(own), folder or None)

    def output(self, run_id: str, name: str, artifact: str, tags: Mapping[str, str]) -> str:
        """Log a model that refers to the folder `artifact`, without a copy; returns its id.

        The same weights are logged once, also if the run of a finished stage resumes.
        """
        about = {**tags, "artifact": artifact}
        with self._call(f"log the weights {artifact} of run {run_id}"):
            for model in self._logged(f"source_run_id = '{run_id}'"):
                if about.items() <= model.tags.items():
                    return str(model.model_id)
            model = self._client.create_logged_model(
                self._client.get_run(run_id).info.experiment_id,
                name=re.sub(r"[/:.%\"']", "-", name),  # MLflow's rule for these names
                source_run_id=run_id,
                tags=about,
                # The UI compares models by their parameters.
                params={k: about[k] for k in ("artifact", "digest") if k in about},
            )
            self._client.finalize_logged_model(model.model_id, "READY")
            self._client.log_outputs(
                run_id, [entities.LoggedModelOutput(model.model_id, int(about.get("steps", 0)))]
            )
            return str(model.model_id)

    def produced(self, digest: str, artifact: str = "") -> Produced | None:
        with self._call(f"find the model of weights {digest}"):
            found = [m for m in self._logged(f"tags.digest = '{digest}'") if m.source_run_id]
            own = [m for m in found if self._artifact(m.tags) == artifact] or found
            return Produced(str(own[0].source_run_id), str(own[0].model_id)) if own else None

    def find(self, tags: Mapping[str, str]) -> list[tuple[str, Mapping[str, str]]]:
        with self._call("find runs by their tags"):
            condition = " and ".join(
                f"tags.`{key}` = '{_quoted(value)}'" for key, value in tags.items()
            )
            runs = _pages(self._client.search_runs, self._everywhere(), condition)
            return [(str(r.info.run_id), dict(r.data.tags)) for r in runs[::-1]]

    def finish(self, run_id: str, status: Status = "FINISHED") -> None:
        with self._call(f"finish run {run_id}"):
            self._client.set_terminated(run_id, status)

    def register(
        self,
        name: str,
        model_id: str,
        run_id: str,
        artifact: str,
        tags: Mapping[str, str],
        description: str = "",
    ) -> Version:
        with self._call(f"register {artifact} as {name!r}"):
            if name not in self.models():
                self._client.create_registered_model(name)
            # MLflow would resolve a source of models:/<id> by its global uri, not by this client's.
            model = self._client.get_logged_model(model_id)
            about = {**tags, "artifact": artifact}
            new = self._client.create_model_version(
                name,
                model.artifact_location,
                run_id,
                about,
                description=description[:DESCRIPTION_CHARS],
                model_id=model_id,
                await_creation_for=0,
            )
            # The UI finds the versions of a logged model by this tag, which otherwise only MLflow's
            # register_model writes.
            known = json.loads(model.tags.get(mlflow_tags.MLFLOW_MODEL_VERSIONS, "[]"))
            versions = json.dumps([*known, {"name": name, "version": new.version}])
            self._client.set_logged_model_tags(
                model_id, {mlflow_tags.MLFLOW_MODEL_VERSIONS: versions}
            )
            return self._version(new, {})

    def alias(self, name: str, alias: str, version: str | None) -> None:
        known = None if version is None else self.version(name, version)
        with self._call(f"set the alias {alias!r} of {name!r}"):
            if known is not None:
                self._client.set_registered_model_alias(name, alias, known.version)
            elif alias in self._client.get_registered_model(name).aliases:
                self._client.delete_registered_model_alias(name, alias)

    def champions(self, name: str) -> tuple[str, ...]:
        known = self.versions(name)
        if not known:
            self.version(name, "")  # raises
        with self._call(f"read the champions of {name!r}"):
            tags = self._client.get_registered_model(name).tags
            return followed(json.loads(tags.get("champions", "[]")), holders(known))

    def set_champions(self, name: str, champions: Sequence[str], expected: Sequence[str]) -> bool:
        """Replace the champions under a lock of the home.

        Without a common home, the champions are read again after they are written.
        """
        with FileLock(self._home / "registry.lock"):
            if self.champions(name) != tuple(expected):
                return False
            with self._call(f"set the champions of {name!r}"):
                self._client.set_registered_model_tag(
                    name, "champions", json.dumps(list(champions))
                )
            for alias, version in aliases_of(champions).items():
                self.alias(name, alias, version)
            return self.champions(name) == tuple(champions)

    def tag_version(self, name: str, version: str, tags: Mapping[str, str]) -> None:
        with self._call(f"tag version {version} of {name!r}"):
            for key, value in tags.items():
                self._client.set_model_version_tag(name, version, key, value)

    def _open(self, name: str, home: Path) -> str:
        """Return the experiment's id; create it if it does not exist.

        Its files are in the home, or where a server puts them if the home is a local folder.
        """
        known = self._client.get_experiment_by_name(name)
        if known is None:
            served = self.uri.startswith(("http://", "https://")) and storage.is_local(home)
            place = home.resolve() / "mlartifacts" / re.sub(r"[^\w.-]", "-", name)
            folder = None if served else place.as_uri()
            try:
                return str(self._client.create_experiment(name, folder, TRAINING))
            except MlflowException:
                known = self._client.get_experiment_by_name(name)  # another driver created it
                if known is None:
                    raise
        return str(known.experiment_id)


def artifact_of(model: str, home: Path) -> str:
    """Return the artifact's folder of a model name, version, alias or path.

    Raises TrackingError if no such version is registered.
    """
    if is_folder(model):
        return model
    return MLflowReader(None, home).version(*split(model)).artifact


def _database(home: Path) -> str:
    """Return the URI of the database in the home. Raises TrackingError for a home in a store."""
    if not storage.is_local(home):
        raise TrackingError(
            f"{home}: there is no tracking server for a home in a store. Got no "
            "MLFLOW_TRACKING_URI; expected the URL of an MLflow server that all nodes reach. "
            "Fix: set MLFLOW_TRACKING_URI=https://HOST, and MLFLOW_TRACKING_TOKEN if it has one"
        )
    return f"sqlite:///{home.resolve()}/mlflow.db"


@contextmanager
def _locked(uri: str) -> Iterator[None]:
    """Lock an sqlite file or a PostgreSQL database during the block.

    Two processes that create its tables at the same time would corrupt the first, and fail in the
    second.
    """
    if uri.startswith("postgresql"):
        engine = create_engine(uri)
        try:
            with engine.connect() as connection:  # the lock ends with the connection
                connection.execute(text(f"SELECT pg_advisory_lock({POSTGRESQL_LOCK})"))
                yield
        finally:
            engine.dispose()
        return
    if not uri.startswith("sqlite:///"):
        yield
        return
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):
        yield


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    return uri.replace(f":{parts.password}@", ":***@") if parts.password else uri


def _ui_tags(tags: Mapping[str, str], parent: str | None) -> dict[str, str]:
    """Return MLflow's own tags, by which the UI nests runs and shows user and version."""
    known = {
        mlflow_tags.MLFLOW_PARENT_RUN_ID: parent,
        mlflow_tags.MLFLOW_SOURCE_NAME: "bridgework",
        mlflow_tags.MLFLOW_SOURCE_TYPE: "LOCAL",
        mlflow_tags.MLFLOW_USER: os.environ.get("USER"),
        mlflow_tags.MLFLOW_GIT_COMMIT: tags.get("git_commit"),
    }
    return {k: v for k, v in known.items() if v}


def _name(key: str) -> str:
    return re.sub(r"[^\w./ :-]", "_", key)  # MLflow's rule for parameters and metrics


def _input(dataset: DatasetInput, context: str) -> entities.DatasetInput:
    return entities.DatasetInput(
        entities.Dataset(
            name=dataset.name,
            digest=dataset.digest[:SHORT],
            # the only types that the UI supports
            source_type="s3" if dataset.path.startswith("s3://") else "local",
            source=json.dumps({"uri": dataset.path}),
            profile=json.dumps({"rows": dataset.rows, "digest": dataset.digest}),
        ),
        [entities.InputTag(mlflow_tags.MLFLOW_DATASET_CONTEXT, context)],
    )


def _read_input(logged: entities.DatasetInput) -> DatasetInput:
    dataset = logged.dataset
    about = json.loads(dataset.profile or "{}")
    path = json.loads(dataset.source).get("uri", "")
    digest = about.get("digest", dataset.digest)
    return DatasetInput(dataset.name, digest, path, about.get("rows", 0))


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _pages(search: Callable[..., PagedList[T]], *where: Any) -> list[T]:
    found: list[T] = []
    token = None
    while True:
        page = search(*where, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def _listed(values: Sequence[str]) -> str:
    """Return a list of ids in MLflow's filter language."""
    return f"({', '.join(repr(_quoted(value)) for value in values)})"


def _quoted(text: str) -> str:
    """Remove characters that would end a string of MLflow's filter language."""
    return re.sub(r"['\"`%\\]", "_", text)


def group(key: str) -> str:
    """Return the group of a metric in MLflow's UI.

    `train`, `data`, `eval` for figures of evaluations, and `interval` for their intervals.
    """
    first, dot, _ = key.partition(".")
    if key.endswith(INTERVAL):
        return "interval"
    if first in DATA:
        return "data"
    return "eval" if dot and first != "loss" else "train"
