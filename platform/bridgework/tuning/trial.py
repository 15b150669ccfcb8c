"""One trial of a sweep, in the process of a Tune actor: the driver's `train` with its overrides.

With workers, a stage is a Ray Train run of its own, and this process is only its driver. Stages
that several trials have in common are trained once, under the digest of their settings.
"""

import json
import logging
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from ray import cloudpickle, tune
from ray.tune.integration.ray_train import TuneReportCallback
from rich.console import Console

from bridgework import __version__, ray_utils
from bridgework.config import override, to_dict
from bridgework.errors import Interrupted, ResourceError, RunError
from bridgework.system import System, fingerprint
from bridgework.training import checkpoint, run_dir
from bridgework.training.driver import train
from bridgework.training.fork import copy_stage, fork
from bridgework.training.options import RunOptions
from bridgework.tuning.space import Space

OUTCOME = "outcome"  # key of the last report of a trial, JSON
JUDGMENT = "judgment"  # key: number of the evaluation, from 1 to BUDGET.judgments
LOCK_S = 120.0  # an interrupted sweep's processes end within this time
LATENCY_RUNS = 3

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """Part of the last stage that a trial of a population trains."""

    source: str  # RUN@STEP of the checkpoint that it starts from; empty for the first generation
    end: int  # step at which it is judged and paused
    judgment: int  # its number
    last: bool  # True: it trains to the end of the stage


@dataclass(frozen=True)
class TrialJob:
    """Settings that all trials of a sweep share."""

    space: Space
    home: Path
    run: str
    cwd: str
    features: Literal["cached", "computed"]
    version: str = __version__  # of bridgework in the command


def run_trial(config: dict[str, Any], *, job: TrialJob) -> None:
    """Train all repeats of a trial and report its objectives, or the reason of its failure.

    An error of the recipe ends the trial. A lack of resources is raised, so that Tune tries again.
    """
    ray_utils.enter_folder(job.cwd)  # Tune starts in another one
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        ray_utils.check_version(job.version)
        system: System = cloudpickle.loads(bytes.fromhex(config["system"]))
        segment = Segment(**config["segment"]) if "segment" in config else None
        outcome = _outcome(system, str(config["trial"]), job, segment)
    except (
        ResourceError,
        Interrupted,
        StopIteration,
    ):  # the last one is Tune's, of a stopped trial
        raise
    except Exception as error:
        line = " ".join(str(error).split())
        own = type(error).__module__.startswith("bridgework.")
        outcome = {"failed": line if own and line else f"{type(error).__name__}: {line}"}
    tune.report({OUTCOME: json.dumps(outcome)})


def repeat_names(trial: str, repeats: int) -> list[str]:
    """Return the folders of a trial's repeats: `003`, `003-1`, `003-2`."""
    return [trial, *(f"{trial}-{number}" for number in range(1, repeats))]


