"""Models: towers, bridges, and the wirings that put them together. The specs are the public face."""

from bridgework.models.bridges import MLP, Linear
from bridgework.models.language import LanguageConfig
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.models.vision import EfficientNetConfig, ViTConfig

__all__ = ["MLP", "EfficientNetConfig", "LanguageConfig", "Linear", "PrefixVLM", "ViTConfig"]
