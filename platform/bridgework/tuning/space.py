"""Search spaces of sweeps: modules of tune_spaces/ with SYSTEM, STAGES, SPACE, METRIC, BUDGET.

SPACE maps the dotted paths of `--set` to Ray Tune's distributions; `*` sets a path in every stage
alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ray.tune.search.sample import Categorical, Domain, Float, Integer, Normal, Quantized

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.plugins import Plugins

SPACES = Plugins(
    kind="sweep",
    package="tune_spaces",
    attributes=("SYSTEM", "STAGES", "SPACE", "METRIC", "BUDGET"),
    example="my_lab.spaces.x",
    hint="tune_spaces/llava_bridge.py for the five names",
)


@config_class
class Metric:
    """The metric that a sweep optimizes, as `bridgework eval` names it."""

    name: str
    mode: Literal["max", "min"]


@config_class
class SweepBudget:
    """Budget of a sweep.

    A trial is evaluated `judgments` times; ASHA stops the worse half early.
    """

    trials: int = 8
    concurrent: int = 2
    cpus: float = 1.0  # of each trial
    judgments: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "concurrent", "judgments"):
            if getattr(self, name) < 1:
                raise SpecError(f"a sweep needs {name} of at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Space:
    """A sweep as its module defines it; `fixed` are overrides that every trial shares."""

    name: str
    system: str
    stages: tuple[str, ...]
    space: Mapping[str, Any]
    metric: Metric
    budget: SweepBudget
    fixed: Mapping[str, Any]


def described(distribution: Domain) -> dict[str, Any]:
    """Return JSON that identifies a distribution: choices, or bounds, scale and step of a range."""
    if isinstance(distribution, Categorical):
        return {"choice": [repr(choice) for choice in distribution.categories]}
    numeric, sampler, step = _numeric(distribution)
    scale = type(sampler).__name__.strip("_") + str(getattr(sampler, "base", ""))
    kind = type(distribution).__name__
    return {
        "kind": kind,
        "lower": numeric.lower,
        "upper": numeric.upper,
        "scale": scale,
        "step": step,
    }


def bounds(path: str, distribution: Any) -> list[Any]:
    """Return the values that a field must accept: all choices, or both ends of a range.

    Raises SpecError for grids, functions, normal distributions and plain values, because Optuna
    cannot search them.
    """
    if isinstance(distribution, Categorical):
        return list(distribution.categories)
    if isinstance(distribution, Float | Integer):
        numeric, sampler, step = _numeric(distribution)
        if not isinstance(sampler, Normal):
            exclusive = isinstance(distribution, Integer) and step is None  # as in Python's range
            return [numeric.lower, numeric.upper - exclusive]
    raise SpecError(
        f"SPACE[{path!r}] cannot be searched. Got {distribution!r}; expected tune.choice, uniform, "
        "loguniform, randint, lograndint or their quantized forms. "
        "Fix: write a grid as tune.choice([...]), a constant into FIXED"
    )


def _numeric(distribution: Any) -> tuple[Any, Any, float | None]:
    """Return a range, its sampler, and the step of a quantized one (Ray has no annotations)."""
    sampler = distribution.get_sampler()
    if isinstance(sampler, Quantized):
        return distribution, sampler.sampler, sampler.q
    return distribution, sampler, None


def spaces() -> list[str]:
    """Return the names of the spaces in tune_spaces/ of the working directory."""
    return SPACES.names()


def load(name: str) -> Space:
    """Return a space: `llava_bridge`, or a module of your own with the same five names.

    Raises SpecError if there is no such module, if its import fails, and for a missing name.
    """
    module = SPACES.load(name)
    return Space(
        name=name,
        system=module.SYSTEM,
        stages=tuple(module.STAGES),
        space=dict(module.SPACE),
        metric=module.METRIC,
        budget=module.BUDGET,
        fixed=dict(getattr(module, "FIXED", {})),
    )
