"""Packing: samples share a sequence and stay isolated, by block masks and positions that restart.

`segments` (B, T) holds the number of each token's sample, -1 on padding. The result for a sample is the result for it
alone (as in BERT-style sequence packing; Krell et al. 2021, arXiv:2107.02027, 3.2).
"""

# B sequences  T tokens  D width

import sys
from math import inf
from typing import Any

import torch
from torch import Tensor

from bridgework.errors import SpecError

BY_LENGTH = (
    "dynamic",
    "longrope",
)  # kinds of rotary positions whose angles depend on the length of the text
KINDS = {  # transformers' masks for models whose layers are all alike, and the field that each needs
    "create_sliding_window_causal_mask": "sliding_window",
    "create_chunked_causal_mask": "attention_chunk_size",
    "create_causal_mask": "vocab_size",
}
COUPLING = {  # fields of configs under which a token's result depends on tokens that no mask hides
    "expert_capacity": "its experts take a fixed number of tokens of a sequence",
    "local_radius": "its encoder reads a sequence in blocks of its own",
}


def refusal(config: Any, cls: Any) -> str | None:
    """Return why a language model of transformers cannot keep packed samples apart; None where its masks do.

    `cls` is the class that the config builds.
    """
    from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as KNOWN

    said = f"{config.model_type!r} cannot keep samples of one sequence apart:"
    if _is_recurrent(config, cls):
        return f"{said} its recurrent layers carry a state from one to the next"
    if unknown := sorted(_layers(config) - set(KNOWN)):
        return f"{said} transformers has no mask for its {unknown[0]!r} layers"
    module = sys.modules[cls.__module__]
    if not any(hasattr(module, kind) for kind in KINDS):
        return f"{said} it builds masks of its own"
    if hasattr(module, "build_alibi_tensor") and getattr(config, "alibi", True):
        return f"{said} its ALiBi counts positions by a padding mask, which has no blocks"
    return next((f"{said} {why}" for name, why in COUPLING.items() if hasattr(config, name)), None)


def reads_padding(language: Any) -> bool:
    """Return whether padding before a text changes it: a recurrent state that no padding mask reaches."""
    cls = type(language)
    masked = hasattr(sys.modules[cls.__module__], "create_recurrent_attention_mask")
    return _is_recurrent(language.config, cls) and not masked


def caches(language: Any, length: int) -> bool:
    """Return whether what a language model keeps of a prompt serves any continuation, up to `length` tokens."""
    return not _is_recurrent(language.config, type(language)) and length <= _rotary_limit(
        language.config
    )


def _layers(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _is_recurrent(config: Any, cls: Any) -> bool:
    """Whether a layer has a state instead of attention; a kind of layer may have several masks by name."""
    from transformers import masking_utils

    kinds = [
        masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING.get(kind) for kind in _layers(config)
    ]
    masks = [
        mask for kind in kinds for mask in (kind.values() if isinstance(kind, dict) else (kind,))
    ]
    return masking_utils.create_recurrent_attention_mask in masks or getattr(
        cls, "_is_stateful", False
    )


def _rotary_limit(config: Any) -> float:
    """Tokens up to which no angle depends on the length of the text; infinite for most kinds of rotary positions."""
    parameters = getattr(config, "rope_parameters", None) or {}
    own = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in own
        if kind.get("rope_type") in BY_LENGTH
    ]
    return min(limits, default=inf)


def check(language: Any) -> None:
    """Raises SpecError for a language model that cannot keep packed samples apart."""
    if (why := refusal(language.config, type(language))) is not None:
        raise SpecError(f"packing: {why}. Fix: set the stage's data.packing=none")


def positions(segments_BT: Tensor) -> Tensor:
    """(B, T) int64: the place of each token in its own sample, from 0."""
    place_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return place_T - torch.where(begins_BT, place_T, 0).cummax(-1).values


def own(segments_BT: Tensor) -> Tensor:
    """(B, T, T) bool: whether two tokens are of one sample, or both padding."""
    return segments_BT.unsqueeze(-1) == segments_BT.unsqueeze(-2)


def sum_masks(seen_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), 0 where a token (the second dimension) sees another, else the lowest number of `dtype`."""
    scores_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=seen_BTT.device)
    return scores_BTT.masked_fill(~seen_BTT, torch.finfo(dtype).min).unsqueeze(1)


def decoding(
    language: Any, embeds_BTD: Tensor, attention_BT: Tensor, segments_BT: Tensor | None
) -> dict[str, Any]:
    """Return the mask and positions of a causal language model, by its argument names.

    With `segments` the masks are those that transformers builds for the model's own layers (full, sliding, chunked),
    in blocks. Padding is a sample of its own, so no row is empty. Raises SpecError for a model that cannot pack.
    """
    if segments_BT is None:
        places_BT = (attention_BT.long().cumsum(-1) - 1).clamp(
            min=0
        )  # padding on the left moves no token
        return {"attention_mask": attention_BT, "position_ids": places_BT}
    check(language)
    positions_BT = positions(segments_BT)
    if (limit := _rotary_limit(language.config)) < inf and int(positions_BT.max()) >= limit:
        raise SpecError(
            f"packing: {language.config.model_type!r} rotates all samples of a sequence by the longest. Got a sample "
            f"of {int(positions_BT.max()) + 1} tokens; expected at most {limit}. Fix: set data.max_tokens={limit}, "
            "or data.packing=none"
        )
    return {
        "attention_mask": _masks(language, embeds_BTD, positions_BT),
        "position_ids": positions_BT,
    }


def _masks(language: Any, embeds_BTD: Tensor, positions_BT: Tensor) -> Any:
    """The mask of a model's layers in blocks, or a mapping with one for each kind of layer that it has."""
    from transformers import masking_utils

    config, module = language.config, sys.modules[type(language).__module__]
    build = masking_utils.create_masks_for_generate
    if not hasattr(config, "layer_types"):  # Moshi's config has a window, and its model none
        uses = [
            kind
            for kind, field in KINDS.items()
            if hasattr(module, kind) and getattr(config, field, None)
        ]
        build = getattr(masking_utils, uses[0])
    # without a padding mask transformers takes positions that restart as the bounds of packed samples
    return build(config, embeds_BTD, None, None, position_ids=positions_BT)


def last_seen(places_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
    """(B, T) int64: the number in its row, from 1, of the last place before or at each token; 0 for none.

    What another sample shows is not seen.
    """
    count_BT = places_BT.cumsum(-1)
    if segments_BT is None:
        return count_BT
    place_T = torch.arange(places_BT.shape[1], device=places_BT.device)
    last_BT = torch.where(places_BT, place_T, -1).cummax(-1).values
    own_BT = segments_BT.gather(1, last_BT.clamp(min=0)) == segments_BT
    return count_BT.masked_fill((last_BT < 0) | ~own_BT, 0)
