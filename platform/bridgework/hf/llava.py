"""PrefixVLM with an MLP to and from transformers' `LlavaForConditionalGeneration` (LLaVA 1.5)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import (
    IMAGE_WORD,
    check_fields,
    compare_prefix_vlm,
    image_token_id,
    image_tokens,
    language_special_ids,
    parameter_names,
    replace_prefix,
    vit_config,
    weights_stage,
)
from bridgework.hf.processors import chat_template, image_processor, processor_class
from bridgework.losses import LanguageModeling
from bridgework.models import LanguageConfig, MLPConfig, PrefixVLMConfig, ViTConfig
from bridgework.models.origin import Origin
from bridgework.system import Stage

ARCHITECTURES = ("LlavaForConditionalGeneration",)
PARTS = {  # ours -> transformers'
    "vision.tower.": "model.vision_tower.",
    "bridge.": "model.multi_modal_projector.",
    "language.model.": "model.language_model.",
    "language.lm_head.": "lm_head.",
}
FIXED: dict[str, Any] = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def model_config(config: Any, *, tied: bool | None = None) -> PrefixVLMConfig:
    """Return the model config of a LlavaConfig. Raises WeightsError for unsupported fields."""
    check_fields(config, FIXED)
    vision, layer = config.vision_config, config.vision_feature_layer
    kind = next((ours for ours, theirs in KINDS.items() if theirs == vision.model_type), None)
    if kind is None or not isinstance(layer, int):
        raise WeightsError(
            "LLaVA: vision features not supported. "
            f"Got layer {layer} of a {vision.model_type}; expected one layer of CLIP or SigLIP"
        )
    select = (
        "all" if config.vision_feature_select_strategy == "full" and kind == "clip" else "patch"
    )
    if kind == "siglip" and config.vision_feature_select_strategy != "full":
        raise WeightsError(
            "LLaVA: vision_feature_select_strategy is not supported, because it drops the first "
            "patch of a SigLIP as if it were a CLS token. "
            f"Got {config.vision_feature_select_strategy!r}; expected 'full'"
        )
    return PrefixVLMConfig(
        vision=vit_config(
            vision, cast(Literal["clip", "siglip"], kind), layer=layer, select=select
        ),
        bridge=MLPConfig(depth=2),
        language=LanguageConfig.of(config.text_config, config.name_or_path or "bytes", tied=tied),
    )


def hf_config(model: PrefixVLMConfig) -> Any:
    """Return the LlavaConfig of a model config.

    Raises SpecError if transformers has no such model.
    """
    from transformers import LlavaConfig

    vision = model.vision
    if (
        not isinstance(vision, ViTConfig)
        or vision.kind not in KINDS
        or model.bridge != MLPConfig(depth=2)
        or model.pixels.grids
    ):
        raise SpecError(
            "LLaVA: model not supported by transformers. Expected a CLIP or SigLIP ViT without "
            "tiles, and an MLP of two matrices"
        )
    full = vision.select == "all" or vision.kind == "siglip"
    return LlavaConfig(
        vision_config=vision.config().to_dict(),
        text_config=model.language.config().to_dict(),
        vision_feature_layer=vision.layer,
        vision_feature_select_strategy="full" if full else "default",
        image_seq_length=model.image_tokens,
        tie_word_embeddings=model.language.tied,
        architectures=list(ARCHITECTURES),
        **FIXED,
    )


def special_ids(
    model: PrefixVLMConfig, tokenizer: Any, endings: Sequence[int], built: Any
) -> Origin:
    """Return the special ids and generation settings of a model that was trained here."""
    return language_special_ids(
        tokenizer, endings, built, image_token_id(model.language, tokenizer)
    )


def added_tokens(model: PrefixVLMConfig, origin: Origin) -> Mapping[int, str]:
    """Return the image token that the tokenizer needs, by its id."""
    return image_tokens(origin)


def tensor_names(model: PrefixVLMConfig) -> Mapping[str, str]:
    """Return our parameter names -> transformers', one to one.

    Tied embeddings have the name of the input embeddings. SigLIP's head has no counterpart.
    """
    return {name: replace_prefix(name, PARTS) for name in parameter_names(model)}


def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') features, logits and texts for random rows with an image."""
    return compare_prefix_vlm(ours, theirs, origin, model_config(theirs.config).image_tokens)


def stage(model: PrefixVLMConfig) -> Stage:
    """Return the stage for the imported weights; it is never trained."""
    return weights_stage(model, "instruct", (LanguageModeling(),), "v1")


def processor(model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text."""
    return llava_processor("LlavaProcessor", model, tokenizer, template)


def llava_processor(name: str, model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the processor of a LLaVA; each image token is expanded to one token per patch."""
    vision = cast(ViTConfig, model.vision)
    has_cls = vision.kind == "clip"
    return processor_class(name)(
        image_processor=image_processor(model.pixels),
        tokenizer=tokenizer,
        patch_size=vision.patch,
        vision_feature_select_strategy="default"
        if has_cls and vision.select == "patch"
        else "full",
        num_additional_image_tokens=int(has_cls),
        chat_template=None if template is None else chat_template(template, tokenizer, IMAGE_WORD),
    )
