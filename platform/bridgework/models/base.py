"""What of a model trains: globs over the names of its parameters. All else is frozen and stays in eval mode.

What the wirings of pairs have in common: each text has one image beside it, and no place for it inside.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, Self

from torch import nn

from bridgework.errors import SpecError, suggest
from bridgework.system import Layout, Pixels


class VLMModule(nn.Module):
    """A wiring: its frozen parts stay in eval mode, whoever calls `train()` on it or on what holds it."""

    provides: frozenset[str]  # what a forward can be asked for
    remedy: ClassVar = "take another loss"  # where it is asked for something else
    limits: ClassVar[
        Mapping[str, tuple[float, float]]
    ] = {}  # parameter -> where every optimizer step leaves it

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        set_eval(self)
        return self

    def check(self, requested: frozenset[str]) -> None:
        """Raises SpecError where a forward is asked for what it does not give."""
        if unknown := requested - self.provides:
            given = ", ".join(map(repr, sorted(self.provides)))
            raise SpecError(
                f"this {type(self).__name__} gives {given}, not {sorted(unknown)}: {self.remedy}"
            )

    def after_step(self) -> None:
        """What the wiring does to state of its own behind every optimizer step: a momentum twin and its queues."""


class Counts(NamedTuple):
    """Numbers of parameters; one that two names share is counted once."""

    trainable: int
    frozen: int


def set_trainable(module: nn.Module, trains: Mapping[str, float]) -> dict[str, float]:
    """Freeze all of `module` but what the globs name; returns {parameter: multiplier of the learning rate}.

    The last glob that matches a name wins, and 0 freezes: {"language.*": 1.0, "language.lm_head.*": 0.0}. A tied
    parameter may be named by either of its names and is returned under the first. Raises SpecError for a glob that
    matches nothing and when nothing trains.
    """
    first = {id(p): name for name, p in module.named_parameters()}
    names = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    chosen: dict[str, float] = {}
    for glob, multiplier in trains.items():
        if multiplier < 0:
            raise SpecError(
                f"trains[{glob!r}] is a multiplier of the learning rate, 0 or more, got {multiplier:g}"
            )
        matched = {first_name for name, first_name in names.items() if fnmatchcase(name, glob)}
        if not matched:
            raise SpecError(f"trains[{glob!r}] matches no parameter" + suggest(glob, _globs(names)))
        chosen |= dict.fromkeys(matched, multiplier)
    learning = {name: chosen[name] for name in first.values() if chosen.get(name)}
    if not learning:
        raise SpecError(f"nothing trains: every glob of {dict(trains)} has the multiplier 0")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in learning)
    set_eval(module)
    return learning


def set_eval(module: nn.Module) -> None:
    """Eval mode for every submodule whose parameters are all frozen: no dropout, no batch statistics."""
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
        else:
            set_eval(child)


def count(module: nn.Module) -> Counts:
    """How many parameters of `module` train and how many do not."""
    sizes = [(p.requires_grad, p.numel()) for p in module.parameters()]
    return Counts(
        sum(n for trains, n in sizes if trains), sum(n for trains, n in sizes if not trains)
    )


def _globs(names: Mapping[str, str]) -> set[str]:
    """The first two levels of the names as globs: what a person who mistyped is likely to have meant."""
    parts = [name.split(".") for name in names]
    return {f"{'.'.join(p[:n])}.*" for p in parts for n in (1, 2) if len(p) > n}


class PairModelConfig:
    """The half of a ModelSpec that is the same for all of them; the spec adds what its text is."""

    vision: Any  # the config of the tower

    @property
    def pixels(self) -> Pixels:
        pixels: Pixels = self.vision.pixels
        return pixels

    @property
    def vision_tokens(self) -> int:
        return int(self.vision.tokens)

    @property
    def image_tokens(self) -> int:
        return 0

    def places(self, layout: Layout) -> int:
        return 0

    @property
    def instruction(self) -> None:
        return None

    def unshardable(self, requested: frozenset[str]) -> str | None:
        return None

    @property
    def packing_refusal(self) -> str:
        return "the wiring reads pairs, each text beside its own image"
