"""CLIP's ResNet: a stem of three convolutions, average pools before strides, an attention pool.

Radford et al. 2021, arXiv:2103.00020, 2.4: ResNet-D (He et al. 2019), blur before every stride
(Zhang 2019), and multi-head attention whose query is the mean of the map. Parameters have the names
of the released weights.
"""

# N images  S pixels of a side  P cells of the last map  C channels of the last map  H heads
# D width of the pool

from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from bridgework.config import config_class
from bridgework.errors import SpecError, WeightsError
from bridgework.models import pretrained as weights_of
from bridgework.models.vision import CLIP_MEAN, CLIP_STD, VisionTower
from bridgework.system import Pixels

STRIDE = 32  # pixels per side of a cell of the last map
EXPANSION = 4  # of a bottleneck's width


@config_class
class ModifiedResNetConfig:
    """CLIP's ResNet; defaults: RN50. RN101 has layers (3, 4, 23, 3) and a pool of 512."""

    image_size: int = 224  # pixels
    layers: tuple[int, int, int, int] = (3, 4, 6, 3)  # bottlenecks of each stage
    width: int = 64  # channels after the stem; a head of the pool has 64
    pool: int = 1024  # width of the attention pool's output
    select: Literal["pool", "patch"] = "pool"  # patch: the last map, row by row, without the pool
    fit: Literal["pad", "crop"] = "crop"
    weights: str | None = None  # .safetensors or .pt file of tensors under the names of openai/CLIP

    def __post_init__(self) -> None:
        if self.image_size % STRIDE:
            raise SpecError(f"vision.image_size {self.image_size} must be a multiple of {STRIDE}")
        if self.width % 2:
            raise SpecError(f"vision.width must be even, got {self.width}")

    @property
    def pixels(self) -> Pixels:
        return Pixels(size=self.image_size, fit=self.fit, mean=CLIP_MEAN, std=CLIP_STD)

    @property
    def cells(self) -> int:
        return (self.image_size // STRIDE) ** 2

    @property
    def channels(self) -> int:
        return self.width * 8 * EXPANSION

    @property
    def tokens(self) -> int:
        return 1 if self.select == "pool" else self.cells

    @property
    def feature_width(self) -> int:
        return self.pool if self.select == "pool" else self.channels

    def build(self, *, pretrained: bool = True) -> "ModifiedResNet":
        """Return the tower in float32. Raises WeightsError for a file of another size."""
        network = Network(self)
        if pretrained and self.weights is not None:
            _load(network, self.weights)
        return ModifiedResNet(self, network)

    def tiny(self) -> "ModifiedResNetConfig":
        """Return a config of one bottleneck per stage, 2 x 2 cells, 256 channels, a pool of 32."""
        return replace(self, image_size=64, layers=(1, 1, 1, 1), width=8, pool=32, weights=None)


def _load(network: nn.Module, weights: str) -> None:
    """Load a file of weights; of a complete CLIP only `visual.*` is read."""
    path = Path(weights_of.resolve(weights))
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, "cpu", weights_only=True)
        )
        prefix = "visual." if any(name.startswith("visual.") for name in state) else ""
        network.load_state_dict(
            {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
        )
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split()[:30])
        raise WeightsError(
            f"weights {weights!r} do not fit vision.layers, width and pool, "
            f"or hold no named tensors: {reason}"
        ) from error


class ModifiedResNet(VisionTower):
    """One token per image from the attention pool, or the cells of the last map."""

    config: ModifiedResNetConfig

    def patches(self, normal_N3SS: Tensor) -> Tensor:
        network = cast(Network, self.tower)
        cells_NPC = network.map(normal_N3SS).flatten(2).transpose(1, 2)
        return (
            cast(Tensor, network.attnpool(cells_NPC)) if self.config.select == "pool" else cells_NPC
        )


class Network(nn.Module):
    """Stem, four stages and attention pool."""

    def __init__(self, config: ModifiedResNetConfig) -> None:
        super().__init__()
        width = config.width
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, config.layers[0], stride=1)
        self.layer2 = _stage(width * EXPANSION, width * 2, config.layers[1], stride=2)
        self.layer3 = _stage(width * 2 * EXPANSION, width * 4, config.layers[2], stride=2)
        self.layer4 = _stage(width * 4 * EXPANSION, width * 8, config.layers[3], stride=2)
        self.attnpool = AttentionPool(config.cells, config.channels, width // 2, config.pool)

    def map(self, normal_N3SS: Tensor) -> Tensor:
        """Map (N, 3, S, S) to (N, C, S / 32, S / 32)."""
        map_NCHW: Tensor = self.bn1(self.conv1(normal_N3SS)).relu()
        map_NCHW = self.bn2(self.conv2(map_NCHW)).relu()
        map_NCHW = self.bn3(self.conv3(map_NCHW)).relu()
        map_NCHW = nn.functional.avg_pool2d(map_NCHW, 2)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            map_NCHW = stage(map_NCHW)
        return map_NCHW


def _stage(inner: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    first = Bottleneck(inner, width, stride)
    return nn.Sequential(
        first, *(Bottleneck(width * EXPANSION, width, 1) for _ in range(1, blocks))
    )


class Bottleneck(nn.Module):
    """Residual block of 1 x 1, 3 x 3 and 1 x 1 convolutions.

    A stride is an average pool before a convolution of stride 1, on both paths.
    """

    def __init__(self, inner: int, width: int, stride: int) -> None:
        super().__init__()
        outer = width * EXPANSION
        self.conv1 = nn.Conv2d(inner, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(width, outer, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outer)
        nn.init.zeros_(self.bn3.weight)  # a block starts as the identity (openai/CLIP)
        self.downsample: nn.Module = nn.Identity()
        if stride > 1 or inner != outer:
            convolution = nn.Conv2d(inner, outer, 1, bias=False)
            parts = [("-1", nn.AvgPool2d(stride)), ("0", convolution), ("1", nn.BatchNorm2d(outer))]
            self.downsample = nn.Sequential(OrderedDict(cast(Any, parts)))

    def forward(self, map_NCHW: Tensor) -> Tensor:
        inner_NCHW = self.bn1(self.conv1(map_NCHW)).relu()
        inner_NCHW = self.avgpool(self.bn2(self.conv2(inner_NCHW)).relu())
        outer_NCHW: Tensor = self.bn3(self.conv3(inner_NCHW)) + self.downsample(map_NCHW)
        return outer_NCHW.relu()


class AttentionPool(nn.Module):
    """Attention from the mean of the cells to itself and all cells, with position embeddings."""

    def __init__(self, cells: int, channels: int, heads: int, out: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(cells + 1, channels) * channels**-0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, out)
        for projection in (self.q_proj, self.k_proj, self.v_proj, self.c_proj):
            nn.init.normal_(projection.weight, std=channels**-0.5)

    def forward(self, cells_NPC: Tensor) -> Tensor:
        """Map (N, P, C) to (N, 1, D)."""
        tokens_NPC = torch.cat([cells_NPC.mean(1, keepdim=True), cells_NPC], dim=1)
        tokens_NPC = tokens_NPC + self.positional_embedding
        q, k, v = self.q_proj(tokens_NPC[:, :1]), self.k_proj(tokens_NPC), self.v_proj(tokens_NPC)
        attended_NH1C = scaled_dot_product_attention(
            *(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        )
        return cast(Tensor, self.c_proj(attended_NH1C.transpose(1, 2).flatten(2)))
