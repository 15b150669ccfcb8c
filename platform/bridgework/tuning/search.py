"""Sweeps: Optuna proposes trials, ASHA stops weak ones, and the driver's `train` trains each one.

A trial is stages of a system with overrides, a folder under the sweep's run, and a child run in the
tracker. Only the sweep's own process calls the tracker, because several processes that open a new
sqlite store at the same time corrupt it.
"""

import json
import math
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.tune import Callback, ResultGrid, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from bridgework import storage
from bridgework.config import override, to_dict
from bridgework.errors import RunError, SpecError, TrackingError, suggest
from bridgework.system import System, load
from bridgework.tracking import registry
from bridgework.tracking.tracker import Point, Status, Tracker, Version
from bridgework.training import run_dir
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from bridgework.tuning.space import Space, bounds, described

# Both print progress that is clearer in the sweep's own table.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class TrialRow:
    """One trial of a sweep: a row of its table."""

    trial: str
    changes: Mapping[str, Any]
    score: float | None  # None: the trial reported none
    status: str  # finished | stopped | failed
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Result of a sweep: rows, best first; the best trial's command, weights and version."""

    rows: tuple[TrialRow, ...]
    command: str
    artifact: Path
    metrics: dict[str, float]
    version: Version | None
    not_challenger: str = ""  # the reason why the alias `challenger` did not move to `version`


