"""Image classifier: an image tower and one linear layer over named classes.

A linear probe trains the layer alone, a fine-tune the tower too (CLIP, arXiv:2103.00020, 3.2). The
features are those before CLIP's projection into the joint space (appendix A.3).
"""

# B batch  N images  F width of the tower  C classes  S pixels of a side

import json
from dataclasses import replace
from typing import cast

from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.mixture import SHAPE_LABELS
from bridgework.models.base import Outputs, PairModel, PairModelConfig
from bridgework.models.clip_resnet import ModifiedResNetConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig

CLASSES = frozenset({"classes"})
FIRST_STD = 0.01  # of the layer's weights, so that all classes start about equally likely


@config_class
class ImageClassifierConfig(PairModelConfig):
    """An image tower with one vector per image, and the class names as in the rows' labels."""

    vision: ViTConfig | ModifiedResNetConfig | EfficientNetConfig
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.vision.tokens != 1:
            raise SpecError(
                f"model.vision: a classifier reads one vector per image. Got {self.vision.tokens}. "
                "Fix: set vision.select=cls (pool of a ModifiedResNet, grid=1 of an EfficientNet)"
            )
        distinct = len(set(self.classes)) >= max(2, len(self.classes))
        if not distinct or not all(map(str.strip, self.classes)):
            raise SpecError(
                f"model.classes are two or more different names. Got {list(self.classes[:6])}. "
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
        """Return the model in float32.

        Without weights, or with `pretrained=False`, it is drawn from torch's generator.
        """
        vision = self.vision.build(pretrained=pretrained)
        return ImageClassifier(vision, nn.Linear(self.vision.feature_width, len(self.classes)))

    def tiny(self) -> "ImageClassifierConfig":
        """Return a tiny config with the classes of the synthetic pictures."""
        return replace(self, vision=self.vision.tiny(), classes=SHAPE_LABELS)


class ImageClassifier(PairModel):
    """`vision` and `head`. Takes pixels, or cached features of the same tower."""

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
        """Return logits (B, C).

        ids: (B, 1), of which only the number of samples is read. labels: (B, 1) int64, the class.
        pixels: (B, 3, S, S) uint8, or features: (B, 1, F); sample i has image i.

        Raises DataError if images and samples do not match.
        """
        self.check(requested)
        patches_B1F = self.image_patches(pixels, features, samples=len(ids))
        return Outputs(classes_BC=self.classify(patches_B1F), labels_BT=labels)

    def classify(self, features: Tensor) -> Tensor:
        """Return (N, C) logits, from the vision tower's output (N, 1, F)."""
        self.check_images(None, features)
        return cast(Tensor, self.head(features[:, 0].to(self.head.weight.dtype)))
