"""What modules of this package share: names by prefix, the word for an image, random rows, a stage to hold weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bridgework.data.tokens import load_tokenizer
from bridgework.errors import WeightsError
from bridgework.models.eva import EvaConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.vision import VIT_FIELDS, normalise
from bridgework.system import IGNORE, IMAGE, AdamW, Budget, LossSpec, Mixture, ModelSpec, Source, Stage

IMAGE_WORD = "<image>"
WRITTEN = 5  # tokens of greedy text that are compared
EVA = {"hidden_act": "gelu", "qkv_bias": True, "layer_norm_eps": 1e-6, "attention_dropout": 0.0}  # never otherwise here


def parameters(model: Any) -> list[str]:
    """The names of a spec's parameters, one for tied ones, without a byte of memory."""
    with torch.device("meta"):
        return [name for name, _ in model.build(pretrained=False).named_parameters()]


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the first of `prefixes` that it begins with exchanged."""
    ours = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[ours] + name.removeprefix(ours)


def eva(config: Any) -> EvaConfig:
    """The tower of a BLIP-2 or an InstructBLIP. Raises WeightsError for what it cannot be."""
    expect(config, EVA)
    return EvaConfig(**{ours: getattr(config, theirs) for ours, theirs in VIT_FIELDS.items()})


def expect(config: Any, wanted: Mapping[str, object]) -> None:
    """Raises WeightsError for a config of transformers that says otherwise."""
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise WeightsError(f"this {config.model_type} has {name} {found}, and only {value} is read")


def image_word(language: LanguageConfig) -> int:
    """The id that stands for an image: the tokenizer's, else the last of the vocabulary, which is padding."""
    found: int | None = load_tokenizer(language.tokenizer).get_vocab().get(IMAGE_WORD)
    return language.vocab - 1 if found is None else found


def written(ours: Any, theirs: Any, places: int, heard: int | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Both sides' image tokens, logits and greedy ids for two random rows with an image of `places` tokens in each.

    Of an encoder-decoder the logits of the answer. With `heard`, the size of its vocabulary, there are instructions.
    """
    generator, look, text = torch.Generator().manual_seed(0), ours.vision.config.pixels, theirs.config.text_config
    images = torch.randint(0, 256, (2, 3, look.size, look.size), dtype=torch.uint8, generator=generator)
    word = theirs.config.image_token_index
    said = torch.randint(0, text.vocab_size - 1, (2, 7), generator=generator)
    said[said == word] = text.vocab_size - 1
    ids = torch.cat([said[:, :1], torch.full((2, places), IMAGE), said[:, 1:]], dim=1)
    labels, attention, words = ids.clone(), torch.ones_like(ids, dtype=torch.bool), ids.masked_fill(ids == IMAGE, word)
    labels[:, :-3] = IGNORE
    told, shown = {}, {"pixel_values": normalise(images, look)}
    if heard is not None:
        told["instruction"] = shown["qformer_input_ids"] = torch.randint(0, heard, (2, 5), generator=generator)
    features = theirs.get_image_features(**shown).pooler_output
    logits = ours(ids, attention, labels, images, **told).logits_BTV
    if not text.is_encoder_decoder:
        expected = theirs(input_ids=words, **shown).logits
    else:
        logits = logits[:, -4:-1]
        expected = theirs(input_ids=words[:, :-3], labels=words[:, -3:].contiguous(), **shown).logits
    return {
        "features": (ours.images(images, None, *told.values()).flatten(0, 1), torch.cat([*features])),
        "logits": (logits, expected),
        "greedy": greedy(
            ours, theirs, {"ids": ids, "attention": attention, "pixels": images, **told}, {"input_ids": words, **shown}
        ),
    }


def greedy(ours: Any, theirs: Any, own: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """(B, WRITTEN) ids that both sides write, `own` and `other` being what each of their `generate` is given.

    No token ends a text early, and what `generation_config` says on either side is not heard.
    """
    how = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    with _plain(ours), _plain(theirs):
        return ours.generate(**own, **how), theirs.generate(**other, **how)[:, -WRITTEN:]


@contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """No `generation_config` in the model but what starts a decoder; they are put back behind it."""
    from transformers import GenerationConfig

    writers: list[Any] = [module for module in model.modules() if hasattr(module, "generation_config")]
    said = {module: module.generation_config for module in writers}
    for module, given in said.items():
        module.generation_config = GenerationConfig(decoder_start_token_id=given.decoder_start_token_id)
    try:
        yield
    finally:
        for module, given in said.items():
            module.generation_config = given


def holding(model: ModelSpec, name: str, losses: Sequence[LossSpec], template: str) -> Stage:
    """A stage that holds weights: nothing is trained in it."""
    source = Source(name="shapes", dataset="synthetic:shapes")
    return Stage(
        name=name,
        model=model,
        trains={"*": 1.0},
        losses=tuple(losses),
        data=Mixture(sources=(source,), template=template, max_tokens=model.context, lanes=1),
        budget=Budget(steps=1, batch=1),
        optim=AdamW(peak_lr=1e-5),
    )
