"""Search spaces of sweeps: modules of tune_spaces/ with SYSTEM, STAGES, SPACE, METRIC, BUDGET.

SPACE maps the dotted paths of `--set` to Ray Tune's distributions; `*` sets a path in every stage
alike. A nested mapping is a choice with paths of its own: {"..bridge": {"linear": {}, "mlp":
{"..bridge.depth": tune.choice([2, 3])}}}. SPACE may also be a function of an Optuna trial, which
calls `trial.suggest_float` and its relatives with dotted paths.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from ray.tune.search.sample import Categorical, Float, Integer, LogUniform, Normal, Quantized

from bridgework.config import added, config_class, override
from bridgework.errors import SpecError, suggest
from bridgework.plugins import Plugins
from bridgework.system import EvalSpec, Stage, System
from bridgework.system import load as load_system
from bridgework.training.estimate import key as model_key
from bridgework.training.estimate import parameter_counts

SPACES = Plugins(
    kind="sweep",
    package="tune_spaces",
    attributes=("SYSTEM", "STAGES", "SPACE", "METRIC", "BUDGET"),
    example="my_lab.spaces.x",
    hint="tune_spaces/llava_bridge.py for the five names",
)
COSTS = {  # objectives that no evaluation returns; lower is better
    "cost.tokens": "positions of an image in the language model",
    "cost.parameters": "trainable parameters of the last stage",
    "cost.latency_ms": "time per row of the first metric's evaluation, median of three runs",
}
INSIDE = (math.sqrt(5) - 1) / 2  # place of the value between both ends that a field must accept
MOST_COMBINATIONS = 10_000  # a space with more counts as endless

Trial = Any  # an optuna.Trial, or anything with its suggest_ methods
Suggest = Callable[[Trial], Mapping[str, Any] | None]


@config_class
class Metric:
    """A metric that a sweep optimizes: as `bridgework eval` names it, or one of COSTS."""

    name: str
    mode: Literal["max", "min"]

    def __post_init__(self) -> None:
        if self.mode not in ("max", "min"):
            raise SpecError(
                f"METRIC {self.name}: invalid mode. Got {self.mode!r}; expected 'max' or 'min'"
            )

    @property
    def cost(self) -> bool:
        return self.name in COSTS

    def better(self, one: float, other: float) -> bool:
        return one > other if self.mode == "max" else one < other


@config_class
class SweepBudget:
    """Budget of a sweep, and the resources of each trial.

    A trial is evaluated `judgments` times. Its values, and the decision to stop it, depend on the
    trials that are at least `concurrent` numbers older, all of which have ended. The sweep is
    therefore the same for any number of nodes, any timing and after any interruption.
    """

    trials: int = 8
    concurrent: int = 2  # trials at the same time, at most; fewer if the cluster has less
    cpus: float = 1.0  # of a trial in one process
    gpus: float | None = None  # of a trial or of each worker; None: 1 if the cluster can have GPUs
    workers: int = 0  # Ray Train workers of a trial; 0 trains in the trial's own process
    repeats: int = 1  # runs of a configuration with different seeds; their mean is the score
    judgments: int = 3
    seed: int = 0
    sampler: Literal["tpe", "gp", "nsga2", "random"] = "tpe"
    # asha: successive halving (Li et al. 2020, arXiv:1810.05934); several objectives: none.
    # pbt: population based training, which replaces values and weights at each judgment
    stopper: Literal["asha", "median", "hyperband", "pbt", "none"] = "asha"
    reduction: int = 2  # asha and hyperband continue with the best 1/reduction of the trials
    max_failures: int = 3  # restarts of a trial after a failure of the machine
    # members of the population of pbt, instead of `trials`; each is a trial between two judgments
    population: int = added(default=8)

    def __post_init__(self) -> None:
        for name in ("trials", "concurrent", "judgments", "repeats"):
            if getattr(self, name) < 1:
                raise SpecError(f"a sweep needs {name} of at least 1, got {getattr(self, name)}")
        for name, low in (
            ("workers", 0),
            ("max_failures", 0),
            ("reduction", 2),
            ("population", 2),
        ):
            if getattr(self, name) < low:
                raise SpecError(
                    f"BUDGET.{name} is too small. Got {getattr(self, name)}; "
                    f"expected at least {low}"
                )
        if not 0 < self.cpus < math.inf:
            raise SpecError(f"BUDGET.cpus is out of range. Got {self.cpus}; expected above 0")
        if self.gpus is not None and not 0 <= self.gpus < math.inf:
            raise SpecError(f"BUDGET.gpus is out of range. Got {self.gpus}; expected at least 0")
        for name, allowed in (
            ("sampler", ("tpe", "gp", "nsga2", "random")),
            ("stopper", ("asha", "median", "hyperband", "pbt", "none")),
        ):
            if (value := getattr(self, name)) not in allowed:
                raise SpecError(
                    f"BUDGET.{name} is unknown. Got {value!r}{suggest(str(value), allowed)}"
                )


@dataclass(frozen=True)
class Space:
    """A sweep as its module defines it; `fixed` are overrides that every trial shares."""

    name: str
    system: str
    stages: tuple[str, ...]
    space: Mapping[str, Any] | Suggest
    metrics: tuple[Metric, ...]
    budget: SweepBudget
    fixed: Mapping[str, Any]
    prefer: str = ""  # rule that chooses among the best trials of several objectives
    tiny: bool = False  # sweep the system at laptop size
    evals: tuple[EvalSpec, ...] = ()  # of the last stage, instead of the recipe's

    def base(self) -> System:
        """Return the system that every trial changes."""
        system = load_system(self.system)
        system = system.tiny() if self.tiny else system
        if self.evals and self.stages:
            last = replace(system[self.stages[-1]], evals=self.evals)
            stages = tuple(last if stage.name == last.name else stage for stage in system.stages)
            system = replace(system, stages=stages)
        return override(system, self.fixed)

    @property
    def metric(self) -> Metric:
        """Return the first objective, by which trials are stopped and registered."""
        return self.metrics[0]

    def draw(self, trial: Trial) -> dict[str, Any]:
        """Return the overrides of a trial, by the values that `trial` suggests."""
        if not callable(self.space):
            return _draw(self.space, trial)
        captured = _Captured(trial)
        returned = self.space(captured)
        return {**captured.values, **(returned or {})}

    def explore(self) -> "list[Probe]":
        """Draw with every choice, and both ends and the inside of every range, one at a time.

        Returns the probes. Raises SpecError for a space that cannot be searched.
        """
        found: list[Probe] = []
        known: set[str] = set()
        queue: list[dict[str, Any]] = [{}]
        while queue:
            probe = self._probe(queue.pop(0))
            found.append(probe)
            for path, distribution in probe.distributions.items():
                if path not in known:
                    known.add(path)
                    rest = _alternatives(distribution)[1:]
                    queue += [{**probe.forced, path: value} for value in rest]
        if not known:
            raise SpecError(f"sweep {self.name}: SPACE is empty. Fix: give at least one path")
        return found

    def combinations(self) -> "list[Probe] | None":
        """Return the probes of all different configurations; None if there are too many."""
        found: list[Probe] = []
        queue: list[dict[str, Any]] = [{}]
        while queue:
            probe = self._probe(queue.pop())
            free = next((p for p in probe.distributions if p not in probe.forced), None)
            if free is None:
                found.append(probe)
                if len(found) > MOST_COMBINATIONS:
                    return None
                continue
            values = _all_values(probe.distributions[free])
            if values is None or len(values) > MOST_COMBINATIONS:
                return None
            queue += [{**probe.forced, free: value} for value in reversed(values)]
        return found

    def described(self) -> dict[str, Any]:
        """Return JSON that identifies the space: its distributions and its conditions."""
        probes = self.explore()
        return {
            "distributions": {
                path: distribution_to_json(distribution)
                for probe in probes
                for path, distribution in probe.distributions.items()
            },
            "conditions": [
                {path: repr(value) for path, value in probe.changes.items()} for probe in probes
            ],
        }

    def paths(self) -> list[str]:
        """Return all paths that a trial may change."""
        return list(dict.fromkeys(path for probe in self.explore() for path in probe.changes))

    def _probe(self, forced: Mapping[str, Any]) -> "Probe":
        probe = Probe(forced)
        try:
            probe.changes = self.draw(probe)
        except SpecError:
            raise
        except Exception as error:
            raise SpecError(
                f"sweep {self.name}: SPACE cannot be searched. Got {type(error).__name__}: "
                f"{' '.join(str(error).split())}. Fix: call trial.suggest_float, suggest_int or "
                "suggest_categorical with dotted paths"
            ) from error
        if not isinstance(probe.changes, dict) or not all(
            isinstance(path, str) for path in probe.changes
        ):
            raise SpecError(
                f"sweep {self.name}: SPACE returns overrides by dotted path. "
                f"Got {probe.changes!r}; expected a dict or None"
            )
        return probe


class Probe:
    """Stand-in of an Optuna trial that suggests `forced` values, else the first value."""

    def __init__(self, forced: Mapping[str, Any]) -> None:
        self.forced = dict(forced)
        self.distributions: dict[str, BaseDistribution] = {}
        self.changes: dict[str, Any] = {}

    @property
    def params(self) -> dict[str, Any]:
        """Return the suggested values by name."""
        return {
            name: self.forced.get(name, _alternatives(distribution)[0])
            for name, distribution in self.distributions.items()
        }

    def suggest_float(
        self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False
    ) -> float:
        return float(self._suggest(name, lambda: FloatDistribution(low, high, log=log, step=step)))

    def suggest_int(
        self, name: str, low: int, high: int, *, step: int = 1, log: bool = False
    ) -> int:
        return int(self._suggest(name, lambda: IntDistribution(low, high, log=log, step=step)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if len({repr(choice) for choice in choices}) < len(choices):
            raise SpecError(f"SPACE[{name!r}] has a choice twice. Got {list(choices)!r}")
        return self._suggest(name, lambda: CategoricalDistribution(choices))

    def _suggest(self, name: str, make: Callable[[], BaseDistribution]) -> Any:
        try:
            distribution = make()
        except (ValueError, TypeError) as error:
            raise SpecError(f"SPACE[{name!r}] is not a range: {error}") from None
        if self.distributions.setdefault(name, distribution) != distribution:
            raise SpecError(f"SPACE suggests {name!r} twice, with different distributions")
        return self.forced.get(name, _alternatives(distribution)[0])


class _Captured:
    """An Optuna trial that remembers the suggested values."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self.values: dict[str, Any] = {}

    def suggest_float(self, name: str, low: float, high: float, **kwargs: Any) -> Any:
        return self._keep(name, self._trial.suggest_float(name, low, high, **kwargs))

    def suggest_int(self, name: str, low: int, high: int, **kwargs: Any) -> Any:
        return self._keep(name, self._trial.suggest_int(name, low, high, **kwargs))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._keep(name, self._trial.suggest_categorical(name, choices))

    def _keep(self, name: str, value: Any) -> Any:
        self.values[name] = value
        return value


