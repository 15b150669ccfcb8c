"""Configuration of a vision-language system: an ordered tuple of stages, each complete in itself.

A recipe is a module with a function that returns a `System`. `load("llava")` finds it by import
path, `override` changes it by dotted path, and `fingerprint` identifies it. One dotted path is the
`--set` argument, the search key of a sweep and the parameter in MLflow. This module imports neither
torch nor Ray, and branches on no system's name.
"""

import hashlib
import inspect
import json
import math
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

# --- the data's view of a model: all that the data code knows of it -----------------------------

# Token id of an image position in a row of ids (LLaVA's number); it is never looked up.
IMAGE = -200
# Token id that ends a chunk of an interleaved document, Flamingo's <EOC>; a wiring that supports it
# has an embedding row for it.
END = -201
# Label of a position without loss: the default `ignore_index` of torch's cross_entropy.
IGNORE = -100


@config_class
class Pixels:
    """Preprocessing from image to vision-tower squares; part of the digest of cached features."""

    size: int  # pixels, both sides
    fit: Literal["pad", "crop"] = "crop"  # pad to a square of the mean color, or center-crop
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # (columns, rows) of the tiles read in addition to the base square; (): the base square alone
    grids: tuple[tuple[int, int], ...] = ()
    video: bool = False  # the frames of a video are one image of many squares, not separate images


class Layout(NamedTuple):
    """Grid of an image's tiles: the base square first, then columns x rows tiles, row by row.

    A video is its first frame and one column of the other frames.
    """

    columns: int  # 0 without tiles
    rows: int
    width: int  # pixels, of the upright image
    height: int