def repeated(system: System, stages: tuple[str, ...], repeat: int) -> System:
    """Return the system with the seeds of a repeat; the first has those of the recipe."""
    if repeat == 0:
        return system
    return override(system, {f"stages.{name}.seed": system[name].seed + repeat for name in stages})


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of an ended trial: it is never resumed."""
    for stage in folder.iterdir() if folder.is_dir() else ():
        if stage.is_dir():
            shutil.rmtree(checkpoint.root(stage), ignore_errors=True)


def _outcome(system: System, trial: str, job: TrialJob, segment: Segment | None) -> dict[str, Any]:
    budget, stages = job.space.budget, job.space.stages
    repeats: list[dict[str, float]] = []
    for repeat, name in enumerate(repeat_names(trial, budget.repeats)):
        one = repeated(system, stages, repeat)
        folder = run_dir.path_of(job.home, f"{job.run}/{name}")
        _wait_for_lock(folder)
        if segment is not None and segment.source:
            with run_dir.locked(folder):  # also copies the stages before the last one
                run = f"{job.run}/{name}"
                fork(one, segment.source, home=job.home, run=run, stages=stages, unchanged=True)
        else:
            for number in range(1, len(stages)):
                _shared(one, number, job, folder)
        results = train(
            one,
            home=job.home,
            run=f"{job.run}/{name}",
            options=_options(one, job, segment, judged=repeat == 0),
            stages=stages,
            console=Console(quiet=True),
        )
        repeats.append(results[stages[-1]].metrics | _costs(one, job, folder))
    for metric in job.space.metrics:
        values = [metrics.get(metric.name) for metrics in repeats]
        if any(value is None or not math.isfinite(value) for value in values):
            raise RunError(f"{metric.name} is not a finite number. Got {values}")
    return {"repeats": repeats}


def _options(system: System, job: TrialJob, segment: Segment | None, *, judged: bool) -> RunOptions:
    """Return the options of the last stage; only the first repeat is judged midway."""
    budget, metric = job.space.budget, job.space.metric.name
    options = RunOptions(
        workers=budget.workers,
        gpus_per_worker=budget.gpus,
        features=job.features,
        threads=max(1, round(budget.cpus)),
    )
    if not judged or (segment is not None and segment.last):
        return options
    steps = system[job.space.stages[-1]].budget.steps
    judge = _Judge(metric, steps, math.ceil(steps / budget.judgments))
    if segment is not None:
        # The checkpoint that later trials start from is complete before the judgment.
        judge = _Judge(metric, steps, segment.end, segment.judgment)
        options = replace(options, checkpoint_every=segment.end)
    return replace(
        options,
        evaluate_every=judge.every,
        midway=metric.split(".")[0],
        report=judge.report,
        callbacks=(_Report(judge),) if budget.workers else (),
    )


@dataclass(frozen=True)
class _Judge:
    """The evaluations of a stage that Tune sees: those before its end."""

    metric: str
    steps: int
    every: int  # steps between two evaluations: the last one is at the end of the stage
    first: int = 1  # number of the first one

    def report(self, metrics: Mapping[str, float], step: int) -> None:
        if (judged := self.judged(metrics, step)) is not None:
            tune.report(judged)

    def judged(self, metrics: Mapping[str, float], step: int) -> dict[str, Any] | None:
        """Return the report to Tune; None for one that is not an evaluation before the end."""
        if self.metric not in metrics or step % self.every or step >= self.steps:
            return None
        judgment = self.first + step // self.every - 1
        return {self.metric: metrics[self.metric], "step": step, JUDGMENT: judgment}


class _Report(TuneReportCallback):
    """Passes the evaluations of Ray Train's workers to Tune, one at a time."""

    def __init__(self, judge: _Judge) -> None:
        init: Any = super().__init__  # untyped in Ray
        init()
        self._judge = judge

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any
    ) -> None:
        judged = self._judge.judged(metrics[0], int(metrics[0]["step"]))
        if judged is not None:
            super().after_report(run_context, [judged], None)


def _shared(system: System, number: int, job: TrialJob, folder: Path) -> None:
    """Train the first `number` stages once for all trials that have them in common.

    The last of them is then linked into the trial's folder.
    """
    names = job.space.stages[:number]
    last = folder / names[-1]
    if run_dir.is_finished(last):
        return
    settings = [to_dict(system[name], options=False) for name in names]
    run = f"{job.run}/shared/{fingerprint([*settings, job.features])}"
    place = run_dir.path_of(job.home, run)
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not run_dir.is_finished(place / names[-1]):
            for name in names[:-1]:  # by now finished in the trial's folder
                if not run_dir.is_finished(place / name):
                    copy_stage(folder / name, place / name)
            budget = job.space.budget
            train(
                replace(system, stages=tuple(system[name] for name in names)),
                home=job.home,
                run=run,
                options=RunOptions(
                    workers=budget.workers,
                    gpus_per_worker=budget.gpus,
                    features=job.features,
                    threads=max(1, round(budget.cpus)),
                ),
                stages=names,
                console=Console(quiet=True),
            )
            remove_checkpoints(place)
    copy_stage(place / names[-1], last)


def _costs(system: System, job: TrialJob, folder: Path) -> dict[str, float]:
    """Measure the objectives that no evaluation returns."""
    last = system[job.space.stages[-1]]
    measures: dict[str, Callable[[], float]] = {
        "cost.tokens": lambda: last.model.image_tokens,
        "cost.parameters": lambda: _trainable(system, last.name),
        "cost.latency_ms": lambda: _latency_ms(system, job, folder),
    }
    return {m.name: float(measures[m.name]()) for m in job.space.metrics if m.cost}


def _trainable(system: System, stage: str) -> float:
    from bridgework.training.estimate import parameter_counts

    return float(parameter_counts(system[stage]).trainable)


def _latency_ms(system: System, job: TrialJob, folder: Path) -> float:
    """Return the milliseconds per row of the first metric's evaluation."""
    from bridgework.inference.pipeline import Pipeline

    last = system[job.space.stages[-1]]
    judge = next(s for s in last.evals if s.name == job.space.metric.name.split(".")[0])
    pipeline = Pipeline.load(str(run_dir.artifact_dir(folder / last.name)))
    seconds = []
    for _ in range(LATENCY_RUNS):
        started = time.perf_counter()
        judge.run(pipeline, job.home)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds) / float(getattr(judge, "rows", 1))


def _wait_for_lock(folder: Path) -> None:
    """Wait until the processes of an interrupted sweep have left the trial's folder."""
    deadline = time.monotonic() + LOCK_S
    while time.monotonic() < deadline:
        with ExitStack() as stack:
            try:
                stack.enter_context(run_dir.locked(folder))
                return
            except RunError:
                pass
        time.sleep(1.0)
