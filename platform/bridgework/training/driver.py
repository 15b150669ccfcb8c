"""Driver: trains a System's stages in order, from resolved data to artifacts.

Ray Train runs the loop, and the tracker records every stage. A run is a folder,
`<home>/runs/<run>/`, with recipe.json and one folder per stage. The same run started again resumes:
finished stages are not trained again, and an unfinished one continues from its newest complete
checkpoint.
"""

import json
import logging
import operator
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from rich.console import Console

from bridgework import artifacts, ray_utils, storage
from bridgework.artifacts import StageResult
from bridgework.data import reader
from bridgework.data.catalog import resolve
from bridgework.data.dataset import Dataset, open_dataset
from bridgework.errors import Interrupted, ResourceError, RunError, SpecError
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking.relay import MetricsForwarder
from bridgework.tracking.tracker import JOURNAL, Tracker
from bridgework.training import checkpoint, feature_cache, loop, notices, run_dir, snapshots
from bridgework.training.engine import learning_rate
from bridgework.training.flight_recorder import resolve_curated_data
from bridgework.training.fork import Fork, describe
from bridgework.training.fork import fork as make_fork
from bridgework.training.metrics import progress_bar
from bridgework.training.options import RunOptions
from bridgework.training.run_tracking import RunRecord
from bridgework.training.skips import Skip, Skips
from bridgework.training.step import check

DEFAULT_OPTIONS = RunOptions()

log = logging.getLogger(__name__)


def train(
    system: System,
    *,
    home: Path,
    run: str,
    options: RunOptions = DEFAULT_OPTIONS,
    stages: Sequence[str] | None = None,
    tracker: Tracker | None = None,
    parent_run: str | None = None,
    console: Console | None = None,
    fork: str | None = None,
) -> dict[str, StageResult]:
    """Train `stages` (by default all) of `system` in order and record them in the tracker.

    fork: RUN, or RUN@STEP: `run` is a new run that starts from that run's checkpoint.

    Raises SpecError for an unknown stage, DataError for missing data, RunError if the run's name
    belongs to another recipe, is in use, or its workers failed more than `options.max_failures`
    times, Interrupted if a signal stopped it after a checkpoint, and Paused after the checkpoint of
    `options.until`.
    """
    chosen = [system[name] for name in stages] if stages is not None else list(system.stages)
    console = console or Console(stderr=True)
    folder = run_dir.path_of(home, run)
    if fork is not None:
        with run_dir.locked(folder):
            forked = make_fork(system, fork, home=home, run=run, stages=stages)
            console.print(describe(forked), markup=False, highlight=False, soft_wrap=True)
    if options.keep_best is not None:
        snapshots.check_metric(chosen, options.keep_best)
    if options.until is not None and options.until >= chosen[-1].budget.steps:
        raise SpecError(
            f"--until: stage {chosen[-1].name} ends before it. Got {options.until}; expected less "
            f"than its {chosen[-1].budget.steps} steps. Fix: leave it out"
        )
    for i, stage in enumerate(chosen):
        _check_stage(stage, [before.name for before in chosen[:i]], folder, home, options)
    with (
        run_dir.locked(folder) as lease,
        notices.to_console(partial(console.print, markup=False, soft_wrap=True)),
    ):
        known = run_dir.same_recipe(folder, system, partial(_may_extend, system, folder, home))
        unfinished = [
            stage.name for stage in chosen if not run_dir.is_finished(folder / stage.name)
        ]
        if options.skip and not unfinished:
            raise RunError(
                f"run {run!r}: all stages are finished, so there is no step left to skip"
            )
        source = Fork.read(folder)
        execution = f"workers={options.workers} threads={options.threads or 'auto'}"
        if options.keep_best is not None:
            execution += f" evaluate_every={options.evaluate_every} keep_best={options.keep_best}"
        tags = {"execution": execution} | (source.tags() if source else {})
        tracked = RunRecord(tracker, system, run, parent_run, console.print, tags, home=home)
        results: dict[str, StageResult] = {}
        try:
            for stage in chosen:
                first = [stage.name] == unfinished[:1]
                stage_options = options if first else replace(options, skip=())
                if stage is not chosen[-1]:
                    stage_options = replace(stage_options, until=None)
                results[stage.name] = _stage(
                    system, stage, folder, home, stage_options, tracked, console, known, lease
                )
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt | SystemExit | Interrupted)
            tracked.finish("KILLED" if killed else "FAILED")
            raise
        tracked.finish("FINISHED")
    return results


