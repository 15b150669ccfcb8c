"""Models: towers, bridges and wirings. The public names are configs; `build()` makes modules."""

from bridgework.models.blip_med import MEDConfig
from bridgework.models.blip_text import MEDTextConfig
from bridgework.models.blip_vit import BlipViTConfig, EvaConfig
from bridgework.models.clip_resnet import ModifiedResNetConfig
from bridgework.models.clip_text import CLIPTextConfig
from bridgework.models.cross_attention_vlm import CrossAttentionVLMConfig
from bridgework.models.dual_encoder import DualEncoderConfig
from bridgework.models.gated_cross_attention import GatesConfig
from bridgework.models.image_classifier import ImageClassifierConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.lora import LoRAConfig
from bridgework.models.momentum_encoder import MomentumConfig
from bridgework.models.prefix_vlm import PrefixVLMConfig
from bridgework.models.projectors import ConcatConfig, LinearConfig, MLPConfig
from bridgework.models.qformer import QFormerConfig
from bridgework.models.qformer_pretrainer import QFormerPretrainerConfig
from bridgework.models.resampler import ResamplerConfig
from bridgework.models.vision import EfficientNetConfig, ViTConfig

__all__ = [
    "BlipViTConfig",
    "CLIPTextConfig",
    "ConcatConfig",
    "CrossAttentionVLMConfig",
    "DualEncoderConfig",
    "EfficientNetConfig",
    "EvaConfig",
    "GatesConfig",
    "ImageClassifierConfig",
    "LanguageConfig",
    "LinearConfig",
    "LoRAConfig",
    "MEDConfig",
    "MEDTextConfig",
    "MLPConfig",
    "ModifiedResNetConfig",
    "MomentumConfig",
    "PrefixVLMConfig",
    "QFormerConfig",
    "QFormerPretrainerConfig",
    "ResamplerConfig",
    "ViTConfig",
]
