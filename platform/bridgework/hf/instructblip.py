"""PrefixVLM with an instruction-aware Q-Former to and from InstructBLIP of transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import SpecError
from bridgework.hf import blip2
from bridgework.hf.common import (
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
from bridgework.losses import LanguageModeling
from bridgework.models import LanguageConfig, PrefixVLMConfig
from bridgework.models.origin import Origin
from bridgework.models.qformer import names_in_blip2
from bridgework.system import Scoring, Stage

ARCHITECTURES = ("InstructBlipForConditionalGeneration",)
QFORMER_TOKENIZER = "qformer_tokenizer"  # folder of the Q-Former's tokenizer


def model_config(config: Any, *, tied: bool | None = None) -> PrefixVLMConfig:
    """Return the model config of an InstructBlipConfig.

    Raises WeightsError for unsupported fields.
    """
    folder = config.name_or_path
    return PrefixVLMConfig(
        vision=eva_config(config.vision_config),
        bridge=blip2.qformer_config(
            config, text=True, tokenizer=f"{folder}/{QFORMER_TOKENIZER}" if folder else "bytes"
        ),
        language=LanguageConfig.of(config.text_config, folder or "bytes", tied=tied),
    )


def hf_config(model: PrefixVLMConfig) -> Any:
    """Return the InstructBlipConfig of a model config.

    Raises SpecError if transformers has no such model.
    """
    from transformers import InstructBlipConfig

    if model.instruction is None:
        raise SpecError(
            "InstructBLIP: its Q-Former reads instructions. Fix: export the model as BLIP-2"
        )
    parts = blip2.shared_fields(model)
    for part, kind in (
        ("vision_config", "instructblip_vision_model"),
        ("qformer_config", "instructblip_qformer"),
    ):
        parts[part] = {**parts[part], "model_type": kind}
    del parts["qformer_config"]["use_qformer_text_input"]  # always true, so not a field
    return InstructBlipConfig(
        **parts, text_config=model.language.config().to_dict(), architectures=list(ARCHITECTURES)
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
    """Return our parameter names -> transformers', one to one; tied parameters have one name."""
    return {name: _their_name(name) for name in parameter_names(model)}


def outputs(ours: Any, theirs: Any, origin: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') features, logits and texts for random rows with instructions."""
    vocab = theirs.config.qformer_config.vocab_size
    return compare_prefix_vlm(
        ours, theirs, origin, theirs.config.num_query_tokens, instruction_vocab=vocab, nested=True
    )


def stage(model: PrefixVLMConfig) -> Stage:
    """Return the stage for the imported weights; it is never trained.

    Candidates are ranked by their log-likelihood (arXiv:2305.06500, 2.5).
    """
    return replace(
        weights_stage(model, "instruct", (LanguageModeling(),), "answer"),
        scoring=Scoring(prior=False),
    )


def processor(model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """Return the transformers processor of images and text."""
    result = processor_class("InstructBlipProcessor")(
        image_processor=image_processor(model.pixels),
        tokenizer=tokenizer,
        qformer_tokenizer=load_tokenizer(str(model.instruction)),
        num_query_tokens=model.bridge.tokens(0),
    )
    if template is not None:
        # without an image token, because the processor puts images first
        result.chat_template = chat_template(template, tokenizer, "")
    return result


def _their_name(name: str) -> str:
    if name.startswith("bridge."):
        return names_in_blip2(name.removeprefix("bridge."))[1]
    return replace_prefix(name, blip2.PARTS)
