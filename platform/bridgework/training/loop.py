"""The training loop: one function for every stage of every system.

It builds the stage's model, goes on from the newest complete checkpoint, takes the planned batches one after the other,
writes its journal, and leaves a weights artefact. What differs between systems lives in the Step.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn

from bridgework.data.batch import Batch, collate
from bridgework.data.reader import Feed, Row
from bridgework.data.tokens import load_tokenizer
from bridgework.errors import ResourceError, RunError
from bridgework.inference import Pipeline
from bridgework.models import freezing, lora
from bridgework.system import EvalSpec, Stage, System
from bridgework.tracking import DatasetInput, Journal
from bridgework.training import artefact, checkpoint
from bridgework.training.engine import Engine, Taken, reshaped
from bridgework.training.schedule import learning_rate
from bridgework.training.step import Step, check

FLUSH_S = 1.0  # how long points may wait before the driver sees them
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that a worker needs to train one stage; picklable."""

    system: System
    stage: str
    feed: Feed
    folder: Path  # of this stage in the run: checkpoints, journal, evals, artefact; seen by every worker
    home: Path
    parent: Path | None = None  # the artefact to start from
    datasets: tuple[DatasetInput, ...] = ()
    checkpoint_every: int = 0  # steps; 0: only the artefact at the end
    evaluate_every: int = 0  # steps; 0: only at the end
    midway: str | None = None  # the one evaluation before the end; None: all
    keep: int = 2  # checkpoints


Metrics = dict[str, float]
Report = Callable[[Metrics, int], None]


def run(job: Job, rows: Callable[[int], Iterator[list[Row]]], report: Report, *, rank: int, world: int) -> Metrics:
    """Train `job` to its end and return the metrics of its evaluations; every rank calls it together.

    `rows(start)` gives this rank's samples of the steps from `start` on. Raises RunError when the loss is not finite.
    """
    stage = job.system[job.stage]
    micro_batches = accumulated(stage, world)
    check(stage, micro_batches)

    model, inherited = built(job, stage)
    multipliers = freezing.apply(model, stage.trains)
    attempt = _agreed(uuid4().hex[:8])  # so that an orphan of an older attempt cannot write into this one's files
    found = _agreed(_newest(job, attempt) if rank == 0 else None)
    engine, start = _engine(stage, model, multipliers, micro_batches, found, attempt)
    journal = Journal(job.folder / "journal")
    tokenizer = load_tokenizer(stage.model.tokenizer)
    clock = _Clock()
    metrics: Metrics = {}

    for step, batch_rows in enumerate(rows(start), start):
        clock.waited()
        torch.manual_seed(hash((stage.seed, step, rank)))
        batches = _micro_batches(batch_rows, stage.budget.micro, micro_batches, pad_id=tokenizer.pad_token_id or 0)
        lr = learning_rate(stage.optim, step, stage.budget.steps)
        with _room(stage):
            taken = engine.train_step(batches, lr)
        metrics = _named(stage, taken) | {"lr": lr, "grad_norm": taken.norm} | clock.took(batches, world)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(taken.norm)):
            journal.flush()  # how it came to this
            keys = ", ".join(r.key for r in batch_rows[:4])
            raise RunError(
                f"{stage.name}: the loss of step {step} is {metrics['loss']}, the norm of its gradient {taken.norm}; "
                f"nothing was saved; it had {keys}, ...; "
                f"lower stages.{stage.name}.optim.peak_lr, or look at these samples with `bridgework data preview`"
            )
        done = step + 1
        if rank == 0:
            journal.append(metrics, done)
            if clock.due(FLUSH_S):
                journal.flush()
        if done == stage.budget.steps:
            break
        if job.checkpoint_every and done % job.checkpoint_every == 0:
            journal.flush()  # steps before a checkpoint are never taken again
            _save(job, engine, attempt, done, rank, world)
        if job.evaluate_every and done % job.evaluate_every == 0:
            judges = [spec for spec in stage.evals if job.midway in (None, spec.name)]
            report(metrics | _evaluate(job, stage, model, judges), done)
        clock.waits()

    judged = _evaluate(job, stage, model, stage.evals, write=rank == 0)
    journal.append(judged, stage.budget.steps)
    state = engine.state(artefact.kept(stage, model.state_dict(), multipliers, inherited))
    if rank == 0:
        journal.flush()
        _finish(job, metrics | judged, state)
    report(metrics | judged, stage.budget.steps)
    return metrics | judged


