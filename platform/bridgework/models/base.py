"""Base classes of the wirings, their outputs, and the globs that decide which parameters train."""

# B batch  T tokens  V vocabulary  D width of the shared space  Q queries, or entries of a queue
# C classes  A answers of all questions  N tokens of the longest answer, or images  P patches
# F width of the tower's features

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, ClassVar, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from bridgework.errors import DataError, SpecError, suggest
from bridgework.system import Layout, Pixels


@dataclass
class Outputs:
    """Outputs of a forward pass: the requested ones, labels and identities; all others are None.

    A loss names the fields that it reads in a protocol of its own.
    """

    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None  # int64, IGNORE where there is no loss
    segments_BT: Tensor | None = None  # int64, the sample of each token, where samples share rows
    classes_BC: Tensor | None = None  # logits of an image classifier
    image_BD: Tensor | None = None  # one vector per image
    image_BQD: Tensor | None = None  # several vectors per image, not of unit length
    text_BD: Tensor | None = None
    logit_scale: Tensor | None = None  # (B,) float32: 1 / temperature, repeated for each sample
    identity_B: Tensor | None = None  # int64: rows of one identity show one image; below 0: unknown
    match_B3C: Tensor | None = (
        None  # own pair, own text + negative image, own image + negative text
    )
    # momentum contrast: keys and queues come from the momentum encoder
    image_key_BD: Tensor | None = None
    text_key_BD: Tensor | None = None
    image_queue_QD: Tensor | None = None
    text_queue_QD: Tensor | None = None
    identity_queue_Q: Tensor | None = None
    alpha: Tensor | None = None  # share of the momentum encoder in the targets
    # all answers of a question
    answers_ANV: Tensor | None = None  # logits of each token of an answer
    answers_AN: Tensor | None = None
    owner_A: Tensor | None = None  # int64, the question of each answer
    weight_A: Tensor | None = None
    # preferences: nats, summed over the tokens of an answer
    chosen_B: Tensor | None = None
    rejected_B: Tensor | None = None
    chosen_reference_B: Tensor | None = None
    rejected_reference_B: Tensor | None = None


class VLMModule(nn.Module):
    """Base class of all wirings. Frozen submodules stay in eval mode even after `.train()`."""

    provides: frozenset[str]  # names of the outputs that a forward can be asked for
    remedy: ClassVar = "take another loss"  # the fix in the error about any other output
    limits: ClassVar[Mapping[str, tuple[float, float]]] = {}
    # parameter -> (lowest, highest) value, applied after every optimizer step

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        set_eval(self)
        return self

    def check(self, requested: frozenset[str]) -> None:
        """Raise SpecError if a requested output is not among `provides`."""
        if unknown := requested - self.provides:
            provided = ", ".join(map(repr, sorted(self.provides)))
            raise SpecError(
                f"{type(self).__name__}: a requested output is not provided. "
                f"Got {sorted(unknown)}; expected {provided}. Fix: {self.remedy}"
            )

    def check_images(self, pixels: Tensor | None, features: Tensor | None) -> None:
        """Check the image inputs of a forward: `pixels`, cached `features` (N, P, F), or neither.

        Raises DataError if both are given, or if another vision tower computed the features.
        """
        if pixels is not None and features is not None:
            raise DataError(
                "images: both pixels and cached features are given. "
                "Got two inputs; expected one. Fix: drop the pixels, or the cached features"
            )
        tower = cast(Any, self.vision).config
        shape = (tower.tokens, tower.feature_width)
        if features is not None and features.shape[1:] != shape:
            raise DataError(
                "images: the cached features come from another vision tower. "
                f"Got {tuple(features.shape[1:])} per image; expected {shape}. "
                "Fix: compute the features again"
            )

    def after_step(self) -> None:
        """Update the wiring's own state after an optimizer step, e.g. a momentum encoder."""


class PairModel(VLMModule):
    """Base class of the wirings of image-text pairs: sample i has image i, outside its tokens."""

    def image_patches(
        self, pixels: Tensor | None, features: Tensor | None, *, samples: int | None = None
    ) -> Tensor:
        """Return (N, P, F) of the vision tower, from pixels (N, 3, S, S) uint8 or cached features.

        Raises DataError unless one of both is given, with one image for each of the `samples`.
        """
        self.check_images(pixels, features)
        if pixels is None and features is None:
            raise DataError(
                f"{type(self).__name__}: no images. Got neither pixels nor cached features; "
                "expected one of them. Fix: give every sample an image"
            )
        patches_NPF: Tensor = cast(Any, self.vision)(pixels) if features is None else features
        if samples is not None and len(patches_NPF) != samples:
            raise DataError(
                f"{type(self).__name__}: every sample needs exactly one image. "
                f"Got {samples} samples and {len(patches_NPF)} images; expected {samples} images. "
                "Fix: use a dataset of image-text pairs"
            )
        return patches_NPF


