"""The prefix wiring with an MLP to and from transformers' `LlavaForConditionalGeneration` (LLaVA 1.5)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import (
    IMAGE_WORD,
    expect,
    exported_settings,
    holding,
    image_word,
    image_words,
    language_ids,
    parameters,
    renamed,
    vit,
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
WANTED: dict[str, Any] = {"projector_hidden_act": "gelu", "multimodal_projector_bias": True}
KINDS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}


def spec(config: Any, *, tied: bool | None = None) -> PrefixVLMConfig:
    """The wiring of a LlavaConfig. Raises WeightsError for what it cannot be."""
    expect(config, WANTED)
    vision, layer = config.vision_config, config.vision_feature_layer
    kind = next((ours for ours, theirs in KINDS.items() if theirs == vision.model_type), None)
    if kind is None or not isinstance(layer, int):
        raise WeightsError(
            f"this LLaVA reads layer {layer} of a {vision.model_type}; one layer of CLIP or SigLIP is read"
        )
    select = (
        "all" if config.vision_feature_select_strategy == "full" and kind == "clip" else "patch"
    )
    if kind == "siglip" and config.vision_feature_select_strategy != "full":
        raise WeightsError(
            "this LLaVA drops the first patch of a SigLIP as if it were a CLS token; that is not read"
        )
    return PrefixVLMConfig(
        vision=vit(vision, cast(Literal["clip", "siglip"], kind), layer=layer, select=select),
        bridge=MLPConfig(depth=2),
        language=LanguageConfig.of(config.text_config, config.name_or_path or "bytes", tied=tied),
    )


def config(model: PrefixVLMConfig) -> Any:
    """The LlavaConfig of a wiring. Raises SpecError where transformers has none."""
    from transformers import LlavaConfig

    vision = model.vision
    if (
        not isinstance(vision, ViTConfig)
        or vision.kind not in KINDS
        or model.bridge != MLPConfig(depth=2)
        or model.pixels.grids
    ):
        raise SpecError(
            "transformers' LLaVA is a CLIP or SigLIP ViT, one square of it, and an MLP of two matrices"
        )
    whole = vision.select == "all" or vision.kind == "siglip"
    return LlavaConfig(
        vision_config=vision.config().to_dict(),
        text_config=model.language.config().to_dict(),
        vision_feature_layer=vision.layer,
        vision_feature_select_strategy="full" if whole else "default",
        image_seq_length=model.image_tokens,
        tie_word_embeddings=model.language.tied,
        architectures=list(ARCHITECTURES),
        **WANTED,
    )


def ids(model: PrefixVLMConfig, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
    """The special ids of a model that was trained here, and its settings of generation."""
    return language_ids(tokenizer, endings, built, image_word(model.language, tokenizer))


def words(model: PrefixVLMConfig, said: Origin) -> Mapping[int, str]:
    """The word that the tokenizer must have for an image, by its id."""
    return image_words(said)


def names(model: PrefixVLMConfig) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one; of tied ones, the input embeddings. SigLIP's head is nobody's."""
    return {name: renamed(name, PARTS) for name in parameters(model)}


def outputs(ours: Any, theirs: Any, said: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' image tokens, logits and texts for random rows with an image in each."""
    return exported_settings(ours, theirs, said, spec(theirs.config).image_tokens)


def stage(model: PrefixVLMConfig) -> Stage:
    """A stage that holds the weights."""
    return holding(model, "instruct", (LanguageModeling(),), "v1")


def processor(model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """transformers' processor of the pictures and texts of the wiring."""
    return llava_processor("LlavaProcessor", model, tokenizer, template)


def llava_processor(name: str, model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """The processor of a LLaVA: an image takes the places of its patches, where its word stands."""
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
