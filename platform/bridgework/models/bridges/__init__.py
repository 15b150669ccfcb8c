"""Bridges: what turns the patches of a vision tower into tokens that a language model reads."""

from bridgework.models.bridges.projector import MLP, Linear

__all__ = ["MLP", "Linear"]
