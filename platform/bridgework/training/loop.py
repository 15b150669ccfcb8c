"""Training loop: one function for every stage of every system.

It builds the stage's model, resumes from the newest complete checkpoint, trains on the planned
batches in order, writes its journal, and saves a weights artifact. All differences between systems
are in the TrainingModule.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn

from bridgework import artifacts, storage
from bridgework.data.collate import Batch, collate
from bridgework.data.reader import ReaderConfig, Row
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import BridgeworkError, ResourceError, RunError
from bridgework.evaluation import results
from bridgework.evaluation.base import Result
from bridgework.evaluation.results import EvaluationRecord
from bridgework.inference.pipeline import Pipeline
from bridgework.mixture import DatasetInput
from bridgework.models import base, lora
from bridgework.rng import derive
from bridgework.storage import node_cache
from bridgework.system import EvalSpec, Stage, System
from bridgework.tracking.tracker import JOURNAL, Journal
from bridgework.training import checkpoint, snapshots
from bridgework.training.engine import Engine, learning_rate
from bridgework.training.flight_recorder import FlightRecorder
from bridgework.training.metrics import (
    Clock,
    GoodputMeter,
    Metrics,
    MixtureCounter,
    per_sample,
    step_metrics,
    suspects,
)
from bridgework.training.run_dir import has_snapshot
from bridgework.training.step import TrainingModule, check
from bridgework.training.stopping import Preemption, interrupted, listening, paused

FLUSH_S = 1.0  # seconds that points may wait before the driver sees them
T = TypeVar("T")
Report = Callable[[Metrics, int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs to train one stage; picklable."""

    system: System
    stage: str
    feed: ReaderConfig
    # this stage's folder in the run, shared by all workers: checkpoints, journal, evals, artifact
    folder: Path
    home: Path
    parent: Path | None = None  # the artifact to start from
    datasets: tuple[DatasetInput, ...] = ()
    checkpoint_every: int = 0  # steps; 0: only the artifact at the end
    until: int | None = None  # step after which the run stops, with a checkpoint; None: its end
    evaluate_every: int = 0  # steps; 0: only at the end
    midway: str | None = None  # name of the only evaluation before the end; None: all
    evaluate_in_task: bool = False  # by the driver, on snapshots that the loop writes
    keep_best: snapshots.BestBy | None = None  # chooses the result; None: the last step is
    skip_steps: frozenset[int] = frozenset()  # steps without an optimizer update
    keep: int = 2  # number of checkpoints
    # of recipes with other options with which this run was trained before
    fingerprints: tuple[str, ...] = ()
    lease: storage.Lease | None = (
        None  # of a run in a store; a worker checks it before it publishes
    )


def run(
    job: TrainJob,
    rows: Callable[[int], Iterator[list[Row]]],
    report: Report,
    *,
    rank: int,
    world: int,
    fixed_start: bool = False,
    preemption: Preemption | None = None,
) -> Metrics:
    """Train `job` to its end and return the metrics of its result; every rank calls it.

    With `evaluate_in_task`, it ends with a snapshot of the last step: the caller evaluates it and
    publishes the result.

    `rows(start)` yields this rank's samples of each step from `start` on. With `fixed_start`, the
    samples can begin only at the newest checkpoint at the time of the call. `preemption` knows if a
    node is about to be taken away, which leads to checkpoints.

    Raises RunError if the loss, the gradient or the weights are not finite; Interrupted, after a
    checkpoint, if the run is asked to stop; Paused, after that of `until`; ResourceError for a lack
    of memory or disk space.
    """
    with storage.growing(job.folder) as growing:
        return _train(job, rows, report, growing, rank, world, fixed_start, preemption)