def sweep(
    space: Space,
    *,
    home: Path,
    run: str,
    changes: Mapping[str, Any] | None = None,
    tracker: Tracker | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run `space` with `changes` in every trial, and register the best trial's last stage.

    The new version becomes `challenger` if it is better than the holder of the alias. A complete
    sweep is not run again. Raises SpecError for a path, a stage or a metric that does not exist,
    and RunError if no trial finished with a score or `run` holds another sweep. The runs in the
    tracker then end FAILED, or KILLED after Ctrl-C.
    """
    console = console or Console(stderr=True)
    fixed = {**space.fixed, **(changes or {})}
    base = override(load(space.system), fixed)
    _check(space, base)
    rows = _load_rows(home / "runs" / run, space, base)
    parent = (
        tracker.start(run, tags={"run_key": run, "system": base.name, "sweep": space.name})
        if tracker
        else None
    )
    recorder = _Recorder(space, run, tracker, parent, console)
    with recorder.closed():
        if rows is None:
            rows = _scored(
                _search(space, base, home, run, recorder), space, run, home / "runs" / run
            )
            _save_rows(home / "runs" / run, space, base, rows)
        return _registered(space, base, fixed, rows, home, run, tracker, parent, console)


def _registered(
    space: Space,
    base: System,
    fixed: Mapping[str, Any],
    rows: list[TrialRow],
    home: Path,
    run: str,
    tracker: Tracker | None,
    parent: str | None,
    console: Console,
) -> Outcome:
    """Return the outcome, and register the best trial's last stage if a tracker answers."""
    best = rows[0]
    # All its stages are finished, so this only logs their inputs and outputs to the tracker.
    winner = train(
        override(base, best.changes),
        home=home,
        run=f"{run}/{best.trial}",
        options=RunOptions(workers=0),
        stages=space.stages,
        tracker=tracker,
        parent_run=parent,
        console=Console(quiet=True),
    )[space.stages[-1]]
    command = _command(space, fixed, best.changes)
    version, why = None, ""
    try:
        if tracker is not None and winner.run_id is not None:
            version = registry.register(
                tracker, base.name, winner, {"command": command, "sweep": run}
            )
            _, why = registry.challenge(tracker, version, space.metric.name)
            version = tracker.version(base.name, version.version)
    except TrackingError as error:
        console.print(f"{error}; the winner is not registered yet: the same command later does it")
    return Outcome(tuple(rows), command, winner.artifact, winner.metrics, version, why)


def _search(space: Space, base: System, home: Path, run: str, recorder: "_Recorder") -> ResultGrid:
    trial = tune.with_parameters(
        _trial, space=space, base=base, home=home, run=run, cwd=os.getcwd()
    )
    tuner = Tuner(
        tune.with_resources(trial, {"CPU": space.budget.cpus}),
        param_space=dict(space.space),
        tune_config=TuneConfig(
            metric=space.metric.name,
            mode=space.metric.mode,
            num_samples=space.budget.trials,
            max_concurrent_trials=space.budget.concurrent,
            search_alg=OptunaSearch(seed=space.budget.seed),
            scheduler=ASHAScheduler(
                time_attr="training_iteration", max_t=space.budget.judgments, grace_period=1
            ),
            reuse_actors=True,
        ),
        run_config=RunConfig(
            name="tune",
            **storage.for_ray(home / "runs" / run),
            verbose=0,
            callbacks=[recorder],
        ),
    )
    return tuner.fit()


def _identity(space: Space, base: System) -> dict[str, Any]:
    """Return all settings that determine the trials and the best one; JSON-ready."""
    return {
        "recipe": base.fingerprint(),
        "stages": list(space.stages),
        "space": {path: described(distribution) for path, distribution in space.space.items()},
        "metric": to_dict(space.metric),
        "budget": to_dict(space.budget),
    }


def _load_rows(folder: Path, space: Space, base: System) -> list[TrialRow] | None:
    """Return the rows of this sweep if it was run before, else None."""
    file = folder / "sweep.json"
    if not file.exists():
        return None
    stored = json.loads(file.read_text())
    identity = _identity(space, base)
    if differs := [name for name in identity if stored["identity"].get(name) != identity[name]]:
        raise RunError(
            f"{folder} holds another sweep: its {', '.join(differs)} differ. "
            "Fix: give another --run"
        )
    return [TrialRow(**row) for row in stored["rows"]]


def _save_rows(folder: Path, space: Space, base: System, rows: list[TrialRow]) -> None:
    storage.write_atomic(
        folder / "sweep.json",
        json.dumps({"identity": _identity(space, base), "rows": [vars(r) for r in rows]}, indent=1),
    )


def _check(space: Space, base: System) -> None:
    for stage in space.stages:
        base[stage]
    for path, distribution in space.space.items():
        for value in bounds(path, distribution):
            override(base, {path: value})
    last = base[space.stages[-1]]
    ways = {f"{spec.name}.{key}": way for spec in last.evals for key, way in spec.better.items()}
    decisive = [name for name, way in ways.items() if way is not None]
    if space.metric.name not in decisive:
        baseline = (
            "is a baseline, which cannot rank trials,"
            if space.metric.name in ways
            else "is not a metric of any evaluation"
        )
        raise SpecError(
            f"sweep {space.name}: METRIC {space.metric.name!r} {baseline} of stage {last.name}"
            + (
                suggest(space.metric.name, decisive)
                or ". Fix: add evaluations to the stage's evals in the recipe"
            )
        )
    if space.metric.mode != {"higher": "max", "lower": "min"}[str(ways[space.metric.name])]:
        raise SpecError(
            f"sweep {space.name}: METRIC has mode {space.metric.mode!r}, and "
            f"{ways[space.metric.name]} {space.metric.name} is better. Fix: take the other mode"
        )


def _trial(
    config: dict[str, Any], *, space: Space, base: System, home: Path, run: str, cwd: str
) -> None:
    """Train the stages of one trial, in the process of a Tune actor."""
    import torch

    # Tune starts in another folder, but a recipe's paths are relative to that of the command.
    os.chdir(cwd)
    torch.set_num_threads(max(1, round(space.budget.cpus)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    name = tune.get_context().get_trial_id()
    system = override(base, config)
    *first, last = space.stages
    # Rounded up, because ASHA ends a trial after `judgments` reports.
    every = math.ceil(system[last].budget.steps / space.budget.judgments)
    evaluation = space.metric.name.split(".")[0]
    for stages, options in (
        (first, RunOptions(workers=0)),
        (
            [last],
            RunOptions(workers=0, evaluate_every=every, midway=evaluation, report=_reporter(space)),
        ),
    ):
        train(
            system,
            home=home,
            run=f"{run}/{name}",
            options=options,
            stages=stages,
            console=Console(quiet=True),
        )


def _reporter(space: Space) -> Any:
    def report(metrics: dict[str, float], step: int) -> None:
        if space.metric.name in metrics:
            tune.report({**metrics, "step": step})

    return report


class _Recorder(Callback):
    """Logs trials to the tracker from the sweep's own process, since ASHA stops some silently."""

    def __init__(
        self, space: Space, run: str, tracker: Tracker | None, parent: str | None, console: Console
    ) -> None:
        self._run, self._space = run, space
        self._tracker, self._parent, self._console = tracker, parent, console
        self.runs: dict[str, str] = {}
        self._running: set[str] = set()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Finish the sweep's run and open trials after the block: FAILED or KILLED if it raised."""
        try:
            yield
        except BaseException as error:
            self._close("FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        self._close("FINISHED")

    def _close(self, status: Status) -> None:
        for run_id in (*sorted(self._running), *filter(None, [self._parent])):
            self._call_tracker(partial(_finish, run_id, status))
        self._running.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return no state, because a console cannot be pickled and Tune's restore is not used."""
        return {}

    def on_trial_start(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        if trial.trial_id not in self.runs:
            self._call_tracker(lambda tracker: self._open(tracker, trial))

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name, step, at = (
            self._space.metric.name,
            int(result["step"]),
            int(result["timestamp"] * 1000),
        )
        self._console.print(
            f"trial {trial.trial_id}: {name} {result[name]:.3f} at step {step}", highlight=False
        )
        points = [
            Point(k, v, step, at)
            for k, v in result.items()
            if isinstance(v, float) and "/" not in k
        ]
        self._call_tracker(lambda tracker: tracker.points(self.runs[trial.trial_id], points))

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._finish_trial(trial, "FINISHED")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._finish_trial(trial, "FAILED")

    def _finish_trial(self, trial: Trial, status: Status) -> None:
        self._running.discard(self.runs[trial.trial_id])
        self._call_tracker(partial(_finish, self.runs[trial.trial_id], status))

    def _open(self, tracker: Tracker, trial: Trial) -> None:
        name = f"{self._run}/{trial.trial_id}"
        tags = {"run_key": name, "sweep": self._space.name, "system": self._space.system}
        self.runs[trial.trial_id] = tracker.start(name, parent=self._parent, tags=tags)
        self._running.add(self.runs[trial.trial_id])
        tracker.params(self.runs[trial.trial_id], trial.config)

    def _call_tracker(self, call: Callable[[Tracker], object]) -> None:
        """Call the tracker; after its first failure the sweep continues without it."""
        if self._tracker is None:
            return
        try:
            call(self._tracker)
        except TrackingError as error:
            self._tracker = None
            self._console.print(f"{error}; the sweep continues, and its trials are not tracked")


def _finish(run_id: str, status: Status, tracker: Tracker) -> None:
    tracker.finish(run_id, status)


def _scored(results: ResultGrid, space: Space, run: str, folder: Path) -> list[TrialRow]:
    """Return the rows of all trials, best first.

    Raises RunError if no trial finished with a score.
    """
    rows = _rows(results, space, folder)
    if not _may_win(rows[0]):
        raise RunError(
            f"sweep {run}: none of {len(rows)} trials finished with a {space.metric.name}. "
            f"Fix: see the reasons in {folder / 'tune'}"
        )
    return rows


def _may_win(row: TrialRow) -> bool:
    return row.status == "finished" and row.score is not None


def _rows(results: ResultGrid, space: Space, folder: Path) -> list[TrialRow]:
    rows = []
    for result in (results[i] for i in range(len(results))):
        metrics = result.metrics or {}
        trial = str(metrics.get("trial_id", "?"))
        complete = run_dir.is_finished(folder / trial / space.stages[-1])
        status = "failed" if result.error else "finished" if complete else "stopped"
        score = metrics.get(space.metric.name)
        score = score if score is not None and math.isfinite(score) else None
        rows.append(
            TrialRow(
                trial,
                dict(result.config or {}),
                score,
                status,
                float(metrics.get("time_total_s", 0.0)),
            )
        )
    return best_first(rows, space)


def best_first(rows: Sequence[TrialRow], space: Space) -> list[TrialRow]:
    """Sort trials: first those that finished with a score, from best to worst."""
    return sorted(rows, key=lambda row: (not _may_win(row), *_order(row, space)))


def _order(row: TrialRow, space: Space) -> tuple[bool, float]:
    score = row.score if row.score is not None else 0.0
    return row.score is None, -score if space.metric.mode == "max" else score


def _command(space: Space, fixed: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """Return the command that trains the best trial again."""
    args = [
        "bridgework",
        "train",
        space.system,
        *(w for s in space.stages for w in ("--stage", s)),
    ]
    for path, value in {**fixed, **changes}.items():
        args += ["--set", f"{path}={value}"]
    return shlex.join(args)


def with_trials(space: Space, *, trials: int | None) -> Space:
    """Return the space with another number of trials; None keeps it."""
    return space if trials is None else replace(space, budget=replace(space.budget, trials=trials))
