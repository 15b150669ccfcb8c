"""Population based training: trials exchange weights and values while they train.

All members of a population train to the same step. The worst quarter then continues from the
checkpoints of the best quarter, with perturbed values, and the others continue as they are
(truncation selection; Jaderberg et al. 2017, arXiv:1711.09846, 3.3 and 4.1).

A trial of the study is one member between two such steps. Trial n belongs to generation
n // population. It is a fork of a trial of the generation before: of its own predecessor, or of a
better trial. Its values and its origin depend on the seed and on the scores of that generation
alone, all of which has ended before. Timing and interruptions therefore change nothing. (Ray Tune's
PopulationBasedTraining decides by the order in which results arrive, draws from a global generator,
and keeps its state in a process that a kill ends.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from bridgework.config import override
from bridgework.errors import SpecError
from bridgework.rng import derive
from bridgework.system import System
from bridgework.training.fork import misfits
from bridgework.tuning.space import Space

QUANTILE = 0.25  # share of the population that is replaced, and that replaces
DOWN, UP = 0.8, 1.2  # factors of a value on a logarithmic scale (4.1)
SHIFT = 0.2  # of a value on a linear scale, in widths of its range
RESAMPLE = 0.25  # probability that a value is drawn again, and not perturbed
MAY_CHANGE = ("optim", "data", "losses")  # fields of a stage that a population may search


@dataclass(frozen=True)
class Origin:
    """Checkpoint that a trial of a population starts from."""

    trial: str  # name of the trial that wrote it
    step: int
    copied: bool  # True: of a better trial, with perturbed values; False: its own predecessor's


@dataclass(frozen=True)
class Schedule:
    """Generations of a population: the steps of the last stage at which they end."""

    population: int
    ends: tuple[int, ...]

    @classmethod
    def of(cls, space: Space, base: System) -> Self | None:
        """Return the schedule of a space; None unless it is searched by a population."""
        budget = space.budget
        if budget.stopper != "pbt":
            return None
        steps = base[space.stages[-1]].budget.steps
        every = math.ceil(steps / budget.judgments)
        ends = [min(steps, every * n) for n in range(1, math.ceil(steps / every) + 1)]
        return cls(budget.population, tuple(ends))

    @property
    def total(self) -> int:
        """Number of trials of all generations."""
        return self.population * len(self.ends)

    def generation(self, number: int) -> int:
        """Return the generation of a trial, from 0."""
        return number // self.population

    def is_last(self, number: int) -> bool:
        return self.generation(number) == len(self.ends) - 1

    def end(self, number: int) -> int:
        """Return the step at which a trial ends."""
        return self.ends[self.generation(number)]

    def before(self, number: int) -> range:
        """Return the numbers of the generation before that of a trial; none for the first."""
        first = (self.generation(number) - 1) * self.population
        return range(max(0, first), first + self.population)


def choose_origin(
    number: int, schedule: Schedule, scores: Mapping[int, float], *, higher: bool, seed: int
) -> tuple[int, bool]:
    """Return the number of the trial that `number` is a fork of, and True if it is not its own.

    scores: finite ones of the generation before, by number; a failed trial has none. higher: True
    if higher scores are better.
    """
    own, quarter = number - schedule.population, max(1, int(schedule.population * QUANTILE))
    best_first = sorted(scores, key=lambda n: (-scores[n] if higher else scores[n], n))
    failed = [n for n in schedule.before(number) if n not in scores]
    worst = {*failed, *[*best_first, *failed][-quarter:]}
    best = best_first[:quarter]
    if own not in worst or own in best:
        return own, False
    draw = np.random.default_rng(derive(seed, number))
    return best[int(draw.integers(len(best)))], True


class Explorer:
    """Trial that suggests values near those of a parent.

    fresh: an Optuna trial with a random sampler, for values that are drawn again.
    """

    def __init__(self, parent: Mapping[str, Any], fresh: Any, seed: int) -> None:
        self.params: dict[str, Any] = {}
        self._parent, self._fresh = parent, fresh
        self._draw = np.random.default_rng(seed)

    def suggest_float(self, name: str, low: float, high: float, **options: Any) -> Any:
        return self._near(name, self._fresh.suggest_float(name, low, high, **options))

    def suggest_int(self, name: str, low: int, high: int, **options: Any) -> Any:
        return self._near(name, self._fresh.suggest_int(name, low, high, **options))

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return self._near(name, self._fresh.suggest_categorical(name, choices))

    def _near(self, name: str, fresh: Any) -> Any:
        if name not in self.params:
            up, again = bool(self._draw.random() < 0.5), self._draw.random() < RESAMPLE
            known = name in self._parent and not again
            distribution = self._fresh.distributions[name]
            self.params[name] = perturb(self._parent[name], distribution, up=up) if known else fresh
        return self.params[name]


def perturb(value: Any, distribution: BaseDistribution, *, up: bool) -> Any:
    """Return a value next to `value`, in the given direction, or in the other one at a bound.

    On a logarithmic scale it is a factor, on a linear one a fifth of the range. Of choices, it is
    the neighbor.
    """
    moved = _moved(value, distribution, up)
    return _moved(value, distribution, not up) if moved == value else moved


def _moved(value: Any, distribution: BaseDistribution, up: bool) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        place = distribution.choices.index(value) + (1 if up else -1)
        return distribution.choices[min(len(distribution.choices) - 1, max(0, place))]
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    sign = 1 if up else -1
    shift = value * ((UP if up else DOWN) - 1) if distribution.log else sign * SHIFT * (high - low)
    new = value + shift
    if step is not None:
        count, before = round((new - low) / step), round((value - low) / step)
        new = low + step * (count if count != before else before + sign)
    new = min(high, max(low, new))
    return int(new) if isinstance(distribution, IntDistribution) else float(new)


def check_population(space: Space, base: System) -> None:
    """Raise SpecError for a space that a population cannot search."""
    schedule, last, where = Schedule.of(space, base), space.stages[-1], f"sweep {space.name}"
    if schedule is None:
        return
    if len(space.metrics) > 1:
        raise SpecError(
            f"{where}: a population is selected by one METRIC. Got {len(space.metrics)}. "
            "Fix: give one, or another BUDGET.stopper"
        )
    if space.budget.repeats > 1:
        raise SpecError(
            f"{where}: a population trains each trial once. Got BUDGET.repeats "
            f"{space.budget.repeats}; expected 1. Fix: repeat the winner's command with other seeds"
        )
    if len(schedule.ends) < 2:
        raise SpecError(
            f"{where}: a population is selected between two judgments. Got BUDGET.judgments "
            f"{space.budget.judgments} in {schedule.ends[-1]} steps; expected at least 2"
        )
    for path in space.paths():
        _, stage, field, *_ = path.split(".")
        if stage != last and (stage != "*" or len(space.stages) > 1):
            raise SpecError(
                f"{where}: SPACE[{path!r}] changes a stage that is finished before the first "
                f"judgment. Got {stage}; expected {last}. "
                "Fix: put it into FIXED, or take another BUDGET.stopper"
            )
        if field not in MAY_CHANGE:
            raise SpecError(
                f"{where}: SPACE[{path!r}] cannot change in mid-run, as a population does. "
                f"Got {field}; expected a field of {', '.join(MAY_CHANGE)}, e.g. optim.peak_lr, "
                "data.alpha or data.sources.NAME.factor. "
                "Fix: put it into FIXED, or take another BUDGET.stopper"
            )
    stages = [override(base, probe.changes)[last] for probe in space.explore()]
    for other in stages[1:]:
        if found := misfits(stages[0], other):
            raise SpecError(
                f"{where}: a checkpoint does not fit after such a change: {found[0]}. "
                "Expected a weight decay of 0 for all values or for none. Fix: change the range"
            )
