"""Sweeps: Optuna proposes trials and stops weak ones, Ray Tune runs them, `train` trains each one.

A trial is stages of a system with overrides, a folder under the sweep's run, and a child run in the
tracker. The study in the sweep's folder records what was tried, so that the same command resumes.
Only the sweep's own process calls the tracker and writes the study, because several processes that
open a new sqlite store at the same time corrupt it.
"""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray import cloudpickle, tune
from ray.tune import Callback, FailureConfig, RunConfig, TuneConfig, Tuner
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from bridgework import ray_metrics, ray_utils
from bridgework.artifacts import StageResult
from bridgework.config import flat, override
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.errors import BridgeworkError, Interrupted, RunError, SpecError, TrackingError
from bridgework.evaluation.statistics import Interval
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking import environment, registry
from bridgework.tracking.tracker import Point, Status, Tracker, Version
from bridgework.training import feature_cache, run_dir
from bridgework.training.driver import can_cache_features, num_draws, train
from bridgework.training.options import RunOptions
from bridgework.training.ray_train import release
from bridgework.tuning import report, study
from bridgework.tuning.choice import Rule, front, ranked
from bridgework.tuning.compare import score_intervals, verdict
from bridgework.tuning.population import check_population
from bridgework.tuning.space import Space, check
from bridgework.tuning.space import with_trials as with_trials
from bridgework.tuning.study import TrialRow, Trials
from bridgework.tuning.trial import (
    JUDGMENT,
    OUTCOME,
    Segment,
    TrialJob,
    remove_checkpoints,
    repeat_names,
    repeated,
    run_trial,
)

# Tune prints progress that is clearer in the sweep's own lines.
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
DRIVER_CPUS = 0.1  # of a trial that only drives a Ray Train run
TUNE = "tune"  # prefix of the folders of Ray Tune, which hold nothing that is needed later

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Result of a sweep: rows, best first; the best trial's command, weights and version."""

    rows: tuple[TrialRow, ...]
    command: str
    artifact: Path
    metrics: dict[str, float]
    version: Version | None
    not_challenger: str = ""  # the reason why the alias `challenger` did not move to `version`
    front: tuple[str, ...] = ()  # trials of the Pareto front, for several objectives
    verdict: str = ""  # the winner compared with the runner-up
    report: Path | None = None  # HTML page
    # of each trial's scores, by its name; None where the evaluation keeps no rows
    intervals: Mapping[str, tuple[Interval | None, ...]] = field(default_factory=dict)


