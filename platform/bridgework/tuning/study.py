"""Trials of a sweep: an Optuna study in the sweep's folder is the record of everything tried.

The values of trial n, and the decision to stop it, are pure functions of the space, the seed and
the trials up to number n - `concurrent`, which have all ended before n starts. Timing, the number
of nodes and interruptions therefore change nothing. `optuna-dashboard` opens the study.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    SuccessiveHalvingPruner,
)
from optuna.samplers import BaseSampler, GPSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, TrialState, create_trial
from sqlalchemy import URL

from bridgework import storage
from bridgework.config import to_dict
from bridgework.errors import RunError, SpecError, suggest
from bridgework.rng import derive
from bridgework.system import System
from bridgework.tuning.population import Explorer, Origin, Schedule, choose_origin
from bridgework.tuning.space import Space

FILE = "study.db"
STARTUP = 6  # random trials before a sampler learns
POPULATION = 10  # of NSGA-II
REDRAWS = 20  # tries for values that no earlier trial had
INFEASIBLE = {"failed": 1.0}  # constraints of a trial: samplers avoid its values
OPTIONS = ("trials", "cpus", "gpus", "workers", "max_failures")  # they change no trial
STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
}

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True)
class TrialRow:
    """One trial of a sweep: a row of its table."""

    trial: str
    changes: Mapping[str, Any]
    score: float | None  # mean over the repeats of the first metric; None: it has none
    status: str  # finished | stopped | paused (a population's, before its end) | failed | running
    seconds: float
    scores: tuple[float, ...] = ()  # one for each objective; () unless it finished
    repeats: tuple[Mapping[str, float], ...] = ()  # metrics of each repeat
    curve: Mapping[int, float] = field(default_factory=dict)  # judgment -> first metric
    reason: str = ""  # of a failed trial, one line
    origin: Origin | None = None  # of a trial that continues another one

    @property
    def finished(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True)
class Proposal:
    """The next trial to start: its number and its overrides."""

    number: int
    changes: Mapping[str, Any]


class Trials:
    """The study of one sweep."""

    def __init__(
        self, folder: Path, space: Space, run: str, schedule: Schedule | None = None
    ) -> None:
        """schedule: of a population; None: the trials are independent."""
        self.folder, self.space, self.schedule = folder, space, schedule
        self._storage = optuna.storages.RDBStorage(url_of(folder))
        self._study = optuna.create_study(
            study_name=run,
            storage=self._storage,
            sampler=RandomSampler(seed=0),  # the trials are drawn in `propose`
            directions=_directions(space),
            load_if_exists=True,
        )

    @classmethod
    def open(cls, folder: Path, space: Space, base: System, run: str) -> "Trials":
        """Open the study in `folder`, or create it.

        Raises RunError if it holds another sweep, SpecError for a folder in a store: the study is a
        database file.
        """
        if not storage.is_local(folder):
            raise SpecError(
                f"{folder}: a sweep keeps its study in a database file. Got a store; expected a "
                "folder. Fix: set BRIDGEWORK_HOME to a folder of the head for sweeps; datasets and "
                "artifacts may be URLs"
            )
        if (folder / "sweep.json").exists() and not (folder / FILE).exists():
            raise RunError(
                f"{folder} holds a sweep of an earlier version, without a study to resume. "
                "Fix: give another --run"
            )
        now = json.loads(json.dumps(identity(space, base)))
        if (folder / FILE).exists():
            stored = optuna.load_study(study_name=run, storage=url_of(folder)).user_attrs.get(
                "identity"
            )
            if stored is not None:
                _same(folder, stored, now)
        trials = cls(folder, space, run, Schedule.of(space, base))
        trials._study.set_user_attr("identity", now)
        trials._study.set_user_attr("metrics", [metric.name for metric in space.metrics])
        return trials

    @property
    def study(self) -> optuna.Study:
        """Return the study itself, for figures and importances."""
        return self._study

    def note(self, key: str, value: Any) -> None:
        self._study.set_user_attr(key, value)

    def noted(self, key: str) -> Any:
        return self._study.user_attrs.get(key)

    @property
    def size(self) -> int:
        """Number of trials that the space asks for."""
        return self.space.budget.trials if self.schedule is None else self.schedule.total

    def count(self) -> int:
        """Return the number of trials of this sweep, without those of earlier sweeps."""
        return sum(not is_warm(trial) for trial in self._all())

    def extend(self, more: int) -> int:
        """Return the number of trials after `more` new ones; an interrupted extension is resumed."""
        target = int(self.noted("target") or 0)
        if target <= self.count() and not self.unfinished():
            target = self.count() + more
            self.note("target", target)
        return target

    def unfinished(self) -> list[int]:
        """Return the numbers of the trials that an interruption left open."""
        return [t.number for t in self._all() if t.state == TrialState.RUNNING]

    def changes(self, number: int) -> dict[str, Any]:
        """Return the overrides of a trial."""
        return self.space.draw(FixedTrial(self._all()[number].params))

    def origin(self, number: int) -> Origin | None:
        """Return the checkpoint that a trial of a population starts from; None for the first."""
        return _origin(self._all()[number])

    def disposable(self, number: int) -> list[int]:
        """Return the trials whose checkpoints no trial needs, now that this one has ended."""
        if self.schedule is None:
            return [number]
        first = self.schedule.generation(number) * self.schedule.population
        end = first + self.schedule.population
        ended = [trial.state.is_finished() for trial in self._all()[first:end]]
        if len(ended) < self.schedule.population or not all(ended):
            return []
        return list(range(end if self.schedule.is_last(number) else first))

    def ready(self) -> bool:
        """Return True if all trials that the next one may depend on have ended."""
        trials = self._all()
        if self.schedule is not None:
            ended = [trial.state.is_finished() for trial in trials]
            generation = self.schedule.generation(len(trials)) * self.schedule.population
            return all(ended[:generation]) and ended.count(False) < self.space.budget.concurrent
        known = trials[: max(0, len(trials) - self.space.budget.concurrent + 1)]
        return all(t.state.is_finished() for t in known)

    def propose(self) -> Proposal | None:
        """Draw and record the next trial; None if every configuration was tried.

        Raises RunError if a population has no trial left to continue.
        """
        trials, number = self._all(), len(self._all())
        if self.schedule is not None and self.schedule.generation(number):
            return self._propose_fork(trials, number, self.schedule)
        own = [trial.params for trial in trials if not is_warm(trial)]
        frozen = None
        for attempt in range(REDRAWS):
            seed = derive(self.space.budget.seed, number, attempt) % 2**32
            view = self._view(trials, number, seed)
            self.space.draw(view.ask())
            frozen = view.get_trials()[-1]
            if frozen.params not in own:
                break
        else:
            endless = self.schedule is not None or self.space.combinations() is None
            frozen = self._untried(own) or (frozen if endless else None)
        if frozen is None:
            return None
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=frozen.params,
                distributions=frozen.distributions,
                system_attrs=frozen.system_attrs,
            )
        )
        return Proposal(number, self.changes(number))

    def _propose_fork(
        self, trials: Sequence[FrozenTrial], number: int, schedule: Schedule
    ) -> Proposal:
        """Record the trial that continues one of the generation before it."""
        scores = {}
        for before in schedule.before(number):
            value = trials[before].intermediate_values.get(schedule.generation(number), math.nan)
            if trials[before].state == TrialState.PRUNED and math.isfinite(value):
                scores[before] = value
        if not scores:
            reasons = {str(trials[n].user_attrs.get("reason", "")) for n in schedule.before(number)}
            raise RunError(
                f"{self.folder.name}: every trial of judgment {schedule.generation(number)} "
                f"failed, so none can be continued. Got {'; '.join(filter(None, reasons))}"
            )
        seed, higher = self.space.budget.seed, self.space.metric.mode == "max"
        parent, copied = choose_origin(number, schedule, scores, higher=higher, seed=seed)
        params, distributions = trials[parent].params, trials[parent].distributions
        if copied:
            view = self._view([], number, derive(seed, number) % 2**32)
            fresh = view.ask()
            explorer = Explorer(params, fresh, derive(seed, number, 1))
            self.space.draw(explorer)
            params, distributions = explorer.params, fresh.distributions
        origin = Origin(name(parent), schedule.end(parent), copied)
        self._study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=distributions,
                user_attrs={"origin": asdict(origin)},
            )
        )
        return Proposal(number, self.changes(number))

    def _untried(self, own: Sequence[Mapping[str, Any]]) -> FrozenTrial | None:
        """Return the first configuration of a small space that no trial had."""
        for probe in self.space.combinations() or []:
            if probe.params not in own:
                return create_trial(
                    state=TrialState.RUNNING,
                    params=probe.params,
                    distributions=probe.distributions,
                )
        return None

    def report(self, number: int, judgment: int, value: float) -> bool:
        """Record a value of the first metric; returns True if the trial is to be stopped."""
        trial_id = self._all()[number]._trial_id
        self._storage.set_trial_intermediate_value(trial_id, judgment, value)
        return self.stops(number)

    def stops(self, number: int) -> bool:
        """Decide by the recorded values of a trial if it is to be stopped."""
        trial, trials = self._all()[number], self._all()
        if self.schedule is not None:
            judged = self.schedule.generation(number) + 1 in trial.intermediate_values
            return judged and not self.schedule.is_last(number)
        pruner = _pruner(self.space)
        known: dict[int, float] = {}
        decision, rungs = False, dict[str, Any]()
        for judgment, value in sorted(trial.intermediate_values.items()):
            known[judgment] = value
            if judgment >= self.space.budget.judgments:
                break  # it has finished
            view = self._view(trials, number, seed=0, current={**known}, rungs=rungs)
            decision = pruner.prune(view, view.get_trials(deepcopy=False)[-1])
            rungs = view.get_trials()[-1].system_attrs
            if decision:
                break
        for key, value in rungs.items():
            self._storage.set_trial_system_attr(trial._trial_id, key, value)
        return decision

    def finish(
        self, number: int, values: Sequence[float], repeats: Sequence[Mapping[str, float]]
    ) -> None:
        """Record the objectives of a finished trial, and the metrics of each of its repeats."""
        trial_id = self._all()[number]._trial_id
        self._storage.set_trial_user_attr(trial_id, "repeats", [dict(r) for r in repeats])
        self.stops(number)  # records the rungs that later trials compare with
        self._study.tell(number, values=list(values))

    def stop(self, number: int) -> None:
        if self.schedule is not None:
            trial_id = self._all()[number]._trial_id
            self._storage.set_trial_user_attr(trial_id, "paused", True)
        self._study.tell(number, state=TrialState.PRUNED)

    def fail(self, number: int, reason: str) -> None:
        """Record that a trial failed. It has no score, and its values are not drawn again."""
        trial_id = self._all()[number]._trial_id
        self._storage.set_trial_user_attr(trial_id, "reason", reason)
        self._study.tell(number, state=TrialState.FAIL)

    def spend(self, number: int, seconds: float) -> None:
        """Add seconds to the time that a trial took."""
        trial = self._all()[number]
        total = float(trial.user_attrs.get("seconds", 0.0)) + seconds
        self._storage.set_trial_user_attr(trial._trial_id, "seconds", total)

    def warm_start(self, folder: Path, run: str) -> int:
        """Add the finished trials of another sweep as knowledge; returns their number.

        They are never run again and never win. Raises RunError if there is no such sweep, or if
        its trials are not comparable.
        """
        if not (folder / FILE).exists():
            known = [p.parent.name for p in folder.parent.glob(f"*/{FILE}")]
            raise RunError(f"--warm-start: there is no sweep {run!r}{suggest(run, known)}")
        other = optuna.load_study(study_name=run, storage=url_of(folder))
        mine, theirs = self.noted("identity"), other.user_attrs.get("identity", {})
        differs = [
            name for name in ("system", "metrics", "evaluations") if mine[name] != theirs.get(name)
        ]
        if differs:
            raise RunError(
                f"--warm-start {run}: its trials are not comparable, because its "
                f"{', '.join(differs)} differ. Fix: leave it out"
            )
        if self._all():
            return 0  # this sweep has started, with or without it
        added = 0
        for trial in other.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if is_warm(trial) or not self._fits(trial):
                continue
            self._study.add_trial(
                create_trial(
                    values=trial.values,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs={"from": f"{run}/{name(trial.number)}"},
                )
            )
            added += 1
        return added

    def _fits(self, trial: FrozenTrial) -> bool:
        """Return True if this space could have drawn the trial."""
        own = {p: d for probe in self.space.explore() for p, d in probe.distributions.items()}
        return all(
            path in own
            and type(own[path]) is type(trial.distributions[path])
            and own[path]._contains(own[path].to_internal_repr(value))
            for path, value in trial.params.items()
        )

    def rows(self) -> list[TrialRow]:
        """Return the trials of this sweep in the order of their numbers."""
        return [
            row_of(trial, self.space.draw(FixedTrial(trial.params)))
            for trial in self._all()
            if not is_warm(trial)
        ]

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _view(
        self,
        trials: Sequence[FrozenTrial],
        number: int,
        seed: int,
        *,
        current: Mapping[int, float] | None = None,
        rungs: Mapping[str, Any] | None = None,
    ) -> optuna.Study:
        """Return a study in memory of all that trial `number` may know.

        current: the values so far of the trial itself, which is then the last one of the study.
        """
        view = optuna.create_study(
            study_name=self._study.study_name,
            sampler=_sampler(self.space, seed),
            pruner=NopPruner(),
            directions=_directions(self.space),
        )
        for trial in trials[:number]:
            known = trial.number <= number - self.space.budget.concurrent or is_warm(trial)
            view.add_trial(_as_known(trial) if known else _as_running(trial))
        if current is not None:
            view.add_trial(
                create_trial(
                    state=TrialState.RUNNING,
                    params=trials[number].params,
                    distributions=trials[number].distributions,
                    intermediate_values=dict(current),
                    system_attrs=dict(rungs or {}),
                )
            )
        return view


def url_of(folder: Path) -> str:
    """Return the URL of the study in a sweep's folder, for Optuna and optuna-dashboard."""
    return URL.create("sqlite", database=str(folder / FILE)).render_as_string()


