"""CLIP to and from transformers' `CLIPModel`. A ResNet has no place there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import holding, parameters, renamed, vit
from bridgework.hf.processors import image_processor, processor_class
from bridgework.losses import Contrastive
from bridgework.models import clip_text as text_tower
from bridgework.models import vision as vision_tower
from bridgework.models.clip_text import CLIPTextConfig
from bridgework.models.dual_encoder import DualEncoderConfig
from bridgework.models.origin import Origin
from bridgework.models.vision import ViTConfig
from bridgework.system import Stage

ARCHITECTURES = ("CLIPModel",)
PARTS = {  # ours -> transformers'
    "vision.tower.": "vision_model.",
    "text.tower.": "text_model.",
    "heads.image.": "visual_projection.",
    "heads.text.": "text_projection.",
    "heads.logit_scale": "logit_scale",
}
FIXED = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}  # what our text tower never is otherwise


def spec(config: Any, *, tied: bool | None = None) -> DualEncoderConfig:
    """The wiring of a CLIPConfig. Raises WeightsError for what it cannot be."""
    for name, value in FIXED.items():
        if (found := getattr(config.text_config, name, value)) != value:
            raise WeightsError(
                f"this CLIP has {name} {found} in its clip_text_model, and only {value} is read"
            )
    text = {ours: getattr(config.text_config, theirs) for ours, theirs in text_tower.FIELDS.items()}
    return DualEncoderConfig(
        vision=vit(config.vision_config, "clip", layer=-1, select="cls", fit="crop"),
        text=CLIPTextConfig(tokenizer=config.name_or_path or "bytes", **text),
        embed=config.projection_dim,
    )


def config(model: DualEncoderConfig) -> Any:
    """The CLIPConfig of a wiring. Raises SpecError where transformers has none."""
    from transformers import CLIPConfig

    vision = model.vision
    if not isinstance(vision, ViTConfig) or vision.kind != "clip" or not model.project_image:
        raise SpecError(
            f"transformers' CLIPModel holds a projected CLIP ViT, not a {type(vision).__name__}"
        )
    projected: dict[str, Any] = {"projection_dim": model.embed}
    return CLIPConfig(
        vision_config=vision.config().to_dict() | projected,
        text_config=model.text.config().to_dict() | projected,
        **projected,
    )


def ids(model: DualEncoderConfig, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
    """The special ids of a model that was trained here."""
    given = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Origin(config={f"text_config.{name}": value for name, value in given.items()})


def names(model: DualEncoderConfig) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one; no two are tied. `logit_scale` is (1,) here and () there."""
    return {name: renamed(name, PARTS) for name in parameters(model)}


def stage(model: DualEncoderConfig) -> Stage:
    """A stage that holds the weights: nothing is trained in it."""
    return holding(model, "contrast", (Contrastive(temperature=None),), "caption")


def processor(model: DualEncoderConfig, tokenizer: Any, template: str | None) -> Any:
    """transformers' processor of the pictures and texts of the wiring."""
    return processor_class("CLIPProcessor")(
        image_processor=image_processor(model.pixels), tokenizer=tokenizer
    )


@torch.no_grad()
def outputs(ours: Any, theirs: Any, said: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' features and logits for two random images and texts."""
    generator = torch.Generator().manual_seed(0)
    look, words = ours.vision.config.pixels, theirs.config.text_config
    images = torch.randint(
        0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    length = min(8, words.max_position_embeddings)
    ids = torch.randint(0, words.vocab_size - 1, (2, length), generator=generator)
    ids[ids == words.eos_token_id] = 0
    ids[:, -1] = (
        words.vocab_size - 1 if words.eos_token_id == 2 else words.eos_token_id
    )  # 2: of the first configs
    attention = torch.ones_like(ids)
    expected = theirs(
        input_ids=ids, attention_mask=attention, pixel_values=vision_tower.normalize(images, look)
    )
    found = ours(ids, attention.bool(), pixels=images)
    image, text = (
        nn.functional.normalize(found.image_BD, dim=-1),
        nn.functional.normalize(found.text_BD, dim=-1),
    )
    return {
        "image": (image, expected.image_embeds),
        "text": (text, expected.text_embeds),
        "logits": (found.logit_scale[0] * image @ text.T, expected.logits_per_image),
    }
