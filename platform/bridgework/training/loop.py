"""Training loop: one function for every stage of every system.

It builds the stage's model, resumes from the newest complete checkpoint, trains on the planned
batches in order, writes its journal, and saves a weights artifact. All differences between systems
are in the TrainingModule.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn

from bridgework import artifacts, storage
from bridgework.data.collate import Batch, collate
from bridgework.data.reader import ReaderConfig, Row
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import BridgeworkError, ResourceError, RunError
from bridgework.inference.pipeline import Pipeline
from bridgework.mixture import DatasetInput
from bridgework.models import base, lora
from bridgework.rng import derive
from bridgework.system import EvalSpec, Stage, System
from bridgework.tracking.tracker import Journal
from bridgework.training import checkpoint
from bridgework.training.engine import Engine, learning_rate
from bridgework.training.flight_recorder import FlightRecorder
from bridgework.training.metrics import (
    Clock,
    Metrics,
    MixtureCounter,
    per_sample,
    step_metrics,
    suspects,
)
from bridgework.training.step import TrainingModule, check
from bridgework.training.stopping import interrupted, listening

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
    evaluate_every: int = 0  # steps; 0: only at the end
    midway: str | None = None  # name of the only evaluation before the end; None: all
    skip_steps: frozenset[int] = frozenset()  # steps without an optimizer update
    keep: int = 2  # number of checkpoints
    # of recipes with other options with which this run was trained before
    fingerprints: tuple[str, ...] = ()


def run(
    job: TrainJob,
    rows: Callable[[int], Iterator[list[Row]]],
    report: Report,
    *,
    rank: int,
    world: int,
    fixed_start: bool = False,
) -> Metrics:
    """Train `job` to its end and return the metrics of its evaluations; every rank calls it.

    `rows(start)` yields this rank's samples of each step from `start` on. With `fixed_start`, the
    samples can begin only at the newest checkpoint at the time of the call.

    Raises RunError if the loss, the gradient or the weights are not finite; Interrupted, after a
    checkpoint, if the run is asked to stop; ResourceError for a lack of memory or disk space.
    """
    stage = job.system[job.stage]
    check(stage, num_micro_batches(stage, world))

    model, inherited = build_model(job, stage)
    multipliers = base.set_trainable(model, stage.trains)
    # A new id, because an orphan of an older attempt must not write to this attempt's files.
    attempt = _broadcast(uuid4().hex[:8])
    engine, start, before = _resume(job, stage, model, multipliers, attempt, fixed_start)
    journal, mixed, clock = Journal(job.folder / "journal"), MixtureCounter(stage, before), Clock()
    pad_id = load_tokenizer(stage.model.tokenizer).pad_token_id or 0
    metrics: Metrics = {}

    done = start
    recorder = FlightRecorder(job.folder, attempt, rank, start)
    with listening(job.folder, log.warning) as stop, closing(journal), recorder:
        for step, batch_rows in enumerate(rows(start), start):
            clock.end_wait()
            stopped = False
            if step not in job.skip_steps:
                batches = _micro_batches(stage, batch_rows, world, pad_id, engine.device)
                lr = learning_rate(stage.optim, step, stage.budget.steps)
                engine.draws, engine.stop = derive(stage.seed, step), bool(stop.asked)
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
                stopped = result.stop
            done = step + 1
            if rank == 0 and clock.flush_due(FLUSH_S):
                journal.flush()
            if done == stage.budget.steps:
                break
            if stopped or (job.checkpoint_every and done % job.checkpoint_every == 0):
                journal.flush()  # steps before a checkpoint are never repeated
                recorder.flush()
                _save(job, engine, attempt, done, world, mixed.state())
            if stopped:
                raise interrupted(job.stage, stop.asked, done)
            if job.evaluate_every and done % job.evaluate_every == 0:
                evals = [spec for spec in stage.evals if job.midway in (None, spec.name)]
                report(metrics | _evaluate(job, stage, model, evals), done)
            clock.start_wait()

    if done != stage.budget.steps:
        raise RunError(
            f"{job.stage}: its rows ended after {done} of {stage.budget.steps} steps. "
            "Fix: run it again"
        )
    if not engine.finite():
        raise _weights_not_finite(job, done)
    figures = _evaluate(job, stage, model, stage.evals, write=rank == 0)
    journal.append(figures, stage.budget.steps)
    state = engine.state(
        artifacts.tensors_to_save(stage, model.state_dict(), multipliers, inherited)
    )
    if rank == 0:
        journal.flush()
        _finish(job, metrics | figures, state)
    report(metrics | figures, stage.budget.steps)
    return metrics | figures


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
) -> tuple[Engine, int, dict[str, float]]:
    """Return the engine at the newest usable checkpoint, its step, and its MixtureCounter state.

    A checkpoint with complete files may still hold values that are not finite, e.g. if an older
    version or broken memory wrote them. It is moved to `damaged/`.
    """
    engine: Engine | None = None
    while True:
        found = _on_rank_0(lambda: _latest_checkpoint(job, attempt))
        # Without ZeRO (stage 0) the state has no shards, so any number of workers can load it.
        elastic = (
            found is not None and found.world != dist.get_world_size() and stage.zero.stage > 0
        )
        engine = engine or Engine(
            TrainingModule(model, stage.losses), stage, multipliers, universal=elastic
        )
        if found is None:
            return engine, 0, {}
        client = (
            _load_elastic(job, found, engine, attempt)
            if elastic
            else engine.load(found.folder, universal=False)
        )
        if engine.finite():
            return engine, found.step, client["mixed"]
        damage = (
            f"{job.stage}: checkpoint of step {found.step} is damaged: "
            "it holds values that are not finite"
        )
        if dist.get_rank() == 0:
            log.warning("%s; resuming from the one before", damage)
        _on_rank_0(partial(checkpoint.move_to_damaged, found.folder))
        if fixed_start:
            raise ResourceError(f"{damage}; the workers start again from the one before")


def _latest_checkpoint(job: TrainJob, attempt: str) -> checkpoint.Checkpoint | None:
    found, rejected = checkpoint.resume(
        job.folder, job.system.fingerprint(), *job.fingerprints, home=job.home
    )
    for reason in rejected:
        log.warning("%s: %s; resuming from the one before", job.stage, reason)
    checkpoint.remove_stale(job.folder, attempt, found.step if found else 0)
    return found


def _load_elastic(
    job: TrainJob, found: checkpoint.Checkpoint, engine: Engine, attempt: str
) -> dict[str, Any]:
    """Load a checkpoint of another number of workers, by a temporary universal one."""
    from bridgework.training.deepspeed_backend import convert_to_universal

    universal = found.folder.with_name(f".universal-{attempt}")
    _on_rank_0(lambda: checkpoint.make_room(job.folder, found.size, home=job.home))
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


def _evaluate(
    job: TrainJob,
    stage: Stage,
    model: nn.Module,
    evals: Sequence[EvalSpec],
    *,
    write: bool = False,
) -> Metrics:
    """Run evaluations; every rank reads the same rows, because all must gather sharded weights."""
    pipeline = Pipeline(model, stage)
    metrics: Metrics = {}
    for spec in evals:
        result = spec.run(pipeline, job.home)
        metrics |= result.metrics
        for name, image in result.pictures.items() if write else ():
            try:
                (job.folder / "evals").mkdir(exist_ok=True)
                image.save(job.folder / "evals" / f"{name}.png")
            except OSError as error:  # the metrics are in the journal
                log.warning("%s: the image of %s cannot be saved: %s", job.stage, name, error)
    return metrics


def _save(
    job: TrainJob,
    engine: Engine,
    attempt: str,
    step: int,
    world: int,
    mixed: Mapping[str, float],
) -> None:
    """Write a checkpoint of `step`. Raises if its weights are not finite or the disk is full."""
    if not engine.finite():
        raise _weights_not_finite(job, step)
    need = engine.checkpoint_bytes()
    _on_rank_0(lambda: checkpoint.make_room(job.folder, need, home=job.home))
    folder = checkpoint.begin(job.folder, step, attempt)
    try:
        with storage.disk_errors(folder):
            engine.save(folder, {"step": step, "mixed": dict(mixed)})
            dist.barrier()
            _on_rank_0(
                lambda: checkpoint.complete(
                    folder,
                    step=step,
                    world=world,
                    attempt=attempt,
                    fingerprint=job.system.fingerprint(),
                    keep=job.keep,
                    home=job.home,
                )
            )
    except ResourceError:
        shutil.rmtree(folder, ignore_errors=True)  # partial files would keep the disk full
        raise


def _finish(job: TrainJob, metrics: Metrics, state: dict[str, torch.Tensor]) -> None:
    """Write the metrics and then the artifact: its presence means that the stage is finished."""
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