def _train(
    job: TrainJob,
    rows: Callable[[int], Iterator[list[Row]]],
    report: Report,
    growing: storage.Growing,
    rank: int,
    world: int,
    fixed_start: bool,
    preemption: Preemption | None,
) -> Metrics:
    stage = job.system[job.stage]
    check(stage, num_micro_batches(stage, world))
    meter = GoodputMeter(job.system.name, _run_name(job), stage.name, rank=rank)

    model, inherited = build_model(job, stage)
    multipliers = base.set_trainable(model, stage.trains)
    # A new id, because an orphan of an older attempt must not write to this attempt's files.
    attempt = _broadcast(uuid4().hex[:8])
    engine, start, client = _resume(job, stage, model, multipliers, attempt, fixed_start)
    journal = Journal(job.folder / JOURNAL, growing.folder / JOURNAL)
    mixed, clock = MixtureCounter(stage, client.get("mixed", {})), Clock()
    pad_id = load_tokenizer(stage.model.tokenizer).pad_token_id or 0
    metrics: Metrics = client.get("metrics", {})
    names = artifacts.tensors_to_save(stage, model.state_dict(), multipliers, inherited)
    writer = _SnapshotWriter(job, engine, names, attempt)
    evaluate = partial(_evaluate_midway, job, stage, model, writer, journal, meter)
    preemption = preemption or Preemption(lambda: None)

    done = start
    recorder = FlightRecorder(job.folder, attempt, rank, start, growing.folder)
    with listening(job.folder, log.warning) as stop, closing(journal), closing(writer), recorder:
        if job.until is not None and start >= job.until:
            raise paused(job.stage, start)
        due = start and job.evaluate_every and start % job.evaluate_every == 0
        if due and not (
            job.evaluate_in_task and _on_rank_0(lambda: has_snapshot(job.folder, start))
        ):
            # The attempt that saved this checkpoint may have ended before its evaluation.
            report(metrics | evaluate(metrics, start), start)
        for step, batch_rows in enumerate(rows(start), start):
            clock.end_wait()
            stopped = save = False
            if step not in job.skip_steps:
                batches = _micro_batches(stage, batch_rows, world, pad_id, engine.device)
                lr = learning_rate(stage.optim, step, stage.budget.steps)
                engine.draws, engine.stop = derive(stage.seed, step), bool(stop.asked)
                engine.save_due = preemption.due()
                with _memory(stage, batches):
                    result = engine.train_step(batches, lr)
                losses, counts = per_sample(stage, result)
                recorder.step(step, batches, losses, counts)
                metrics = (
                    step_metrics(stage, result)
                    | mixed.add(result)
                    | {"lr": lr}
                    | clock.end_step(batches, result)
                )
                if not (math.isfinite(metrics["loss"]) and math.isfinite(result.norm)):
                    keys = suspects([row.key for row in batch_rows], losses)
                    raise _loss_not_finite(job, step, metrics, keys)
                if rank == 0:
                    journal.append(metrics, step)
                meter.step(step, metrics)
                stopped, save = result.stop, result.save
            done = step + 1
            if rank == 0 and clock.flush_due(FLUSH_S):
                journal.flush()
            if done == stage.budget.steps:
                break
            every = job.checkpoint_every and done % job.checkpoint_every == 0
            reached = done == job.until
            if stopped or save or every or reached:
                journal.flush()  # steps before a checkpoint are never repeated
                recorder.flush()
                growing.flush()
                with preemption.saving(), meter.timed("checkpoint"):
                    writer.settle()  # a run that resumes here takes no earlier snapshot again
                    client = {"mixed": mixed.state(), "metrics": metrics}
                    _save(job, engine, attempt, done, world, client)
                if save and rank == 0:
                    log.warning(
                        "%s: a node is taken away soon: a checkpoint of step %d is saved",
                        job.stage,
                        done,
                    )
            if stopped:
                raise interrupted(job.stage, stop.asked, done)
            if reached:
                raise paused(job.stage, done)
            if job.evaluate_every and done % job.evaluate_every == 0:
                report(metrics | evaluate(metrics, done), done)
            clock.start_wait()

    if done != stage.budget.steps:
        raise RunError(
            f"{job.stage}: its rows ended after {done} of {stage.budget.steps} steps. "
            "Fix: run it again"
        )
    if not engine.finite():
        raise _weights_not_finite(job, done)
    if job.evaluate_in_task:
        with meter.timed("snapshot"):
            writer.take(metrics, done)
            writer.settle()
        report(metrics, done)
        return metrics
    with meter.timed("evaluation"):
        final = _evaluate(job, stage, model, stage.evals)
    journal.append(final.with_intervals, done)
    if rank == 0:
        journal.flush()
        growing.flush()
    if job.keep_best is not None:
        writer.offer(metrics, done, final)
        writer.settle()
        metrics = _on_rank_0(lambda: publish_best(job))
    else:
        state, metrics = engine.state(names), metrics | final.metrics
        if rank == 0:
            _keep_results(job, final, job.folder / results.FOLDER)
            _finish(job, metrics, state)
    report(metrics, done)
    return metrics


