"""The training loop: one function for every stage of every system.

It builds the stage's model, goes on from the newest complete checkpoint, takes the planned batches one after the other,
writes its journal, and leaves a weights artifact. What differs between systems lives in the Step.
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
from bridgework.training.deepspeed_engine import Engine, convert_to_universal, learning_rate
from bridgework.training.flight_recorder import FlightRecorder
from bridgework.training.metrics import (
    Clock,
    Metrics,
    MixtureCounter,
    metric_names,
    per_sample,
    suspects,
)
from bridgework.training.step import TrainingModule, check
from bridgework.training.stopping import interrupted, listening

FLUSH_S = 1.0  # how long points may wait before the driver sees them
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """Everything that a worker needs to train one stage; picklable."""

    system: System
    stage: str
    feed: ReaderConfig
    folder: Path  # of this stage in the run: checkpoints, journal, evals, artifact; seen by every worker
    home: Path
    parent: Path | None = None  # the artifact to start from
    datasets: tuple[DatasetInput, ...] = ()
    checkpoint_every: int = 0  # steps; 0: only the artifact at the end
    evaluate_every: int = 0  # steps; 0: only at the end
    midway: str | None = None  # the one evaluation before the end; None: all
    passes: frozenset[int] = frozenset()  # steps that are passed without an update
    keep: int = 2  # checkpoints
    fingerprints: tuple[
        str, ...
    ] = ()  # of recipes with other options that this run was trained with before


Report = Callable[[Metrics, int], None]


def run(
    job: TrainJob,
    rows: Callable[[int], Iterator[list[Row]]],
    report: Report,
    *,
    rank: int,
    world: int,
    fixed_start: bool = False,
) -> Metrics:
    """Train `job` to its end and return the metrics of its evaluations; every rank calls it together.

    `rows(start)` gives this rank's samples of the steps from `start` on; with `fixed_start` they begin at the newest
    checkpoint of the moment and nowhere else. Raises RunError when the loss, the gradient or the weights are not
    finite, Interrupted after a checkpoint when the run is asked to stop, ResourceError for what the machine lacks.
    """
    stage = job.system[job.stage]
    check(stage, num_micro_batches(stage, world))

    model, inherited = build_model(job, stage)
    multipliers = base.set_trainable(model, stage.trains)
    attempt = _agreed(
        uuid4().hex[:8]
    )  # so that an orphan of an older attempt cannot write into this one's files
    engine, start, before = _engine(job, stage, model, multipliers, attempt, fixed_start)
    journal, mixed, clock = Journal(job.folder / "journal"), MixtureCounter(stage, before), Clock()
    pad_id = load_tokenizer(stage.model.tokenizer).pad_token_id or 0
    metrics: Metrics = {}

    done = start
    recorder = FlightRecorder(job.folder, attempt, rank, start)
    with listening(job.folder, log.warning) as stop, closing(journal), recorder:
        for step, batch_rows in enumerate(rows(start), start):
            clock.waited()
            stopped = False
            if step not in job.passes:
                batches = _micro_batches(stage, batch_rows, world, pad_id, engine.device)
                lr = learning_rate(stage.optim, step, stage.budget.steps)
                engine.draws, engine.stop = derive(stage.seed, step), bool(stop.asked)
                with _memory(stage, batches):
                    taken = engine.train_step(batches, lr)
                losses, counts = per_sample(stage, taken)
                recorder.step(step, batches, losses, counts)
                metrics = (
                    metric_names(stage, taken)
                    | mixed.add(taken)
                    | {"lr": lr}
                    | clock.took(batches, taken)
                )
                if not (math.isfinite(metrics["loss"]) and math.isfinite(taken.norm)):
                    raise _not_finite(
                        job, step, metrics, suspects([row.key for row in batch_rows], losses)
                    )
                if rank == 0:
                    journal.append(metrics, step)
                stopped = taken.stop
            done = step + 1
            if rank == 0 and clock.due(FLUSH_S):
                journal.flush()
            if done == stage.budget.steps:
                break
            if stopped or (job.checkpoint_every and done % job.checkpoint_every == 0):
                journal.flush()  # steps before a checkpoint are never taken again
                recorder.flush()
                _save(job, engine, attempt, done, rank, world, mixed.state())
            if stopped:
                raise interrupted(job.stage, stop.asked, done)
            if job.evaluate_every and done % job.evaluate_every == 0:
                judges = [spec for spec in stage.evals if job.midway in (None, spec.name)]
                report(metrics | _evaluate(job, stage, model, judges), done)
            clock.waits()

    if done != stage.budget.steps:
        raise RunError(
            f"{job.stage}: its rows ended after {done} of {stage.budget.steps} steps; run it again"
        )
    if not engine.finite():
        raise _weights_not_finite(job, done)
    judged = _evaluate(job, stage, model, stage.evals, write=rank == 0)
    journal.append(judged, stage.budget.steps)
    state = engine.state(
        artifacts.tensors_to_save(stage, model.state_dict(), multipliers, inherited)
    )
    if rank == 0:
        journal.flush()
        _finish(job, metrics | judged, state)
    report(metrics | judged, stage.budget.steps)
    return metrics | judged


def _not_finite(job: TrainJob, step: int, metrics: Metrics, own: Sequence[str]) -> RunError:
    """Name the samples of all ranks that may be the cause; every rank comes here at the same step."""
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, list(own))
    keys = ", ".join(key for of_rank in everyone for key in of_rank)
    return RunError(
        f"{job.stage}: the loss of step {step} is {metrics['loss']}, the norm of its gradient {metrics['grad_norm']}; "
        f"nothing was saved; look first at {keys}: `bridgework data preview --run {_run_name(job)}/{job.stage} "
        f"--step {step}`, then leave samples out with `bridgework train .. --skip KEY`, or lower "
        f"stages.{job.stage}.optim.peak_lr in {_other_run(job)}"
    )


def _weights_not_finite(job: TrainJob, step: int) -> RunError:
    kept = checkpoint.checkpoints(job.folder)
    resumes = (
        f"the same command resumes at step {kept[0].step}"
        if kept
        else "the same command begins again"
    )
    return RunError(
        f"{job.stage}: a weight or a state of the optimizer is NaN or infinite after step {step - 1}, and the loss was "
        f"finite. Nothing was saved, and {resumes}. Fix: if it happens again at the same step, lower "
        f"stages.{job.stage}.optim.peak_lr or raise stages.{job.stage}.optim.eps in {_other_run(job)}; if it does "
        "not, look at the memory of the machine"
    )


def _other_run(job: TrainJob) -> str:
    """Name the way to a run with another learning rate."""
    if checkpoint.checkpoints(job.folder):
        return f"a new run from this one's newest checkpoint (--fork {_run_name(job)})"
    return "a new run (another --run)"


def _run_name(job: TrainJob) -> str:
    try:
        return job.folder.parent.relative_to(job.home / "runs").as_posix()
    except ValueError:
        return job.folder.parent.name


def num_micro_batches(stage: Stage, world: int) -> int:
    """Micro-batches of a step: those of the rank with the most lanes, so that all run the same collectives."""
    samples = math.ceil(stage.data.lanes / world) * (stage.budget.batch // stage.data.lanes)
    return math.ceil(samples / stage.budget.micro)


@contextmanager
def _memory(stage: Stage, batches: Sequence[Batch]) -> Iterator[None]:
    """Raises ResourceError, naming this worker's longest samples, for a step that does not fit into memory."""
    try:
        yield
    except (
        RuntimeError,
        MemoryError,
    ) as error:  # torch.OutOfMemoryError is one; on a CPU it has no name of its own
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocat" not in str(
            error
        ):
            raise
        size = {
            key: tokens
            for batch in batches
            for key, tokens in zip(batch.keys, batch.tokens_by_sample().tolist(), strict=True)
        }
        longest = sorted(size, key=lambda key: -size[key])[:4]
        named = ", ".join(f"{key} ({size[key]} tokens)" for key in longest)
        raise ResourceError(
            f"{stage.name}: a step of {stage.budget.micro} samples a forward does not fit into memory "
            f"({str(error).strip().partition(chr(10))[0]}); the longest samples of this worker are {named}; set "
            f"stages.{stage.name}.budget.micro={max(1, stage.budget.micro // 2)}: the same batch is then taken in "
            "more pieces, and the same run resumes; or leave samples out with --skip KEY"
        ) from None