class ModelSpec(Protocol):
    """Config of a wiring: it declares the format of the data and builds the module."""

    @property
    def pixels(self) -> Pixels: ...

    @property
    def tokenizer(self) -> str:
        """Folder, hub name, `package:` path or "bytes"."""

    @property
    def context(self) -> int:
        """Maximum number of tokens of the language model, images included."""

    @property
    def image_tokens(self) -> int:
        """Token positions of a square; 0: no positions, and every sample has one image."""

    def num_image_tokens(self, layout: Layout) -> int:
        """Return the number of positions that an image fills in the token stream."""

    @property
    def instruction(self) -> str | None:
        """Tokenizer of a second stream with the user's text; None without one."""

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs of the tensors that are loaded from pretrained weights."""

    @property
    def vision_tokens(self) -> int:
        """Output vectors of the vision tower per square: its cost in addition to the text."""

    @property
    def packing_refusal(self) -> str | None:
        """Reason why samples cannot share a sequence; None if they can."""

    def unshardable(self, requested: frozenset[str]) -> str | None:
        """Return why ZeRO 3 cannot shard the model for the `requested` outputs; None if it can."""

    def build(self, *, pretrained: bool = True) -> Any:
        """Build the torch.nn.Module."""

    def tiny(self) -> Self: ...


class LossSpec(Protocol):
    """A loss: each sample's summand and its contribution to the divisor (see bridgework.losses).

    It may have `by_image` (it reads which rows have the same image) and `options` (arguments of the
    wiring's forward).
    """

    @property
    def requires(self) -> str:
        """Name of the wiring's output that the loss reads."""

    @property
    def weight(self) -> float: ...

    @property
    def whole_batch(self) -> bool:
        """True if it compares samples, so that it must see a worker's complete share at once."""

    @property
    def cached_outputs(self) -> tuple[str, ...]:
        """Outputs to cache so that it works over micro-batches, in two passes (GradCache)."""

    @property
    def supports_packing(self) -> bool:
        """True if it separates samples that share a sequence."""

    def __call__(self, outputs: Any) -> Any:
        """Return sums_B, float32: each sample's summand."""

    def count(self, labels_BT: Any) -> Any:
        """Return counts_B, float32: each sample's contribution to the divisor."""


Direction = Literal["higher", "lower"]
# metric -> its better direction; None: a baseline
Better = Mapping[str, Direction | None]


class EvalSpec(Protocol):
    """An evaluation of a stage's weights (see bridgework.evaluation)."""

    better: ClassVar[Better]  # every metric that `run` returns, without the evaluation's name

    @property
    def name(self) -> str: ...

    @property
    def dataset(self) -> str:
        """Dataset that must exist before training starts."""

    def tiny(self) -> Self: ...

    def run(self, pipeline: Any, home: Path) -> Any:
        """Evaluate an inference.Pipeline and return an evaluation.Result."""


@config_class
class Scoring:
    """Scores of the candidate answers of a question, by which they are ranked.

    An answer that is likely about any image has a high prior, its log-likelihood given blank
    images. Subtracting a part of it is the debiasing of arXiv:2306.01879; all of it is
    pointwise mutual information.
    """

    prior: bool = True  # subtract the prior
    prior_weight: float = added(default=1.0)  # the part that is subtracted, above 0
    per_token: bool = False  # divide by the answer's number of tokens: length normalization

    def __post_init__(self) -> None:
        if not 0 < self.prior_weight < math.inf:
            raise SpecError(
                f"scoring.prior_weight: a part of the prior is subtracted. Got {self.prior_weight}; "
                "expected a number above 0. Fix: prior=false subtracts nothing"
            )

    def __call__(self, loglik: float, prior: float, tokens: int) -> float:
        """Return the score of an answer.

        loglik: nats, summed over the answer's tokens. prior: the same without the image.
        """
        nats = loglik - self.prior_weight * prior if self.prior else loglik
        return nats / max(1, tokens) if self.per_token else nats


class CurationSpec(Protocol):
    """Builds a dataset between stages with the models of earlier ones (see bridgework.curation)."""

    @property
    def makes(self) -> str:
        """Name of the dataset, as in the stage's sources."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Earlier stages whose artifacts it needs."""

    @property
    def sources(self) -> tuple[str, ...]:
        """Datasets that it reads; they must exist before training starts."""

    def tiny(self) -> Self: ...

    def run(
        self,
        artifacts: Mapping[str, Path],
        dest: str,
        *,
        home: Path,
        workers: int,
        say: Callable[[str], object],
    ) -> Any:
        """Write `dest` and return its data.manifest.Manifest; running it again resumes."""


# --- training -----------------------------------------------------------------------------------


@config_class
class Budget:
    """Training length and batch sizes of a stage.

    Example:
        >>> import bridgework as bw
        >>> budget = bw.Budget(steps=100, batch=256, micro=32)
        >>> budget.steps * budget.batch  # samples, over all workers
        25600
    """

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
    """AdamW with a linear warm-up and a decay of the learning rate.

    Example:
        >>> import bridgework as bw
        >>> from bridgework.training.engine import learning_rate
        >>> optim = bw.AdamW(peak_lr=1e-3, warmup=0.1, decay="constant")
        >>> [learning_rate(optim, step, steps=100) for step in (0, 9, 99)]
        [0.0001, 0.001, 0.001]
    """

    peak_lr: float
    final_lr: float = 0.0
    warmup: float = 0.03  # share of the steps
    # from peak_lr to final_lr; "constant" does not decay
    decay: Literal["cosine", "constant", "exponential"] = "cosine"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0  # largest norm of the gradient; 0 turns clipping off

    def __post_init__(self) -> None:
        bounded("optim.peak_lr", self.peak_lr, above=0)
        bounded("optim.final_lr", self.final_lr, least=0)
        bounded("optim.weight_decay", self.weight_decay, least=0)
        bounded("optim.eps", self.eps, least=FLOAT32_TINY)  # the divisor at a zero gradient
        bounded("optim.clip", self.clip, least=0)
        for number, beta in enumerate(self.betas):
            bounded(f"optim.betas[{number}]", beta, least=0, below=1)
        if self.final_lr > self.peak_lr:
            raise SpecError(
                f"optim.final_lr: the rate only decays. Got {self.final_lr:g}; "
                f"expected at most peak_lr, {self.peak_lr:g}"
            )
        if self.decay == "exponential" and self.final_lr <= 0:
            raise SpecError(
                "optim.final_lr: an exponential decay never reaches 0. Got 0; expected more than 0"
            )
        if not 0.0 <= self.warmup < 1.0:
            raise SpecError(
                f"optim.warmup is a share of the steps. Got {self.warmup:g}; expected [0, 1)"
            )


@config_class
class ZeRO:
    """DeepSpeed settings of a stage; `config` overrides DeepSpeed's JSON by dotted path."""

    stage: Literal[0, 1, 2, 3] = 2
    precision: Literal["fp32", "bf16"] = "bf16"
    config: Mapping[str, Any] = field(default_factory=dict)


@config_class
class Stage:
    """One step of a system's training: model, trained parameters, losses, data, budget, evals.

    Example:
        >>> import bridgework as bw
        >>> align = bw.load("llava")["align"]
        >>> dict(align.trains), align.budget.steps
        ({'bridge.*': 1.0}, 2180)
    """

    name: str
    model: ModelSpec
    # glob of parameter names -> multiplier of the learning rate; all other parameters are frozen
    trains: Mapping[str, float]
    losses: tuple[LossSpec, ...]
    data: Mixture
    budget: Budget
    optim: AdamW
    starts_from: str | None = None  # an earlier stage, or the folder of an artifact
    # globs of the tensors loaded from there; a different wiring may need only some of them
    init_params: tuple[str, ...] = ("*",)
    zero: ZeRO = ZeRO()
    evals: tuple[EvalSpec, ...] = option(default=())
    seed: int = 0
    # builds a dataset with the models of earlier stages before this stage starts
    curation: CurationSpec | None = None
    # of candidate answers, for `Pipeline.rank_answers` and `rank`
    scoring: Scoring = added(default=Scoring())

    def __post_init__(self) -> None:
        if not self.trains:
            raise SpecError(
                f"{self.name}.trains is empty. "
                "Expected at least one glob of parameters, e.g. {'bridge.*': 1.0}"
            )
        for glob, multiplier in self.trains.items():
            bounded(f"{self.name}.trains[{glob!r}]", multiplier, least=0)
        for loss in self.losses:
            bounded(f"{self.name}.losses.{type(loss).__name__.lower()}.weight", loss.weight)
        if not self.losses:
            raise SpecError(f"{self.name}.losses is empty. Expected at least one loss")
        if self.budget.batch % self.data.lanes:
            raise SpecError(
                f"{self.name}: budget.batch {self.budget.batch} is not a multiple of data.lanes "
                f"{self.data.lanes}, and every lane gives the same number of samples to a batch"
            )
        unique(f"{self.name}.evals", [e.name for e in self.evals])
        if self.data.by_image and not any(getattr(loss, "by_image", False) for loss in self.losses):
            raise SpecError(
                f"{self.name}.data.by_image is for losses that compare images, and none of "
                f"{', '.join(type(loss).__name__ for loss in self.losses)} does. Fix: leave it out"
            )
        if self.data.packing is not None:
            self._check_packing()
        datasets = [source.dataset for source in self.data.leaves]
        if self.curation is not None and self.curation.makes not in datasets:
            raise SpecError(
                f"{self.name}.curation makes {self.curation.makes!r}, "
                "which none of the stage's sources reads" + suggest(self.curation.makes, datasets)
            )

    @property
    def needs_gpus(self) -> bool:
        """True for bfloat16, which is several times slower than float32 on a CPU."""
        return self.zero.precision == "bf16"

    def _check_packing(self) -> None:
        alone = [type(loss).__name__ for loss in self.losses if not loss.supports_packing]
        why = self.model.packing_refusal or (
            f"{alone[0]} reads a sequence as one sample" if alone else None
        )
        if why is not None:
            raise SpecError(
                f"{self.name}.data.packing: {why}. Fix: set stages.{self.name}.data.packing=none"
            )
        packing = self.data.packing
        if packing is not None and (packing.tokens or 0) > self.model.context:
            raise SpecError(
                f"{self.name}.data.packing.tokens is longer than the context of the language "
                f"model. Got {packing.tokens}; expected at most {self.model.context}"
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
            data=self.data.tiny(kind, curated=None if curation is None else curation.makes),
            curation=curation,
            budget=self.budget.tiny(),
            zero=replace(self.zero, precision="fp32"),
            evals=tuple(e.tiny() for e in self.evals),
        )


@config_class
class System:
    """Stages in the order in which they run.

    Example:
        >>> import bridgework as bw
        >>> system = bw.load("llava").tiny()
        >>> system.name, [stage.name for stage in system.stages]
        ('llava-tiny', ['align', 'instruct'])
        >>> system["align"].budget
        Budget(steps=8, batch=8, micro=8)
    """

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
                    f"{self.name}.{stage.name} starts from {start!r}, "
                    "which is neither an earlier stage nor a path" + suggest(start, seen)
                )
            for name in () if stage.curation is None else stage.curation.uses:
                if name not in seen:
                    raise SpecError(
                        f"{self.name}.{stage.name}.curation uses {name!r}, "
                        "which is not an earlier stage" + suggest(name, seen)
                    )
            seen.append(stage.name)

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = [s.name for s in self.stages]
        raise SpecError(f"{self.name} has no stage {name!r}" + suggest(name, names))

    def tiny(self) -> "System":
        """Return the same program at laptop size, on synthetic data.

        All choices that affect shapes are unchanged; sizes and budgets shrink. The name ends in
        `-tiny`, so that its models are never registered with those of the real system.
        """
        name = self.name.removesuffix("-tiny") + "-tiny"
        return replace(self, name=name, stages=tuple(s.tiny() for s in self.stages))

    def fingerprint(self) -> str:
        """Return 12 hex digits of the recipe: machine-independent, new if any field differs."""
        return fingerprint(to_dict(self))

    def identity(self) -> str:
        """Return 12 hex digits of all fields that affect the training result.

        Options such as `budget.micro` do not change them.
        """
        return fingerprint(to_dict(self, options=False))


def fingerprint(recipe: Any) -> str:
    """Return 12 hex digits of a JSON-ready recipe."""
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

    Example:
        >>> import bridgework as bw
        >>> [stage.name for stage in bw.load("blip2").stages]
        ['represent', 'generate']
        >>> bw.load("llava:next")["align"].trains
        {'bridge.*': 1.0}
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
    """Return the public functions of a recipe that need no argument and are annotated to return a System."""
    for name, value in vars(module).items():
        offered = isinstance(value, types.FunctionType) and not inspect.signature(value).parameters
        if (
            offered
            and not name.startswith("_")
            and typing.get_type_hints(value).get("return") is System
        ):
            yield name, cast(Callable[[], System], value)
