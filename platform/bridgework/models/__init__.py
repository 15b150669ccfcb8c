"""Models: towers, bridges, and the wirings that put them together. The specs are the public face."""

from bridgework.models.blip_vit import BlipViTConfig
from bridgework.models.bridges import MLP, Concat, Linear, QFormer, Resampler
from bridgework.models.bridges.gated_xattn import Gates
from bridgework.models.crossattn_vlm import CrossAttentionVLM
from bridgework.models.dual_encoder import DualEncoder
from bridgework.models.eva import EvaConfig
from bridgework.models.image_classifier import ImageClassifier
from bridgework.models.language import LanguageConfig
from bridgework.models.lora import LoRA
from bridgework.models.med import MED
from bridgework.models.med_text import MEDTextConfig
from bridgework.models.modified_resnet import ModifiedResNetConfig
from bridgework.models.momentum import MomentumConfig
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.models.qformer_pretrainer import QFormerPretrainer
from bridgework.models.text import CLIPTextConfig
from bridgework.models.vision import EfficientNetConfig, ViTConfig

__all__ = [
    "MED",
    "MLP",
    "BlipViTConfig",
    "CLIPTextConfig",
    "Concat",
    "CrossAttentionVLM",
    "DualEncoder",
    "EfficientNetConfig",
    "EvaConfig",
    "Gates",
    "ImageClassifier",
    "LanguageConfig",
    "Linear",
    "LoRA",
    "MEDTextConfig",
    "ModifiedResNetConfig",
    "MomentumConfig",
    "PrefixVLM",
    "QFormer",
    "QFormerPretrainer",
    "Resampler",
    "ViTConfig",
]
