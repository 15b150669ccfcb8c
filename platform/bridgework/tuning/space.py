"""What a sweep searches: a module of tune_spaces/ with SYSTEM, STAGES, SPACE, METRIC, BUDGET.

SPACE maps the dotted paths of `--set` to Ray Tune's distributions; `*` sets a path in every stage alike.
"""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from bridgework.errors import SpecError, suggest
from bridgework.spec import spec


@spec
class Metric:
    """The figure of an evaluation that decides, as `bridgework eval` names it."""

    name: str
    mode: Literal["max", "min"]


@spec
class SweepBudget:
    """How much a sweep may try. A trial is judged `judgements` times; ASHA stops the worse half early."""

    trials: int = 8
    concurrent: int = 2
    cpus: float = 1.0  # of each trial
    judgements: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("trials", "concurrent", "judgements"):
            if getattr(self, name) < 1:
                raise SpecError(f"a sweep needs {name} of at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Space:
    """A sweep as its module says it; `fixed` are overrides that every trial shares."""

    name: str
    system: str
    stages: tuple[str, ...]
    space: Mapping[str, Any]
    metric: Metric
    budget: SweepBudget
    fixed: Mapping[str, Any]


def spaces() -> list[str]:
    """The spaces that ship: the modules of tune_spaces."""
    try:
        package = import_module("tune_spaces")
    except ModuleNotFoundError:
        return []
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__))


def load(name: str) -> Space:
    """`llava_bridge`, or a module of your own with the same five names: `my_lab.spaces.x`."""
    path = name if "." in name else f"tune_spaces.{name}"
    try:
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise
        raise SpecError(
            f"there is no sweep {name!r} (run this where tune_spaces/ lies)" + suggest(name, spaces())
        ) from None
    missing = [n for n in ("SYSTEM", "STAGES", "SPACE", "METRIC", "BUDGET") if not hasattr(module, n)]
    if missing:
        raise SpecError(f"{path} does not say {', '.join(missing)}; see tune_spaces/llava_bridge.py for the five names")
    return Space(
        name=name,
        system=module.SYSTEM,
        stages=tuple(module.STAGES),
        space=dict(module.SPACE),
        metric=module.METRIC,
        budget=module.BUDGET,
        fixed=dict(getattr(module, "FIXED", {})),
    )
