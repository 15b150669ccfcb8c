"""What a vision-language system *is*: an ordered tuple of stages, each a value that says everything about it.

A recipe is a module with a function that returns a `System`; `load("llava")` finds it by import path, `override`
changes it by dotted path, `fingerprint` names it. One dotted path is the `--set` word, the key of a sweep and the
parameter in MLflow. This module knows no torch, no Ray and no system by name.
"""

import hashlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, cast

from bridgework.config import FLOAT32_TINY, added, bounded, config_class, option, to_dict
from bridgework.errors import SpecError, suggest
from bridgework.mixture import Group as Group
from bridgework.mixture import Mixture as Mixture
from bridgework.mixture import Packing as Packing
from bridgework.mixture import Source as Source
from bridgework.mixture import unique
from bridgework.plugins import Plugins

# --- what a model tells the data, and the data never asks otherwise --------------------------------------------------

IMAGE = (
    -200
)  # stands in a row of token ids wherever an image token goes (LLaVA's own number); never looked up
END = -201  # ends a chunk of an interleaved document, Flamingo's <EOC>; a wiring that knows it has a row for it
IGNORE = -100  # a label without loss (the default of torch's cross_entropy)


@config_class
class Pixels:
    """How an image becomes the squares that a vision tower reads: part of the digest of cached features."""

    size: int  # pixels, both sides
    fit: Literal["pad", "crop"] = "crop"  # pad to a square of the mean color, or crop the centre
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    grids: tuple[
        tuple[int, int], ...
    ] = ()  # (columns, rows) of tiles beside the base square; () gives that alone
    video: bool = (
        False  # the frames of a video are one image of many squares, and not images of their own
    )


class Layout(NamedTuple):
    """How an image was cut: the base square comes first, then columns x rows tiles, row by row.

    A video is its first frame and one column of the others.
    """

    columns: int  # 0 without tiles
    rows: int
    width: int  # pixels, of the upright image
    height: int


class ModelSpec(Protocol):
    """The config of a wiring: it says what the data must look like, and builds the module."""

    @property
    def pixels(self) -> Pixels: ...
    @property
    def tokenizer(self) -> str: ...  # folder, hub name, `package:` path or "bytes"
    @property
    def context(self) -> int: ...  # tokens the language model takes, images included
    @property
    def image_tokens(
        self,
    ) -> int: ...  # places that a square fills; 0: no places, and every sample has one image
    def places(self, layout: Layout) -> int: ...  # places in the token stream that an image fills
    @property
    def instruction(self) -> str | None: ...  # tokenizer of a second stream: what the user says
    @property
    def pretrained(
        self,
    ) -> tuple[str, ...]: ...  # globs of the tensors that pretrained weights bring back
    @property
    def vision_tokens(
        self,
    ) -> int: ...  # vectors the vision tower makes of a square: what it costs beside the text
    @property
    def packing_refusal(
        self,
    ) -> str | None: ...  # why several samples cannot share a sequence; None where they can
    def unshardable(
        self, requested: frozenset[str]
    ) -> str | None: ...  # why ZeRO 3 cannot split it, for such outputs
    def build(self, *, pretrained: bool = True) -> Any: ...  # torch.nn.Module
    def tiny(self) -> Self: ...


class LossSpec(Protocol):
    """A loss: what each sample adds to a sum, and to what the sum is divided by (see bridgework.losses)."""

    @property
    def requires(self) -> str: ...  # the output of the wiring that it reads
    @property
    def weight(self) -> float: ...
    @property
    def whole_batch(
        self,
    ) -> bool: ...  # compares samples with each other: it must see a worker's share at once
    @property
    def cached_outputs(
        self,
    ) -> tuple[
        str, ...
    ]: ...  # outputs by which it can all the same, in two passes over micro-batches
    @property
    def supports_packing(self) -> bool: ...  # tells samples that share a sequence apart
    # It may have `by_image` (reads which rows show one image) and `options` (arguments of the wiring's forward).
    def __call__(self, outputs: Any) -> Any: ...  # sums_B, float32: what each sample adds
    def count(self, labels_BT: Any) -> Any: ...  # counts_B, float32: what each adds to the divisor


Better = Mapping[
    str, Literal["higher", "lower"] | None
]  # figure -> its better direction; None: a baseline


class EvalSpec(Protocol):
    """An evaluation of a stage's weights (see bridgework.evaluation)."""

    better: ClassVar[Better]  # every figure that `run` returns, without the evaluation's name

    @property
    def name(self) -> str: ...
    @property
    def dataset(self) -> str: ...  # must be there before training starts
    def tiny(self) -> Self: ...
    def run(self, pipeline: Any, home: Path) -> Any: ...  # inference.Pipeline -> evaluation.Result