def num_micro_batches(stage: Stage, world: int) -> int:
    """Return the micro-batches per step of the rank with the most lanes.

    Every rank runs that many, because all must run the same collectives.
    """
    samples = math.ceil(stage.data.lanes / world) * (stage.budget.batch // stage.data.lanes)
    return math.ceil(samples / stage.budget.micro)


def build_model(job: TrainJob, stage: Stage) -> tuple[base.VLMModule, list[str]]:
    """Build the stage's model with the parent's weights, the same on every rank.

    Returns the model and the names of the tensors from the parent.
    """
    torch.manual_seed(stage.seed)  # every rank draws the same new weights
    model: base.VLMModule = stage.model.build()
    inherited = (
        lora.remap_adapters(model, artifacts.weights(job.parent, stage.init_params))
        if job.parent
        else {}
    )
    artifacts.load_into(model, inherited, str(job.parent))
    return model, list(inherited)


def _resume(
    job: TrainJob,
    stage: Stage,
    model: base.VLMModule,
    multipliers: Mapping[str, float],
    attempt: str,
    fixed_start: bool,
) -> tuple[Engine, int, dict[str, Any]]:
    """Return the engine at the newest usable checkpoint, its step, and what the loop saved in it.

    A checkpoint with complete files may still hold values that are not finite, e.g. if an older
    version or broken memory wrote them. It is moved to `damaged/`.
    """
    engine: Engine | None = None
    while True:
        found = _on_rank_0(lambda: _latest_checkpoint(job, attempt, fixed_start))
        # Without ZeRO (stage 0) the state has no shards, so any number of workers can load it.
        elastic = (
            found is not None and found.world != dist.get_world_size() and stage.zero.stage > 0
        )
        engine = engine or Engine(
            TrainingModule(model, stage.losses), stage, multipliers, universal=elastic
        )
        if found is None:
            return engine, 0, {}
        with found.local() as folder:
            client = (
                _load_elastic(job, found, folder, engine, attempt)
                if elastic
                else engine.load(folder, universal=False)
            )
        if engine.finite():
            return engine, found.step, client
        damage = (
            f"{job.stage}: checkpoint of step {found.step} is damaged: "
            "it holds values that are not finite"
        )
        if dist.get_rank() == 0:
            log.warning("%s; resuming from the one before", damage)
        _on_rank_0(partial(checkpoint.move_to_damaged, found.folder))
        if fixed_start:
            raise ResourceError(f"{damage}; the workers start again from the one before")


def _latest_checkpoint(
    job: TrainJob, attempt: str, fixed_start: bool
) -> checkpoint.Checkpoint | None:
    while True:
        found, rejected = checkpoint.resume(
            job.folder, job.system.fingerprint(), *job.fingerprints, home=job.home
        )
        for reason in rejected:
            log.warning("%s: %s; resuming from the one before", job.stage, reason)
        try:
            with found.local() if found else nullcontext():  # downloads and compares it
                break
        except checkpoint.Damaged as error:
            assert found is not None
            damage = f"{job.stage}: checkpoint of step {found.step} is damaged: {error}"
            checkpoint.move_to_damaged(found.folder)
            if fixed_start:
                raise ResourceError(
                    f"{damage}; the workers start again from the one before"
                ) from None
            log.warning("%s; resuming from the one before", damage)
    start = found.step if found else 0
    checkpoint.remove_stale(job.folder, attempt, start)
    snapshots.remove_stale(job.folder, start)
    return found


def _load_elastic(
    job: TrainJob, found: checkpoint.Checkpoint, folder: Path, engine: Engine, attempt: str
) -> dict[str, Any]:
    """Load a checkpoint of another number of workers, by a temporary universal one.

    folder: its local files. With a home in a store, every rank converts them on its own node.
    """
    from bridgework.training.deepspeed_backend import convert_to_universal

    _on_rank_0(lambda: checkpoint.make_room(job.folder, found.size, home=job.home))
    if not storage.is_local(job.folder):
        with node_cache.scratch() as universal:
            convert_to_universal(folder, universal)
            client = engine.load(universal, universal=True)
            dist.barrier()
        return client
    universal = found.folder.with_name(f".universal-{attempt}")
    try:
        _on_rank_0(lambda: convert_to_universal(found.folder, universal))
        client = engine.load(universal, universal=True)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)
    return client


