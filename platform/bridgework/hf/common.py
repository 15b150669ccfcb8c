"""Helpers of all families: configs compared, names by prefix, special ids, random rows, texts, a stage for weights."""

# B rows  N tokens written  V vocabulary

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bridgework.errors import WeightsError
from bridgework.models.attention_masks import BY_LENGTH
from bridgework.models.blip_vit import EVA_FIXED, EvaConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.origin import Origin
from bridgework.models.vision import VIT_FIELDS, ViTConfig, normalize
from bridgework.system import (
    IGNORE,
    IMAGE,
    AdamW,
    Budget,
    LossSpec,
    Mixture,
    ModelSpec,
    Source,
    Stage,
)

IMAGE_WORD = "<image>"
WRITTEN = 5  # tokens of greedy text that are compared, whatever the settings of either side
LONGEST = 32  # tokens of a text that ends by itself, at most
BEYOND = 8  # tokens of a prompt beyond a window
IDS = (  # settings of generation that name tokens
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
UNSAID = (
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
)  # of a drawn model's settings
SPECIAL = ("*_token_id", "*_token_index")  # fields of configs that name tokens
VOLATILE = (
    "*architectures",
    "*dtype",
    "*transformers_version",
    "*_name_or_path",
    "*_attn_implementation*",
    "*auto_map",
)
UNREAD = (  # fields of configs that no forward at rest reads; nor does any read one that its config does not declare
    *SPECIAL, "*initializer*", "*_init_value", "*dropout*", "*projection_dim", "*output_attentions", "*use_cache",
    "*output_hidden_states", "*return_dict", "*id2label", "*label2id", "*problem_type", "*tie_word_embeddings",
    "*image_seq_length", "*chunk_size_feed_forward", "*label_smoothing", "*vision_config.vocab_size", "*pretraining_tp",
    "*router_aux_loss_coef", "*layerdrop", "*model_type", "*freeze_*", "perceiver_config.use_resampler",
)  # fmt: skip


# --- configs ---------------------------------------------------------------------------------------------------------


def fields(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a config of transformers by dotted path; parts such as `text_config` are opened."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if name.endswith("_config") and isinstance(value, Mapping):
            found |= fields(value, f"{path}.")
        elif not any(fnmatchcase(path, glob) for glob in VOLATILE):
            found[path] = listed(value)
    return found


def unequal(own: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Return the fields of two configs that differ, as (own, other); a field that one lacks is None there."""
    ours, theirs = fields(own.to_dict()), fields(other.to_dict())
    paths = sorted(ours.keys() | theirs.keys())
    pairs = {path: (ours.get(path), theirs.get(path)) for path in paths}
    return {path: (a, b) for path, (a, b) in pairs.items() if a != b}


def is_read(path: str, unread: Sequence[str] = ()) -> bool:
    """Return whether a forward may read the field of a config."""
    return not any(fnmatchcase(path, glob) for glob in (*UNREAD, *unread))


def overlay(config: Any, values: Mapping[str, Any]) -> Any:
    """Set fields of a config by dotted path, in place, and return it."""
    for path, value in values.items():
        *parts, name = path.split(".")
        part = config
        for step in parts:
            part = getattr(part, step)
        setattr(part, name, listed(value))
    return config


def listed(value: Any) -> Any:
    """Return a value of JSON with lists where recipes hold tuples."""
    if isinstance(value, Mapping):
        return {str(key): listed(item) for key, item in value.items()}
    return [listed(item) for item in value] if isinstance(value, list | tuple) else value


def expect(config: Any, wanted: Mapping[str, object]) -> None:
    """Raises WeightsError for a config of transformers that says otherwise."""
    for name, value in wanted.items():
        if (found := getattr(config, name)) != value:
            raise WeightsError(
                f"this {config.model_type} has {name} {found}, and only {value} is read"
            )


def eva(config: Any) -> EvaConfig:
    """Return the tower of a BLIP-2 or an InstructBLIP. Raises WeightsError for what it cannot be."""
    expect(config, {**EVA_FIXED, "attention_dropout": 0.0})
    return EvaConfig(**{ours: getattr(config, theirs) for ours, theirs in VIT_FIELDS.items()})


def vit(config: Any, kind: Literal["clip", "siglip"], **choices: Any) -> ViTConfig:
    """Return the tower of a config of transformers; `choices` are the fields that a config does not have."""
    numbers = {ours: getattr(config, theirs) for ours, theirs in VIT_FIELDS.items()}
    eps = ViTConfig.own_norm_eps(config)
    return ViTConfig(kind=kind, act=config.hidden_act, norm_eps=eps, **numbers, **choices)


# --- parameters ------------------------------------------------------------------------------------------------------


def parameters(model: Any) -> list[str]:
    """Return the names of a spec's parameters, one for tied ones, without a byte of memory."""
    with torch.device("meta"):
        return [name for name, _ in model.build(pretrained=False).named_parameters()]


def renamed(name: str, prefixes: Mapping[str, str]) -> str:
    """Return `name` with the first of `prefixes` that it begins with exchanged."""
    ours = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[ours] + name.removeprefix(ours)


# --- special ids -----------------------------------------------------------------------------------------------------


def image_word(language: LanguageConfig, tokenizer: Any) -> int:
    """Return the id of an image: that of `<image>`, else the first without a token, which may be one row too many."""
    known = tokenizer.get_vocab()
    found: int | None = known.get(IMAGE_WORD)
    return min(language.vocab, max(known.values()) + 1) if found is None else found


def image_words(said: Origin) -> Mapping[int, str]:
    """Return the word of an image by its id; none where the config names none."""
    word = said.config.get("image_token_index")
    return {} if word is None else {word: IMAGE_WORD}


def language_ids(
    tokenizer: Any, endings: Sequence[int], model: Any, word: int | None = None
) -> Origin:
    """Return the special ids of a language model that was trained here, and its settings of generation.

    What its own weights said of generation stays; `endings` are all ids that end an answer. An id that has no row in
    the vocabulary is left out.
    """
    vocab = int(model.language.get_input_embeddings().weight.shape[0])
    said = {
        name: value
        for name, value in model.language.generation_config.to_diff_dict().items()
        if not name.startswith("_") and name not in UNSAID
    }
    own = said.get("eos_token_id")
    ends = {*endings, *(own if isinstance(own, list | tuple) else () if own is None else (own,))}
    eos = sorted(
        ending for ending in ends if ending < vocab or ending in getattr(model, "endings", ())
    )
    marks = {
        "bos_token_id": said.get("bos_token_id", tokenizer.bos_token_id),
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids: dict[str, Any] = {
        name: mark for name, mark in marks.items() if mark is not None and mark < vocab
    }
    if eos:
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    config = {f"text_config.{name}": value for name, value in ids.items()}
    config |= {} if word is None else {"image_token_index": word}
    return Origin(config=config, generation=said | ids)


# --- texts -----------------------------------------------------------------------------------------------------------


def exported_settings(
    ours: Any,
    theirs: Any,
    said: Origin,
    places: int,
    *,
    heard: int | None = None,
    nested: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return both sides' image tokens, logits and texts for random rows with an image of `places` tokens in each.

    Of an encoder-decoder the logits of the answer. With `heard`, the size of its vocabulary, there are instructions.
    `nested` is a model whose language model generates by the special ids of its own config.
    """
    generator, look, text = (
        torch.Generator().manual_seed(0),
        ours.vision.config.pixels,
        theirs.config.text_config,
    )
    if (
        theirs.config.image_token_index is None
    ):  # of a config before transformers 4.45: any word will do
        theirs.config.image_token_index = text.vocab_size - 1
    word, length = theirs.config.image_token_index, 7 + resolve_attribute(text, places)
    rows = 2 if length == 7 else 1
    images = torch.randint(
        0, 256, (rows, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    vocab = int(ours.language.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocab - 1, (rows, length), generator=generator)
    tokens[tokens == word] = vocab - 1
    ids = torch.cat([tokens[:, :1], torch.full((rows, places), IMAGE), tokens[:, 1:]], dim=1)
    labels, attention, words = (
        ids.clone(),
        torch.ones_like(ids, dtype=torch.bool),
        ids.masked_fill(ids == IMAGE, word),
    )
    labels[:, :-3] = IGNORE
    given, shown = {}, {"pixel_values": normalize(images, look)}
    if heard is not None:
        given["instruction"] = shown["qformer_input_ids"] = torch.randint(
            0, heard, (rows, 5), generator=generator
        )
    features = theirs.get_image_features(**shown).pooler_output
    logits = ours(ids, attention, labels, images, **given).logits_BTV
    if not text.is_encoder_decoder:
        expected = theirs(input_ids=words, **shown).logits[..., :vocab]
    else:
        logits = logits[:, -4:-1]
        expected = theirs(
            input_ids=words[:, :-3], labels=words[:, -3:].contiguous(), **shown
        ).logits
    own, other = (
        {"ids": ids, "attention": attention, "pixels": images, **given},
        {"input_ids": words, **shown},
    )
    return {
        "features": (
            ours.images(images, None, *given.values()).flatten(0, 1),
            torch.cat([*features]),
        ),
        "logits": (logits, expected),
        **texts(
            ours,
            theirs,
            own,
            other,
            ends={name: said.config.get(f"text_config.{name}") for name in IDS}
            if nested
            else said.generation,
            skip=1 if text.is_encoder_decoder else words.shape[1],
            never=() if text.vocab_size == vocab else (word,),  # a row that only the other side has
        ),
    }


def resolve_attribute(text: Any, places: int) -> int:
    """Return how many tokens more than a few a prompt takes to go beyond every window of a config, images included.

    A window, a chunk, or the length from which angles are scaled. 0 where the context ends before.
    """
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [
        own
        for own in (rope, *rope.values())
        if isinstance(own, Mapping) and own.get("rope_type") in BY_LENGTH
    ]
    scaled = [own.get("original_max_position_embeddings") for own in kinds]
    windows = [
        getattr(text, name, None)
        for name in ("sliding_window", "attention_chunk_size", "window_size")
    ]
    longest = getattr(text, "max_position_embeddings", None) or 0
    most = longest - places - 7 - LONGEST
    return max(
        (
            beyond
            for window in (*windows, *scaled)
            if window and (beyond := window + BEYOND) <= most
        ),
        default=0,
    )


def texts(
    ours: Any,
    theirs: Any,
    own: Mapping[str, Any],
    other: Mapping[str, Any],
    *,
    ends: Mapping[str, Any],
    skip: int,
    never: Sequence[int] = (),
    forced: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the ids that both sides write, `own` and `other` being the inputs of each `generate`.

    `greedy`: WRITTEN tokens, whatever either side's settings are. `until_end`: a text that ends by itself; the other
    side hears its own special ids alone, and this side `ends`. The other side puts `skip` ids first and never writes
    `never`. `forced` is a family whose `generate` takes its end from the config, whatever the settings are.
    """
    how = {"max_new_tokens": WRITTEN, "min_new_tokens": WRITTEN, "do_sample": False}
    barred = {"suppress_tokens": [*never]} if never else {}
    named = {name: listed(ends[name]) for name in IDS if ends.get(name) is not None}
    with _settings(ours), _settings(theirs):
        greedy = (
            ours.generate(**own, **how, **(named if forced else {})),
            theirs.generate(**other, **how, **barred)[:, -WRITTEN:],
        )
    free = {"max_new_tokens": LONGEST, "do_sample": False}
    if barred:
        barred["suppress_tokens"] = [*barred["suppress_tokens"], *named.get("suppress_tokens", ())]
    with _settings(ours), _settings(theirs, IDS):
        until_end = (
            ours.generate(**own, **free, **named),
            theirs.generate(**other, **free, **barred)[:, skip:],
        )
    return {"greedy": greedy, "until_end": until_end}


@contextmanager
def _settings(
    model: nn.Module, kept: Sequence[str] = ("decoder_start_token_id",)
) -> Iterator[None]:
    """Leave only the settings `kept` in every `generation_config` of the model; all are put back afterwards."""
    from transformers import GenerationConfig

    writers: list[Any] = [
        module for module in model.modules() if hasattr(module, "generation_config")
    ]
    said = {module: module.generation_config for module in writers}
    for module, given in said.items():
        module.generation_config = GenerationConfig(
            **{name: getattr(given, name, None) for name in kept}
        )
    try:
        yield
    finally:
        for module, given in said.items():
            module.generation_config = given


# --- stages ----------------------------------------------------------------------------------------------------------


def holding(model: ModelSpec, name: str, losses: Sequence[LossSpec], template: str) -> Stage:
    """Return a stage that holds weights: nothing is trained in it."""
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
