"""BLIP's vision transformer: all tokens of the last block, CLS first, behind the final norm (arXiv:2201.12086, 3.1).

transformers' BlipVisionModel, drawn or begun from an ImageNet ViT as the paper does (4.1).

EVA's vision transformer, as BLIP-2 reads it: 39 of ViT-g's 40 blocks, no norm behind them (2301.12597, 3.4).

The LayerNorm that transformers holds in the tower is the bridge's `ln_vision` here: it trains beside a frozen tower.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bridgework.config import config_class, positive
from bridgework.errors import SpecError
from bridgework.models import pretrained as weights_of
from bridgework.models.vision import (
    CLIP_MEAN,
    CLIP_STD,
    VIT_FIELDS,
    Positions,
    VisionTower,
    stretched,
)
from bridgework.system import Pixels

# N images  S pixels of a side  P patches, CLS first  D width


POSITIONS = "embeddings.position_embedding"
FIXED = {
    "hidden_act": "gelu",
    "qkv_bias": True,
}  # of transformers' BlipVisionModel: never otherwise here
FROM_VIT = {  # transformers' ViT -> its BlipVisionModel; the three of q, k and v become one
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "layers.": "encoder.layers.",
    "attention.o_proj": "self_attn.projection",
    "layernorm_before": "layer_norm1",
    "layernorm_after": "layer_norm2",
}


@config_class
class BlipViTConfig:
    """The tower of transformers' BLIP models; the defaults are ViT-B/16 at 224 px."""

    image_size: int = 224  # pixels; weights of another size get their positions interpolated
    patch: int = 16  # pixels
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    norm_eps: float = 1e-6  # BLIP's vit.py; the configs of transformers' BLIP checkpoints say 1e-5
    fit: Literal["pad", "crop"] = "crop"
    weights: str | None = None  # folder or hub name of a ViT or DeiT

    def __post_init__(self) -> None:
        positive("vision", self, "width", "depth", "heads", "ffn")
        if self.width % self.heads:
            raise SpecError(
                f"vision.width {self.width} must be a multiple of vision.heads {self.heads}"
            )
        if not 1 <= self.patch <= self.image_size:
            raise SpecError(
                f"vision.patch must lie in [1, image_size {self.image_size}], got {self.patch}"
            )

    @property
    def pixels(self) -> Pixels:
        return Pixels(size=self.image_size, fit=self.fit, mean=CLIP_MEAN, std=CLIP_STD)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + 1

    @property
    def feature_width(self) -> int:
        return self.width

    def config(self) -> Any:
        """transformers' config of the tower."""
        from transformers import BlipVisionConfig

        # transformers would draw all but nothing (1e-10), for it only ever loads this tower
        numbers = {hf: getattr(self, ours) for ours, hf in VIT_FIELDS.items()}
        return BlipVisionConfig(**numbers, layer_norm_eps=self.norm_eps, initializer_range=0.02)

    def build(self, *, pretrained: bool = True) -> "BlipViT":
        """The tower in float32. Raises WeightsError for weights that do not fit the numbers."""
        from transformers import BlipVisionModel

        tower = BlipVisionModel(self.config())
        if pretrained and self.weights is not None:
            state = self._begin(self.weights)
            state[POSITIONS] = stretched(state[POSITIONS], tower.get_parameter(POSITIONS), cls=1)
            tower.load_state_dict(state)
        return BlipViT(self, tower)

    def _begin(self, weights: str) -> dict[str, Tensor]:
        from transformers import AutoConfig, ViTModel

        config = weights_of.load_config(AutoConfig, weights)
        sizes = {own: hf for own, hf in VIT_FIELDS.items() if own != "image_size"}
        found = {own: getattr(config, hf, None) for own, hf in sizes.items()}
        found |= {name: getattr(config, name, None) for name in FIXED}
        weights_of.check(weights, {own: getattr(self, own) for own in sizes} | FIXED, found)
        return from_vit(
            weights_of.load(ViTModel, weights, add_pooling_layer=False).state_dict(), self.depth
        )

    def tiny(self) -> "BlipViTConfig":
        """Width 32, two blocks, 4 x 4 patches."""
        return replace(
            self, image_size=32, patch=8, width=32, depth=2, heads=2, ffn=64, weights=None
        )


class BlipViT(VisionTower):
    """All tokens of the last block, normed."""

    config: BlipViTConfig

    @property
    def positions(self) -> Positions:
        return Positions(POSITIONS, cls=1)

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        return cast(Tensor, self.tower(normal_N3SS).last_hidden_state)


