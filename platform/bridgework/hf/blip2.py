"""BLIP-2 to and from transformers.

Stage 1 is `Blip2ForImageTextRetrieval`, stage 2 `Blip2ForConditionalGeneration`. The former has
neither a temperature nor an LM head: on import these keep their random initialization.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import (
    check_fields,
    compare_prefix_vlm,
    eva_config,
    image_token_id,
    image_tokens,
    language_special_ids,
    parameter_names,
    replace_prefix,
    weights_stage,
)
from bridgework.hf.processors import chat_template, image_processor, processor_class
from bridgework.losses import LanguageModeling, Matching, QueryContrast
from bridgework.models import (
    EvaConfig,
    LanguageConfig,
    PrefixVLMConfig,
    QFormerConfig,
    QFormerPretrainerConfig,
)
from bridgework.models.origin import Origin
from bridgework.models.qformer import FIXED, names_in_blip2
from bridgework.models.vision import normalize
from bridgework.system import Stage

GENERATION, RETRIEVAL = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
ARCHITECTURES = (GENERATION, RETRIEVAL)
PARTS = {
    "vision.tower.": "vision_model.",
    "language.": "language_model.",
    "heads.": "",
}  # ours -> transformers'
NOT_EXPORTED = ("heads.lm.", "heads.temperature")  # transformers has no such parameters
QFORMER = {  # ours -> transformers'
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "cross_every": "cross_attention_frequency",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
}

Model = PrefixVLMConfig | QFormerPretrainerConfig


def model_config(config: Any, *, tied: bool | None = None) -> Model:
    """Return the model config of a Blip2Config. Raises WeightsError for unsupported fields."""
    vision, folder = eva_config(config.vision_config), config.name_or_path or "bytes"
    retrieval = RETRIEVAL in (config.architectures or ())
    bridge = qformer_config(
        config, text=retrieval, tokenizer=folder if retrieval else QFormerConfig().tokenizer
    )
    if bool(config.qformer_config.use_qformer_text_input) != retrieval:
        raise WeightsError(
            f"BLIP-2: use_qformer_text_input does not fit {config.architectures}. "
            f"Got {not retrieval}; expected {retrieval}"
        )
    if retrieval:
        return QFormerPretrainerConfig(
            vision=vision, bridge=bridge, embed=config.image_text_hidden_size
        )
    return PrefixVLMConfig(
        vision=vision,
        bridge=bridge,
        language=LanguageConfig.of(config.text_config, folder, tied=tied),
    )


def hf_config(model: Model) -> Any:
    """Return the Blip2Config of a model config.

    Raises SpecError if transformers has no such model.
    """
    from transformers import Blip2Config

    if isinstance(model, QFormerPretrainerConfig):
        return Blip2Config(
            **shared_fields(model), image_text_hidden_size=model.embed, architectures=[RETRIEVAL]
        )
    if model.instruction is not None:
        raise SpecError(
            "BLIP-2: its Q-Former reads no instructions. Fix: export the model as InstructBLIP"
        )
    return Blip2Config(
        **shared_fields(model),
        text_config=model.language.config().to_dict(),
        architectures=[GENERATION],
    )


def special_ids(model: Model, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
    """Return the special ids and generation settings of a model that was trained here."""
    if isinstance(model, QFormerPretrainerConfig):
        return Origin(config={"qformer_config.pad_token_id": tokenizer.pad_token_id})
    return language_special_ids(
        tokenizer, endings, built, image_token_id(model.language, tokenizer)
    )


def unread(model: Model) -> tuple[str, ...]:
    """Return the config fields that this architecture declares and does not read."""
    retrieval = isinstance(model, QFormerPretrainerConfig)
    return (
        ("text_config.*", "use_decoder_only_language_model")
        if retrieval
        else ("image_text_hidden_size",)
    )


def added_tokens(model: Model, origin: Origin) -> Mapping[int, str]:
    """Return the image token that the tokenizer needs, by its id."""
    return image_tokens(origin)


def tensor_names(model: Model) -> Mapping[str, str]:
    """Return our parameter names -> transformers', without NOT_EXPORTED."""
    return {
        name: _their_name(name)
        for name in parameter_names(model)
        if not name.startswith(NOT_EXPORTED)
    }


