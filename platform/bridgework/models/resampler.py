"""The perceiver resampler: any number of patches become a fixed number of tokens (Flamingo, arXiv:2204.14198, 2.1).

xGen-MM uses the same block without frames and with GELU, on every tile by itself (arXiv:2408.08872).
"""

# N images or videos  T frames  P patches of one  F width of the tower's features  Q latents  D width of what reads them
# K keys: patches and latents  H heads  W width of a head

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError


@config_class
class ResamplerConfig:
    """Latents read the patches `depth` times over; the defaults are Flamingo's (A.1.1, table 4)."""

    latents: int = 64
    depth: int = 6
    heads: int = 16
    head_width: int = 96
    ffn: int = 4  # hidden units of the feed-forward part, in widths of the features
    activation: Literal["relu2", "relu", "gelu"] = (
        "relu2"  # transformers' names; relu2 is the squared ReLU
    )
    qk_norm: bool = False  # a LayerNorm on every head's queries and keys (Idefics)
    frames: int = 0  # learned positions in time; 0: frames are a set
    project: bool = (
        True  # to the width of what reads the tokens; without it they stay as wide as the features
    )

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
        """Eight latents and two layers; frames stay."""
        return replace(
            self, latents=min(self.latents, 8), depth=min(self.depth, 2), heads=2, head_width=8
        )


class Resampler(nn.Module):
    """`latents`, `frames` where there are any, `layers`, `norm`, and `project` where the spec has it."""

    def __init__(self, config: ResamplerConfig, in_width: int, out_width: int) -> None:
        super().__init__()
        self.config = config
        self.latents = nn.Parameter(torch.randn(config.latents, in_width))
        self.frames = nn.Parameter(torch.randn(config.frames, in_width)) if config.frames else None
        self.layers = nn.ModuleList(ResamplerLayer(config, in_width) for _ in range(config.depth))
        self.norm = nn.LayerNorm(in_width)
        self.project = nn.Linear(in_width, out_width) if config.project else nn.Identity()

    def forward(self, patches: Tensor, real: Tensor | None = None) -> Tensor:
        """(N, P, F), or frames (N, T, P, F), -> (N, Q, D).

        `real` (N, P) or (N, T, P) bool is False on padding, which changes nothing; the frames that are there come
        first. Raises DataError when its shape is not that of the patches.
        """
        if real is not None and real.shape != patches.shape[:-1]:
            raise DataError(
                f"the mask of the patches is {tuple(real.shape)}, they are {tuple(patches.shape[:-1])}"
            )
        if patches.ndim == 4:
            patches = self._in_time(patches, real).flatten(1, 2)
            real = None if real is None else real.flatten(1, 2)
        latents_NQF = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents_NQF = layer(latents_NQF, patches, real)
        tokens_NQD: Tensor = self.project(self.norm(latents_NQF))
        return tokens_NQD

    def _in_time(self, patches_NTPF: Tensor, real_NTP: Tensor | None) -> Tensor:
        if self.frames is None:
            return patches_NTPF
        count, length, places = (
            len(patches_NTPF),
            patches_NTPF.shape[1],
            torch.arange(patches_NTPF.shape[1]),
        )
        there_N = real_NTP.any(-1).sum(-1) if real_NTP is not None else torch.full((count,), length)
        position_NT = frame_positions(
            there_N.to(self.frames.device), places.to(self.frames.device), len(self.frames)
        )
        return patches_NTPF + at(self.frames, position_NT).unsqueeze(2)


class ResamplerLayer(nn.Module):
    """Latents attend to patches and latents, then a feed-forward part; both with a residual, none with a bias."""

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

    def forward(self, latents_NQF: Tensor, patches_NPF: Tensor, real_NP: Tensor | None) -> Tensor:
        own_NQF = self.latent_norm(latents_NQF)
        seen_NKF = torch.cat([self.media_norm(patches_NPF), own_NQF], dim=1)
        heard_NHQW = F.scaled_dot_product_attention(
            self.query_norm(self._heads(self.query(own_NQF))),
            self.key_norm(self._heads(self.key(seen_NKF))),
            self._heads(self.value(seen_NKF)),
            attn_mask=None if real_NP is None else _with_latents(real_NP, own_NQF.shape[1]),
        )
        latents_NQF = latents_NQF + self.out(heard_NHQW.transpose(1, 2).flatten(2))
        read_NQF: Tensor = latents_NQF + self.down(
            self.activation(self.up(self.ffn_norm(latents_NQF)))
        )
        return read_NQF

    def _heads(self, states: Tensor) -> Tensor:
        heads: Tensor = states.unflatten(-1, (self.heads, -1))
        return heads.transpose(1, 2)


def frame_positions(there_N: Tensor, places_T: Tensor, learned: int) -> Tensor:
    """(N, T) where each of a video's frames lies among the `learned` positions.

    Up to `learned` frames take the first ones; more are spread evenly, so that the first and the last keep theirs
    (Flamingo trains on 8 frames and reads 30; appendix A).
    """
    spread_N = (learned - 1) / (there_N - 1).clamp(min=1)
    return (places_T * torch.where(there_N > learned, spread_N, 1.0).unsqueeze(-1)).clamp(
        max=learned - 1
    )


def at(rows_LF: Tensor, position: Tensor) -> Tensor:
    """The rows at fractional positions, linear between two of them: position's shape with F behind it."""
    low = position.floor().long()
    share = (position - low).unsqueeze(-1).to(rows_LF.dtype)
    return rows_LF[low] * (1 - share) + rows_LF[(low + 1).clamp(max=len(rows_LF) - 1)] * share


def _with_latents(real_NP: Tensor, latents: int) -> Tensor:
    """(N, 1, 1, K): latents are always there, so that no row is without a key."""
    return torch.cat([real_NP, real_NP.new_ones(len(real_NP), latents)], dim=1)[:, None, None]
