"""Perceiver resampler: any number of patches to a fixed number of tokens.

Flamingo, arXiv:2204.14198, 2.1. xGen-MM uses the same block without frames and with GELU, on every
tile by itself (arXiv:2408.08872).
"""

# N images or videos  T frames  P patches of one  F width of the tower's features  Q latents
# D output width  K keys: patches and latents  H heads  W width of a head

from dataclasses import replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError


@config_class
class ResamplerConfig:
    """Latents that attend to the patches in `depth` layers; defaults: Flamingo (A.1.1, table 4)."""

    latents: int = 64
    depth: int = 6
    heads: int = 16
    head_width: int = 96
    ffn: int = 4  # hidden units of the feed-forward part, in widths of the features
    # transformers' names; relu2 is the squared ReLU
    activation: Literal["relu2", "relu", "gelu"] = "relu2"
    qk_norm: bool = False  # a LayerNorm on every head's queries and keys (Idefics)
    frames: int = 0  # learned positions in time; 0: none, frames are a set
    project: bool = True  # to the output width; otherwise tokens are as wide as the features

    def __post_init__(self) -> None:
        for name in ("latents", "depth", "heads", "head_width", "ffn"):
            if getattr(self, name) < 1:
                raise SpecError(f"bridge.{name} must be at least 1, got {getattr(self, name)}")
        if self.frames < 0:
            raise SpecError(
                f"bridge.frames must be 0 (no positions in time) or more, got {self.frames}"
            )

    def build(self, in_width: int, out_width: int) -> "Resampler":
        return Resampler(self, in_width, out_width)

    def tokens(self, patches: int) -> int:
        return self.latents

    def tiny(self) -> "ResamplerConfig":
        """Return a config with eight latents and two layers; frames stay."""
        return replace(
            self, latents=min(self.latents, 8), depth=min(self.depth, 2), heads=2, head_width=8
        )


class Resampler(nn.Module):
    """`latents`, `layers`, `norm`; `frames` and `project` if the config has them."""

    def __init__(self, config: ResamplerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, in_width))
        self.frames = nn.Parameter(torch.randn(config.frames, in_width)) if config.frames else None
        self.layers = nn.ModuleList(ResamplerLayer(config, in_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(in_width)
        self.project = nn.Linear(in_width, out_width) if config.project else nn.Identity()

    def forward(self, patches: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (N, P, F), or frames (N, T, P, F), to (N, Q, D).

        `mask` (N, P) or (N, T, P) bool is False on padding, which has no effect; real frames come
        before padded ones. Raises DataError if its shape is not that of the patches.
        """
        if mask is not None and mask.shape != patches.shape[:-1]:
            raise DataError(
                "resampler: the mask of the patches has another shape. "
                f"Got {tuple(mask.shape)}; expected {tuple(patches.shape[:-1])}"
            )
        if patches.ndim == 4:
            patches = self._add_frame_positions(patches, mask).flatten(1, 2)
            mask = None if mask is None else mask.flatten(1, 2)
        latents_NQF = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents_NQF = layer(latents_NQF, patches, mask)
        tokens_NQD: Tensor = self.project(self.norm(latents_NQF))
        return tokens_NQD

    def _add_frame_positions(self, patches_NTPF: Tensor, mask_NTP: Tensor | None) -> Tensor:
        if self.frames is None:
            return patches_NTPF
        count, length = patches_NTPF.shape[:2]
        frames_N = torch.full((count,), length) if mask_NTP is None else mask_NTP.any(-1).sum(-1)
        position_NT = frame_positions(
            frames_N.to(self.frames.device),
            torch.arange(length).to(self.frames.device),
            len(self.frames),
        )
        return patches_NTPF + interpolate_rows(self.frames, position_NT).unsqueeze(2)


class ResamplerLayer(nn.Module):
    """Attention of latents to patches and latents, then a feed-forward part.

    Both have a residual connection and no bias.
    """

    def __init__(self, config: ResamplerConfig, width: int) -> None:
        super().__init__()
        from transformers.activations import ACT2FN  # takes seconds: not before a model is built

        self.heads, inner = config.heads, config.heads * config.head_width
        self.media_norm, self.latent_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.query_norm = nn.LayerNorm(config.head_width) if config.qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(config.head_width) if config.qk_norm else nn.Identity()
        self.out = nn.Linear(inner, width, bias=False)
        self.ffn_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.ffn * width, bias=False)
        self.activation = ACT2FN[config.activation]
        self.down = nn.Linear(config.ffn * width, width, bias=False)

    def forward(self, latents_NQF: Tensor, patches_NPF: Tensor, mask_NP: Tensor | None) -> Tensor:
        """Return the latents (N, Q, F) after both parts."""
        normed_NQF = self.latent_norm(latents_NQF)
        keys_NKF = torch.cat([self.media_norm(patches_NPF), normed_NQF], dim=1)
        attended_NHQW = F.scaled_dot_product_attention(
            self.query_norm(self._heads(self.query(normed_NQF))),
            self.key_norm(self._heads(self.key(keys_NKF))),
            self._heads(self.value(keys_NKF)),
            attn_mask=None if mask_NP is None else _with_latents(mask_NP, normed_NQF.shape[1]),
        )
        latents_NQF = latents_NQF + self.out(attended_NHQW.transpose(1, 2).flatten(2))
        hidden_NQF = self.activation(self.up(self.ffn_norm(latents_NQF)))
        return latents_NQF + cast(Tensor, self.down(hidden_NQF))

    def _heads(self, states: Tensor) -> Tensor:
        heads: Tensor = states.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


def frame_positions(frames_N: Tensor, index_T: Tensor, learned: int) -> Tensor:
    """Return (N, T), the fractional position of each frame among the `learned` ones.

    Up to `learned` frames take the first positions. More frames are spread evenly, from the first
    to the last position (Flamingo trains on 8 frames and reads 30; appendix A).
    """
    spread_N = (learned - 1) / (frames_N - 1).clamp(min=1)
    step_N1 = torch.where(frames_N > learned, spread_N, 1.0).unsqueeze(-1)
    return (index_T * step_N1).clamp(max=learned - 1)


def interpolate_rows(rows_LF: Tensor, position: Tensor) -> Tensor:
    """Return the rows at fractional positions, interpolated linearly: (*position.shape, F)."""
    low = position.floor().long()
    share = (position - low).unsqueeze(-1).to(rows_LF.dtype)
    return rows_LF[low] * (1 - share) + rows_LF[(low + 1).clamp(max=len(rows_LF) - 1)] * share


def _with_latents(mask_NP: Tensor, latents: int) -> Tensor:
    """Return (N, 1, 1, K): latents are always visible, so that no row is without a key."""
    return torch.cat([mask_NP, mask_NP.new_ones(len(mask_NP), latents)], dim=1)[:, None, None]