def _check_stage(
    stage: Stage, before: Sequence[str], folder: Path, home: Path, options: RunOptions
) -> None:
    """Raise errors that would otherwise occur in a worker, or hours later in an evaluation."""
    curated = stage.curation and stage.curation.makes
    read = [source.dataset for source in stage.data.leaves if source.dataset != curated]
    evaluated = [name for e in stage.evals for name in getattr(e, "datasets", (e.dataset,))]
    for dataset in (*read, *(stage.curation.sources if stage.curation else ()), *evaluated):
        open_dataset(resolve(dataset, home))
    if options.most_workers > stage.data.lanes:
        raise SpecError(
            f"{stage.name} has {stage.data.lanes} lanes for {options.most_workers} workers. "
            f"Fix: raise stages.{stage.name}.data.lanes, or give fewer --workers"
        )
    check(stage, loop.num_micro_batches(stage, max(1, options.fewest_workers)))
    if not run_dir.is_finished(folder / stage.name):
        _check_gpus(stage, options)
    if stage.curation is None:
        reader.ReaderConfig.of(stage, home).plan()
    if stage.starts_from not in before:
        _parent(stage, folder)
    for name in stage.curation.uses if stage.curation else ():
        if name not in before:
            _artifact_of(stage.name, "its curation uses", name, folder)


def _check_gpus(stage: Stage, options: RunOptions) -> None:
    """Raise ResourceError for a stage that needs GPUs without one, unless CPUs were asked for."""
    if not stage.needs_gpus or options.gpus_per_worker is not None:
        return
    if options.workers:
        found, where = ray_utils.gpus_each() > 0, "the cluster has none and can start none"
    else:
        found, where = torch.cuda.is_available(), "torch finds none on this machine"
    if not found:
        raise ResourceError(
            f"{stage.name}: the recipe trains in bfloat16, which is meant for GPUs, and {where}. "
            "Fix: run it on GPUs; or train on CPUs with --gpus-per-worker 0, or in float32 with "
            f"--set stages.{stage.name}.zero.precision=fp32; or use --tiny"
        )