def check(space: Space, base: System) -> None:
    """Raise SpecError, before anything is trained, for every mistake that a trial would meet."""
    _check_stages(space, base)
    _check_metrics(space, base)
    probes = space.explore()
    paths = list(dict.fromkeys(path for probe in probes for path in probe.changes))
    _check_paths(space, base, paths)
    combinations = space.combinations()
    if combinations is not None and len(combinations) == 1:
        raise SpecError(
            f"sweep {space.name}: SPACE has no free parameter, so all trials would be equal. "
            "Fix: give a range or several choices, or use `bridgework train`"
        )
    counted: set[str] = set()
    for probe in probes:
        changed = override(base, probe.changes)
        for stage in (changed[name] for name in space.stages):
            if model_key(stage) not in counted:
                counted.add(model_key(stage))
                _check_model(space, stage, probe.changes)


def _check_model(space: Space, stage: Stage, changes: Mapping[str, Any]) -> None:
    """Raise SpecError if the stage's model cannot be built with these overrides."""
    try:
        parameter_counts(stage)
    except Exception as error:
        given = ", ".join(f"{path}={value}" for path, value in changes.items())
        raise SpecError(
            f"sweep {space.name}: the model of stage {stage.name} cannot be built with {given}. "
            f"Got {' '.join(str(error).split()) or type(error).__name__}"
        ) from error