class PairModelConfig:
    """Base class of `PairModel`'s configs; a config adds `tokenizer`, `context` and `build`."""

    vision: Any  # the config of the tower

    @property
    def pixels(self) -> Pixels:
        pixels: Pixels = self.vision.pixels
        return pixels

    @property
    def vision_tokens(self) -> int:
        tokens: int = self.vision.tokens
        return tokens

    @property
    def image_tokens(self) -> int:
        return 0

    def num_image_tokens(self, layout: Layout) -> int:
        return 0

    @property
    def instruction(self) -> None:
        return None

    def unshardable(self, requested: frozenset[str]) -> str | None:
        return None

    @property
    def packing_refusal(self) -> str:
        return "the wiring reads pairs, each text next to its own image"


class LanguageWiringConfig:
    """Base class of configs of wirings with a vision tower and a language model."""

    vision: Any  # the config of the tower
    language: Any  # a LanguageConfig

    @property
    def tokenizer(self) -> str:
        tokenizer: str = self.language.tokenizer
        return tokenizer

    @property
    def context(self) -> int:
        context: int = self.language.context
        return context

    @property
    def vision_tokens(self) -> int:
        tokens: int = self.vision.tokens
        return tokens

    @property
    def packing_refusal(self) -> str | None:
        refusal: str | None = self.language.packing_refusal
        return refusal

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs of the parameters that can be loaded from the pretrained checkpoints again."""
        towers = {"vision.*": self.vision.weights, "language.*": self.language.weights}
        return tuple(glob for glob, weights in towers.items() if weights is not None)


def set_trainable(module: nn.Module, trains: Mapping[str, float]) -> dict[str, float]:
    """Freeze all of `module` but the parameters that the globs name; return their multipliers.

    The result is {parameter: multiplier of the learning rate}. The last glob that matches a name
    wins, and 0 freezes, e.g. {"language.*": 1.0, "language.lm_head.*": 0.0}. A tied parameter may
    be named by either of its names and is returned under the first. Raises SpecError for a glob
    that matches nothing and when nothing trains.
    """
    first = {id(p): name for name, p in module.named_parameters()}
    names = {name: first[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    chosen: dict[str, float] = {}
    for glob, multiplier in trains.items():
        if multiplier < 0:
            raise SpecError(
                f"trains[{glob!r}]: a multiplier of the learning rate is negative. "
                f"Got {multiplier:g}; expected 0 or more. Fix: set 0 to freeze"
            )
        matched = {first_name for name, first_name in names.items() if fnmatchcase(name, glob)}
        if not matched:
            raise SpecError(f"trains[{glob!r}] matches no parameter" + suggest(glob, _globs(names)))
        chosen |= dict.fromkeys(matched, multiplier)
    learning = {name: chosen[name] for name in first.values() if chosen.get(name)}
    if not learning:
        raise SpecError(
            f"trains: nothing trains. Got {dict(trains)}; expected a multiplier above 0. "
            "Fix: set 1.0 for at least one glob"
        )
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in learning)
    set_eval(module)
    return learning


def set_eval(module: nn.Module) -> None:
    """Set eval mode for every submodule whose parameters are all frozen.

    It turns off dropout and the update of batch statistics.
    """
    for child in module.children():
        parameters = list(child.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            child.eval()
        else:
            set_eval(child)


@contextmanager
def eval_no_grad(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients and with every submodule in eval mode.

    Afterwards each submodule has its own mode again: in a partly frozen model they differ.
    """
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class ParameterCounts(NamedTuple):
    """Numbers of parameters; a parameter with two names counts once."""

    trainable: int
    frozen: int


def count(module: nn.Module) -> ParameterCounts:
    """Return the numbers of trainable and of frozen parameters of `module`."""
    sizes = [(p.requires_grad, p.numel()) for p in module.parameters()]
    return ParameterCounts(
        sum(n for trains, n in sizes if trains), sum(n for trains, n in sizes if not trains)
    )


def _globs(names: Mapping[str, str]) -> set[str]:
    """Return the first two levels of the names as globs: the likely meaning of a mistyped glob."""
    parts = [name.split(".") for name in names]
    return {f"{'.'.join(p[:n])}.*" for p in parts for n in (1, 2) if len(p) > n}
