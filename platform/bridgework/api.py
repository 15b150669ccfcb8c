"""The public API: `import bridgework as bw`, and everything here is `bw.NAME`.

Nothing heavy is imported with this module: torch, transformers, Ray, DeepSpeed and MLflow load in the
function that needs them. The command line calls the same functions.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridgework import storage
from bridgework.data.catalog import destination, resolve
from bridgework.data.catalog import home as default_home
from bridgework.errors import SpecError, TrackingError
from bridgework.system import System, load
from bridgework.training.options import RunOptions
from bridgework.training.run_dir import default_name

if TYPE_CHECKING:
    from rich.console import Console

    from bridgework.artifacts import StageResult
    from bridgework.data.dataset import Dataset
    from bridgework.data.manifest import Manifest
    from bridgework.evaluation.gate import Gate
    from bridgework.serving.launch import Endpoint
    from bridgework.tracking.mlflow_store import MLflowTracker
    from bridgework.tracking.promotion import PromotionDecision
    from bridgework.tuning.search import Outcome
    from bridgework.tuning.space import Space

POST_S = 5.0  # seconds that a command may spend on the metrics of earlier runs


def train(
    system: System | str,
    *,
    stages: Sequence[str] | None = None,
    workers: int | tuple[int, int] = 0,
    run: str | None = None,
    home: str | Path | None = None,
    options: RunOptions | None = None,
    fork: str | None = None,
    track: bool = True,
    project: str = "bridgework",
    console: "Console | None" = None,
) -> dict[str, "StageResult"]:
    """Train the stages of a system one after the other; the same call again resumes.

    Args:
        system: A System, or the name of a recipe such as "llava" or "llava:v1".
        stages: Names of the stages to train. Default: all.
        workers: Ray Train workers. 0 trains in this process, without Ray. (1, 4) is elastic: as many as the
            cluster has room for, changed at checkpoints, with the same batches and losses.
        run: Name of the run's folder, `<home>/runs/<run>`. Default: the system's name and six digits
            of its identity, so that an equal system resumes.
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.
        options: Everything else about the execution; `workers` above replaces its field.
        fork: RUN or RUN@STEP: start from a checkpoint of another run.
        track: Record the run in MLflow. A server that does not answer never stops a run.
        project: Name of the MLflow experiment.
        console: Where progress is printed. Default: stderr.

    Returns:
        For each stage its artifact (a folder), final metrics, and ids in MLflow. The last one is registered
        as a new version of the system's model.

    Raises:
        SpecError: A stage does not exist.
        DataError: A dataset does not exist, or has too many bad rows.
        RunError: The run belongs to another recipe, is in use, or failed more often than allowed.
        Interrupted: A signal stopped the run, after a checkpoint. Paused, a kind of it: the run reached
            `options.until`.

    Example:
        >>> import bridgework as bw
        >>> system = bw.override(bw.load("llava").tiny(), {"stages.align.budget.steps": 2})
        >>> result = bw.train(system, stages=["align"], track=False)
        >>> sorted(result)
        ['align']
    """
    from bridgework.training.driver import train as train_stages

    resolved = load(system) if isinstance(system, str) else system
    for name in stages or ():
        resolved[name]  # a wrong name is reported before anything is opened
    place = _place(home)
    tracker = open_tracker(project, place, console) if track else None
    run = run or default_name(resolved.name.replace(":", "-"), resolved, place)
    with _ray(workers):
        results = train_stages(
            resolved,
            home=place,
            run=run,
            options=replace(options or RunOptions(), workers=workers),
            stages=stages,
            tracker=tracker,
            console=console,
            fork=fork,
        )
    *_, last = results
    if tracker is not None and results[last].run_id and results[last].model_id:
        from bridgework.tracking import registry

        version = registry.register(tracker, resolved.name, results[last], {"run": run})
        results[last] = replace(results[last], version=f"{version.name}:{version.version}")
    return results


def sweep(
    space: "Space | str",
    *,
    changes: Mapping[str, Any] | None = None,
    trials: int | None = None,
    more: int = 0,
    prefer: str | None = None,
    warm_start: Sequence[str] = (),
    run: str | None = None,
    home: str | Path | None = None,
    track: bool = True,
    project: str = "bridgework",
    console: "Console | None" = None,
) -> "Outcome":
    """Search a space with Ray Tune, and register the best trial if it beats the challenger.

    The same call resumes an interrupted sweep, and does not run a finished one again.

    Args:
        space: A Space, or the name of a module of tune_spaces/ such as "llava_bridge".
        changes: Overrides by dotted path that every trial shares.
        trials: Number of trials. Default: the space's own.
        more: Trials in addition to those that the sweep has already.
        prefer: Rule that chooses among several objectives, e.g. "quality >= best - 0.01, then tokens".
        warm_start: Earlier sweeps of the same system, whose trials the proposals know.
        run: Name of the sweep's folder. Default: "sweep-SPACE".
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.
        track: Record the trials in MLflow and register the winner.
        project: Name of the MLflow experiment.
        console: Where progress is printed. Default: stderr.

    Returns:
        The trials, best first; the command that trains the best one again; its artifact.

    Raises:
        SpecError: A path, a stage or a metric of the space does not exist.
        RunError: No trial finished with a score, or `run` holds another sweep.
    """
    from bridgework.tuning import search
    from bridgework.tuning.space import load as load_space

    given = load_space(space) if isinstance(space, str) else space
    place = _place(home)
    chosen = search.with_trials(given, trials=trials)
    return search.sweep(
        chosen if prefer is None else replace(chosen, prefer=prefer),
        home=place,
        run=run or f"sweep-{given.name}",
        changes=changes,
        more=more,
        warm_start=warm_start,
        tracker=partial(open_tracker, project, place, console) if track else None,
        console=console,
    )


def evaluate(
    model: str | Path,
    evaluations: Sequence[Any] | None = None,
    *,
    home: str | Path | None = None,
    project: str = "bridgework",
    track: bool = True,
    console: "Console | None" = None,
) -> dict[str, float]:
    """Evaluate a model; the figures and their rows are kept in <home>/evals.

    Args:
        model: An artifact's folder, or a registered model: "llava", "llava@challenger", "llava:3".
        evaluations: Configs from bridgework.evaluation. Default: those of the model's stage.
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.
        project: Name of the MLflow experiment.
        track: False records nothing in MLflow.
        console: Where a tracker that does not answer is reported.

    Returns:
        The figures by name, e.g. {"ranking.accuracy": 0.4}.

    Raises:
        SpecError: There is no evaluation to run.
        TrackingError: No such model is registered.
        DataError: The dataset of an evaluation does not exist.

    Example:
        >>> import bridgework as bw
        >>> from bridgework.evaluation import Ranking
        >>> figures = bw.evaluate("./artifact", [Ranking(dataset="synthetic:shapes", rows=32)])
        >>> sorted(figures)
        ['ranking.accuracy', 'ranking.accuracy_without_prior', 'ranking.chance']
    """
    from bridgework.inference.pipeline import Pipeline
    from bridgework.tracking import evaluations as tracked
    from bridgework.tracking.mlflow_store import artifact_of

    place = _place(home)
    artifact = artifact_of(str(model), place)
    pipeline = Pipeline.load(artifact)
    chosen = pipeline.stage.evals if evaluations is None else evaluations
    if not chosen:
        raise SpecError(
            f"stage {pipeline.stage.name} of {model} has no evaluations. Fix: give some, e.g. "
            "evaluations=[bridgework.evaluation.HeldOutLoss(dataset=...)]"
        )
    tracker = open_tracker(project, place, console) if track else None
    done = tracked.evaluate(artifact, chosen, place, tracker=tracker, pipeline=pipeline)
    return {name: value for result, _ in done for name, value in result.metrics.items()}


def open_dataset(name: str, *, home: str | Path | None = None) -> "Dataset":
    """Open a dataset of shards.

    Args:
        name: A folder, a URL, or a name under <home>/datasets. "synthetic:shapes" is written on first use.
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.

    Returns:
        The dataset: its manifest, and its rows by index.

    Raises:
        DataError: There is no such dataset; a similar name is suggested.

    Example:
        >>> import bridgework as bw
        >>> dataset = bw.open_dataset("synthetic:shapes")
        >>> dataset.manifest.license
        'CC0-1.0'
    """
    from bridgework.data.dataset import open_dataset as open_shards

    return open_shards(resolve(name, _place(home)))


def import_dataset(
    format: str,
    source: str | Path,
    dest: str | Path,
    *,
    license: str | None = None,
    workers: int = 0,
    home: str | Path | None = None,
    **options: Any,
) -> "Manifest":
    """Import data of another format as a dataset of shards; the same call again resumes.

    Args:
        format: "folder", "webdataset", "hf", "coco", .. or the import path of your own importer.
        source: A file, a folder or a URL.
        dest: A folder or a URL; a bare name is under <home>/datasets.
        license: License of the dataset, e.g. "CC-BY-4.0".
        workers: Ray actors that read; 0 reads in this process.
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.
        options: Options of the format; `bridgework data import FORMAT` lists them.

    Returns:
        The manifest: rows, shards, digest, and the number of quarantined rows by reason.

    Raises:
        SpecError: An unknown format or option; a similar name is suggested.
        DataError: Nothing can be read, or more rows are bad than allowed.

    Example:
        >>> import bridgework as bw
        >>> manifest = bw.import_dataset("folder", "photos", "my-photos", license="CC0-1.0")
        >>> manifest.rows, manifest.license
        (2, 'CC0-1.0')
    """
    from bridgework.data.importers import load as load_importer

    given = options | ({} if license is None else {"license": license})
    cls = load_importer(format)
    try:
        importer = cls(**given)
    except TypeError as error:
        raise SpecError(
            f"format {format}: {error}. Fix: see `bridgework data import {format}`"
        ) from None
    return import_with(importer, str(source), str(dest), workers=workers, home=home)


def import_with(
    importer: Any,
    source: str,
    dest: str,
    *,
    workers: int = 0,
    home: str | Path | None = None,
    say: Callable[[str], object] | None = None,
) -> "Manifest":
    """Write a dataset with a configured importer, and send the event of it; see `import_dataset`."""
    from bridgework.tracking.openlineage_events import dataset_written

    place = _place(home)
    path = destination(dest, place)
    with _ray(workers):
        manifest: Manifest = importer.run(source, path, workers=workers, say=say or _report)
    dataset_written(place, "IMPORT", [source], path, manifest)
    return manifest


def curate(
    curation: Any,
    sources: str | Sequence[str],
    dest: str | Path,
    *,
    workers: int = 0,
    home: str | Path | None = None,
) -> "Manifest":
    """Write a curated copy of datasets; the same call again resumes.

    Args:
        curation: A curation's config, e.g. bridgework.curation.dedup.Dedup(by="perceptual").
        sources: Datasets: folders, URLs, or names under <home>/datasets.
        dest: A folder or a URL; a bare name is under <home>/datasets.
        workers: Ray actors that annotate; 0 works in this process.
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.

    Returns:
        The manifest of the new dataset; its `parameters["counts"]` are the decisions by reason.

    Raises:
        DataError: No row is left, or more rows cannot be annotated than allowed.

    Example:
        >>> import bridgework as bw
        >>> from bridgework.curation.filters import Filters
        >>> manifest = bw.curate(Filters(min_side=8), "synthetic:shapes", "large-enough")
        >>> manifest.rows == bw.open_dataset("synthetic:shapes").manifest.rows
        True
    """
    from bridgework.curation import runner

    place = _place(home)
    given = (sources,) if isinstance(sources, str) else tuple(sources)
    found = [resolve(source, place) for source in given]
    with _ray(workers):
        return runner.make(
            curation,
            found,
            destination(str(dest), place),
            home=place,
            workers=workers,
            say=_report,
        )


def promote(
    model: str,
    *,
    gate: "str | Path | Gate | None" = None,
    metric: str | None = None,
    force: str | None = None,
    home: str | Path | None = None,
    project: str = "bridgework",
    say: Callable[[str], object] | None = None,
) -> "PromotionDecision":
    """Make a registered version the champion if it passes the gate against the present champion.

    Args:
        model: "llava:3" or "llava@challenger".
        gate: A gate file or a bridgework.evaluation.gate.Gate. Default: the first figure of the stage's
            evaluations must improve, and the first figures of the others are guarded.
        metric: The only figure that must improve, e.g. "ranking.accuracy", instead of a gate.
        force: Reason for a promotion without a gate.
        home: A folder or a URL. Default: $BRIDGEWORK_HOME, or ./.bridgework.
        project: Name of the MLflow experiment.
        say: Called with lines of progress. Default: they are printed to stderr.

    Returns:
        The decision: the verdict, both versions, and every check with its interval.

    Raises:
        TrackingError: No such version, or it does not pass, or another promotion was faster.
        SpecError: An invalid gate.
    """
    from bridgework.evaluation.gate import read_gate
    from bridgework.tracking import promotion
    from bridgework.tracking.mlflow_store import MLflowTracker

    place = _place(home)
    return promotion.promote(
        MLflowTracker(None, place, project),
        model,
        home=place,
        gate=read_gate(Path(gate)) if isinstance(gate, str | Path) else gate,
        metric=metric,
        force=force,
        say=say or _report,
    )


@contextmanager
def serve(
    app: str = "chat", *, host: str = "127.0.0.1", port: int = 8000, **options: Any
) -> Iterator["Endpoint"]:
    """Serve a model over HTTP for the length of a `with` block.

    Args:
        app: "chat", "embed" or "caption".
        host: Address to listen on.
        port: 0 to 65535.
        options: Fields of bridgework.serving.options.Options, e.g. model="llava", replicas=2, dev=True.

    Yields:
        The endpoint, once it answers; `endpoint.address` is its URL.

    Raises:
        SpecError: An unknown app or option.
        ResourceError: The port is in use, or Ray cannot be joined.
        TrackingError: No such model is registered.
    """
    from bridgework.serving import launch

    endpoint = launch.start(app, options, launch.AppAddress(host=host, port=port))
    try:
        yield endpoint
    finally:
        endpoint.stop()


def open_tracker(
    project: str, home: Path, console: "Console | None" = None
) -> "MLflowTracker | None":
    """Return the MLflow tracker, or None if its server does not answer, which is printed."""
    from bridgework.tracking.mlflow_store import MLflowTracker

    home.mkdir(parents=True, exist_ok=True)
    from bridgework.training.run_tracking import post_waiting

    try:
        tracker = MLflowTracker(None, home, project)
        post_waiting(tracker, home, timeout_s=POST_S)
        return tracker
    except TrackingError as error:
        if console is not None:
            console.print(
                f"{error}. The run is not tracked; the same command later records it",
                soft_wrap=True,
            )
        return None


def _place(home: str | Path | None) -> Path:
    return default_home() if home is None else storage.locate(home)


def _report(text: str) -> None:
    """Print progress to stderr."""
    print(text, file=sys.stderr)


def _ray(workers: int | tuple[int, int]) -> Any:
    """Return a Ray session for the block, or nothing where none is needed or one is open already."""
    from bridgework.ray_utils import is_open, ray_session

    return ray_session() if workers and not is_open() else nullcontext()
