"""From a System to trained artifacts: the driver. Ray Train runs the loop; the tracker hears of everything.

A run is a folder, `<home>/runs/<run>/`, with recipe.json and one folder a stage. The same run again goes on where it
stopped: finished stages are taken as they are, an unfinished one resumes from its newest complete checkpoint.
"""

import json
import logging
import operator
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from bridgework import artifacts
from bridgework.artifacts import StageResult
from bridgework.data import reader
from bridgework.data.catalog import resolve
from bridgework.data.dataset import Dataset, open_dataset
from bridgework.errors import Interrupted, RunError, SpecError
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking.relay import MetricsForwarder
from bridgework.tracking.tracker import Tracker
from bridgework.training import checkpoint, feature_cache, loop, notices, run_dir
from bridgework.training.deepspeed_engine import learning_rate
from bridgework.training.flight_recorder import reads
from bridgework.training.fork import Fork, describe
from bridgework.training.fork import fork as make_fork
from bridgework.training.metrics import progress_bar
from bridgework.training.ray_train import RunOptions, fit
from bridgework.training.run_tracking import RunRecord
from bridgework.training.skips import Skip, Skips
from bridgework.training.step import check

USUAL = RunOptions()

log = logging.getLogger(__name__)


def train(
    system: System,
    *,
    home: Path,
    run: str,
    how: RunOptions = USUAL,
    stages: Sequence[str] | None = None,
    tracker: Tracker | None = None,
    parent_run: str | None = None,
    console: Console | None = None,
    fork: str | None = None,
) -> dict[str, StageResult]:
    """Train `stages` (all, by default) of `system` one after the other, and record it in the tracker.

    fork: RUN, or RUN@STEP: `run` is a new run that starts from that run's checkpoint. Raises SpecError for a stage that
    is not there, DataError for data that is not, RunError when the run's name belongs to another recipe, is in use, or
    its workers failed more often than `how.max_failures`, Interrupted when a signal stopped it after a checkpoint.
    """
    chosen = [system[name] for name in stages] if stages is not None else list(system.stages)
    console = console or Console(stderr=True)
    folder = run_dir.path_of(home, run)
    if fork is not None:
        with run_dir.locked(folder):
            made = make_fork(system, fork, home=home, run=run, stages=stages)
            console.print(describe(made), markup=False, highlight=False, soft_wrap=True)
    for i, stage in enumerate(chosen):
        _checked(stage, [before.name for before in chosen[:i]], folder, home, how)
    with (
        run_dir.locked(folder),
        notices.to_console(partial(console.print, markup=False, soft_wrap=True)),
    ):
        known = run_dir.same_recipe(folder, system, partial(_may_extend, system, folder, home))
        unfinished = [stage.name for stage in chosen if not _finished(folder / stage.name)]
        if how.skip and not unfinished:
            raise RunError(
                f"every stage of run {run!r} is finished: there is no step left to skip samples of"
            )
        forked = Fork.read(folder)
        tracked = RunRecord(
            tracker, system, run, parent_run, console.print, forked.tags() if forked else None
        )
        results: dict[str, StageResult] = {}
        try:
            for stage in chosen:
                skipping = how if [stage.name] == unfinished[:1] else replace(how, skip=())
                results[stage.name] = _stage(
                    system, stage, folder, home, skipping, tracked, console, known
                )
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt | SystemExit | Interrupted)
            tracked.finish("KILLED" if killed else "FAILED")
            raise
        tracked.finish("FINISHED")
    return results


def _checked(
    stage: Stage, before: Sequence[str], folder: Path, home: Path, how: RunOptions
) -> None:
    """Raises here what would otherwise stop the stage in a worker, or hours later in an evaluation."""
    made = stage.curation and stage.curation.makes
    known = [source.dataset for source in stage.data.leaves if source.dataset != made]
    judged = [name for e in stage.evals for name in getattr(e, "datasets", (e.dataset,))]
    for dataset in (*known, *(stage.curation.sources if stage.curation else ()), *judged):
        open_dataset(resolve(dataset, home))
    if how.workers > stage.data.lanes:
        raise SpecError(
            f"{stage.name} has {stage.data.lanes} lanes for {how.workers} workers; "
            f"raise stages.{stage.name}.data.lanes, or give fewer --workers"
        )
    check(stage, loop.num_micro_batches(stage, max(1, how.workers)))
    if stage.curation is None:
        reader.ReaderConfig.of(stage, home).plan()
    if stage.starts_from not in before:
        _parent(stage, folder)
    for name in stage.curation.uses if stage.curation else ():
        if name not in before:
            _left(stage.name, "its curation uses", name, folder)