def _finish(job: TrainJob, metrics: Metrics, state: dict[str, torch.Tensor]) -> None:
    """The artifact comes last: where it is, the stage is finished and its metrics are there."""
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


def build_model(job: TrainJob, stage: Stage) -> tuple[base.VLMModule, list[str]]:
    """The stage's model with what it init_params, and the names of that; on every rank the same."""
    torch.manual_seed(stage.seed)  # every rank draws the same new weights
    model: base.VLMModule = stage.model.build()
    inherited = (
        lora.remap_adapters(model, artifacts.weights(job.parent, stage.init_params))
        if job.parent
        else {}
    )
    artifacts.load_into(model, inherited, str(job.parent))
    return model, list(inherited)


def _agreed(value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _by_rank_0(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its value on every rank; its errors are raised on every rank, so none waits."""
    made: T | BridgeworkError | None = None
    if dist.get_rank() == 0:
        try:
            made = work()
        except BridgeworkError as error:
            made = error
    found = _agreed(made)
    if isinstance(found, BridgeworkError):
        raise found
    return cast(T, found)


def _engine(
    job: TrainJob,
    stage: Stage,
    model: base.VLMModule,
    multipliers: Mapping[str, float],
    attempt: str,
    fixed_start: bool,
) -> tuple[Engine, int, dict[str, float]]:
    """The engine with the state of the newest usable checkpoint, the step to take next, and what was mixed.

    Files may be complete and hold values that are not finite: an older version, or broken memory, wrote them.
    """
    engine: Engine | None = None
    while True:
        found = _by_rank_0(lambda: _newest(job, attempt))
        elastic = (
            found is not None and found.world != dist.get_world_size() and stage.zero.stage > 0
        )  # 0: no shards
        engine = engine or Engine(
            TrainingModule(model, stage.losses), stage, multipliers, universal=elastic
        )
        if found is None:
            return engine, 0, {}
        if elastic:
            client = _load_of_other_workers(job, found, engine, attempt)
        else:
            client = engine.load(found.folder, universal=False)
        if engine.finite():
            return engine, found.step, client["mixed"]
        damage = f"{job.stage}: checkpoint of step {found.step} is damaged: it holds values that are not finite"
        if dist.get_rank() == 0:
            log.warning("%s; resuming from the one before", damage)
        _by_rank_0(partial(checkpoint.set_aside, found.folder))
        if fixed_start:
            raise ResourceError(f"{damage}; the workers start again from the one before")


def _load_of_other_workers(
    job: TrainJob, found: checkpoint.Checkpoint, engine: Engine, attempt: str
) -> dict[str, Any]:
    universal = found.folder.with_name(f".universal-{attempt}")
    _by_rank_0(lambda: checkpoint.make_room(job.folder, found.size, home=job.home))
    try:
        _by_rank_0(lambda: convert_to_universal(found.folder, universal))
        client = engine.load(universal, universal=True)
        dist.barrier()
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(universal, ignore_errors=True)
    return client


def _newest(job: TrainJob, attempt: str) -> checkpoint.Checkpoint | None:
    found, passed = checkpoint.resume(
        job.folder, job.system.fingerprint(), *job.fingerprints, home=job.home
    )
    for damage in passed:
        log.warning("%s: %s; resuming from the one before", job.stage, damage)
    checkpoint.remove_stale(job.folder, attempt, found.step if found else 0)
    return found


def _save(
    job: TrainJob,
    engine: Engine,
    attempt: str,
    step: int,
    rank: int,
    world: int,
    mixed: Mapping[str, float],
) -> None:
    """A checkpoint of `step`, unless its weights are not finite or the disk has no room for it."""
    if not engine.finite():
        raise _weights_not_finite(job, step)
    need = engine.checkpoint_bytes()
    _by_rank_0(lambda: checkpoint.make_room(job.folder, need, home=job.home))
    folder = checkpoint.begin(job.folder, step, attempt)
    try:
        with storage.disk_errors(folder):
            engine.save(folder, {"step": step, "mixed": dict(mixed)})
            dist.barrier()
            _by_rank_0(
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
        shutil.rmtree(folder, ignore_errors=True)  # what is half-written would keep the disk full
        raise


def _micro_batches(
    stage: Stage, rows: Sequence[Row], world: int, pad_id: int, device: torch.device
) -> list[Batch]:
    """Batches of at most `budget.micro` sequences, on every rank as many; one that is over repeats a row without loss.

    Without packing the number is arithmetic. With it, only the rank that has packed knows how many sequences it has.
    """
    size = stage.budget.micro
    sequences = [list(same) for _, same in groupby(rows, key=lambda row: row.place)]
    number = num_micro_batches(stage, world)
    if stage.data.packing is not None:
        most = torch.tensor(math.ceil(len(sequences) / size), device=device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        number = int(most)
    groups = [sequences[i : i + size] for i in range(0, len(sequences), size)]
    batches = [collate([row for same in group for row in same], pad_id=pad_id) for group in groups]
    while len(batches) < number:
        batches.append(replace(collate(rows[:1], pad_id=pad_id), idle=True))
    return batches


def _evaluate(
    job: TrainJob,
    stage: Stage,
    model: nn.Module,
    judges: Sequence[EvalSpec],
    *,
    write: bool = False,
) -> Metrics:
    """Every rank evaluates the same rows, so that sharded weights are gathered by all."""
    pipeline = Pipeline(model, stage)
    metrics: Metrics = {}
    for spec in judges:
        result = spec.run(pipeline, job.home)
        metrics |= result.metrics
        for name, picture in result.pictures.items() if write else ():
            try:
                (job.folder / "evals").mkdir(exist_ok=True)
                picture.save(job.folder / "evals" / f"{name}.png")
            except OSError as error:  # the figures are in the journal
                log.warning("%s: the picture of %s is not kept: %s", job.stage, name, error)
    return metrics