def sweep(
    space: Space,
    *,
    home: Path,
    run: str,
    changes: Mapping[str, Any] | None = None,
    more: int = 0,
    warm_start: Sequence[str] = (),
    tracker: Tracker | Callable[[], Tracker | None] | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run `space` with `changes` in every trial, and register the best trial's last stage.

    The same call resumes an interrupted sweep: finished trials are not run again, and unfinished
    ones continue from their checkpoints. more: trials in addition to those that `run` has already.
    warm_start: earlier sweeps of the same system, whose trials the first proposals know. tracker: or
    a function that opens it, which is called after the checks.

    The new version becomes `challenger` if it is better than the holder of the alias. Raises
    SpecError for a path, a stage or a metric that does not exist, RunError if no trial finished
    with a score or `run` holds another sweep, and Interrupted after Ctrl-C. The runs in the tracker
    then end FAILED or KILLED.
    """
    console = console or Console(stderr=True)
    fixed = {**space.fixed, **(changes or {})}
    space = replace(space, fixed=fixed)
    base = space.base()
    check(space, base)
    check_population(space, base)
    if space.budget.stopper == "pbt" and (more or warm_start):
        raise SpecError(
            f"sweep {space.name}: a population has a fixed size, and its first values are drawn at "
            f"random. Got {'--trials +N' if more else '--warm-start'}. Fix: leave it out"
        )
    if space.prefer:
        Rule.parse(space.prefer, space.metrics)
    folder = run_dir.path_of(home, run)
    with run_dir.locked(folder):
        trials = Trials.open(folder, space, base, run)
        for earlier in warm_start:
            count = trials.warm_start(run_dir.path_of(home, earlier), earlier)
            console.print(f"warm start: {count} trials of {earlier}", highlight=False)
        target = trials.extend(more) if more else trials.size
        if callable(tracker):
            tracker = tracker()
        parent = None
        if tracker is not None:
            tags = {"run_key": run, "system": base.name, "sweep": space.name}
            with suppress(TrackingError):
                parent = tracker.start(run, tags=tags)
        recorder = _Recorder(space, base, run, home, trials, target, tracker, parent, console)
        with recorder.closed():
            if trials.unfinished() or trials.count() < target:
                _search(trials, base, home, run, target, recorder)
            rows = _finished_rows(trials, space, run)
            return _registered(trials, base, rows, home, run, recorder)


def _search(
    trials: Trials, base: System, home: Path, run: str, target: int, recorder: "_Recorder"
) -> None:
    """Run the unfinished and the new trials. Raises Interrupted if a signal stopped them."""
    space, budget, folder = trials.space, trials.space.budget, trials.folder
    for old in folder.glob(f"{TUNE}-*"):
        shutil.rmtree(old, ignore_errors=True)
    with nullcontext() if ray_utils.is_open() else ray_utils.ray_session():
        features = _features(trials, base, home, target, recorder.say)
        # Without the distributions: a worker may not be able to import a function of the space.
        job = TrialJob(replace(space, space={}), home, run, os.getcwd(), features)
        gpus = ray_utils.gpus_each(budget.gpus)
        needs = {"CPU": DRIVER_CPUS} if budget.workers else {"CPU": budget.cpus, "GPU": gpus}
        if not budget.workers:
            ray_utils.wait_for(f"trials of {run}", [needs], say=recorder.say)
        proposer = _Proposer(trials, base, target, recorder)
        tuner = Tuner(
            tune.with_resources(tune.with_parameters(run_trial, job=job), needs),
            tune_config=TuneConfig(
                num_samples=-1,
                search_alg=proposer,
                scheduler=_Scheduler(proposer, recorder),
                # A Ray Train run belongs to the actor that drives it, and ends with it.
                reuse_actors=not budget.workers,
                trial_name_creator=lambda trial: str(trial.config.get("trial", "trial")),
                trial_dirname_creator=lambda trial: str(trial.config.get("trial", "trial")),
            ),
            run_config=RunConfig(
                name=f"{TUNE}-{os.getpid()}-{os.urandom(3).hex()}",
                storage_path=str(folder),
                verbose=0,
                callbacks=[_Callback(proposer, recorder)],
                failure_config=FailureConfig(max_failures=budget.max_failures),
            ),
        )
        with _sigterm_as_sigint(), recorder.bar():
            tuner.fit()
    if proposer.raised is not None:
        raise proposer.raised
    if trials.unfinished() or (trials.count() < target and not proposer.exhausted):
        raise Interrupted(
            f"sweep {run}: stopped after {trials.count() - len(trials.unfinished())} of {target} "
            "trials; the same command resumes"
        )
    for old in folder.glob(f"{TUNE}-*"):
        shutil.rmtree(old, ignore_errors=True)


def _features(
    trials: Trials, base: System, home: Path, target: int, say: Callable[[str], object]
) -> Literal["cached", "computed"]:
    """Decide once for all trials if features of frozen towers are cached, and cache them.

    The decision counts the images that all trials draw, and is kept for a resumed sweep.
    """
    space = trials.space
    stages = [base[name] for name in space.stages if can_cache_features(base[name])]
    if not stages:
        return "computed"
    datasets = {stage.name: _datasets(stage, home) for stage in stages}
    runs = (trials.schedule.population if trials.schedule else target) * space.budget.repeats
    draws = sum(stage.budget.steps * stage.budget.batch for stage in stages) * runs
    stored = trials.noted("features")
    every = {d.manifest.digest: d for found in datasets.values() for d in found}
    pays = feature_cache.pays(list(every.values()), draws)
    chosen: Literal["cached", "computed"] = "cached" if (stored or pays) else "computed"
    if stored is not None:
        chosen = "cached" if stored == "cached" else "computed"
    if chosen == "computed":
        rows = sum(d.manifest.rows for d in every.values())
        say(
            f"features are computed in training: {runs} trials draw {draws:,} images, and caching "
            f"would compute {rows:,}"
        )
    for stage in stages if chosen == "cached" else ():
        try:
            decision = feature_cache.prepare(
                _tower(stage),
                datasets[stage.name],
                draws=num_draws(base, stage) * runs,
                home=home,
                workers=space.budget.concurrent,
                demanded=True,
            )
            say(f"{stage.name}: {decision.why}")
        except BridgeworkError as error:
            if stored == "cached":
                raise
            say(f"{stage.name}: features are computed in training: {error}")
            chosen = "computed"
    trials.note("features", chosen)
    return chosen


def _tower(stage: Stage) -> Any:
    return getattr(stage.model, "vision", None)


def _datasets(stage: Stage, home: Path) -> list[Any]:
    curated = stage.curation and stage.curation.makes
    return [
        open_dataset(resolve(source.dataset, home))
        for source in stage.data.leaves
        if source.dataset != curated
    ]


class _Proposer(Searcher):
    """Gives Tune the unfinished trials, then new ones as soon as they may start."""

    def __init__(self, trials: Trials, base: System, target: int, recorder: "_Recorder") -> None:
        super().__init__()
        self._trials, self._base, self._target = trials, base, target
        self._recorder = recorder
        self._resume = trials.unfinished()
        self._numbers: dict[str, int] = {}  # by Tune's id
        self.exhausted = False
        self.raised: Exception | None = None

    def number(self, trial_id: str) -> int:
        return self._numbers[trial_id]

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's config, None to wait, or FINISHED."""
        if self.raised is not None:
            return Searcher.FINISHED
        try:
            return self._suggest(trial_id)
        except Exception as error:  # Tune would hide it in a log
            self.raised = error
            return Searcher.FINISHED

    def _suggest(self, trial_id: str) -> Any:
        while True:
            if self._resume:
                number = self._resume.pop(0)
                if self._trials.stops(number):  # decided, but not yet recorded
                    self._trials.stop(number)
                    continue
                changes = self._trials.changes(number)
            elif self._trials.count() >= self._target:
                return Searcher.FINISHED
            elif not self._trials.ready():
                return None
            else:
                proposal = self._trials.propose()
                if proposal is None:
                    self.exhausted = True
                    self._recorder.say(
                        f"every configuration of the space was tried: {self._trials.count()} "
                        f"instead of {self._target} trials"
                    )
                    return Searcher.FINISHED
                number, changes = proposal.number, dict(proposal.changes)
            try:
                system = override(self._base, changes)
            except SpecError as error:  # a combination of values that are valid alone
                self._trials.fail(number, str(error))
                self._recorder.ended(number, None)
                continue
            self._numbers[trial_id] = number
            self._recorder.started(number, system)
            config = {"trial": study.name(number), "system": cloudpickle.dumps(system).hex()}
            segment = self._segment(number)
            return config if segment is None else {**config, "segment": asdict(segment)}

    def _segment(self, number: int) -> Segment | None:
        """Return the part of the stage that a trial of a population trains."""
        schedule, origin = self._trials.schedule, self._trials.origin(number)
        if schedule is None:
            return None
        source = f"{self._recorder.run}/{origin.trial}@{origin.step}" if origin else ""
        judgment = schedule.generation(number) + 1
        return Segment(source, schedule.end(number), judgment, schedule.is_last(number))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None: ...

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, because the study is the state."""

    def restore(self, checkpoint_path: str) -> None: ...

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Scheduler(FIFOScheduler):
    """Records every report in the study, and stops the trials that the study's rule stops."""

    def __init__(self, proposer: _Proposer, recorder: "_Recorder") -> None:
        init: Any = super().__init__  # untyped in Ray
        init()
        self._proposer, self._recorder = proposer, recorder

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        number = self._proposer.number(trial.trial_id)
        try:
            stop = self._recorder.reported(number, result)
        except Exception as error:
            self._proposer.raised, stop = error, True
        return TrialScheduler.STOP if stop else TrialScheduler.CONTINUE

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Callback(Callback):
    """Records the end of trials."""

    def __init__(self, proposer: _Proposer, recorder: "_Recorder") -> None:
        self._proposer, self._recorder = proposer, recorder

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def on_trial_recover(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        number = self._proposer.number(trial.trial_id)
        self._recorder.say(f"trial {study.name(number)}: starts again after {_reason(trial)}")

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._ended(trial, "it ended without a result")

    def on_trial_error(
        self, iteration: int, trials: list[Trial], trial: Trial, **info: Any
    ) -> None:
        self._ended(trial, _reason(trial))

    def _ended(self, trial: Trial, failure: str) -> None:
        try:
            number = self._proposer.number(trial.trial_id)
            self._recorder.release_workers(number)
            self._recorder.ended(number, failure)
        except Exception as error:  # raised after the sweep, because Tune would wrap it
            self._proposer.raised = self._proposer.raised or error


def _reason(trial: Trial) -> str:
    """Return the last line of a trial's error: Ray puts tracebacks before it."""
    error = trial.get_error()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = lines[-1] if lines else type(error).__name__
    return re.sub(r"^(bridgework\.errors\.)", "", line)[:400]


class _Recorder:
    """Writes the course of a sweep to the study, the tracker and the console."""

    def __init__(
        self,
        space: Space,
        base: System,
        run: str,
        home: Path,
        trials: Trials,
        target: int,
        tracker: Tracker | None,
        parent: str | None,
        console: Console,
    ) -> None:
        self.space, self._base, self.run, self._home = space, base, run, home
        self._trials, self._target = trials, target
        self.tracker, self.parent, self.console = tracker, parent, console
        self._runs: dict[int, str] = {}
        self.logged: dict[str, dict[str, StageResult]] = {}  # by the name of a trial's run
        self._systems: dict[int, System] = {}
        self._since: dict[int, float] = {}
        self._best: float | None = None  # score of any report so far
        self._bar: Progress | None = None
        self._began, self._before = time.monotonic(), 0

    @property
    def resources(self) -> tuple[float, float]:
        """Return the CPUs and GPUs of a trial, as requested."""
        budget = self.space.budget
        workers = max(1, budget.workers)
        return budget.cpus if not budget.workers else float(workers), (budget.gpus or 0) * workers

    def log_report(self, folder: Path) -> None:
        """Log the page and the figures with the sweep's run."""
        parent = self.parent
        if parent is not None:
            for file in sorted(folder.iterdir()):
                self._call_tracker(partial(_log_file, parent, file))

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self) -> Iterator[None]:
        """Show the state of the sweep in a terminal during the block."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
        )
        self._before = sum(row.status != "running" for row in self._trials.rows())
        self._began = time.monotonic()
        with Progress(
            *columns, console=self.console, disable=not self.console.is_terminal
        ) as self._bar:
            self._bar.add_task(self.run, total=self._target, state="starting")
            self._refresh()
            yield
        self._bar = None

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Finish the sweep's run and open trials after the block: FAILED or KILLED if it raised."""
        try:
            yield
        except BaseException as error:
            failed = isinstance(error, Exception) and not isinstance(error, Interrupted)
            self._close("FAILED" if failed else "KILLED")
            raise
        self._close("FINISHED")

    def started(self, number: int, system: System) -> None:
        """Open the trial's run, with its commit and datasets: a losing trial saw them too."""
        self._systems[number], self._since[number] = system, time.monotonic()
        ray_metrics.add("bridgework_sweep_trials", sweep=self.run, event="started")
        name = f"{self.run}/{study.name(number)}"
        tags = {
            "run_key": name,
            "run": name,
            "sweep": self.space.name,
            "system": system.name,
            "fingerprint": system.fingerprint(),
            **environment.tags(),
        }
        if (origin := self._trials.origin(number)) is not None:
            stage = self.space.stages[-1]
            tags["forked_from"] = f"{self.run}/{origin.trial}/{stage}@{origin.step}"
            tags["values"] = "perturbed" if origin.copied else "kept"
        changes = self._trials.changes(number)

        def open_run(tracker: Tracker) -> None:
            self._runs[number] = tracker.start(name, parent=self.parent, tags=tags)
            tracker.params(self._runs[number], {**flat(system), **changes}, resumed=True)
            tracker.inputs(self._runs[number], _inputs(system, self.space, self._home))

        self._call_tracker(open_run)
        self._refresh()

    def reported(self, number: int, result: Mapping[str, Any]) -> bool:
        """Record a report; returns True if the trial is to be stopped."""
        if self._ended(number):
            return False
        self._spend(number)
        if OUTCOME in result:
            self._finish(number, json.loads(result[OUTCOME]))
            return False
        name = self.space.metric.name
        if name not in result:
            return False
        value, judgment, step = float(result[name]), int(result[JUDGMENT]), int(result["step"])
        self._points(number, {name: value}, step)
        self._export(number, value)
        stop = self._trials.report(number, judgment, value)
        if not self.console.is_terminal:
            self.say(f"trial {study.name(number)}: {name} {value:.3f} at step {step}")
        if stop:
            self._trials.stop(number)
        return stop

    def _export(self, number: int, score: float) -> None:
        """Export a trial's score and the best one to Prometheus."""
        better = max if self.space.metric.mode == "max" else min
        self._best = score if self._best is None else better(self._best, score)
        labels = {"sweep": self.run, "metric": self.space.metric.name}
        trial = study.name(number)
        ray_metrics.set_value("bridgework_sweep_score", score, trial=trial, **labels)
        ray_metrics.set_value("bridgework_sweep_best", self._best, **labels)

    def _finish(self, number: int, outcome: Mapping[str, Any]) -> None:
        if "failed" in outcome:
            self._trials.fail(number, str(outcome["failed"]))
            return
        repeats = outcome["repeats"]
        values = [
            sum(metrics[metric.name] for metrics in repeats) / len(repeats)
            for metric in self.space.metrics
        ]
        self._trials.finish(number, values, repeats)
        means = {m.name: v for m, v in zip(self.space.metrics, values, strict=True)}
        self._points(number, means, self._systems[number][self.space.stages[-1]].budget.steps)
        self._export(number, values[0])

    def ended(self, number: int, failure: str | None) -> None:
        """Record the end of a trial; failure: the reason, if it has reported none itself."""
        if not self._ended(number):
            self._spend(number)
            self._trials.fail(number, failure or "it ended without a result")
        row = next(row for row in self._trials.rows() if row.trial == study.name(number))
        score = "" if row.score is None else f", {self.space.metric.name} {row.score:.4g}"
        reason = f": {row.reason}" if row.reason else ""
        self.say(f"trial {row.trial} {row.status}{score}{reason}; {self._state()}")
        for ended in self._trials.disposable(number):
            for name in repeat_names(study.name(ended), self.space.budget.repeats):
                remove_checkpoints(self._trials.folder / name)
        ray_metrics.add("bridgework_sweep_trials", sweep=self.run, event=row.status)
        if row.finished:
            self._log_finished(number, row)
        if number in self._runs:
            status: Status = "FAILED" if row.status == "failed" else "FINISHED"
            self._call_tracker(partial(_end_run, self._runs.pop(number), status, row))
        self._refresh()

    def release_workers(self, number: int) -> None:
        """Free the workers of a trial in threads, because Tune kills its process after this."""
        if not self.space.budget.workers:
            return
        for name in repeat_names(study.name(number), self.space.budget.repeats):
            for stage in self.space.stages:
                folder = self._trials.folder / name / stage
                threading.Thread(target=release, args=(folder,), daemon=True).start()

    def _log_finished(self, number: int, row: TrialRow) -> None:
        """Log datasets, images and weights of the stages: all are finished, none is trained."""
        if self.tracker is None or number not in self._systems:
            return
        for repeat, name in enumerate(repeat_names(row.trial, self.space.budget.repeats)):
            try:
                self.log_run(repeated(self._systems[number], self.space.stages, repeat), name)
            except BridgeworkError as error:
                self.say(f"trial {name} is not logged: {error}")

    def log_run(self, system: System, name: str) -> dict[str, StageResult]:
        """Log a finished run of a trial: all its stages are finished, so none is trained."""
        self.logged[name] = train(
            system,
            home=self._home,
            run=f"{self.run}/{name}",
            options=RunOptions(workers=0),
            stages=self.space.stages,
            tracker=self.tracker,
            parent_run=self.parent,
            console=Console(quiet=True),
        )
        return self.logged[name]

    def _points(self, number: int, values: Mapping[str, float], step: int) -> None:
        if number in self._runs:
            at = int(time.time() * 1000)
            points = [Point(key, value, step, at) for key, value in values.items()]
            self._call_tracker(lambda tracker: tracker.points(self._runs[number], points))

    def _ended(self, number: int) -> bool:
        return number not in self._trials.unfinished()

    def _spend(self, number: int) -> None:
        now = time.monotonic()
        since = self._since.get(number, now)
        self._trials.spend(number, now - since)
        self._since[number] = now

    def _state(self) -> str:
        """Return e.g. `3 finished, 1 stopped of 8, best heldout.loss 2.1 (002), 4 min left`."""
        rows = self._trials.rows()
        counts = Counter(row.status for row in rows)
        parts = ", ".join(
            f"{counts[s]} {s}"
            for s in ("finished", "stopped", "paused", "failed", "running")
            if counts[s]
        )
        text = f"{parts or 'none'} of {self._target}"
        best = ranked(rows, self.space.metrics, self.space.prefer)[0] if rows else None
        if best is not None and best.finished:
            text += f", best {self.space.metric.name} {best.score:.4g} ({best.trial})"
        done = sum(row.status != "running" for row in rows) - self._before
        left = self._target - self._before - done
        if done > 0 and left > 0:
            seconds = (time.monotonic() - self._began) / done * left
            text += f", about {max(1, round(seconds / 60))} min left"
        return text

    def _refresh(self) -> None:
        if self._bar is not None:
            rows = self._trials.rows()
            done = sum(row.status != "running" for row in rows)
            self._bar.update(self._bar.task_ids[0], completed=done, state=self._state())

    def _close(self, status: Status) -> None:
        for run_id in (*self._runs.values(), *filter(None, [self.parent])):
            self._call_tracker(partial(_end_run, run_id, status, None))
        self._runs.clear()

    def _call_tracker(self, call: Callable[[Tracker], object]) -> None:
        """Call the tracker; after its first failure the sweep continues without it."""
        if self.tracker is None:
            return
        try:
            call(self.tracker)
        except TrackingError as error:
            self.tracker = None
            self.say(f"{error}; the sweep continues, and its trials are not tracked")


def _log_file(run_id: str, file: Path, tracker: Tracker) -> None:
    tracker.file(run_id, file, "report")


def _end_run(run_id: str, status: Status, row: TrialRow | None, tracker: Tracker) -> None:
    if row is not None and row.reason:
        tracker.params(run_id, {"failed": row.reason[:400]}, resumed=True)
    tracker.finish(run_id, status)


def _inputs(system: System, space: Space, home: Path) -> list[DatasetInput]:
    """Return the datasets of all stages of a trial."""
    return [
        DatasetInput(source.name, d.manifest.digest, d.path, d.manifest.rows)
        for name in space.stages
        for stage in [system[name]]
        for source in stage.data.leaves
        if not (stage.curation and stage.curation.makes == source.dataset)
        for d in [open_dataset(resolve(source.dataset, home))]
    ]


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Let Tune end the trials after SIGTERM as after Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _finished_rows(trials: Trials, space: Space, run: str) -> list[TrialRow]:
    """Return the rows of all trials, best first.

    Raises RunError, with the reasons, if no trial finished with a score.
    """
    rows = ranked(trials.rows(), space.metrics, space.prefer)
    if not rows or not rows[0].finished:
        raise RunError(
            f"sweep {run}: none of {len(rows)} trials finished with a {space.metric.name}. "
            f"Got {'; '.join(failures(rows)) or 'only stopped trials'}"
        )
    return rows


def failures(rows: Sequence[TrialRow]) -> list[str]:
    """Return the reasons of the failed trials, each once with its trials."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        if row.status == "failed":
            by_reason.setdefault(row.reason, []).append(row.trial)
    return [f"{', '.join(sorted(names))}: {reason}" for reason, names in by_reason.items()]


def _registered(
    trials: Trials, base: System, rows: list[TrialRow], home: Path, run: str, recorder: _Recorder
) -> Outcome:
    """Return the outcome, and register the best trial's last stage if a tracker answers."""
    space, best = trials.space, rows[0]
    system = override(base, best.changes)
    results = recorder.logged.get(best.trial) or recorder.log_run(system, best.trial)
    winner = results[space.stages[-1]]
    cached = any(can_cache_features(base[name]) for name in space.stages)
    features = trials.noted("features") if cached else None
    command = command_of(space, best.changes, features)
    if best.origin is not None:
        command = commands_of(space, rows, run, features)
    version, why = None, ""
    try:
        if recorder.tracker is not None and winner.run_id is not None:
            tags = {"command": command, "sweep": run}
            version = registry.register(recorder.tracker, base.name, winner, tags)
            _, why = registry.challenge(recorder.tracker, version, space.metric.name, home)
            version = recorder.tracker.version(base.name, version.version)
    except TrackingError as error:
        recorder.say(f"{error}; the winner is not registered yet: the same command later does it")
    optimal = front(rows, space.metrics) if len(space.metrics) > 1 else []
    compared = verdict(rows, space.metric, trials.folder, space.stages[-1])
    cpus, gpus = recorder.resources
    notes = {"command": command, "verdict": compared, "prefer": space.prefer}
    trials.note("outcome", {**notes, "cpus": cpus, "gpus": gpus, "space": space.name})
    page = report.write(report.load(home, run))
    recorder.log_report(page.parent)
    return Outcome(
        tuple(rows),
        command,
        winner.artifact,
        winner.metrics,
        version,
        why,
        tuple(row.trial for row in optimal),
        compared,
        page,
        {
            row.trial: score_intervals(row, space.metrics, trials.folder, space.stages[-1])
            for row in rows
        },
    )


def command_of(space: Space, changes: Mapping[str, Any], features: str | None) -> str:
    """Return the command that trains a trial again, with the same bits."""
    args = ["bridgework", "train", space.system, *(["--tiny"] if space.tiny else [])]
    args += [w for s in space.stages for w in ("--stage", s)]
    for path, value in {**space.fixed, **changes}.items():
        args += ["--set", f"{path}={value}"]
    args += ["--workers", str(space.budget.workers)]
    args += ["--threads", str(max(1, round(space.budget.cpus)))]
    if features is not None:
        args += ["--features", features]
    return shlex.join(args)


def commands_of(space: Space, rows: Sequence[TrialRow], run: str, features: str | None) -> str:
    """Return the commands that train the best trial of a population again, joined by `&&`.

    rows: best first. Each command trains until the values change, and the next one is its fork.
    """
    by_name, row = {row.trial: row for row in rows}, rows[0]
    legs: list[tuple[Mapping[str, Any], int | None]] = [(row.changes, None)]
    while row.origin is not None:
        before = by_name[row.origin.trial]
        if row.origin.copied:
            legs.insert(0, (before.changes, row.origin.step))
        row = before
    commands, source = list[str](), ""
    for number, (changes, until) in enumerate(legs, 1):
        name = f"{run}-again-{number}"
        words = [command_of(space, changes, features), "--run", shlex.quote(name)]
        words += ["--fork", shlex.quote(source)] if source else []
        words += ["--until", str(until)] if until is not None else []
        commands.append(" ".join(words))
        source = f"{name}@{until}"
    return " && ".join(commands)