def row_of(trial: FrozenTrial, changes: Mapping[str, Any]) -> TrialRow:
    """Return the row of a trial with these overrides."""
    values = tuple(trial.values or ()) if trial.state == TrialState.COMPLETE else ()
    curve = dict(sorted(trial.intermediate_values.items()))
    last = list(curve.values())[-1] if curve else None
    score = values[0] if values else last
    return TrialRow(
        trial=name(trial.number),
        changes=changes,
        score=score if score is not None and math.isfinite(score) else None,
        status="paused" if trial.user_attrs.get("paused") else STATES[trial.state],
        seconds=float(trial.user_attrs.get("seconds", 0.0)),
        scores=values,
        repeats=tuple(trial.user_attrs.get("repeats", ())),
        curve=curve,
        reason=str(trial.user_attrs.get("reason", "")),
        origin=_origin(trial),
    )


def _origin(trial: FrozenTrial) -> Origin | None:
    stored = trial.user_attrs.get("origin")
    return None if stored is None else Origin(**stored)


def name(number: int) -> str:
    """Return the name of a trial: its folder in the sweep's."""
    return f"{number:03d}"


def identity(space: Space, base: System) -> dict[str, Any]:
    """Return all settings that determine the trials and the best one; JSON-ready."""
    budget = {k: v for k, v in to_dict(space.budget).items() if k not in OPTIONS}
    last = base[space.stages[-1]]
    judges = {metric.name.split(".")[0] for metric in space.metrics}
    return {
        "recipe": base.identity(),
        "system": base.name,
        "stages": list(space.stages),
        "space": space.described(),
        "metrics": [to_dict(metric) for metric in space.metrics],
        "evaluations": [to_dict(spec) for spec in last.evals if spec.name in judges],
        "budget": budget,
    }