def _micro_batches(
    stage: Stage, rows: Sequence[Row], world: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Collate batches of at most `budget.micro` sequences, the same number on every rank.

    Surplus batches repeat a row without loss. Without packing the number of batches is arithmetic.
    With packing the ranks exchange it, because each one knows only its own number of sequences.
    """
    size = stage.budget.micro
    sequences = [list(samples) for _, samples in groupby(rows, key=lambda row: row.place)]
    number = num_micro_batches(stage, world)
    if stage.data.packing is not None:
        most = torch.tensor(math.ceil(len(sequences) / size), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        number = int(most)
    groups = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    batches = [
        collate([row for samples in group for row in samples], pad_id=pad_id) for group in groups
    ]
    while len(batches) < number:
        batches.append(replace(collate(rows[:1], pad_id=pad_id), idle=True))
    return batches


def midway_evaluations(job: TrainJob, stage: Stage) -> list[EvalSpec]:
    """Return the evaluations before the end of the stage."""
    return [spec for spec in stage.evals if job.midway in (None, spec.name)]


class _Evaluated(NamedTuple):
    """Figures of evaluations, alone and with their intervals for the journal, and the rows."""

    metrics: Metrics
    with_intervals: Metrics
    results: list[tuple[Result, EvaluationRecord]]


def _evaluate(
    job: TrainJob, stage: Stage, model: nn.Module, evals: Sequence[EvalSpec]
) -> _Evaluated:
    """Run evaluations; every rank reads the same rows, because all must gather sharded weights."""
    pipeline, found = Pipeline(model, stage), _Evaluated({}, {}, [])
    for spec in evals:
        result, record = results.evaluate(spec, pipeline, job.home)
        found.metrics.update(result.metrics)
        found.with_intervals.update(results.with_intervals(record.figures))
        found.results.append((result, record))
    return found


def _evaluate_midway(
    job: TrainJob,
    stage: Stage,
    model: nn.Module,
    writer: "_SnapshotWriter",
    journal: Journal,
    meter: GoodputMeter,
    metrics: Metrics,
    step: int,
) -> Metrics:
    """Evaluate the weights after `step` steps, or write a snapshot for that; returns the figures.

    If too many snapshots wait for their tasks, the loop evaluates. metrics: of the last step. The
    journal gets the seconds for which the training stops.
    """
    started, found = time.perf_counter(), _Evaluated({}, {}, [])
    if not (evals := midway_evaluations(job, stage)):
        return {}
    if job.evaluate_in_task and writer.has_room(step):
        with meter.timed("snapshot"):
            writer.take(metrics, step)
    else:
        with meter.timed("evaluation"):
            found = _evaluate(job, stage, model, evals)
        if job.keep_best is not None:
            with meter.timed("snapshot"):
                writer.offer(metrics, step, found)
    if dist.get_rank() == 0:
        stopped = {"evaluation_stop_s": time.perf_counter() - started}
        journal.append(found.with_intervals | stopped, step)
    return found.metrics


def _keep_results(job: TrainJob, found: _Evaluated, folder: Path) -> None:
    """Write the rows and images of evaluations; the driver adds the digest of the weights."""
    for result, record in found.results:
        try:
            results.save(result, record, folder)
        except OSError as error:  # the metrics are in the journal
            log.warning("%s: the results of %s cannot be saved: %s", job.stage, record.name, error)


class _SnapshotWriter:
    """Writes snapshots of a stage's weights. All ranks call every method.

    The training stops while the weights are copied to the CPU. Rank 0 writes them from a thread.
    """

    def __init__(self, job: TrainJob, engine: Engine, names: Iterable[str], attempt: str) -> None:
        """names: of the tensors of an artifact."""
        self._job, self._engine, self._attempt = job, engine, attempt
        self._names = list(names)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self._pending: Future[None] | None = None

    def take(self, metrics: Metrics, step: int, found: _Evaluated | None = None) -> None:
        """Begin to write the weights after `step` steps, with their evaluations if it has some."""
        self.settle()
        state = self._engine.state(self._names)
        if dist.get_rank() == 0:
            self._pending = self._thread.submit(self._write, state, dict(metrics), step, found)

    def offer(self, metrics: Metrics, step: int, found: _Evaluated) -> None:
        """Take a snapshot with its evaluations if it is the best one so far."""
        self.settle()
        if _on_rank_0(lambda: self._wins(found.metrics, step)):
            self.take(metrics, step, found)

    def has_room(self, step: int) -> bool:
        """Return True unless too many snapshots wait for their evaluation, which is reported."""
        self.settle()
        return _on_rank_0(lambda: self._has_room(step))

    def settle(self) -> None:
        """Wait until the last snapshot is written. Raises the error of that on every rank."""
        if self._job.evaluate_in_task or self._job.keep_best is not None:
            _on_rank_0(self._result)

    def close(self) -> None:
        """Wait for the last snapshot, without its error, at any end of a run."""
        if self._pending is not None:
            wait_for_futures([self._pending])

    def _result(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _has_room(self, step: int) -> bool:
        if (waiting := snapshots.waiting(self._job.folder)) < snapshots.MOST_WAITING:
            return True
        log.warning(
            "%s: %d snapshots wait for their evaluation in a task, so the training stops for that "
            "of step %d. Fix: leave resources free for the tasks, or raise --evaluate-every",
            self._job.stage,
            waiting,
            step,
        )
        return False

    def _wins(self, figures: Metrics, step: int) -> bool:
        best = self._job.keep_best
        assert best is not None
        before = best.choose(snapshots.listed(self._job.folder))
        if before is None:
            last = self._job.system[self._job.stage].budget.steps
            return step == last or best.score(figures) > -math.inf
        return best.score(figures) > best.score(before.figures() or {})

    def _write(
        self,
        state: dict[str, torch.Tensor],
        metrics: Metrics,
        step: int,
        found: _Evaluated | None,
    ) -> None:
        job = self._job
        if job.lease is not None:
            job.lease.check()
        need = sum(tensor.nbytes for tensor in state.values())
        checkpoint.make_room(job.folder, need, home=job.home)
        snapshot = snapshots.write(
            job.folder,
            step,
            self._attempt,
            state,
            metrics,
            system=job.system,
            stage=job.stage,
            parent=artifacts.describe(job.parent).digest if job.parent else None,
            datasets=job.datasets,
        )
        if found is not None:
            _keep_results(job, found, snapshot.folder / results.FOLDER)
            snapshot.finish(found.metrics)
            prune_snapshots(job)


def prune_snapshots(job: TrainJob) -> None:
    """Remove the weights of evaluated snapshots that cannot become the result."""
    saved = checkpoint.checkpoints(job.folder)
    snapshots.prune(
        job.folder,
        job.keep_best,
        saved=saved[0].step if saved else 0,
        last=job.system[job.stage].budget.steps,
    )


def publish_best(job: TrainJob) -> Metrics:
    """Make the best snapshot, or the last one, the result of the stage; returns its metrics."""
    if job.lease is not None:
        job.lease.check()
    last = job.system[job.stage].budget.steps
    chosen = snapshots.result(job.folder, job.keep_best, last)
    if job.keep_best is not None and job.keep_best.score(chosen.figures() or {}) == -math.inf:
        log.warning(
            "%s: %s has no finite value at any step, so the last step is the result",
            job.stage,
            job.keep_best.metric,
        )
    return snapshots.publish(chosen, job.folder, job.keep_best)


def _save(
    job: TrainJob,
    engine: Engine,
    attempt: str,
    step: int,
    world: int,
    client: Mapping[str, Any],
) -> None:
    """Write a checkpoint of `step`, with the loop's own state.

    Raises if its weights are not finite or the disk is full.
    """
    if not engine.finite():
        raise _weights_not_finite(job, step)
    need = engine.checkpoint_bytes()
    _on_rank_0(lambda: checkpoint.make_room(job.folder, need, home=job.home))
    folder = checkpoint.begin(job.folder, step, attempt)
    try:
        with storage.disk_errors(folder), checkpoint.writing(folder) as own:
            engine.save(own, {"step": step, **client})
            files = _on_every_rank(lambda: checkpoint.upload(own, folder))
            _on_rank_0(
                lambda: _complete(
                    job, folder, step, attempt, {k: v for each in files for k, v in each.items()}
                )
            )
    except ResourceError:
        with suppress(OSError):  # partial files would keep the disk full
            storage.remove(folder, first=checkpoint.MANIFEST)
        raise


def _complete(
    job: TrainJob, folder: Path, step: int, attempt: str, files: checkpoint.Files
) -> checkpoint.Checkpoint:
    if job.lease is not None:
        job.lease.check()
    return checkpoint.complete(
        folder,
        step=step,
        world=dist.get_world_size(),
        attempt=attempt,
        fingerprint=job.system.fingerprint(),
        keep=job.keep,
        home=job.home,
        files=files,
    )


def _finish(job: TrainJob, metrics: Metrics, state: dict[str, torch.Tensor]) -> None:
    """Write the metrics and then the artifact: its presence means that the stage is finished."""
    if job.lease is not None:
        job.lease.check()
    checkpoint.make_room(job.folder, sum(tensor.nbytes for tensor in state.values()), home=job.home)
    storage.write_atomic(job.folder / "metrics.json", json.dumps(metrics, indent=1))
    with storage.disk_errors(job.folder):
        artifacts.save(
            job.folder / "artifact",
            state,
            system=job.system,
            stage=job.stage,
            parent=artifacts.describe(job.parent).digest if job.parent else None,
            datasets=job.datasets,
            steps=job.system[job.stage].budget.steps,
        )
        storage.sync_tree(job.folder / "artifact")
        storage.sync_folder(job.folder)


def _broadcast(value: T) -> T:
    """Return rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _on_every_rank(work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank and return all values; an error of one is raised on all."""
    own: T | BridgeworkError
    try:
        own = work()
    except BridgeworkError as error:
        own = error
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, own)
    for value in values:
        if isinstance(value, BridgeworkError):
            raise value
    return cast(list[T], values)


def _on_rank_0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its value on every rank.

    Its BridgeworkErrors are raised on every rank, so that no rank waits forever.
    """
    outcome: T | BridgeworkError | None = None
    if dist.get_rank() == 0:
        try:
            outcome = work()
        except BridgeworkError as error:
            outcome = error
    value = _broadcast(outcome)
    if isinstance(value, BridgeworkError):
        raise value
    return cast(T, value)


@contextmanager
def _memory(stage: Stage, batches: Sequence[Batch]) -> Iterator[None]:
    """Raise ResourceError, with this worker's longest samples, if the block runs out of memory."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError; on a CPU torch raises a plain RuntimeError.
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not known and "allocat" not in str(error):
            raise
        size = {
            key: tokens
            for batch in batches
            for key, tokens in zip(batch.keys, batch.tokens_by_sample().tolist(), strict=True)
        }
        longest = sorted(size, key=lambda key: -size[key])[:4]
        named = ", ".join(f"{key} ({size[key]} tokens)" for key in longest)
        raise ResourceError(
            f"{stage.name}: out of memory at {stage.budget.micro} samples per forward. "
            f"Got {str(error).strip().partition(chr(10))[0]}; the longest samples of this worker "
            f"are {named}. Fix: set stages.{stage.name}.budget.micro="
            f"{max(1, stage.budget.micro // 2)}: the batch is then split into more micro-batches, "
            "and the same run resumes; or leave samples out with --skip KEY"
        ) from None


def _loss_not_finite(job: TrainJob, step: int, metrics: Metrics, keys: Sequence[str]) -> RunError:
    """Return the error with the most likely samples of all ranks; every rank must call it."""
    by_rank: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(by_rank, list(keys))
    samples = ", ".join(key for keys_of_rank in by_rank for key in keys_of_rank)
    return RunError(
        f"{job.stage}: the loss is not finite at step {step}. Got {metrics['loss']}, gradient norm "
        f"{metrics['grad_norm']}; no checkpoint was written. Most likely samples: {samples}. "
        f"Fix: look at them with `bridgework data preview --run {_run_name(job)}/{job.stage} "
        f"--step {step}`, then leave samples out with `bridgework train .. --skip KEY`, or lower "
        f"stages.{job.stage}.optim.peak_lr in {_new_run(job)}"
    )


def _weights_not_finite(job: TrainJob, step: int) -> RunError:
    saved = checkpoint.checkpoints(job.folder)
    resumes = (
        f"the same command resumes at step {saved[0].step}"
        if saved
        else "the same command begins again"
    )
    return RunError(
        f"{job.stage}: a weight or a state of the optimizer is NaN or infinite after step "
        f"{step - 1}, and the loss was finite. No checkpoint was written, and {resumes}. Fix: if "
        f"it happens again at the same step, lower stages.{job.stage}.optim.peak_lr or raise "
        f"stages.{job.stage}.optim.eps in {_new_run(job)}; if it does not, check the memory of the "
        "machine"
    )


def _new_run(job: TrainJob) -> str:
    """Describe the command for a run with another learning rate."""
    if checkpoint.checkpoints(job.folder):
        return f"a new run from this one's newest checkpoint (--fork {_run_name(job)})"
    return "a new run (another --run)"


def _run_name(job: TrainJob) -> str:
    try:
        return job.folder.parent.relative_to(job.home / "runs").as_posix()
    except ValueError:
        return job.folder.parent.name