def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') for two random images and texts.

    Image features, logits and generated texts, or vectors and log-odds.
    """
    if hasattr(theirs, "language_model"):
        return compare_prefix_vlm(ours, theirs, origin, theirs.config.num_query_tokens, nested=True)
    look, generator = ours.vision.config.pixels, torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    ids = torch.randint(0, theirs.config.qformer_config.vocab_size, (2, 8), generator=generator)
    image_token, queries = theirs.config.image_token_index, theirs.config.num_query_tokens
    their_ids = ids
    if image_token is not None:  # transformers removes the image tokens
        their_ids = torch.cat([torch.full((2, queries), image_token), ids], dim=1)
    inputs = {
        "pixel_values": normalize(images, look),
        "input_ids": their_ids,
        "attention_mask": torch.ones_like(their_ids),
    }
    features, attention = ours.vision(images), torch.ones_like(ids, dtype=torch.bool)
    embedded = theirs(**inputs)
    matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    return {
        "image": (ours.embed_images(features), embedded.image_embeds),
        "text": (ours.embed_texts(ids, attention), embedded.text_embeds),
        "match": (ours.match(ids, attention, features), matching.diff(dim=1)[:, 0]),
    }


def stage(model: Model) -> Stage:
    """Return the stage for the imported weights; it is never trained."""
    if isinstance(model, QFormerPretrainerConfig):
        losses = (
            QueryContrast(),
            Matching(negatives="all", floor=0.0),
            LanguageModeling(label_smoothing=0.1),
        )
        return weights_stage(model, "represent", losses, "caption")
    return weights_stage(model, "generate", (LanguageModeling(),), "answer")


def processor(model: Model, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text."""
    generates = isinstance(model, PrefixVLMConfig)
    result = processor_class("Blip2Processor")(
        image_processor=image_processor(model.pixels),
        tokenizer=tokenizer,
        num_query_tokens=model.bridge.tokens(0) if generates else None,
    )
    if generates and template is not None:
        # without an image token, because the processor puts images first
        result.chat_template = chat_template(template, tokenizer, "")
    return result


def qformer_config(config: Any, *, text: bool, tokenizer: str) -> QFormerConfig:
    """Return the Q-Former of BLIP-2 or InstructBLIP. Raises WeightsError for unsupported fields."""
    theirs = config.qformer_config
    check_fields(theirs, {**FIXED, "attention_probs_dropout_prob": theirs.hidden_dropout_prob})
    numbers = {ours: getattr(theirs, name) for ours, name in QFORMER.items()}
    return QFormerConfig(queries=config.num_query_tokens, text=text, tokenizer=tokenizer, **numbers)


def shared_fields(model: Model) -> dict[str, Any]:
    """Return the config fields that BLIP-2 and InstructBLIP share.

    Raises SpecError for a vision tower or a bridge that transformers' BLIP-2 cannot have.
    """
    vision, bridge = model.vision, model.bridge
    if (
        not isinstance(vision, EvaConfig)
        or vision.select != "all"
        or not isinstance(bridge, QFormerConfig)
        or not bridge.ln_vision
    ):
        raise SpecError(
            "BLIP-2: vision tower or bridge not supported by transformers. "
            f"Got {type(vision).__name__} and {type(bridge).__name__}; expected an EVA ViT with "
            "its CLS token, and a Q-Former with a LayerNorm on the features"
        )
    return {
        "vision_config": vision.config().to_dict(),
        "qformer_config": bridge.config(vision.width).to_dict(),
        "num_query_tokens": bridge.queries,
    }


def _their_name(name: str) -> str:
    if name.startswith("bridge."):
        return names_in_blip2(name.removeprefix("bridge."))[0]
    return replace_prefix(name, PARTS)
