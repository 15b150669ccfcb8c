"""Dual encoder: image and text towers projected into one space (CLIP, arXiv:2103.00020, 2.3)."""

# B batch, each sample an image and its text  T tokens  S pixels of a side  F width of a tower
# D of the joint space

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgework.config import added, config_class
from bridgework.errors import SpecError
from bridgework.models.base import Outputs, PairModel, PairModelConfig
from bridgework.models.clip_resnet import ModifiedResNetConfig
from bridgework.models.clip_text import CLIPText, CLIPTextConfig
from bridgework.models.origin import Origin
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig

POOLED = frozenset({"pooled"})
FIRST_SCALE, MAX_SCALE = 1 / 0.07, 100.0  # 1 / temperature (2.5)


@config_class
class DualEncoderConfig(PairModelConfig):
    """An image tower, a text tower and the width `embed` of their joint space."""

    vision: ViTConfig | ModifiedResNetConfig | EfficientNetConfig
    text: CLIPTextConfig
    embed: int = 512
    project_image: bool = True  # False if the tower's own pool projects, e.g. ModifiedResNet's
    origin: Origin | None = added(default=None)  # of an imported model: fields for its export

    def __post_init__(self) -> None:
        if self.vision.tokens != 1:
            raise SpecError(
                f"model.vision: a dual encoder reads one vector per image. "
                f"Got {self.vision.tokens}. Fix: set vision.select=cls "
                "(pool of a ModifiedResNet, grid=1 of an EfficientNet)"
            )
        if not self.project_image and self.vision.feature_width != self.embed:
            raise SpecError(
                "model.embed: without project_image it is the width of the tower. "
                f"Got {self.embed}; expected {self.vision.feature_width}"
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
        """Return the model in float32.

        Without weights, or with `pretrained=False`, it is drawn from torch's generator.
        """
        return DualEncoder(
            self.vision.build(pretrained=pretrained),
            self.text.build(pretrained=pretrained),
            DualEncoderHeads(
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


class DualEncoderHeads(nn.Module):
    """Projections `image` and `text` without bias, and `logit_scale` = log(1 / temperature)."""

    def __init__(
        self, image_width: int, text_width: int, embed: int, *, project_image: bool
    ) -> None:
        super().__init__()
        self.image = nn.Linear(image_width, embed, bias=False) if project_image else nn.Identity()
        self.text = nn.Linear(text_width, embed, bias=False)
        # (1,), because DeepSpeed 0.19 cannot broadcast a scalar parameter; transformers has ()
        self.logit_scale = nn.Parameter(torch.tensor([math.log(FIRST_SCALE)]))
        for head in (self.image, self.text):
            if isinstance(head, nn.Linear):
                nn.init.normal_(head.weight, std=head.in_features**-0.5)  # openai/CLIP

    def forward(self, image_BF: Tensor, text_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return images (B, D), texts (B, D) and the scale (B,) float32, repeated per image."""
        scale_B = self.logit_scale.float().exp().expand(len(image_BF))
        return self.image(image_BF), self.text(text_BF), scale_B


class DualEncoder(PairModel):
    """`vision`, `text` and `heads`. Takes pixels, or cached features of the same tower."""

    provides = POOLED
    limits: ClassVar = {"heads.logit_scale": (-math.inf, math.log(MAX_SCALE))}  # 2.5

    def __init__(self, vision: VisionTower, text: CLIPText, heads: DualEncoderHeads) -> None:
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
        """Return one projected vector per image and per text, not of unit length.

        ids: (B, T) int64 and attention: (B, T) bool, of texts with their end token.
        pixels: (B, 3, S, S) uint8, or features: (B, 1, F); sample i has image i.

        `labels` are ignored. Raises DataError if images and texts do not match.
        """
        self.check(requested)
        image_BF = self._images(pixels, features, samples=len(ids))
        image_BD, text_BD, scale_B = self.heads(image_BF, self.text(ids, attention))
        return Outputs(image_BD=image_BD, text_BD=text_BD, logit_scale=scale_B)

    def embed_images(self, features: Tensor) -> Tensor:
        """Return (N, D) float32 of unit length, from the vision tower's output (N, 1, F)."""
        return normalize(self.heads.image(self._images(None, features)).float(), dim=-1)

    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (N, D) float32 of unit length; `labels` are ignored, all tokens count."""
        return normalize(self.heads.text(self.text(ids, attention)).float(), dim=-1)

    def _images(
        self, pixels: Tensor | None, features: Tensor | None, *, samples: int | None = None
    ) -> Tensor:
        """Return (N, F) in the heads' dtype."""
        patches_N1F = self.image_patches(pixels, features, samples=samples)
        return patches_N1F[:, 0].to(self.heads.text.weight.dtype)
