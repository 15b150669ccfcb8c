"""Helpers of all families: config fields, tensor names, special ids, and comparison of outputs."""

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
GREEDY_TOKENS = 5  # tokens of greedy text that are compared, for any settings of either side
MAX_TOKENS = 32  # of a text that ends by an end token
BEYOND_WINDOW = 8  # tokens of a prompt beyond a window
TOKEN_SETTINGS = (  # generation settings that name tokens
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id",
    "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens",
)  # fmt: skip
# generation settings that are not exported from a language model's own weights
DROPPED_SETTINGS = (
    "transformers_version",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
)
TOKEN_FIELDS = ("*_token_id", "*_token_index")  # config fields that name tokens
VOLATILE = (  # config fields that are not compared
    "*architectures",
    "*dtype",
    "*transformers_version",
    "*_name_or_path",
    "*_attn_implementation*",
    "*auto_map",
)
# config fields that no forward in eval mode reads; undeclared fields are not read either
UNREAD = (
    *TOKEN_FIELDS, "*initializer*", "*_init_value", "*dropout*", "*projection_dim",
    "*output_attentions", "*use_cache", "*output_hidden_states", "*return_dict", "*id2label",
    "*label2id", "*problem_type", "*tie_word_embeddings", "*image_seq_length",
    "*chunk_size_feed_forward", "*label_smoothing", "*vision_config.vocab_size", "*pretraining_tp",
    "*router_aux_loss_coef", "*layerdrop", "*model_type", "*freeze_*",
    "perceiver_config.use_resampler",
)  # fmt: skip


# --- configs


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the fields of a transformers config and its nested configs by dotted path."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        path = f"{prefix}{name}"
        if name.endswith("_config") and isinstance(value, Mapping):
            flat |= flatten_config(value, f"{path}.")
        elif not any(fnmatchcase(path, glob) for glob in VOLATILE):
            flat[path] = to_json(value)
    return flat


def config_diff(own: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    """Return the fields that differ as path -> (own, other); a missing field is None."""
    ours, theirs = flatten_config(own.to_dict()), flatten_config(other.to_dict())
    paths = sorted(ours.keys() | theirs.keys())
    pairs = {path: (ours.get(path), theirs.get(path)) for path in paths}
    return {path: (a, b) for path, (a, b) in pairs.items() if a != b}


def is_read(path: str, unread: Sequence[str] = ()) -> bool:
    """Return True if a forward pass may read the config field."""
    return not any(fnmatchcase(path, glob) for glob in (*UNREAD, *unread))


def overlay(config: Any, values: Mapping[str, Any]) -> Any:
    """Set config fields by dotted path, in place, and return the config."""
    for path, value in values.items():
        *parts, name = path.split(".")
        part = config
        for step in parts:
            part = getattr(part, step)
        setattr(part, name, to_json(value))
    return config


def to_json(value: Any) -> Any:
    """Return a JSON value: tuples become lists, keys strings."""
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, list | tuple) else value


def check_fields(config: Any, expected: Mapping[str, object]) -> None:
    """Raise WeightsError if a transformers config has other values than the `expected` ones."""
    for name, value in expected.items():
        if (given := getattr(config, name)) != value:
            raise WeightsError(
                f"{config.model_type}: {name} is not supported. Got {given}; expected {value}"
            )


def eva_config(config: Any) -> EvaConfig:
    """Return the vision tower of BLIP-2 or InstructBLIP.

    Raises WeightsError for unsupported fields.
    """
    check_fields(config, {**EVA_FIXED, "attention_dropout": 0.0})
    return EvaConfig(**{ours: getattr(config, theirs) for ours, theirs in VIT_FIELDS.items()})


def vit_config(config: Any, kind: Literal["clip", "siglip"], **choices: Any) -> ViTConfig:
    """Return the vision tower of a transformers config; `choices` are fields that it lacks."""
    numbers = {ours: getattr(config, theirs) for ours, theirs in VIT_FIELDS.items()}
    eps = ViTConfig.own_norm_eps(config)
    return ViTConfig(kind=kind, act=config.hidden_act, norm_eps=eps, **numbers, **choices)


# --- parameters