@config_class
class Scoring:
    """How the candidate answers of a question are scored, by which they are ranked."""

    prior: bool = (
        True  # subtract the log-likelihood given blank images: pointwise mutual information
    )
    per_token: bool = False  # divide by the number of the answer's tokens: length normalization

    def __call__(self, loglik: float, prior: float, tokens: int) -> float:
        """Return the score from nats summed over an answer's tokens, and nats of the same answer without the image."""
        nats = loglik - prior if self.prior else loglik
        return nats / max(1, tokens) if self.per_token else nats


class CurationSpec(Protocol):
    """Makes a dataset between stages, by what earlier ones learned (see bridgework.curation)."""

    @property
    def makes(self) -> str: ...  # the dataset, as the stage's sources name it
    @property
    def uses(self) -> tuple[str, ...]: ...  # the earlier stages whose artifacts it needs
    @property
    def sources(
        self,
    ) -> tuple[str, ...]: ...  # datasets that it reads: they must be there before training starts
    def tiny(self) -> Self: ...
    def run(
        self,
        artifacts: Mapping[str, Path],
        dest: str,
        *,
        home: Path,
        workers: int,
        say: Callable[[str], object],
    ) -> (
        Any
    ): ...  # -> data.manifest.Manifest of `dest`; run again it goes on, or takes what is there


# --- training --------------------------------------------------------------------------------------------------------


@config_class
class Budget:
    """How much a stage trains."""

    steps: int
    batch: int  # samples per optimizer step, summed over all workers
    micro: int = option(default=8)  # samples per forward and worker; more are accumulated

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "micro"):
            if getattr(self, name) < 1:
                raise SpecError(f"budget.{name} must be at least 1, got {getattr(self, name)}")

    def tiny(self) -> "Budget":
        return Budget(steps=8, batch=8, micro=8)


@config_class
class AdamW:
    """AdamW under a linear warm-up and a decay."""

    peak_lr: float
    final_lr: float = 0.0
    warmup: float = 0.03  # share of the steps
    decay: Literal["cosine", "constant", "exponential"] = (
        "cosine"  # from peak_lr to final_lr, or none at all
    )
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient; 0 turns clipping off

    def __post_init__(self) -> None:
        bounded("optim.peak_lr", self.peak_lr, above=0)
        bounded("optim.final_lr", self.final_lr, least=0)
        bounded("optim.weight_decay", self.weight_decay, least=0)
        bounded("optim.eps", self.eps, least=FLOAT32_TINY)  # a gradient of 0 is divided by it
        bounded("optim.clip", self.clip, least=0)
        for number, beta in enumerate(self.betas):
            bounded(f"optim.betas[{number}]", beta, least=0, below=1)
        if self.final_lr > self.peak_lr:
            raise SpecError(
                f"optim.final_lr {self.final_lr:g} is above peak_lr {self.peak_lr:g}; the rate only decays"
            )
        if self.decay == "exponential" and self.final_lr <= 0:
            raise SpecError("optim.final_lr must be above 0: an exponential decay never reaches 0")
        if not 0.0 <= self.warmup < 1.0:
            raise SpecError(f"optim.warmup is a share of the steps in [0, 1), got {self.warmup:g}")


@config_class
class ZeRO:
    """How DeepSpeed shards a stage; `config` overrides its JSON by dotted path."""

    stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    config: Mapping[str, Any] = field(default_factory=dict)


@config_class
class Stage:
    """One model, what of it trains, on what, for how long, judged by what."""

    name: str
    model: ModelSpec
    trains: Mapping[
        str, float
    ]  # glob of parameter names -> multiplier of the learning rate; all else is frozen
    losses: tuple[LossSpec, ...]
    data: Mixture
    budget: Budget
    optim: AdamW
    starts_from: str | None = None  # an earlier stage, or an artifact's folder
    init_params: tuple[str, ...] = (
        "*",
    )  # globs of the tensors taken from there: another wiring may need only some
    zero: ZeRO = ZeRO()
    evals: tuple[EvalSpec, ...] = option(default=())
    seed: int = 0
    curation: CurationSpec | None = (
        None  # makes a dataset from earlier stages' models before this stage starts
    )
    scoring: Scoring = added(
        default=Scoring()
    )  # of candidate answers, for `Pipeline.choose` and `rank`

    def __post_init__(self) -> None:
        if not self.trains:
            raise SpecError(
                f"{self.name}.trains is empty: name at least one glob of parameters, e.g. {{'bridge.*': 1.0}}"
            )
        for glob, multiplier in self.trains.items():
            bounded(f"{self.name}.trains[{glob!r}]", multiplier, least=0)
        for loss in self.losses:
            bounded(f"{self.name}.losses.{type(loss).__name__.lower()}.weight", loss.weight)
        if not self.losses:
            raise SpecError(f"{self.name}.losses is empty: a stage needs at least one loss")
        if self.budget.batch % self.data.lanes:
            raise SpecError(
                f"{self.name}: budget.batch {self.budget.batch} is not a multiple of data.lanes {self.data.lanes}; "
                "every lane gives the same number of samples to a batch"
            )
        unique(f"{self.name}.evals", [e.name for e in self.evals])
        if self.data.by_image and not any(getattr(loss, "by_image", False) for loss in self.losses):
            raise SpecError(
                f"{self.name}.data.by_image is for losses that compare images, and none of "
                f"{', '.join(type(loss).__name__ for loss in self.losses)} does; leave it out"
            )
        if self.data.packing is not None:
            self._check_packing()
        datasets = [source.dataset for source in self.data.leaves]
        if self.curation is not None and self.curation.makes not in datasets:
            raise SpecError(
                f"{self.name}.curation makes {self.curation.makes!r}, which none of the stage's sources reads"
                + suggest(self.curation.makes, datasets)
            )

    def _check_packing(self) -> None:
        alone = [type(loss).__name__ for loss in self.losses if not loss.supports_packing]
        why = self.model.packing_refusal or (
            f"{alone[0]} reads a sequence as one sample" if alone else None
        )
        if why is not None:
            raise SpecError(
                f"{self.name}.data.packing: {why}; set stages.{self.name}.data.packing=none"
            )
        packing = self.data.packing
        if packing is not None and (packing.tokens or 0) > self.model.context:
            raise SpecError(
                f"{self.name}.data.packing.tokens is {packing.tokens}, and the language model takes "
                f"{self.model.context}; pack at most as many"
            )

    def tiny(self) -> "Stage":
        kind = (
            "preferences"
            if any(loss.requires == "preference" for loss in self.losses)
            else "shapes"
        )
        curation = None if self.curation is None else self.curation.tiny()
        return replace(
            self,
            model=self.model.tiny(),
            data=self.data.tiny(kind, made=None if curation is None else curation.makes),
            curation=curation,
            budget=self.budget.tiny(),
            zero=replace(self.zero, precision="fp32"),
            evals=tuple(e.tiny() for e in self.evals),
        )


