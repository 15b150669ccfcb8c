"""The prefix wiring with an MLP to and from transformers' `LlavaForConditionalGeneration` (LLaVA 1.5)."""

from collections.abc import Mapping
from typing import Any, Literal, cast

from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.interop.parts import expect, holding, image_word, parameters, renamed, written
from bridgework.losses import Captioning
from bridgework.models import MLP, LanguageConfig, PrefixVLM, ViTConfig
from bridgework.models.vision import VIT_FIELDS
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


def spec(config: Any) -> PrefixVLM:
    """The wiring of a LlavaConfig. Raises WeightsError for what it cannot be."""
    expect(config, WANTED)
    vision, layer = config.vision_config, config.vision_feature_layer
    kind = next((ours for ours, theirs in KINDS.items() if theirs == vision.model_type), None)
    if kind is None or not isinstance(layer, int):
        raise WeightsError(
            f"this LLaVA reads layer {layer} of a {vision.model_type}; one layer of CLIP or SigLIP is read"
        )
    select = "all" if config.vision_feature_select_strategy == "full" and kind == "clip" else "patch"
    if kind == "siglip" and config.vision_feature_select_strategy != "full":
        raise WeightsError("this LLaVA drops the first patch of a SigLIP as if it were a CLS token; that is not read")
    return PrefixVLM(
        vision=ViTConfig(
            kind=cast(Literal["clip", "siglip"], kind),
            layer=layer,
            select=cast(Literal["patch", "all"], select),
            act=vision.hidden_act,
            **{ours: getattr(vision, theirs) for ours, theirs in VIT_FIELDS.items()},
        ),
        bridge=MLP(depth=2),
        language=LanguageConfig.of(config.text_config, config.name_or_path or "bytes"),
    )


def config(model: PrefixVLM) -> Any:
    """The LlavaConfig of a wiring. Raises SpecError where transformers has none."""
    from transformers import AutoConfig, LlavaConfig

    vision = model.vision
    if (
        not isinstance(vision, ViTConfig)
        or vision.kind not in KINDS
        or model.bridge != MLP(depth=2)
        or model.pixels.grids
    ):
        raise SpecError("transformers' LLaVA is a CLIP or SigLIP ViT, one square of it, and an MLP of two matrices")
    numbers: dict[str, Any] = {theirs: getattr(vision, ours) for ours, theirs in VIT_FIELDS.items()}
    if vision.act is not None:
        numbers["hidden_act"] = vision.act
    if vision.kind == "siglip":
        numbers["vision_use_head"] = False
    whole = vision.select == "all" or vision.kind == "siglip"
    return LlavaConfig(
        vision_config=AutoConfig.for_model(KINDS[vision.kind], **numbers).to_dict(),
        text_config=model.language.config().to_dict(),
        vision_feature_layer=vision.layer,
        vision_feature_select_strategy="full" if whole else "default",
        image_seq_length=model.image_tokens,
        image_token_index=image_word(model.language),
        tie_word_embeddings=model.language.tied,
        architectures=list(ARCHITECTURES),
        **WANTED,
    )


def names(model: PrefixVLM) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one; of tied ones, the input embeddings. SigLIP's head is nobody's."""
    return {name: renamed(name, PARTS) for name in parameters(model)}


def outputs(ours: Any, theirs: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' image tokens, logits and greedy ids for two random rows with an image in each."""
    return written(ours, theirs, spec(theirs.config).image_tokens)


def stage(model: PrefixVLM) -> Stage:
    """A stage that holds the weights."""
    return holding(model, "instruct", (Captioning(),), "v1")
