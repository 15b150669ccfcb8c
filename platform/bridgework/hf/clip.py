"""CLIP to and from transformers' `CLIPModel`, which has no ResNet."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import parameter_names, replace_prefix, vit_config, weights_stage
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
FIXED = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0}  # of our text tower


def model_config(config: Any, *, tied: bool | None = None) -> DualEncoderConfig:
    """Return the model config of a CLIPConfig. Raises WeightsError for unsupported fields."""
    for name, value in FIXED.items():
        if (given := getattr(config.text_config, name, value)) != value:
            raise WeightsError(
                f"clip_text_model: {name} is not supported. Got {given}; expected {value}"
            )
    text = {ours: getattr(config.text_config, theirs) for ours, theirs in text_tower.FIELDS.items()}
    return DualEncoderConfig(
        vision=vit_config(config.vision_config, "clip", layer=-1, select="cls", fit="crop"),
        text=CLIPTextConfig(tokenizer=config.name_or_path or "bytes", **text),
        embed=config.projection_dim,
    )


def hf_config(model: DualEncoderConfig) -> Any:
    """Return the CLIPConfig of a model config.

    Raises SpecError if transformers has no such model.
    """
    from transformers import CLIPConfig

    vision = model.vision
    if not isinstance(vision, ViTConfig) or vision.kind != "clip" or not model.project_image:
        raise SpecError(
            "CLIPModel: vision tower not supported by transformers. "
            f"Got {type(vision).__name__}; expected a projected CLIP ViT"
        )
    projection: dict[str, Any] = {"projection_dim": model.embed}
    return CLIPConfig(
        vision_config=vision.config().to_dict() | projection,
        text_config=model.text.config().to_dict() | projection,
        **projection,
    )


def special_ids(
    model: DualEncoderConfig, tokenizer: Any, endings: Sequence[int], built: Any
) -> Origin:
    """Return the special ids of a model that was trained here."""
    given = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return Origin(config={f"text_config.{name}": value for name, value in given.items()})


def tensor_names(model: DualEncoderConfig) -> Mapping[str, str]:
    """Return our parameter names -> transformers', one to one; none are tied.

    `logit_scale` is (1,) here and () there.
    """
    return {name: replace_prefix(name, PARTS) for name in parameter_names(model)}


def stage(model: DualEncoderConfig) -> Stage:
    """Return the stage for the imported weights; it is never trained."""
    return weights_stage(model, "contrast", (Contrastive(temperature=None),), "caption")


def processor(model: DualEncoderConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text."""
    return processor_class("CLIPProcessor")(
        image_processor=image_processor(model.pixels), tokenizer=tokenizer
    )


@torch.no_grad()
def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') embeddings and logits for two random images and texts."""
    generator = torch.Generator().manual_seed(0)
    look, words = ours.vision.config.pixels, theirs.config.text_config
    images = torch.randint(
        0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    length = min(8, words.max_position_embeddings)
    ids = torch.randint(0, words.vocab_size - 1, (2, length), generator=generator)
    ids[ids == words.eos_token_id] = 0
    # the first configs have the wrong eos_token_id 2; transformers then reads the highest id
    ids[:, -1] = words.vocab_size - 1 if words.eos_token_id == 2 else words.eos_token_id
    attention = torch.ones_like(ids)
    expected = theirs(
        input_ids=ids, attention_mask=attention, pixel_values=vision_tower.normalize(images, look)
    )
    embedded = ours(ids, attention.bool(), pixels=images)
    image = nn.functional.normalize(embedded.image_BD, dim=-1)
    text = nn.functional.normalize(embedded.text_BD, dim=-1)
    return {
        "image": (image, expected.image_embeds),
        "text": (text, expected.text_embeds),
        "logits": (embedded.logit_scale[0] * image @ text.T, expected.logits_per_image),
    }