def parameter_names(model: Any) -> list[str]:
    """Return the parameter names of a model config, one name for tied parameters.

    The model is built on the meta device, without memory.
    """
    with torch.device("meta"):
        return [name for name, _ in model.build(pretrained=False).named_parameters()]


def replace_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the prefix of a name, by the first entry of `prefixes` that matches."""
    ours = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[ours] + name.removeprefix(ours)


# --- special ids


def image_token_id(language: LanguageConfig, tokenizer: Any) -> int:
    """Return the token id of an image: that of `<image>`, else the first id without a token.

    The latter is `language.vocab`, one row beyond the embeddings, if every row has a token.
    """
    known = tokenizer.get_vocab()
    token_id: int | None = known.get(IMAGE_WORD)
    return min(language.vocab, max(known.values()) + 1) if token_id is None else token_id


def image_tokens(origin: Origin) -> Mapping[int, str]:
    """Return the image token by its id; {} if the config has none."""
    token_id = origin.config.get("image_token_index")
    return {} if token_id is None else {token_id: IMAGE_WORD}


def language_special_ids(
    tokenizer: Any, endings: Sequence[int], model: Any, image_token: int | None = None
) -> Origin:
    """Return the special ids and generation settings of a language model that was trained here.

    The settings of its pretrained weights are kept; `endings` are all ids that end an answer. Ids
    beyond the vocabulary are left out.
    """
    vocab = int(model.language.get_input_embeddings().weight.shape[0])
    settings = {
        name: value
        for name, value in model.language.generation_config.to_diff_dict().items()
        if not name.startswith("_") and name not in DROPPED_SETTINGS
    }
    own = settings.get("eos_token_id")
    ends = {*endings, *(own if isinstance(own, list | tuple) else () if own is None else (own,))}
    eos = sorted(
        ending for ending in ends if ending < vocab or ending in getattr(model, "endings", ())
    )
    others = {
        "bos_token_id": settings.get("bos_token_id", tokenizer.bos_token_id),
        "pad_token_id": tokenizer.pad_token_id,
    }
    ids: dict[str, Any] = {
        name: value for name, value in others.items() if value is not None and value < vocab
    }
    if eos:
        ids["eos_token_id"] = eos[0] if len(eos) == 1 else eos
    config = {f"text_config.{name}": value for name, value in ids.items()}
    config |= {} if image_token is None else {"image_token_index": image_token}
    return Origin(config=config, generation=settings | ids)


# --- comparison of outputs


def compare_prefix_vlm(
    ours: Any,
    theirs: Any,
    origin: Origin,
    num_image_tokens: int,
    *,
    instruction_vocab: int | None = None,
    nested: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (ours, transformers') features, logits and texts for random rows with one image each.

    The logits of an encoder-decoder are those of the answer. With `instruction_vocab`, the rows
    have instructions. `nested`: the language model generates with the special ids of its own
    config.
    """
    generator = torch.Generator().manual_seed(0)
    look, text = ours.vision.config.pixels, theirs.config.text_config
    if theirs.config.image_token_index is None:  # a config before transformers 4.45: any id works
        theirs.config.image_token_index = text.vocab_size - 1
    image_token = theirs.config.image_token_index
    length = 7 + tokens_beyond_windows(text, num_image_tokens)
    rows = 2 if length == 7 else 1
    images = torch.randint(
        0, 256, (rows, 3, look.size, look.size), dtype=torch.uint8, generator=generator
    )
    vocab = int(ours.language.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocab - 1, (rows, length), generator=generator)
    tokens[tokens == image_token] = vocab - 1
    placeholders = torch.full((rows, num_image_tokens), IMAGE)
    ids = torch.cat([tokens[:, :1], placeholders, tokens[:, 1:]], dim=1)
    labels, attention = ids.clone(), torch.ones_like(ids, dtype=torch.bool)
    their_ids = ids.masked_fill(ids == IMAGE, image_token)
    labels[:, :-3] = IGNORE
    instruction, their_inputs = {}, {"pixel_values": normalize(images, look)}
    if instruction_vocab is not None:
        instruction["instruction"] = their_inputs["qformer_input_ids"] = torch.randint(
            0, instruction_vocab, (rows, 5), generator=generator
        )
    features = theirs.get_image_features(**their_inputs).pooler_output
    logits = ours(ids, attention, labels, images, **instruction).logits_BTV
    if not text.is_encoder_decoder:
        expected = theirs(input_ids=their_ids, **their_inputs).logits[..., :vocab]
    else:
        logits = logits[:, -4:-1]
        expected = theirs(
            input_ids=their_ids[:, :-3], labels=their_ids[:, -3:].contiguous(), **their_inputs
        ).logits
    never = () if text.vocab_size == vocab else (image_token,)  # only their model has the row
    ends = origin.generation
    if nested:
        ends = {name: origin.config.get(f"text_config.{name}") for name in TOKEN_SETTINGS}
    return {
        "features": (
            ours.images(images, None, *instruction.values()).flatten(0, 1),
            torch.cat([*features]),
        ),
        "logits": (logits, expected),
        **compare_texts(
            ours,
            theirs,
            {"ids": ids, "attention": attention, "pixels": images, **instruction},
            {"input_ids": their_ids, **their_inputs},
            ends=ends,
            skip=1 if text.is_encoder_decoder else their_ids.shape[1],
            never=never,
        ),
    }