def accumulated(stage: Stage, world: int) -> int:
    """Micro-batches of a step: those of the rank with the most lanes, so that all run the same collectives."""
    samples = math.ceil(stage.data.lanes / world) * (stage.budget.batch // stage.data.lanes)
    return math.ceil(samples / stage.budget.micro)


def _named(stage: Stage, taken: Taken) -> Metrics:
    """The loss of the step, each of its parts, and what each source had in them, where there are several."""
    names = [f"loss.{type(loss).__name__.lower()}" for loss in stage.losses]
    metrics = dict(zip(names, taken.losses_L.tolist(), strict=True))
    total = sum(loss.weight * metrics[name] for loss, name in zip(stage.losses, names, strict=True))
    sources = [source.name for source in stage.data.sources]
    if len(sources) > 1:
        for name, means, counts in zip(names, taken.means_LS.tolist(), taken.counts_LS.tolist(), strict=True):
            metrics |= {f"{name}.{s}": mean for s, mean, n in zip(sources, means, counts, strict=True) if n}
    return {"loss": total, **metrics}


@contextmanager
def _room(stage: Stage) -> Iterator[None]:
    """Raises ResourceError for a step that does not fit into memory."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU is one; on a CPU it has no name of its own
        if not isinstance(error, torch.OutOfMemoryError) and "allocat" not in str(error):
            raise
        raise ResourceError(
            f"{stage.name}: a step of {stage.budget.micro} samples a forward does not fit into memory "
            f"({str(error).strip().partition(chr(10))[0]}); set stages.{stage.name}.budget.micro="
            f"{max(1, stage.budget.micro // 2)}: the same batch is then taken in more pieces"
        ) from None


def _finish(job: Job, metrics: Metrics, state: dict[str, torch.Tensor]) -> None:
    """The artefact comes last: where it is, the stage is finished and its metrics are there."""
    (job.folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
    artefact.save(
        job.folder / "artefact",
        state,
        system=job.system,
        stage=job.stage,
        parent=artefact.describe(job.parent).digest if job.parent else None,
        datasets=job.datasets,
        steps=job.system[job.stage].budget.steps,
    )


def built(job: Job, stage: Stage) -> tuple[freezing.Freezable, list[str]]:
    """The stage's model with what it inherits, and the names of that; on every rank the same."""
    torch.manual_seed(stage.seed)  # every rank draws the same new weights
    model: freezing.Freezable = stage.model.build()
    inherited = lora.fitted(model, artefact.weights(job.parent, stage.inherits)) if job.parent else {}
    artefact.put(model, inherited, str(job.parent))
    return model, list(inherited)


def _agreed(value: T) -> T:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _engine(
    stage: Stage,
    model: freezing.Freezable,
    multipliers: Mapping[str, float],
    micro_batches: int,
    found: checkpoint.Checkpoint | None,
    attempt: str,
) -> tuple[Engine, int]:
    """The engine, with the state of the checkpoint if one was found, and the step to go on with."""
    elastic = found is not None and found.world != dist.get_world_size() and stage.shard.stage > 0  # 0 shards nothing
    step = Step(model, stage.losses, len(stage.data.sources))
    engine = Engine(step, stage, multipliers, micro_batches=micro_batches, universal=elastic)
    if found is None:
        return engine, 0
    if elastic:
        _load_of_other_workers(found, engine, attempt)
    else:
        engine.load(found.folder)
    return engine, found.step


def _load_of_other_workers(found: checkpoint.Checkpoint, engine: Engine, attempt: str) -> None:
    universal = found.folder.with_name(f".universal-{attempt}")
    failed = ""
    if dist.get_rank() == 0:
        try:
            reshaped(found.folder, universal)
        except RunError as error:
            failed = str(error)
    if failed := _agreed(failed):  # every rank must know, or the others wait for ever
        raise RunError(failed)
    engine.load(universal)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(universal)


def _newest(job: Job, attempt: str) -> checkpoint.Checkpoint | None:
    found, passed = checkpoint.newest(job.folder, job.system.fingerprint())
    for damage in passed:
        log.warning("%s: %s; going on from the one before", job.stage, damage)
    checkpoint.sweep(job.folder, attempt, found.step if found else 0)
    return found


def _save(job: Job, engine: Engine, attempt: str, step: int, rank: int, world: int) -> None:
    folder = checkpoint.begin(job.folder, step, attempt)
    engine.save(folder, {"step": step})
    dist.barrier()
    if rank == 0:
        checkpoint.complete(
            folder, step=step, world=world, attempt=attempt, fingerprint=job.system.fingerprint(), keep=job.keep
        )
    dist.barrier()


def _micro_batches(rows: Sequence[Row], size: int, number: int, *, pad_id: int) -> list[Batch]:
    """`number` batches of at most `size` rows; a rank with fewer rows repeats one of them without loss."""
    batches = [collate(rows[i : i + size], pad_id=pad_id) for i in range(0, len(rows), size)]
    while len(batches) < number:
        batches.append(replace(collate(rows[:1], pad_id=pad_id), idle=True))
    return batches


def _evaluate(job: Job, stage: Stage, model: nn.Module, judges: Sequence[EvalSpec], *, write: bool = False) -> Metrics:
    """Every rank evaluates the same rows, so that sharded weights are gathered by all."""
    pipeline = Pipeline(model, stage)
    metrics: Metrics = {}
    for spec in judges:
        result = spec.run(pipeline, job.home)
        metrics |= result.metrics
        for name, picture in result.pictures.items() if write else ():
            (job.folder / "evals").mkdir(exist_ok=True)
            picture.save(job.folder / "evals" / f"{name}.png")
    return metrics


class _Clock:
    """Where the time of a step goes: waiting for data, or working."""

    def __init__(self) -> None:
        self._mark = self._flushed = time.perf_counter()
        self._wait = 0.0

    def waits(self) -> None:
        """The wait for data begins: what lies before it was a checkpoint or an evaluation."""
        self._mark = time.perf_counter()

    def waited(self) -> None:
        self._wait = time.perf_counter() - self._mark

    def took(self, batches: Sequence[Batch], world: int) -> Metrics:
        now = time.perf_counter()
        step_s, self._mark = now - self._mark, now
        samples = sum(b.ids_BT.shape[0] for b in batches)
        tokens = sum(int(b.attention_BT.sum()) for b in batches)
        return {
            "step_s": step_s,
            "samples_per_s": world * samples / step_s,
            "tokens_per_s": world * tokens / step_s,
            "data_wait_share": self._wait / step_s,
        }

    def due(self, seconds: float) -> bool:
        if time.perf_counter() - self._flushed < seconds:
            return False
        self._flushed = time.perf_counter()
        return True
