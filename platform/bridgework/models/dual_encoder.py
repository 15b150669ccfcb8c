"""The dual encoder: an image tower and a text tower, each projected into one space (CLIP, arXiv:2103.00020, 2.3)."""

# B batch, each sample an image and its text  T tokens  S pixels of a side  F width of a tower  D of the joint space

import math
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.models.base import PairModelConfig, VLMModule
from bridgework.models.clip_resnet import ModifiedResNetConfig
from bridgework.models.clip_text import CLIPText, CLIPTextConfig
from bridgework.models.origin import Origin
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig

POOLED = frozenset({"pooled"})
FIRST_SCALE, LARGEST_SCALE = 1 / 0.07, 100.0  # of a cosine (2.5)


@config_class
class DualEncoderConfig(PairModelConfig):
    """Both towers, and the width of the space in which an image is near its text."""

    vision: ViTConfig | ModifiedResNetConfig | EfficientNetConfig
    text: CLIPTextConfig
    embed: int = 512
    project_image: bool = (
        True  # False where the tower's own pool projects, as ModifiedResNet's does
    )
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        if self.vision.tokens != 1:
            raise SpecError(
                f"a dual encoder reads one vector an image, and vision gives {self.vision.tokens}: "
                "set vision.select=cls (pool of a ModifiedResNet, grid=1 of an EfficientNet)"
            )
        if not self.project_image and self.vision.feature_width != self.embed:
            raise SpecError(
                f"without project_image, embed {self.embed} must be the {self.vision.feature_width} that vision gives"
            )

    @property
    def tokenizer(self) -> str:
        return self.text.tokenizer

    @property
    def context(self) -> int:
        return self.text.context

    @property
    def pretrained(self) -> tuple[str, ...]:
        towers = {"vision.*": self.vision.weights, "text.*": self.text.weights}
        return tuple(glob for glob, weights in towers.items() if weights is not None)

    def build(self, *, pretrained: bool = True) -> "DualEncoder":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        return DualEncoder(
            self.vision.build(pretrained=pretrained),
            self.text.build(pretrained=pretrained),
            Heads(
                self.vision.feature_width,
                self.text.width,
                self.embed,
                project_image=self.project_image,
            ),
        )

    def tiny(self) -> "DualEncoderConfig":
        vision = self.vision.tiny()
        embed = 32 if self.project_image else vision.feature_width
        return replace(self, vision=vision, text=self.text.tiny(), embed=embed, origin=None)


@dataclass
class Outputs:
    """What a forward gives."""

    image_BD: Tensor | None = None
    text_BD: Tensor | None = None
    logit_scale: Tensor | None = None  # (B,) float32: what a cosine is times, for every image once


class Heads(nn.Module):
    """Two matrices without bias, `image` and `text`, and `logit_scale`, the logarithm of what a cosine is times."""

    def __init__(
        self, image_width: int, text_width: int, embed: int, *, project_image: bool
    ) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, embed, bias=False) if project_image else nn.Identity()
        self.text = nn.Linear(text_width, embed, bias=False)
        # (1,) where transformers has (): DeepSpeed 0.19 cannot broadcast a parameter without a dimension
        self.logit_scale = nn.Parameter(torch.tensor([math.log(FIRST_SCALE)]))
        for head in (self.image, self.text):
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=head.in_features**-0.5)  # openai/CLIP

    def forward(self, image_BF: Tensor, text_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, D), (B, D), and the scale for every image: (B,) float32."""
        scale_B = self.logit_scale.float().exp().expand(len(image_BF))
        return self.image(image_BF), self.text(text_BF), scale_B


class DualEncoder(VLMModule):
    """`vision`, `text` and `heads`. Takes pixels, or features that the same tower gave before."""

    provides = POOLED
    limits: ClassVar = {"heads.logit_scale": (-math.inf, math.log(LARGEST_SCALE))}  # 2.5

    def __init__(self, vision: VisionTower, text: CLIPText, heads: Heads) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.heads = heads

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        requested: frozenset[str] = POOLED,
    ) -> Outputs:
        """One projected vector for every image and every text, not yet of length 1.

        ids (B, T) int64 and attention (B, T) bool, of texts with their end; pixels (B, 3, S, S) uint8 or features
        (B, 1, F): sample i has image i. `labels` are not read. Raises DataError where images and texts do not match.
        """
        self.check(requested)
        image_BF = self._see(pixels, features)
        if len(image_BF) != len(ids):
            raise DataError(
                f"{len(ids)} texts and {len(image_BF)} images: every sample needs exactly one image"
            )
        return Outputs(*self.heads(image_BF, self.text(ids, attention)))

    def embed_images(self, features: Tensor) -> Tensor:
        """(N, D) float32 of length 1, of what the vision tower saw: (N, 1, F)."""
        return normalize(self.heads.image(self._see(None, features)).float(), dim=-1)

    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, D) float32 of length 1. `labels` are not read: all tokens of a text are its own."""
        return normalize(self.heads.text(self.text(ids, attention)).float(), dim=-1)

    def _see(self, pixels_N3SS: Tensor | None, features_N1F: Tensor | None) -> Tensor:
        """(N, F) in the heads' dtype."""
        if (pixels_N3SS is None) == (features_N1F is None):
            raise DataError("a dual encoder reads either pixels or cached features of every image")
        seen_N1F = self.vision(pixels_N3SS) if features_N1F is None else features_N1F
        width = self.vision.config.feature_width
        if seen_N1F.shape[1:] != (1, width):
            raise DataError(
                f"the cached features are {tuple(seen_N1F.shape[1:])} an image and this tower's are {(1, width)}: "
                "they come from another tower; compute them again"
            )
        return cast(Tensor, seen_N1F[:, 0].to(self.heads.text.weight.dtype))