@config_class
class System:
    """Stages in the order in which they run."""

    name: str
    paper: str = option()
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        unique(f"{self.name}.stages", [s.name for s in self.stages])
        seen: list[str] = []
        for stage in self.stages:
            start = stage.starts_from
            if start is not None and "/" not in start and start not in seen:
                raise SpecError(
                    f"{self.name}.{stage.name} starts from {start!r}, which is neither an earlier stage nor a path"
                    + suggest(start, seen)
                )
            for name in () if stage.curation is None else stage.curation.uses:
                if name not in seen:
                    raise SpecError(
                        f"{self.name}.{stage.name}.curation uses {name!r}, which is no earlier stage"
                        + suggest(name, seen)
                    )
            seen.append(stage.name)

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [s.name for s in self.stages]
        raise SpecError(f"{self.name} has no stage {name!r}" + suggest(name, names))

    def tiny(self) -> "System":
        """The same program on a laptop: every choice that bears on a shape stays, sizes and budgets shrink.

        Its name ends in `-tiny`, so that its models are never registered next to those of the real system.
        """
        name = self.name.removesuffix("-tiny") + "-tiny"
        return replace(self, name=name, stages=tuple(s.tiny() for s in self.stages))

    def fingerprint(self) -> str:
        """12 hex digits that name the recipe: equal on every machine, different when any field differs."""
        return fingerprint(to_dict(self))

    def identity(self) -> str:
        """12 hex digits that name what is learned: options, such as `budget.micro`, do not change them."""
        return fingerprint(to_dict(self, options=False))


def fingerprint(recipe: Any) -> str:
    """12 hex digits of a recipe that is JSON-ready."""
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:12]


# --- names -----------------------------------------------------------------------------------------------------------


RECIPES = Plugins(kind="system", package="bridgework.recipes", example="my_lab.recipes.x")


def recipes() -> list[str]:
    """Return the names of the systems that ship: the modules of bridgework.recipes."""
    return RECIPES.names()


def variants(name: str) -> list[str]:
    """Return the functions of a recipe that return a System: `system` is the default."""
    return [n for n, _ in _recipe_functions(RECIPES.load(name))]


def load(name: str) -> System:
    """Return a system: `llava`, `llava:v1`, or of a module of your own, `my_lab.recipes.x` or `my_lab.recipes.x:tiny`.

    Raises SpecError, with a suggestion, for an unknown system or variant, and if its import fails.
    """
    path, _, variant = name.partition(":")
    functions = dict(_recipe_functions(RECIPES.load(path)))
    function = functions.get(variant or "system")
    if function is None:
        raise SpecError(
            f"{path} has no variant {variant or 'system'!r}"
            + suggest(variant or "system", functions)
        )
    return function()


def _recipe_functions(module: types.ModuleType) -> Iterator[tuple[str, Callable[[], System]]]:
    """What a recipe offers: its public functions that need no argument and say that they return a System."""
    for name, value in vars(module).items():
        offered = isinstance(value, types.FunctionType) and not inspect.signature(value).parameters
        if (
            offered
            and not name.startswith("_")
            and typing.get_type_hints(value).get("return") is System
        ):
            yield name, cast(Callable[[], System], value)