def _stage(
    system: System,
    stage: Stage,
    folder: Path,
    home: Path,
    how: RunOptions,
    tracked: RunRecord,
    console: Console,
    known: tuple[str, ...],
) -> StageResult:
    place = folder / stage.name
    finished = _finished(place)
    reading = stage if finished else _curated(stage, folder, home, how, console)
    datasets = (
        []
        if finished
        else [open_dataset(resolve(source.dataset, home)) for source in reading.data.leaves]
    )
    inputs = (
        artifacts.describe(run_dir.artifact_dir(place)).datasets
        if finished
        else _inputs(reading, datasets)
    )
    parent = _parent(stage, folder)
    run_id = tracked.start(stage, inputs, parent)
    if finished:
        console.print(
            f"{stage.name}: finished before; its artifact is {run_dir.artifact_dir(place)}"
        )
        judged = json.loads((place / "metrics.json").read_text())
        for spec in stage.evals:  # an option, which may have changed since
            if not any(name.startswith(f"{spec.name}.") for name in judged):
                console.print(
                    f"{stage.name}: {spec.name} was not evaluated; `bridgework eval` does it",
                    markup=False,
                )
        with _relayed(tracked.tracker, run_id, place):
            return tracked.done(stage, place)
    cached = _cached(system, stage, datasets, home, how, console)
    _settle_checkpoints(stage, place, known, home, how, console)
    skips = _skips(known, stage, datasets, place, home, how, console)
    job = loop.TrainJob(
        system=system,
        stage=stage.name,
        feed=reader.ReaderConfig.of(
            reading,
            home,
            features=str(cached) if cached else None,
            skipped=skips.keys,
            quarantine=str(place / "quarantine"),
        ),
        folder=place,
        home=home,
        parent=parent,
        datasets=inputs,
        checkpoint_every=how.checkpoint_every or max(5, stage.budget.steps // 20),
        evaluate_every=how.evaluate_every,
        midway=how.midway,
        passes=skips.steps,
        fingerprints=known,
    )
    run_dir.room(home)
    place.mkdir(parents=True, exist_ok=True)
    with (
        _relayed(tracked.tracker, run_id, place),
        progress_bar(place, stage.name, stage.budget.steps, console),
    ):
        if how.workers:
            fit(job, how)
        else:
            _alone()
            loop.run(job, partial(_local_rows, job), how.report or _ignore, rank=0, world=1)
    return tracked.done(stage, place)


def _finished(place: Path) -> bool:
    return run_dir.is_finished(place)


@contextmanager
def _relayed(tracker: Tracker, run_id: str | None, place: Path) -> Iterator[None]:
    """The stage's journal goes to the tracker from a side thread, as it grows."""
    relay = None
    try:
        relay = MetricsForwarder(tracker, {run_id: place / "journal"}) if run_id else None
    except OSError as error:  # a disk that cannot take the ledger never ends a run
        log.warning(
            "%s: metrics are not tracked, the same command later does it: %s", place.name, error
        )
    try:
        yield
    finally:
        if relay is not None:
            relay.close()


def _curated(stage: Stage, folder: Path, home: Path, how: RunOptions, console: Console) -> Stage:
    """The stage as it reads: the dataset that its curation makes is made now, in this run, and stands by its path."""
    curation, place = stage.curation, folder / stage.name
    if curation is None:
        return stage
    artifacts = {
        name: _left(stage.name, "its curation uses", name, folder) for name in curation.uses
    }

    def say(text: str) -> None:
        console.print(f"{stage.name}: {text}", markup=False)

    curation.run(
        artifacts, str(place / "curated" / curation.makes), home=home, workers=how.workers, say=say
    )
    return reads(stage, place)


def _may_extend(system: System, folder: Path, home: Path, before: System, name: str) -> bool:
    """Allow a stage another number of steps than before where what it has learned would be the same.

    That is so where the learning rates and the samples of all steps before its newest checkpoint are.
    """
    old, new, place = before[name], system[name], folder / name
    if _finished(place):
        return False
    kept = checkpoint.checkpoints(place)
    taken = kept[0].step if kept else 0
    if new.budget.steps <= taken:
        return False
    rates = (
        [learning_rate(s.optim, step, s.budget.steps) for step in range(taken)] for s in (old, new)
    )
    if operator.ne(*rates):
        return False
    if taken == 0 or new.curation is not None:
        return taken == 0
    return (
        reader.ReaderConfig.of(new, home).plan().shared(reader.ReaderConfig.of(old, home).plan())
        >= taken
    )


def _settle_checkpoints(
    stage: Stage, place: Path, known: tuple[str, ...], home: Path, how: RunOptions, console: Console
) -> None:
    """Do what a person allowed with the checkpoints; raise here, and not in a worker, where none can be used."""
    if how.trust_checkpoints and (count := checkpoint.trust(place, home=home)):
        console.print(f"{stage.name}: {count} checkpoints are trusted from now on", markup=False)
    try:
        checkpoint.resume(place, *known, home=home)
    except checkpoint.Unusable:
        if not how.start_over:
            raise
        console.print(
            f"{stage.name}: starts over; its checkpoints are in {checkpoint.start_over(place)}",
            markup=False,
        )


def _skips(
    known: tuple[str, ...],
    stage: Stage,
    datasets: Sequence[Dataset],
    place: Path,
    home: Path,
    how: RunOptions,
    console: Console,
) -> Skips:
    """Return what the stage leaves out, with what is asked for now: from its newest checkpoint on."""
    skips = Skips.read(place)
    if not how.skip:
        return skips
    order = skips.new(
        Skip.of(how.skip, checkpoint.cursor(place, *known, home=home), stage.budget.steps)
    )
    if not (order.keys or order.steps):
        return skips
    order.check(
        stage.budget.steps,
        dict(zip((source.name for source in stage.data.leaves), datasets, strict=True)),
    )
    console.print(
        f"{stage.name}: leaves out {', '.join(how.skip)} from step {order.since} on", markup=False
    )
    return skips.add(place, order)


def _inputs(stage: Stage, datasets: Sequence[Dataset]) -> tuple[DatasetInput, ...]:
    return tuple(
        DatasetInput(source.name, d.manifest.digest, d.path, d.manifest.rows)
        for source, d in zip(stage.data.leaves, datasets, strict=True)
    )


def _parent(stage: Stage, folder: Path) -> Path | None:
    """The artifact that a stage starts from: of this run, or the folder that the recipe names."""
    if stage.starts_from is None:
        return None
    if "/" in stage.starts_from:
        artifacts.describe(stage.starts_from)
        return Path(stage.starts_from)
    return _left(
        stage.name,
        "starts from",
        stage.starts_from,
        folder,
        "starts_from to the folder of an artifact",
    )


def _left(stage: str, why: str, earlier: str, folder: Path, instead: str = "curation=none") -> Path:
    """The artifact that an earlier stage left in this run."""
    path = run_dir.artifact_dir(folder / earlier)
    if not path.exists():
        raise RunError(
            f"{stage} {why} {earlier}, which this run has not trained; train it first (--stage {earlier}), "
            f"or set stages.{stage}.{instead}"
        )
    artifacts.describe(path)
    return path


def _cached(
    system: System,
    stage: Stage,
    datasets: Sequence[Dataset],
    home: Path,
    how: RunOptions,
    console: Console,
) -> Path | None:
    """The folder of cached features, for a wiring whose vision tower comes with its weights and stays frozen."""
    tower = getattr(stage.model, "vision", None)
    frozen = not any(_may_match(glob, "vision.") for glob in stage.trains)
    if tower is None or not (
        how.cache_features and frozen and "vision.*" in stage.model.pretrained
    ):
        return None
    sharing = [s for s in system.stages if getattr(s.model, "vision", None) == tower]
    draws = sum(s.budget.steps * s.budget.batch for s in sharing)
    verdict = feature_cache.prepare(
        tower, datasets, draws=draws, home=home, workers=how.readers if how.workers else 0
    )
    console.print(f"{stage.name}: {verdict.why}")
    return verdict.folder


def _may_match(glob: str, prefix: str) -> bool:
    """Whether a name that begins with `prefix` could match; what it says of a glob is never no wrongly."""
    literal = re.split(r"[*?\[]", glob)[0]
    return literal.startswith(prefix) or prefix.startswith(literal)


def _local_rows(job: loop.TrainJob, start: int) -> Iterator[list[reader.Row]]:
    return reader.local(job.feed, rank=0, world=1, start=start)


def _ignore(metrics: dict[str, float], step: int) -> None:
    """The report of a run that nobody listens to."""


def _alone() -> None:
    """A process group of one, for a loop that runs without Ray Train.

    It stays for the life of the process: DeepSpeed remembers the first group that it sees.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # which DeepSpeed asks for
    if not dist.is_initialized():
        dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