def _same(folder: Path, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if differs := [key for key in now if stored.get(key) != now[key]]:
        raise RunError(
            f"{folder} holds another sweep: its {', '.join(differs)} differ. "
            "Fix: give another --run"
        )


def is_warm(trial: FrozenTrial) -> bool:
    return "from" in trial.user_attrs


def _as_known(trial: FrozenTrial) -> FrozenTrial:
    """Return a copy of an ended trial; a failed one is marked as not feasible.

    Samplers ignore failed trials, and would draw the same values again.
    """
    failed = trial.state == TrialState.FAIL
    state = TrialState.PRUNED if failed else trial.state
    return create_trial(
        state=state,
        values=trial.values if state == TrialState.COMPLETE else None,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=dict(trial.intermediate_values),
        system_attrs=dict(trial.system_attrs),  # Optuna adds the constraints to it
        constraints=INFEASIBLE if failed else None,
    )


def _as_running(trial: FrozenTrial) -> FrozenTrial:
    return create_trial(
        state=TrialState.RUNNING,
        params=trial.params,
        distributions=trial.distributions,
        system_attrs={
            key: value
            for key, value in trial.system_attrs.items()
            if not key.startswith("completed_rung")
        },
    )


def _directions(space: Space) -> list[StudyDirection]:
    ways = {"max": StudyDirection.MAXIMIZE, "min": StudyDirection.MINIMIZE}
    return [ways[metric.mode] for metric in space.metrics]


def _sampler(space: Space, seed: int) -> BaseSampler:
    if space.budget.stopper == "pbt":  # the first values are drawn at random, as in the paper
        return RandomSampler(seed=seed)
    match space.budget.sampler:
        case "gp":
            return GPSampler(seed=seed, n_startup_trials=STARTUP, warn_independent_sampling=False)
        case "nsga2":
            return NSGAIISampler(seed=seed, population_size=POPULATION)
        case "random":
            return RandomSampler(seed=seed)
    return TPESampler(seed=seed, n_startup_trials=STARTUP)


def _pruner(space: Space) -> BasePruner:
    """Return the rule that stops trials; several objectives have none."""
    budget = space.budget
    if len(space.metrics) > 1:
        return NopPruner()
    match budget.stopper:
        case "asha":
            return SuccessiveHalvingPruner(min_resource=1, reduction_factor=budget.reduction)
        case "median":
            return MedianPruner(n_startup_trials=STARTUP)
        case "hyperband":
            return HyperbandPruner(
                min_resource=1, max_resource=budget.judgments, reduction_factor=budget.reduction
            )
    return NopPruner()
