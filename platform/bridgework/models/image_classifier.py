"""The classifier wiring: an image tower and one linear layer over named classes.

A linear probe trains the layer alone, a fine-tune the tower too (CLIP, arXiv:2103.00020, 3.2). The
features are those before CLIP's projection into the joint space (appendix A.3).
"""

# B batch  N images  F width of the tower  C classes  S pixels of a side

import json
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError
from bridgework.mixture import SHAPE_LABELS
from bridgework.models.base import PairModelConfig, VLMModule
from bridgework.models.clip_resnet import ModifiedResNetConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig

CLASSES = frozenset({"classes"})
FIRST_STD = 0.01  # of the layer's weights: all classes are about equally likely


@config_class
class ImageClassifierConfig(PairModelConfig):
    """An image tower that gives one vector an image, and the names of the classes, as the rows' labels spell them."""

    vision: ViTConfig | ModifiedResNetConfig | EfficientNetConfig
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.vision.tokens != 1:
            raise SpecError(
                f"a classifier reads one vector an image, and vision gives {self.vision.tokens}: "
                "set vision.select=cls (pool of a ModifiedResNet, grid=1 of an EfficientNet)"
            )
        if len(set(self.classes)) < max(2, len(self.classes)) or not all(
            map(str.strip, self.classes)
        ):
            raise SpecError(
                f"model.classes are two or more different names. Got {list(self.classes[:6])}; "
                "Fix: name the labels of the dataset, e.g. model.classes=cat,dog"
            )

    @property
    def tokenizer(self) -> str:
        return "labels:" + json.dumps(self.classes)  # a class is one token

    @property
    def context(self) -> int:
        return 1

    @property
    def pretrained(self) -> tuple[str, ...]:
        return () if self.vision.weights is None else ("vision.*",)

    def build(self, *, pretrained: bool = True) -> "ImageClassifier":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        vision = self.vision.build(pretrained=pretrained)
        return ImageClassifier(vision, nn.Linear(self.vision.feature_width, len(self.classes)))

    def tiny(self) -> "ImageClassifierConfig":
        """The classes are those of the synthetic pictures."""
        return replace(self, vision=self.vision.tiny(), classes=SHAPE_LABELS)


@dataclass
class Outputs:
    """What a forward gives."""

    classes_BC: Tensor | None = None
    labels_BT: Tensor | None = None


class ImageClassifier(VLMModule):
    """`vision` and `head`. Takes pixels, or features that the same tower gave before."""

    provides = CLASSES

    def __init__(self, vision: VisionTower, head: nn.Linear) -> None:
        super().__init__()
        self.vision = vision
        self.head = head
        nn.init.normal_(self.head.weight, std=FIRST_STD)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        requested: frozenset[str] = CLASSES,
    ) -> Outputs:
        """Return logits (B, C). Sample i has image i: pixels (B, 3, S, S) uint8 or features (B, 1, F).

        labels (B, 1) int64 hold the class; ids (B, 1) say how many samples there are. Raises DataError where images
        and samples do not match.
        """
        self.check(requested)
        if (pixels is None) == (features is None):
            raise DataError("a classifier reads either pixels or cached features of every image")
        logits_BC = self.classify(self.vision(pixels) if features is None else features)
        if len(logits_BC) != len(ids):
            raise DataError(
                f"{len(ids)} samples and {len(logits_BC)} images: every sample needs exactly one image"
            )
        return Outputs(logits_BC, labels)

    def classify(self, features: Tensor) -> Tensor:
        """(N, C) logits, from what the vision tower saw: (N, 1, F)."""
        width = self.vision.config.feature_width
        if features.shape[1:] != (1, width):
            raise DataError(
                f"the cached features are {tuple(features.shape[1:])} an image and this tower's are {(1, width)}: "
                "they come from another tower; compute them again"
            )
        return cast(Tensor, self.head(features[:, 0].to(self.head.weight.dtype)))
