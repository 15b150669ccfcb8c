"""What modules of this package share: renaming by prefix, the word for an image, a stage that only holds weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from bridgework.data.tokens import load_tokenizer
from bridgework.errors import WeightsError
from bridgework.models.eva import EvaConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.vision import VIT_FIELDS
from bridgework.system import AdamW, Budget, LossSpec, Mixture, ModelSpec, Source, Stage

IMAGE_WORD = "<image>"
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
