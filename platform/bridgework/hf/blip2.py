"""BLIP-2 to and from transformers: its second stage is `Blip2ForConditionalGeneration`, its first
`Blip2ForImageTextRetrieval`, which has neither a temperature nor a head over the words: these stay as they are drawn.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import (
    eva,
    expect,
    exported_settings,
    holding,
    image_word,
    image_words,
    language_ids,
    parameters,
    renamed,
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

WRITER, FINDER = "Blip2ForConditionalGeneration", "Blip2ForImageTextRetrieval"
ARCHITECTURES = (WRITER, FINDER)
PARTS = {
    "vision.tower.": "vision_model.",
    "language.": "language_model.",
    "heads.": "",
}  # ours -> transformers'
ALONE = ("heads.lm.", "heads.temperature")  # transformers has no place for them
QFORMER = {  # ours -> transformers'
    "width": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads", "ffn": "intermediate_size",
    "cross_every": "cross_attention_frequency", "vocab": "vocab_size", "positions": "max_position_embeddings",
    "dropout": "hidden_dropout_prob",
}  # fmt: skip

Model = PrefixVLMConfig | QFormerPretrainerConfig


def spec(config: Any, *, tied: bool | None = None) -> Model:
    """The wiring of a Blip2Config, by its architecture. Raises WeightsError for what it cannot be."""
    vision, folder = eva(config.vision_config), config.name_or_path or "bytes"
    finds = FINDER in (config.architectures or ())
    bridge = qformer(config, text=finds, tokenizer=folder if finds else QFormerConfig().tokenizer)
    if bool(config.qformer_config.use_qformer_text_input) != finds:
        raise WeightsError(
            f"this BLIP-2 is a {config.architectures} whose use_qformer_text_input is {not finds}"
        )
    if finds:
        return QFormerPretrainerConfig(
            vision=vision, bridge=bridge, embed=config.image_text_hidden_size
        )
    return PrefixVLMConfig(
        vision=vision,
        bridge=bridge,
        language=LanguageConfig.of(config.text_config, folder, tied=tied),
    )


def config(model: Model) -> Any:
    """The Blip2Config of a wiring. Raises SpecError where transformers has none."""
    from transformers import Blip2Config

    if isinstance(model, QFormerPretrainerConfig):
        return Blip2Config(
            **towers(model), image_text_hidden_size=model.embed, architectures=[FINDER]
        )
    if model.instruction is not None:
        raise SpecError("a Q-Former that hears instructions is an InstructBLIP; export it as one")
    return Blip2Config(
        **towers(model), text_config=model.language.config().to_dict(), architectures=[WRITER]
    )


def ids(model: Model, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
    """The special ids of a model that was trained here, and its settings of generation."""
    if isinstance(model, QFormerPretrainerConfig):
        return Origin(config={"qformer_config.pad_token_id": tokenizer.pad_token_id})
    return language_ids(tokenizer, endings, built, image_word(model.language, tokenizer))


def unread(model: Model) -> tuple[str, ...]:
    """Fields of the config that this architecture has and does not read."""
    finds = isinstance(model, QFormerPretrainerConfig)
    return (
        ("text_config.*", "use_decoder_only_language_model")
        if finds
        else ("image_text_hidden_size",)
    )


def words(model: Model, said: Origin) -> Mapping[int, str]:
    """The word that the tokenizer must have for an image, by its id."""
    return image_words(said)


def names(model: Model) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one, but for those that it has no place for; tied ones are one."""
    return {name: _theirs(name) for name in parameters(model) if not name.startswith(ALONE)}


def outputs(ours: Any, theirs: Any, said: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' image tokens, logits and texts, or vectors and log-odds, for two random images and texts."""
    if hasattr(theirs, "language_model"):
        return exported_settings(ours, theirs, said, theirs.config.num_query_tokens, nested=True)
    look, generator = ours.vision.config.pixels, torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    ids = torch.randint(0, theirs.config.qformer_config.vocab_size, (2, 8), generator=generator)
    word, places = theirs.config.image_token_index, theirs.config.num_query_tokens
    shown = (
        ids if word is None else torch.cat([torch.full((2, places), word), ids], dim=1)
    )  # cut off over there
    given = {
        "pixel_values": normalize(images, look),
        "input_ids": shown,
        "attention_mask": torch.ones_like(shown),
    }
    features, real, found = (
        ours.vision(images),
        torch.ones_like(ids, dtype=torch.bool),
        theirs(**given),
    )
    judged = theirs(**given, use_image_text_matching_head=True).logits_per_image
    return {
        "image": (ours.embed_images(features), found.image_embeds),
        "text": (ours.embed_texts(ids, real), found.text_embeds),
        "match": (ours.match(ids, real, features), judged.diff(dim=1)[:, 0]),
    }


def stage(model: Model) -> Stage:
    """A stage that holds the weights."""
    if isinstance(model, QFormerPretrainerConfig):
        losses = (
            QueryContrast(),
            Matching(negatives="all", floor=0.0),
            LanguageModeling(label_smoothing=0.1),
        )
        return holding(model, "represent", losses, "caption")
    return holding(model, "generate", (LanguageModeling(),), "answer")


def processor(model: Model, tokenizer: Any, template: str | None) -> Any:
    """transformers' processor of the pictures and texts of the wiring."""
    writes = isinstance(model, PrefixVLMConfig)
    made = processor_class("Blip2Processor")(
        image_processor=image_processor(model.pixels),
        tokenizer=tokenizer,
        num_query_tokens=model.bridge.tokens(0) if writes else None,
    )
    if writes and template is not None:
        made.chat_template = chat_template(
            template, tokenizer, ""
        )  # the processor puts images first
    return made


def qformer(config: Any, *, text: bool, tokenizer: str) -> QFormerConfig:
    """The bridge of a BLIP-2 or an InstructBLIP. Raises WeightsError for what it cannot be."""
    theirs = config.qformer_config
    expect(theirs, {**FIXED, "attention_probs_dropout_prob": theirs.hidden_dropout_prob})
    numbers = {ours: getattr(theirs, name) for ours, name in QFORMER.items()}
    return QFormerConfig(queries=config.num_query_tokens, text=text, tokenizer=tokenizer, **numbers)


def towers(model: Model) -> dict[str, Any]:
    """What a BLIP-2's and an InstructBLIP's config say alike. Raises SpecError where transformers has no place."""
    vision, bridge = model.vision, model.bridge
    if (
        not isinstance(vision, EvaConfig)
        or vision.select != "all"
        or not isinstance(bridge, QFormerConfig)
        or not bridge.ln_vision
    ):
        raise SpecError(
            "transformers' BLIP-2 has an EVA ViT, read with its CLS token, and a Q-Former with a LayerNorm on it, "
            f"not a {type(vision).__name__} and a {type(bridge).__name__} like these"
        )
    return {
        "vision_config": vision.config().to_dict(),
        "qformer_config": bridge.config(vision.width).to_dict(),
        "num_query_tokens": bridge.queries,
    }


def _theirs(name: str) -> str:
    if name.startswith("bridge."):
        return names_in_blip2(name.removeprefix("bridge."))[0]
    return renamed(name, PARTS)
