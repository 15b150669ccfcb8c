"""Bridges: what turns the patches of a vision tower into tokens that a language model reads."""

from bridgework.models.bridges.projector import MLP, Concat, Linear
from bridgework.models.bridges.qformer import QFormer
from bridgework.models.bridges.resampler import Resampler

__all__ = ["MLP", "Concat", "Linear", "QFormer", "Resampler"]