def tokens_beyond_windows(text: Any, num_image_tokens: int) -> int:
    """Return how many more tokens a prompt needs to exceed every attention window of a config.

    A window is a sliding window, an attention chunk, or the length from which RoPE is scaled.
    Returns 0 if the context is too short for it.
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
    most = longest - num_image_tokens - 7 - MAX_TOKENS
    return max(
        (
            beyond
            for window in (*windows, *scaled)
            if window and (beyond := window + BEYOND_WINDOW) <= most
        ),
        default=0,
    )


def compare_texts(
    ours: Any,
    theirs: Any,
    our_inputs: Mapping[str, Any],
    their_inputs: Mapping[str, Any],
    *,
    ends: Mapping[str, Any],
    skip: int,
    never: Sequence[int] = (),
    forced: bool = False,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the ids that both sides generate, as (ours, theirs).

    greedy      GREEDY_TOKENS tokens, for any generation settings
    until_end   text up to an end token: ours by `ends`, theirs by the special ids of their settings

    Their `generate` puts `skip` ids in front, which are removed, and must not generate the ids
    `never`. `forced`: their `generate` reads its end token from the config and ignores the
    settings.
    """
    fixed = {"max_new_tokens": GREEDY_TOKENS, "min_new_tokens": GREEDY_TOKENS, "do_sample": False}
    suppressed = {"suppress_tokens": [*never]} if never else {}
    end_ids = {name: to_json(ends[name]) for name in TOKEN_SETTINGS if ends.get(name) is not None}
    with _settings(ours), _settings(theirs):
        greedy = (
            ours.generate(**our_inputs, **fixed, **(end_ids if forced else {})),
            theirs.generate(**their_inputs, **fixed, **suppressed)[:, -GREEDY_TOKENS:],
        )
    free = {"max_new_tokens": MAX_TOKENS, "do_sample": False}
    if suppressed:
        suppressed["suppress_tokens"] += end_ids.get("suppress_tokens", ())
    with _settings(ours), _settings(theirs, TOKEN_SETTINGS):
        until_end = (
            ours.generate(**our_inputs, **free, **end_ids),
            theirs.generate(**their_inputs, **free, **suppressed)[:, skip:],
        )
    return {"greedy": greedy, "until_end": until_end}


@contextmanager
def _settings(
    model: nn.Module, names: Sequence[str] = ("decoder_start_token_id",)
) -> Iterator[None]:
    """Keep only the settings `names` in every `generation_config` of the model, for the block."""
    from transformers import GenerationConfig

    modules: list[Any] = [
        module for module in model.modules() if hasattr(module, "generation_config")
    ]
    before = {module: module.generation_config for module in modules}
    for module, config in before.items():
        module.generation_config = GenerationConfig(
            **{name: getattr(config, name, None) for name in names}
        )
    try:
        yield
    finally:
        for module, config in before.items():
            module.generation_config = config


# --- stages


def weights_stage(model: ModelSpec, name: str, losses: Sequence[LossSpec], template: str) -> Stage:
    """Return a stage for imported weights; it is never trained."""
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
