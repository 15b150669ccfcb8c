"""A sweep: Optuna proposes, ASHA stops what lags, and every trial is trained by the same function as everything else.

A trial is stages of a system with overrides, a folder under the sweep's run, and a child run in the tracker. The
tracker is spoken to by the driver alone: several processes that open a fresh sqlite store at once corrupt it.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune import Callback, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from bridgework.errors import RunError, SpecError, TrackingError
from bridgework.lineage import models
from bridgework.spec import override, to_dict
from bridgework.system import System, load
from bridgework.tracking import Point, Tracker, Version
from bridgework.training.driver import train
from bridgework.training.launch import How
from bridgework.training.record import StageResult
from bridgework.tuning.space import Space

# Both announce what the table of the sweep says better.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class Row:
    """One trial of a sweep as its table shows it."""

    trial: str
    changes: Mapping[str, Any]
    score: float | None  # None: it gave none
    status: str  # finished | stopped | failed
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """A sweep's rows, best first; the winner's command, weights and registered version."""

    rows: tuple[Row, ...]
    command: str
    artefact: Path
    metrics: dict[str, float]
    version: Version | None


def sweep(
    space: Space,
    *,
    home: Path,
    run: str,
    changes: Mapping[str, Any] | None = None,
    tracker: Tracker | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run `space` with `changes` laid over every trial, register the best trial's last stage as `challenger`.

    The same sweep again is not run again. Raises SpecError for a path, a stage or a metric that does not exist,
    RunError when no trial finished or `run` holds another sweep.
    """
    console = console or Console(stderr=True)
    fixed = {**space.fixed, **(changes or {})}
    base = override(load(space.system), fixed)
    _check(space, base)
    folder = home / "runs" / run
    parent = tracker.start(run, tags={"run_key": run, "system": base.name, "sweep": space.name}) if tracker else None
    rows = _kept(folder, space, base)
    if rows is None:
        recorder = _Recorder(space, run, tracker, parent, console)
        rows = _rows(_search(space, base, home, run, recorder), space, folder)
        if rows[0].status != "finished":
            raise RunError(f"sweep {run}: none of {len(rows)} trials finished; the reasons are in {folder / 'tune'}")
        _keep(folder, space, base, rows)
    best = rows[0]
    # All its stages are finished: this only tells the tracker what they read and made.
    winner = train(
        override(base, best.changes),
        home=home,
        run=f"{run}/{best.trial}",
        how=How(workers=0),
        stages=space.stages,
        tracker=tracker,
        parent_run=parent,
        console=Console(quiet=True),
    )[space.stages[-1]]
    command = _command(space, fixed, best.changes)
    version = None
    try:
        version = _challenger(tracker, base.name, winner, {"command": command, "sweep": run})
        if tracker and parent:
            tracker.finish(parent)
    except TrackingError as error:
        console.print(f"{error}; the winner is not registered yet: the same command later does it")
    return Outcome(tuple(rows), command, winner.artefact, winner.metrics, version)


def _search(space: Space, base: System, home: Path, run: str, recorder: "_Recorder") -> ResultGrid:
    trial = tune.with_parameters(_trial, space=space, base=base, home=home, run=run, cwd=os.getcwd())
    tuner = Tuner(
        tune.with_resources(trial, {"CPU": space.budget.cpus}),
        param_space=dict(space.space),
        tune_config=TuneConfig(
            metric=space.metric.name,
            mode=space.metric.mode,
            num_samples=space.budget.trials,
            max_concurrent_trials=space.budget.concurrent,
            search_alg=OptunaSearch(seed=space.budget.seed),
            scheduler=ASHAScheduler(time_attr="training_iteration", max_t=space.budget.judgements, grace_period=1),
            reuse_actors=True,
        ),
        run_config=RunConfig(name="tune", storage_path=str(home / "runs" / run), verbose=0, callbacks=[recorder]),
    )
    return tuner.fit()


def _challenger(tracker: Tracker | None, name: str, winner: StageResult, tags: Mapping[str, str]) -> Version | None:
    """The winner as `challenger`, with the command that makes it again; None where nobody keeps the record."""
    if tracker is None or winner.run_id is None:
        return None
    version = models.register(tracker, name, winner, tags)
    tracker.alias(name, "challenger", version.version)
    return tracker.version(name, "challenger")


def _identity(space: Space, base: System) -> dict[str, Any]:
    ranges = {path: f"{type(d).__name__} {getattr(d, 'domain_str', d)}" for path, d in space.space.items()}
    stages = list(space.stages)
    return {"recipe": base.fingerprint(), "stages": stages, "space": ranges, "budget": to_dict(space.budget)}


def _kept(folder: Path, space: Space, base: System) -> list[Row] | None:
    """The rows of this sweep, if it was run before."""
    file = folder / "sweep.json"
    if not file.exists():
        return None
    kept = json.loads(file.read_text())
    if kept["identity"] != _identity(space, base):
        raise RunError(f"{folder} holds another sweep (its space, budget or recipe differs); give another --run")
    return [Row(**row) for row in kept["rows"]]


