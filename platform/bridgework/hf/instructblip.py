"""The prefix wiring with an instruction-aware Q-Former to and from `InstructBlipForConditionalGeneration`."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import SpecError
from bridgework.hf import blip2
from bridgework.hf.common import (
    eva,
    exported_settings,
    holding,
    image_word,
    image_words,
    language_ids,
    parameters,
    renamed,
)
from bridgework.hf.processors import chat_template, image_processor, processor_class
from bridgework.losses import LanguageModeling
from bridgework.models import LanguageConfig, PrefixVLMConfig
from bridgework.models.origin import Origin
from bridgework.models.qformer import names_in_blip2
from bridgework.system import Scoring, Stage

ARCHITECTURES = ("InstructBlipForConditionalGeneration",)
QFORMER_TOKENIZER = "qformer_tokenizer"  # where transformers' processor keeps the Q-Former's


def spec(config: Any, *, tied: bool | None = None) -> PrefixVLMConfig:
    """The wiring of an InstructBlipConfig. Raises WeightsError for what it cannot be."""
    folder = config.name_or_path
    return PrefixVLMConfig(
        vision=eva(config.vision_config),
        bridge=blip2.qformer(
            config, text=True, tokenizer=f"{folder}/{QFORMER_TOKENIZER}" if folder else "bytes"
        ),
        language=LanguageConfig.of(config.text_config, folder or "bytes", tied=tied),
    )


def config(model: PrefixVLMConfig) -> Any:
    """The InstructBlipConfig of a wiring. Raises SpecError where transformers has none."""
    from transformers import InstructBlipConfig

    if model.instruction is None:
        raise SpecError("a Q-Former that hears no instruction is a BLIP-2; export it as one")
    parts = blip2.towers(model)
    for part, kind in (
        ("vision_config", "instructblip_vision_model"),
        ("qformer_config", "instructblip_qformer"),
    ):
        parts[part] = {**parts[part], "model_type": kind}
    del parts["qformer_config"]["use_qformer_text_input"]  # always
    return InstructBlipConfig(
        **parts, text_config=model.language.config().to_dict(), architectures=list(ARCHITECTURES)
    )


def ids(model: PrefixVLMConfig, tokenizer: Any, endings: Sequence[int], built: Any) -> Origin:
    """The special ids of a model that was trained here, and its settings of generation."""
    return language_ids(tokenizer, endings, built, image_word(model.language, tokenizer))


def words(model: PrefixVLMConfig, said: Origin) -> Mapping[int, str]:
    """The word that the tokenizer must have for an image, by its id."""
    return image_words(said)


def names(model: PrefixVLMConfig) -> Mapping[str, str]:
    """Our parameters -> transformers', one to one; tied ones are one."""
    return {name: _theirs(name) for name in parameters(model)}


def outputs(ours: Any, theirs: Any, said: Origin) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' image tokens, logits and texts for two random rows with an image and an instruction in each."""
    heard = theirs.config.qformer_config.vocab_size
    return exported_settings(
        ours, theirs, said, theirs.config.num_query_tokens, heard=heard, nested=True
    )


def stage(model: PrefixVLMConfig) -> Stage:
    """A stage that holds the weights; candidates are ranked by their log-likelihood (arXiv:2305.06500, 2.5)."""
    return replace(
        holding(model, "instruct", (LanguageModeling(),), "answer"), scoring=Scoring(prior=False)
    )


def processor(model: PrefixVLMConfig, tokenizer: Any, template: str | None) -> Any:
    """transformers' processor of the pictures and texts of the wiring."""
    made = processor_class("InstructBlipProcessor")(
        image_processor=image_processor(model.pixels),
        tokenizer=tokenizer,
        qformer_tokenizer=load_tokenizer(str(model.instruction)),
        num_query_tokens=model.bridge.tokens(0),
    )
    if template is not None:
        made.chat_template = chat_template(
            template, tokenizer, ""
        )  # the processor puts images first
    return made


def _theirs(name: str) -> str:
    if name.startswith("bridge."):
        return names_in_blip2(name.removeprefix("bridge."))[1]
    return renamed(name, blip2.PARTS)