def from_vit(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The tensors of transformers' ViTModel under the names of its BlipVisionModel."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = "post_" + name if name.startswith("layernorm.") else name
        for theirs, new in FROM_VIT.items():
            ours = ours.replace(theirs, new, 1)
        found[ours] = tensor
    for layer in range(depth):
        for kind in ("weight", "bias"):
            at = f"encoder.layers.{layer}."
            parts = [found.pop(f"{at}attention.{part}_proj.{kind}") for part in "qkv"]
            found[f"{at}self_attn.qkv.{kind}"] = torch.cat(parts)
    return found


# N images  S pixels of a side  P patches  D width


EVA_FIXED = {
    "hidden_act": "gelu",
    "qkv_bias": True,
    "layer_norm_eps": 1e-6,
}  # of transformers' tower: never otherwise here


@config_class
class EvaConfig:
    """The vision tower of transformers' BLIP-2 models; the defaults are EVA-CLIP ViT-g/14 at 224 px."""

    image_size: int = 224  # pixels; weights of another size get their positions interpolated
    patch: int = 14  # pixels
    width: int = 1408
    depth: int = 39  # ViT-g without its last block
    heads: int = 16
    ffn: int = 6144
    select: Literal["patch", "all"] = "all"  # all: with the CLS token
    fit: Literal["pad", "crop"] = "crop"
    weights: str | None = None  # folder or hub name of a whole BLIP-2 or InstructBLIP

    def __post_init__(self) -> None:
        positive("vision", self, "width", "depth", "heads", "ffn")
        if self.width % self.heads:
            raise SpecError(
                f"vision.width {self.width} must be a multiple of vision.heads {self.heads}"
            )
        if not 1 <= self.patch <= self.image_size:
            raise SpecError(
                f"vision.patch must lie in [1, image_size {self.image_size}], got {self.patch}"
            )

    @property
    def pixels(self) -> Pixels:
        return Pixels(size=self.image_size, fit=self.fit, mean=CLIP_MEAN, std=CLIP_STD)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + (self.select == "all")

    @property
    def feature_width(self) -> int:
        return self.width

    def config(self) -> Any:
        """transformers' config of the tower."""
        from transformers import Blip2VisionConfig

        # transformers would draw all but nothing (1e-10), for it only ever loads this tower
        return Blip2VisionConfig(
            **{hf: getattr(self, own) for own, hf in VIT_FIELDS.items()}, initializer_range=0.02
        )

    def build(self, *, pretrained: bool = True) -> "Eva":
        """The tower in float32. Raises WeightsError for weights that do not fit the numbers."""
        from transformers import Blip2VisionModel

        tower = Blip2VisionModel(self.config())
        cast(Any, tower).post_layernorm = nn.Identity()
        if pretrained and self.weights is not None:
            self._load(tower, self.weights)
        return Eva(self, tower)

    def _load(self, tower: Any, weights: str) -> None:
        from transformers import AutoConfig

        theirs = weights_of.load_config(AutoConfig, weights).vision_config
        sizes = {own: hf for own, hf in VIT_FIELDS.items() if own != "image_size"}
        found = {own: getattr(theirs, hf, None) for own, hf in sizes.items()}
        found |= {name: getattr(theirs, name, None) for name in EVA_FIXED}
        weights_of.check(weights, {own: getattr(self, own) for own in sizes} | EVA_FIXED, found)
        state = weights_of.tensors(weights, ("vision_model.embeddings.", "vision_model.encoder."))
        state = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
        positions = "embeddings.position_embedding"
        state[positions] = stretched(state[positions], tower.get_parameter(positions), cls=1)
        tower.load_state_dict(state)

    def tiny(self) -> "EvaConfig":
        """Width 32, 4 x 4 patches; the selection stays, and the blocks, for a rate of its own names every one."""
        return replace(self, image_size=32, patch=8, width=32, heads=2, ffn=64, weights=None)


class Eva(VisionTower):
    """The last block's output, as it is."""

    config: EvaConfig

    @property
    def positions(self) -> Positions:
        return Positions("embeddings.position_embedding", cls=1)

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        tower = cast(Any, self.tower)
        hidden_NPD = tower.encoder(tower.embeddings(normal_N3SS)).last_hidden_state
        return cast(Tensor, hidden_NPD if self.config.select == "all" else hidden_NPD[:, 1:])