def _stage(
    system: System,
    stage: Stage,
    folder: Path,
    home: Path,
    options: RunOptions,
    tracked: RunRecord,
    console: Console,
    known: tuple[str, ...],
    lease: storage.Lease | None,
) -> StageResult:
    """Train one stage; a finished one is only recorded in the tracker."""
    place = folder / stage.name
    finished = run_dir.is_finished(place)
    resolved = stage if finished else _curate(stage, folder, home, options, console)
    datasets = (
        []
        if finished
        else [open_dataset(resolve(source.dataset, home)) for source in resolved.data.leaves]
    )
    inputs = (
        artifacts.describe(run_dir.artifact_dir(place)).datasets
        if finished
        else _inputs(resolved, datasets)
    )
    parent = _parent(stage, folder)
    run_id = tracked.start(stage, inputs, parent, finished=finished)
    if finished:
        snapshots.remove_all(place)  # of a run that ended at the very end
        _report_finished(stage, place, console)
        if chosen := _recorded_features(place):
            tracked.note({"features": chosen})
        with _forward_metrics(tracked.tracker, run_id, place):
            return tracked.done(stage, place)
    features = _cache_features(system, stage, datasets, place, home, options, console)
    if chosen := _recorded_features(place):
        tracked.note({"features": chosen})
    _settle_checkpoints(stage, place, known, home, options, console)
    skips = _skips(known, stage, datasets, place, home, options, console)
    best = None
    if options.keep_best is not None:
        best = snapshots.best_by(stage, options.keep_best)
        if best is None:
            text = f"{stage.name}: no evaluation has {options.keep_best}, so its last step is kept"
            console.print(text, markup=False, highlight=False)
        else:
            tracked.note({"keep_best": options.keep_best})
    job = loop.TrainJob(
        system=system,
        stage=stage.name,
        feed=reader.ReaderConfig.of(
            resolved,
            home,
            features=str(features) if features else None,
            skipped=skips.keys,
            quarantine=str(place / "quarantine"),
        ),
        folder=place,
        home=home,
        parent=parent,
        datasets=inputs,
        checkpoint_every=options.checkpoint_every or max(5, stage.budget.steps // 20),
        until=options.until,
        evaluate_every=options.evaluate_every,
        midway=options.midway,
        evaluate_in_task=options.evaluate_in_task,
        keep_best=best,
        skip_steps=skips.steps,
        fingerprints=known,
        lease=lease,
    )
    run_dir.check_disk_space(home)
    place.mkdir(parents=True, exist_ok=True)
    with (
        _forward_metrics(tracked.tracker, run_id, place),
        progress_bar(place, stage.name, stage.budget.steps, console),
    ):
        if options.workers:
            _train_on_workers(job, options)
        else:
            _init_single_process()
            if options.threads:
                torch.set_num_threads(options.threads)
            report = options.report or _ignore
            loop.run(job, partial(_local_rows, job), report, rank=0, world=1)
    return tracked.done(stage, place)


def _train_on_workers(job: loop.TrainJob, options: RunOptions) -> None:
    """Train a stage by Ray Train, and evaluate its snapshots in tasks if `options` say so."""
    from bridgework.training.ray_train import fit

    if not options.evaluate_in_task:
        fit(job, options)
        return
    from bridgework.training.ray_evaluation import SnapshotEvaluator

    trained = run_dir.has_snapshot(job.folder, job.system[job.stage].budget.steps)
    if not trained:
        fingerprints = (job.system.fingerprint(), *job.fingerprints)
        start = checkpoint.cursor(job.folder, *fingerprints, home=job.home)
        snapshots.remove_stale(job.folder, start)
    with closing(SnapshotEvaluator(job, options)) as evaluator:
        if not trained:
            fit(job, options)
        evaluator.finish()
    metrics = loop.publish_best(job)
    for spec in job.system[job.stage].evals:
        if not any(name.startswith(f"{spec.name}.") for name in metrics):
            log.warning(
                "%s: the result has no figures of %s; `bridgework eval` evaluates it",
                job.stage,
                spec.name,
            )


def _report_finished(stage: Stage, place: Path, console: Console) -> None:
    """Print that a stage is finished, and which of its evaluations have no metrics."""
    artifact = run_dir.artifact_dir(place)
    with suppress(ValueError):  # an absolute path is shown only for a home elsewhere
        artifact = artifact.relative_to(Path.cwd())
    console.print(f"{stage.name}: finished before; its artifact is {artifact}", soft_wrap=True)
    metrics = json.loads((place / "metrics.json").read_text())
    for spec in stage.evals:  # an option, which may have changed since
        if not any(name.startswith(f"{spec.name}.") for name in metrics):
            console.print(
                f"{stage.name}: {spec.name} was not evaluated; `bridgework eval` does it",
                markup=False,
            )


@contextmanager
def _forward_metrics(tracker: Tracker, run_id: str | None, place: Path) -> Iterator[None]:
    """Forward the stage's journal to the tracker from a side thread during the block."""
    relay = None
    try:
        relay = MetricsForwarder(tracker, {run_id: place / JOURNAL}) if run_id else None
    except OSError as error:  # a full disk never ends a run
        log.warning(
            "%s: metrics are not tracked, the same command later does it: %s", place.name, error
        )
    try:
        yield
    finally:
        if relay is not None:
            relay.close()


def _curate(stage: Stage, folder: Path, home: Path, options: RunOptions, console: Console) -> Stage:
    """Run the stage's curation in this run; returns the stage with the path of its dataset."""
    curation, place = stage.curation, folder / stage.name
    if curation is None:
        return stage
    inputs = {
        name: _artifact_of(stage.name, "its curation uses", name, folder) for name in curation.uses
    }

    def say(text: str) -> None:
        console.print(f"{stage.name}: {text}", markup=False)

    dest = str(place / "curated" / curation.makes)
    curation.run(inputs, dest, home=home, workers=options.most_workers, say=say)
    return resolve_curated_data(stage, place)


def _may_extend(system: System, folder: Path, home: Path, before: System, name: str) -> bool:
    """Return True if a stage may have another number of steps without affecting its past steps.

    It may if learning rates and samples are the same for all steps before its newest checkpoint.
    """
    old, new, place = before[name], system[name], folder / name
    if run_dir.is_finished(place):
        return False
    saved = checkpoint.checkpoints(place)
    taken = saved[0].step if saved else 0
    if new.budget.steps <= taken:
        return False
    rates = (
        [learning_rate(s.optim, step, s.budget.steps) for step in range(taken)] for s in (old, new)
    )
    if operator.ne(*rates):
        return False
    if taken == 0 or new.curation is not None:
        return taken == 0
    old_plan, new_plan = (reader.ReaderConfig.of(s, home).plan() for s in (old, new))
    return new_plan.shared(old_plan) >= taken


def _settle_checkpoints(
    stage: Stage,
    place: Path,
    known: tuple[str, ...],
    home: Path,
    options: RunOptions,
    console: Console,
) -> None:
    """Apply --trust-checkpoints and --start-over.

    If no checkpoint can be used, the error is raised here and not in a worker.
    """
    if options.trust_checkpoints and (count := checkpoint.trust(place, home=home)):
        console.print(f"{stage.name}: {count} checkpoints are trusted from now on", markup=False)
    try:
        checkpoint.resume(place, *known, home=home)
    except checkpoint.Unusable:
        if not options.start_over:
            raise
        renamed = checkpoint.start_over(place)
        console.print(f"{stage.name}: starts over; its checkpoints are in {renamed}", markup=False)


def _skips(
    known: tuple[str, ...],
    stage: Stage,
    datasets: Sequence[Dataset],
    place: Path,
    home: Path,
    options: RunOptions,
    console: Console,
) -> Skips:
    """Return the stage's skips; new requests are recorded and start at its newest checkpoint."""
    skips = Skips.read(place)
    if not options.skip:
        return skips
    order = skips.new(
        Skip.of(options.skip, checkpoint.cursor(place, *known, home=home), stage.budget.steps)
    )
    if not (order.keys or order.steps):
        return skips
    order.check(
        stage.budget.steps,
        dict(zip((source.name for source in stage.data.leaves), datasets, strict=True)),
    )
    skipped = ", ".join(options.skip)
    console.print(f"{stage.name}: skips {skipped} from step {order.since} on", markup=False)
    snapshots.remove_stale(place, order.since)
    return skips.add(place, order)


def _inputs(stage: Stage, datasets: Sequence[Dataset]) -> tuple[DatasetInput, ...]:
    return tuple(
        DatasetInput(source.name, d.manifest.digest, d.path, d.manifest.rows)
        for source, d in zip(stage.data.leaves, datasets, strict=True)
    )


def _parent(stage: Stage, folder: Path) -> Path | None:
    """Return the artifact that a stage starts from: of this run, or the folder in the recipe."""
    if stage.starts_from is None:
        return None
    if "/" in stage.starts_from:
        artifacts.describe(stage.starts_from)
        return storage.locate(stage.starts_from)
    fix = "starts_from to the folder of an artifact"
    return _artifact_of(stage.name, "starts from", stage.starts_from, folder, fix)


def _artifact_of(
    stage: str, why: str, earlier: str, folder: Path, instead: str = "curation=none"
) -> Path:
    """Return the artifact of an `earlier` stage of this run. Raises RunError if there is none."""
    path = run_dir.artifact_dir(folder / earlier)
    if not path.exists():
        raise RunError(
            f"{stage} {why} {earlier}, which this run has not trained. "
            f"Fix: train it first (--stage {earlier}), or set stages.{stage}.{instead}"
        )
    artifacts.describe(path)
    return path


def can_cache_features(stage: Stage) -> bool:
    """Return True for a stage with a frozen, pretrained vision tower."""
    frozen = not any(_may_match(glob, "vision.") for glob in stage.trains)
    tower = getattr(stage.model, "vision", None)
    return tower is not None and frozen and "vision.*" in stage.model.pretrained


def num_draws(system: System, stage: Stage) -> int:
    """Return the images that all stages with this stage's vision tower draw in training."""
    tower = getattr(stage.model, "vision", None)
    sharing = [s for s in system.stages if getattr(s.model, "vision", None) == tower]
    return sum(s.budget.steps * s.budget.batch for s in sharing)


def _cache_features(
    system: System,
    stage: Stage,
    datasets: Sequence[Dataset],
    place: Path,
    home: Path,
    options: RunOptions,
    console: Console,
) -> Path | None:
    """Return the folder of cached features, and record the decision in the stage's folder.

    A stage with a checkpoint continues as it began. Raises RunError if `options` demand otherwise.
    """
    if not can_cache_features(stage):
        return None

    def say(text: str) -> None:
        console.print(f"{stage.name}: {text}", markup=False, highlight=False)

    choice, began = options.features, _recorded_features(place)
    if began is not None and checkpoint.checkpoints(place):
        if choice not in ("auto", began):
            raise RunError(
                f"{stage.name}: its checkpoints were trained with features {began}, which differ "
                f"in the last digits. Got --features {choice}. "
                f"Fix: give --features {began}, or another --run"
            )
        choice = began
    if choice == "computed":
        decision = feature_cache.CacheDecision(None, "features are computed in training, as chosen")
    else:
        tower: Any = getattr(stage.model, "vision", None)
        decision = feature_cache.prepare(
            tower,
            datasets,
            draws=num_draws(system, stage),
            home=home,
            workers=options.readers if options.workers else 0,
            demanded=choice == "cached",
            say=say,
        )
    place.mkdir(parents=True, exist_ok=True)
    record = {"features": "cached" if decision.folder else "computed", "why": decision.why}
    storage.write_atomic(place / run_dir.FEATURES, json.dumps(record))
    say(decision.why)
    return decision.folder


def _recorded_features(place: Path) -> Literal["cached", "computed"] | None:
    """Return how a stage with a frozen tower got its features; None if it is not recorded."""
    file = place / run_dir.FEATURES
    if not file.is_file():
        return None
    return "cached" if json.loads(file.read_text())["features"] == "cached" else "computed"


def _may_match(glob: str, prefix: str) -> bool:
    """Return False only if no name that begins with `prefix` matches the glob."""
    literal = re.split(r"[*?\[]", glob)[0]
    return literal.startswith(prefix) or prefix.startswith(literal)


def _local_rows(job: loop.TrainJob, start: int) -> Iterator[list[reader.Row]]:
    return reader.local(job.feed, rank=0, world=1, start=start)


def _ignore(metrics: dict[str, float], step: int) -> None:
    """Discard the report of a run without listener."""


def _init_single_process() -> None:
    """Create a process group of one, for a loop that runs without Ray Train.

    It exists until the process ends, because DeepSpeed remembers the first group that it sees.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # read by DeepSpeed
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
