"""CLIP to and from transformers' `CLIPModel`. A ResNet has no place there."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bridgework.errors import SpecError, WeightsError
from bridgework.losses import Contrastive
from bridgework.models import text as text_tower
from bridgework.models import vision as vision_tower
from bridgework.models.dual_encoder import DualEncoder
from bridgework.models.text import CLIPTextConfig
from bridgework.models.vision import ViTConfig
from bridgework.system import AdamW, Budget, Mixture, Source, Stage

ARCHITECTURES = ("CLIPModel",)
PARTS = {  # ours -> transformers'
    "vision.tower.": "vision_model.",
    "text.tower.": "text_model.",
    "heads.image.": "visual_projection.",
    "heads.text.": "text_projection.",
    "heads.logit_scale": "logit_scale",
}
FIXED = {"layer_norm_eps": 1e-5, "attention_dropout": 0.0, "num_channels": 3}  # what our towers never are otherwise


def spec(config: Any) -> DualEncoder:
    """The wiring of a CLIPConfig. Raises WeightsError for what it cannot be."""
    for tower in (config.vision_config, config.text_config):
        for name, value in FIXED.items():
            if (found := getattr(tower, name, value)) != value:
                raise WeightsError(f"this CLIP has {name} {found} in its {tower.model_type}, and only {value} is read")
    vision = {ours: getattr(config.vision_config, theirs) for ours, theirs in vision_tower.VIT_FIELDS.items()}
    text = {ours: getattr(config.text_config, theirs) for ours, theirs in text_tower.FIELDS.items()}
    return DualEncoder(
        vision=ViTConfig(
            kind="clip", layer=-1, select="cls", act=config.vision_config.hidden_act, fit="crop", **vision
        ),
        text=CLIPTextConfig(tokenizer=config.name_or_path or "bytes", **text),
        embed=config.projection_dim,
    )


def config(model: DualEncoder) -> Any:
    """The CLIPConfig of a wiring. Raises SpecError where transformers has none."""
    from transformers import CLIPConfig

    vision = model.vision
    if not isinstance(vision, ViTConfig) or vision.kind != "clip" or not model.project_image:
        raise SpecError(f"transformers' CLIPModel holds a projected CLIP ViT, not a {type(vision).__name__}")
    numbers = {theirs: getattr(vision, ours) for ours, theirs in vision_tower.VIT_FIELDS.items()}
    numbers |= {"hidden_act": vision.act or "quick_gelu", "projection_dim": model.embed}
    words = {theirs: getattr(model.text, ours) for ours, theirs in text_tower.FIELDS.items()}
    words |= {"projection_dim": model.embed, "bos_token_id": None, "pad_token_id": None}
    return CLIPConfig(vision_config=numbers, text_config=words, projection_dim=model.embed)


def names(model: DualEncoder) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one; no two are tied. `logit_scale` is (1,) here and () there."""
    with torch.device("meta"):
        ours = [name for name, _ in model.build(pretrained=False).named_parameters()]
    return {name: _theirs(name) for name in ours}


def stage(model: DualEncoder) -> Stage:
    """A stage that holds the weights: nothing is trained in it."""
    return Stage(
        name="contrast",
        model=model,
        trains={"*": 1.0},
        losses=(Contrastive(temperature=None),),
        data=Mixture(
            sources=(Source(name="shapes", dataset="synthetic:shapes"),),
            template="caption",
            max_tokens=model.context,
            lanes=1,
        ),
        budget=Budget(steps=1, batch=1),
        optim=AdamW(peak_lr=1e-5),
    )


@torch.no_grad()
def outputs(ours: Any, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' features and logits for two random images and texts."""
    generator = torch.Generator().manual_seed(0)
    look, words = ours.vision.config.pixels, theirs.config.text_config
    images = torch.randint(0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator)
    length = min(8, words.max_position_embeddings)
    ids = torch.randint(0, words.vocab_size - 1, (2, length), generator=generator)
    ids[ids == words.eos_token_id] = 0
    ids[:, -1] = words.vocab_size - 1 if words.eos_token_id == 2 else words.eos_token_id  # 2: of the first configs
    attention = torch.ones_like(ids)
    expected = theirs(input_ids=ids, attention_mask=attention, pixel_values=vision_tower.normalise(images, look))
    found = ours(ids, attention.bool(), pixels=images)
    image, text = nn.functional.normalize(found.image_BD, dim=-1), nn.functional.normalize(found.text_BD, dim=-1)
    return {
        "image": (image, expected.image_embeds),
        "text": (text, expected.text_embeds),
        "logits": (found.logit_scale[0] * image @ text.T, expected.logits_per_image),
    }


def _theirs(name: str) -> str:
    (part,) = (part for part in PARTS if name.startswith(part))
    return PARTS[part] + name.removeprefix(part)