def _keep(folder: Path, space: Space, base: System, rows: list[Row]) -> None:
    temporary = folder / "sweep.json.tmp"
    temporary.write_text(json.dumps({"identity": _identity(space, base), "rows": [vars(r) for r in rows]}, indent=1))
    temporary.rename(folder / "sweep.json")


def _check(space: Space, base: System) -> None:
    for stage in space.stages:
        base[stage]
    for path in space.space:
        override(base, {path: _sample(space.space[path])})
    evals = [spec.name for spec in base[space.stages[-1]].evals]
    if space.metric.name.split(".")[0] not in evals:
        raise SpecError(
            f"sweep {space.name}: stage {space.stages[-1]} has no evaluation that gives {space.metric.name!r}; "
            f"its evaluations: {', '.join(evals) or 'none'}"
        )


def _sample(distribution: Any) -> Any:
    return distribution.sample() if hasattr(distribution, "sample") else distribution


def _trial(config: dict[str, Any], *, space: Space, base: System, home: Path, run: str, cwd: str) -> None:
    """Runs in a Tune actor: the stages of one trial, in that process."""
    import torch

    os.chdir(cwd)  # Tune starts in a folder of its own; paths in a recipe begin where the command ran
    torch.set_num_threads(max(1, round(space.budget.cpus)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = tune.get_context().get_trial_id()
    system = override(base, config)
    *first, last = space.stages
    every = math.ceil(system[last].budget.steps / space.budget.judgements)  # a report more, and ASHA ends the trial
    judge = space.metric.name.split(".")[0]
    for stages, how in (
        (first, How(workers=0)),
        ([last], How(workers=0, evaluate_every=every, midway=judge, report=_reporter(space))),
    ):
        train(system, home=home, run=f"{run}/{name}", how=how, stages=stages, console=Console(quiet=True))


def _reporter(space: Space) -> Any:
    def report(metrics: dict[str, float], step: int) -> None:
        if space.metric.name in metrics:
            tune.report({**metrics, "step": step})

    return report


class _Recorder(Callback):
    """Tells the tracker, in the driver, of every trial as it goes: a trial that ASHA stops says nothing itself."""

    def __init__(self, space: Space, run: str, tracker: Tracker | None, parent: str | None, console: Console) -> None:
        self._run, self._space, self._tracker, self._parent, self._console = run, space, tracker, parent, console
        self.runs: dict[str, str] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles a Tuner to restore it, which is never done, and a console has a lock."""
        return {}

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        if trial.trial_id not in self.runs:
            self._tell(lambda tracker: self._open(tracker, trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name, step, at = self._space.metric.name, int(result["step"]), int(result["timestamp"] * 1000)
        self._console.print(f"trial {trial.trial_id}: {name} {result[name]:.3f} at step {step}", highlight=False)
        points = [Point(k, v, step, at) for k, v in result.items() if isinstance(v, float) and "/" not in k]
        self._tell(lambda tracker: tracker.points(self.runs[trial.trial_id], points))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(lambda tracker: tracker.finish(self.runs[trial.trial_id]))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._tell(lambda tracker: tracker.finish(self.runs[trial.trial_id], "FAILED"))

    def _open(self, tracker: Tracker, trial: Trial) -> None:
        name = f"{self._run}/{trial.trial_id}"
        tags = {"run_key": name, "sweep": self._space.name, "system": self._space.system}
        self.runs[trial.trial_id] = tracker.start(name, parent=self._parent, tags=tags)
        tracker.params(self.runs[trial.trial_id], trial.config)

    def _tell(self, say: Callable[[Tracker], object]) -> None:
        """Nobody, from the first time that the tracker does not answer: it never stops a sweep."""
        if self._tracker is None:
            return
        try:
            say(self._tracker)
        except TrackingError as error:
            self._tracker = None
            self._console.print(f"{error}; the sweep goes on, and its trials are not tracked")


def _rows(results: ResultGrid, space: Space, folder: Path) -> list[Row]:
    """All trials: those that finished first, the best of them at the top."""
    rows = []
    for result in (results[i] for i in range(len(results))):
        metrics = result.metrics or {}
        trial = str(metrics.get("trial_id", "?"))
        whole = (folder / trial / space.stages[-1] / "artefact" / "artefact.json").is_file()
        status = "failed" if result.error else "finished" if whole else "stopped"
        score = metrics.get(space.metric.name)
        rows.append(Row(trial, dict(result.config or {}), score, status, float(metrics.get("time_total_s", 0.0))))
    return sorted(rows, key=lambda row: (row.status != "finished", *_order(row, space)))


def _order(row: Row, space: Space) -> tuple[bool, float]:
    score = row.score if row.score is not None else 0.0
    return row.score is None, -score if space.metric.mode == "max" else score


def _command(space: Space, fixed: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """The words that train the winner again."""
    words = ["bridgework", "train", space.system, *(w for s in space.stages for w in ("--stage", s))]
    for path, value in {**fixed, **changes}.items():
        words += ["--set", f"{path}={value}"]
    return shlex.join(words)


def limited(space: Space, *, trials: int | None) -> Space:
    """The same space with another number of trials."""
    return space if trials is None else replace(space, budget=replace(space.budget, trials=trials))