def _check_stages(space: Space, base: System) -> None:
    if not space.stages:
        names = [stage.name for stage in base.stages]
        raise SpecError(f"sweep {space.name}: STAGES is empty{suggest('', names)}")
    for name in space.stages:
        base[name]
    order = [stage.name for stage in base.stages if stage.name in space.stages]
    if list(space.stages) != order:
        raise SpecError(
            f"sweep {space.name}: STAGES is not in the order of the system. "
            f"Got {', '.join(space.stages)}; expected {', '.join(order)}"
        )
    for place, name in enumerate(space.stages):
        start = base[name].starts_from
        if start is not None and "/" not in start and start not in space.stages[:place]:
            raise SpecError(
                f"sweep {space.name}: stage {name} starts from {start}, which STAGES does not "
                f"train. Fix: add {start!r} to STAGES, or set stages.{name}.starts_from to the "
                "folder of an artifact in FIXED"
            )


def _check_metrics(space: Space, base: System) -> None:
    if not space.metrics:
        raise SpecError(f"sweep {space.name}: METRIC is empty. Fix: give at least one Metric")
    last = base[space.stages[-1]]
    ways = {f"{spec.name}.{key}": way for spec in last.evals for key, way in spec.better.items()}
    decisive = [name for name, way in ways.items() if way is not None]
    for metric in space.metrics:
        if metric.cost:
            way: str | None = "lower"
        elif metric.name not in decisive:
            baseline = (
                "is a baseline, which cannot rank trials,"
                if metric.name in ways
                else "is not a metric of any evaluation"
            )
            raise SpecError(
                f"sweep {space.name}: METRIC {metric.name!r} {baseline} of stage {last.name}"
                + (
                    suggest(metric.name, [*decisive, *COSTS])
                    if decisive
                    else ". Fix: add evaluations to the stage's evals in the recipe"
                )
            )
        else:
            way = ways[metric.name]
        if metric.mode != {"higher": "max", "lower": "min"}[str(way)]:
            raise SpecError(
                f"sweep {space.name}: METRIC has mode {metric.mode!r}, and "
                f"{way} {metric.name} is better. Fix: take the other mode"
            )
    if space.metric.cost:
        raise SpecError(
            f"sweep {space.name}: the first METRIC is a cost. Got {space.metric.name}; expected a "
            f"metric of an evaluation{suggest(space.metric.name, decisive)}"
        )
    if len({metric.name for metric in space.metrics}) < len(space.metrics):
        raise SpecError(f"sweep {space.name}: METRIC names an objective twice")


