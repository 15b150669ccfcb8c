"""Vision transformers of BLIP and BLIP-2.

`BlipViT`  all tokens of the last block, CLS first, after the final norm (arXiv:2201.12086, 3.1).
           transformers' BlipVisionModel, random or initialized from an ImageNet ViT (4.1).
`Eva`      EVA-CLIP as BLIP-2 reads it: 39 of ViT-g's 40 blocks without a norm (2301.12597, 3.4).
           The LayerNorm that transformers has in this tower is the bridge's `ln_vision` here,
           because it trains while the tower is frozen.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.models import pretrained as weights_of
from bridgework.models.vision import (
    CLIP_MEAN,
    CLIP_STD,
    VIT_FIELDS,
    Positions,
    VisionTower,
    check_vit_sizes,
    interpolate_positions,
)
from bridgework.system import Pixels

# N images  S pixels of a side  P patches, CLS first  D width

POSITIONS = "embeddings.position_embedding"
# settings of transformers' towers that never differ here
FIXED = {"hidden_act": "gelu", "qkv_bias": True}
EVA_FIXED = {"hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6}
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
    """The tower of transformers' BLIP models; defaults: ViT-B/16 at 224 px."""

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
        check_vit_sizes(self)

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
        """Return transformers' config of the tower."""
        from transformers import BlipVisionConfig

        # transformers' default range is 1e-10, because it only ever loads this tower
        sizes = {theirs: getattr(self, ours) for ours, theirs in VIT_FIELDS.items()}
        return BlipVisionConfig(**sizes, layer_norm_eps=self.norm_eps, initializer_range=0.02)

    def build(self, *, pretrained: bool = True) -> "BlipViT":
        """Return the tower in float32. Raises WeightsError for weights of another size."""
        from transformers import BlipVisionModel

        tower = BlipVisionModel(self.config())
        if pretrained and self.weights is not None:
            _load_interpolated(tower, self._load_vit(self.weights))
        return BlipViT(self, tower)

    def _load_vit(self, weights: str) -> dict[str, Tensor]:
        from transformers import AutoConfig, ViTModel

        _check_sizes(self, weights, weights_of.load_config(AutoConfig, weights), FIXED)
        vit = weights_of.load(ViTModel, weights, add_pooling_layer=False)
        return from_vit(vit.state_dict(), self.depth)

    def tiny(self) -> "BlipViTConfig":
        """Return a config of width 32, two blocks, 4 x 4 patches."""
        return replace(
            self, image_size=32, patch=8, width=32, depth=2, heads=2, ffn=64, weights=None
        )


class BlipViT(VisionTower):
    """All tokens of the last block after the final norm."""

    config: BlipViTConfig

    @property
    def positions(self) -> Positions:
        return Positions(POSITIONS, cls=1)

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        return cast(Tensor, self.tower(normal_N3SS).last_hidden_state)


def from_vit(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return the tensors of transformers' ViTModel under the names of its BlipVisionModel."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        ours = "post_" + name if name.startswith("layernorm.") else name
        for theirs, new in FROM_VIT.items():
            ours = ours.replace(theirs, new, 1)
        renamed[ours] = tensor
    for layer in range(depth):
        for kind in ("weight", "bias"):
            block = f"encoder.layers.{layer}."
            parts = [renamed.pop(f"{block}attention.{part}_proj.{kind}") for part in "qkv"]
            renamed[f"{block}self_attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


@config_class
class EvaConfig:
    """The vision tower of transformers' BLIP-2 models; defaults: EVA-CLIP ViT-g/14 at 224 px."""

    image_size: int = 224  # pixels; weights of another size get their positions interpolated
    patch: int = 14  # pixels
    width: int = 1408
    depth: int = 39  # ViT-g without its last block
    heads: int = 16
    ffn: int = 6144
    select: Literal["patch", "all"] = "all"  # all: with the CLS token
    fit: Literal["pad", "crop"] = "crop"
    weights: str | None = None  # folder or hub name of a complete BLIP-2 or InstructBLIP

    def __post_init__(self) -> None:
        check_vit_sizes(self)

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
        """Return transformers' config of the tower."""
        from transformers import Blip2VisionConfig

        # transformers' default range is 1e-10, because it only ever loads this tower
        sizes = {theirs: getattr(self, ours) for ours, theirs in VIT_FIELDS.items()}
        return Blip2VisionConfig(**sizes, initializer_range=0.02)

    def build(self, *, pretrained: bool = True) -> "Eva":
        """Return the tower in float32. Raises WeightsError for weights of another size."""
        from transformers import Blip2VisionModel

        tower = Blip2VisionModel(self.config())
        cast(Any, tower).post_layernorm = nn.Identity()
        if pretrained and self.weights is not None:
            _load_interpolated(tower, self._load_blip2(self.weights))
        return Eva(self, tower)

    def _load_blip2(self, weights: str) -> dict[str, Tensor]:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights).vision_config
        _check_sizes(self, weights, config, EVA_FIXED)
        prefixes = ("vision_model.embeddings.", "vision_model.encoder.")
        state = weights_of.load_tensors(weights, prefixes)
        return {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}

    def tiny(self) -> "EvaConfig":
        """Return a config of width 32, 4 x 4 patches.

        The selection stays, and the depth, because learning rates name every block.
        """
        return replace(self, image_size=32, patch=8, width=32, heads=2, ffn=64, weights=None)


class Eva(VisionTower):
    """Output of the last block, without a norm."""

    config: EvaConfig

    @property
    def positions(self) -> Positions:
        return Positions(POSITIONS, cls=1)

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        tower = cast(Any, self.tower)
        hidden_NPD = tower.encoder(tower.embeddings(normal_N3SS)).last_hidden_state
        return cast(Tensor, hidden_NPD if self.config.select == "all" else hidden_NPD[:, 1:])


def _check_sizes(config: Any, weights: str, theirs: Any, fixed: Mapping[str, object]) -> None:
    """Raise WeightsError if a transformers config has other sizes, image size excepted."""
    sizes = {ours: hf for ours, hf in VIT_FIELDS.items() if ours != "image_size"}
    expected = {ours: getattr(config, ours) for ours in sizes} | dict(fixed)
    found = {ours: getattr(theirs, hf, None) for ours, hf in sizes.items()}
    found |= {name: getattr(theirs, name, None) for name in fixed}
    weights_of.check_fields(weights, expected, found)


def _load_interpolated(tower: nn.Module, state: dict[str, Tensor]) -> None:
    """Load `state`, with positions interpolated to the image size of the tower."""
    positions = interpolate_positions(state[POSITIONS], tower.get_parameter(POSITIONS), cls=1)
    tower.load_state_dict(state | {POSITIONS: positions})
