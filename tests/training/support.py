"""A tiny LLaVA that learns within a test, and helpers to run it and read its results."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bridgework import artifacts
from bridgework.artifacts import StageResult
from bridgework.config import override
from bridgework.data import reader
from bridgework.evaluation import HeldOutLoss
from bridgework.system import EvalSpec, Stage, System, load
from bridgework.tracking.tracker import Journal, Tracker
from bridgework.training import loop
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from bridgework.training.stopping import Preemption

HELD_OUT = HeldOutLoss(dataset="synthetic:shapes", rows=8)


class Stop(Exception):
    """Raised by a test during a run."""


def llava(steps: int = 4, **changes: Any) -> System:
    """Return a LLaVA of `steps` steps per stage; `changes` are dotted paths with `__` for the dot."""
    fast = {"stages.*.optim.peak_lr": 3e-3, "stages.*.budget.steps": steps}
    return override(
        load("llava").tiny(), fast | {path.replace("__", "."): new for path, new in changes.items()}
    )


def judged(
    steps: int = 6, lr: float = 0.1, evals: Sequence[EvalSpec] = (HELD_OUT,), **changes: Any
) -> System:
    """Return a system of one stage with evaluations and a constant learning rate."""
    constant = {
        "stages__align__optim__peak_lr": lr,
        "stages__align__optim__warmup": 0.0,
        "stages__align__optim__decay": "constant",
        "stages__align__zero__stage": 0,
    }
    system = llava(steps, **constant, **changes)
    return replace(system, stages=(replace(system["align"], evals=tuple(evals)),))


def uncurated(system: System) -> System:
    """Return a tiny system whose stages all read existing data."""
    return replace(system, stages=tuple(replace(s, data=s.data.tiny(), curation=None) if s.curation else s
                                        for s in system.stages))  # fmt: skip


def go(
    system: System,
    home: Path,
    run: str,
    *,
    stages: Sequence[str] | None = ("align",),
    tracker: Tracker | None = None,
    fork: str | None = None,
    **how: Any,
) -> dict[str, StageResult]:
    options = RunOptions(**{"workers": 0, **how})
    return train(
        system, home=home, run=run, options=options, stages=stages, tracker=tracker, fork=fork
    )


def stop_at(step: int) -> Callable[[dict[str, float], int], None]:
    """Return a report, for evaluate_every=1, that raises after `step` steps."""

    def report(metrics: dict[str, float], done: int) -> None:
        if done == step:
            raise Stop

    return report


def losses(
    home: Path, run: str, stage: str = "align", key: str = "loss"
) -> list[tuple[int, float]]:
    """Return (step, loss) in the order of writing; a repeated step occurs twice."""
    parts = Journal(home / "runs" / run / stage / "journal").points()
    return [(p.step, p.value) for _, points in parts for p in points if p.key == key]


def weights(home: Path, run: str, stage: str = "align") -> dict[str, Tensor]:
    return artifacts.weights(home / "runs" / run / stage / "artifact")


def fresh(stage: Stage) -> nn.Module:
    """Return the initial model of a stage without a parent."""
    torch.manual_seed(stage.seed)
    model: nn.Module = stage.model.build()
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Return True if all tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def job(made: System, home: Path, folder: Path, *, every: int = 0) -> loop.TrainJob:
    """Return the job of a system's only stage in `folder`, with a checkpoint every `every` steps."""
    (stage,) = made.stages
    place = folder / stage.name
    place.mkdir(parents=True, exist_ok=True)
    return loop.TrainJob(
        made, stage.name, reader.ReaderConfig.of(stage, home), place, home, checkpoint_every=every
    )


def train_ranks(
    given: loop.TrainJob, rank: int = 0, world: int = 1, preemption: Preemption | None = None
) -> dict[int, float]:
    """Train a stage by the loop on this rank of `world`; returns the loss of every step."""

    def rows(start: int) -> Iterator[list[reader.Row]]:
        return reader.local(given.feed, rank=rank, world=world, start=start)

    loop.run(given, rows, lambda metrics, step: None, rank=rank, world=world, preemption=preemption)
    parts = Journal(given.folder / "journal").points()
    return {
        point.step: point.value for _, points in parts for point in points if point.key == "loss"
    }