def _check_paths(space: Space, base: System, paths: Sequence[str]) -> None:
    for path in paths:
        parts = path.split(".")
        if parts[0] != "stages" or len(parts) < 3:
            raise SpecError(
                f"sweep {space.name}: SPACE[{path!r}] is not a field of a stage. "
                "Fix: write stages.STAGE.FIELD or stages.*.FIELD"
            )
        if parts[1] != "*" and parts[1] not in space.stages:
            raise SpecError(
                f"sweep {space.name}: SPACE[{path!r}] changes a stage that no trial trains"
                + suggest(parts[1], space.stages)
            )
        for other in space.fixed:
            if _same_path(path, other):
                raise SpecError(
                    f"sweep {space.name}: {path} is searched and fixed at the same time. "
                    f"Got {other}={space.fixed[other]}. Fix: leave it out of FIXED and --set"
                )


def _same_path(one: str, other: str) -> bool:
    """Return True if two dotted paths, which may hold `*`, name a field in common."""
    parts = one.split("."), other.split(".")
    return len(parts[0]) == len(parts[1]) and all(
        a == b or "*" in (a, b) for a, b in zip(*parts, strict=True)
    )


# --- distributions -----------------------------------------------------------------------------


def _draw(space: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for path, item in space.items():
        if isinstance(item, Mapping) and "grid_search" not in item:
            if not item or not all(isinstance(inner, Mapping) for inner in item.values()):
                raise _unsearchable(path, item)
            changes[path] = chosen = trial.suggest_categorical(path, list(item))
            changes |= _draw(item[chosen], trial)
        else:
            changes[path] = _suggest(path, item, trial)
    return changes


def _suggest(path: str, item: Any, trial: Trial) -> Any:
    """Draw a value of a distribution of Ray Tune.

    Raises SpecError for grids, functions, normal distributions and plain values, because Optuna
    cannot search them.
    """
    if isinstance(item, Categorical):
        return _suggest_choice(path, list(item.categories), trial)
    if not isinstance(item, Float | Integer):
        raise _unsearchable(path, item)
    sampler, step = cast(Any, item).get_sampler(), None
    if isinstance(sampler, Quantized):
        sampler, step = cast(Any, sampler).sampler, cast(Any, sampler).q
    log = isinstance(sampler, LogUniform)
    if isinstance(sampler, Normal) or (log and step is not None):
        raise _unsearchable(path, item)
    low, high = item.lower, item.upper
    if isinstance(item, Integer):
        # Without a step the upper end is exclusive, as in Python's range.
        last = int(high) if step else int(high) - 1
        return trial.suggest_int(path, int(low), last, step=int(step or 1), log=log)
    return trial.suggest_float(path, float(low), float(high), step=step, log=log)


def _suggest_choice(path: str, choices: list[Any], trial: Trial) -> Any:
    if all(isinstance(c, str | int | float | None) for c in choices):
        return trial.suggest_categorical(path, choices)
    names = {repr(choice): choice for choice in choices}  # a study stores plain values
    return names[trial.suggest_categorical(path, [repr(choice) for choice in choices])]


def _unsearchable(path: str, item: Any) -> SpecError:
    return SpecError(
        f"SPACE[{path!r}] cannot be searched. Got {item!r}; expected tune.choice, uniform, "
        "loguniform, randint, lograndint, quniform, qrandint or a mapping from choices to their "
        "own paths. Fix: write a grid as tune.choice([...]), a constant into FIXED"
    )


def _alternatives(distribution: BaseDistribution) -> list[Any]:
    """Return the values that a field must accept: all choices, or the ends and one inside."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        raise SpecError(f"SPACE holds a distribution that cannot be searched: {distribution}")
    low, high = distribution.low, distribution.high
    if low == high:
        return [low]
    if isinstance(distribution, FloatDistribution) and distribution.step is None:
        if distribution.log:
            return [low, high, low * (high / low) ** INSIDE]
        return [low, high, low + (high - low) * INSIDE]
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return list(dict.fromkeys([low, high, low + distribution.step]))
    return [low, high]


def _all_values(distribution: BaseDistribution) -> list[Any] | None:
    """Return all values, None for a continuous range."""
    if isinstance(distribution, CategoricalDistribution):
        return list(distribution.choices)
    if isinstance(distribution, IntDistribution):
        return list(_steps(distribution.low, distribution.high, distribution.step))
    if isinstance(distribution, FloatDistribution) and distribution.step is not None:
        return list(_steps(distribution.low, distribution.high, distribution.step))
    low, high = (getattr(distribution, name, 0.0) for name in ("low", "high"))
    return [low] if low == high else None


def _steps(low: float, high: float, step: float) -> Iterator[float]:
    count = min(round((high - low) / step), MOST_COMBINATIONS)
    return (low + number * step for number in range(count + 1))


# --- modules -----------------------------------------------------------------------------------


def spaces() -> list[str]:
    """Return the names of the spaces in tune_spaces/ of the working directory."""
    return SPACES.names()


def load(name: str) -> Space:
    """Return a space: `llava_bridge`, or a module of your own with the same five names.

    FIXED, PREFER, TINY and EVALS are optional. Raises SpecError if there is no such module, if its import
    fails, for a missing name, and for a value of another type.
    """
    module = SPACES.load(name)
    metrics = module.METRIC if isinstance(module.METRIC, tuple | list) else (module.METRIC,)
    stages = module.STAGES
    for what, value, fits, expected in (
        ("SYSTEM", module.SYSTEM, isinstance(module.SYSTEM, str), "the name of a system"),
        ("STAGES", stages, isinstance(stages, tuple | list), "a tuple of names"),
        (
            "SPACE",
            module.SPACE,
            callable(module.SPACE) or isinstance(module.SPACE, Mapping),
            "a mapping from paths to distributions, or a function of a trial",
        ),
        ("METRIC", metrics, all(isinstance(m, Metric) for m in metrics), "a Metric or several"),
        ("BUDGET", module.BUDGET, isinstance(module.BUDGET, SweepBudget), "a SweepBudget"),
    ):
        if not fits:
            raise SpecError(f"sweep {name}: {what} is invalid. Got {value!r}; expected {expected}")
    return Space(
        name=name,
        system=module.SYSTEM,
        stages=tuple(stages),
        space=module.SPACE if callable(module.SPACE) else dict(module.SPACE),
        metrics=tuple(metrics),
        budget=module.BUDGET,
        fixed=dict(getattr(module, "FIXED", {})),
        prefer=getattr(module, "PREFER", ""),
        tiny=bool(getattr(module, "TINY", False)),
        evals=tuple(getattr(module, "EVALS", ())),
    )


def with_trials(space: Space, *, trials: int | None) -> Space:
    """Return the space with another number of trials; None keeps it.

    Raises SpecError for a population, whose size is a part of its identity.
    """
    if trials is not None and space.budget.stopper == "pbt":
        raise SpecError(
            f"--trials: sweep {space.name} is a population of {space.budget.population}. "
            "Fix: leave it out, or change BUDGET.population and give another --run"
        )
    return space if trials is None else replace(space, budget=replace(space.budget, trials=trials))
