"""Block-diagonal attention masks and restarted position ids for packed sequences.

`segments` (B, T) holds the sample number of each token, -1 on padding. The result for a sample is
that of the sample alone (as in packed BERT; Krell et al. 2021, arXiv:2107.02027, 3.2).
"""

# B sequences  T tokens  D width  N images

import inspect
import sys
from math import inf
from typing import Any

import torch
from torch import Tensor

from bridgework.errors import SpecError

# kinds of rotary positions whose angles depend on the length of the text
BY_LENGTH = ("dynamic", "longrope")
KINDS = {  # transformers' masks for models with one kind of layer, and the field that each needs
    "create_sliding_window_causal_mask": "sliding_window",
    "create_chunked_causal_mask": "attention_chunk_size",
    "create_causal_mask": "vocab_size",
}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")  # config fields, in tokens
COUPLING = {  # config fields that make a token depend on others that no mask hides
    "expert_capacity": "its experts take a fixed number of tokens of a sequence",
    "local_radius": "its encoder reads a sequence in blocks of its own",
}


def packing_refusal(config: Any, cls: Any) -> str | None:
    """Return the reason why a transformers language model cannot pack samples, or None if it can.

    `cls` is the class that the config builds.
    """
    from transformers.masking_utils import LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING as KNOWN

    prefix = f"{config.model_type!r} cannot keep samples of one sequence apart:"
    if _is_recurrent(config, cls):
        return f"{prefix} its recurrent layers carry a state from one to the next"
    if unknown := sorted(_layers(config) - set(KNOWN)):
        return f"{prefix} transformers has no mask for its {unknown[0]!r} layers"
    module = sys.modules[cls.__module__]
    if not any(hasattr(module, kind) for kind in KINDS):
        return f"{prefix} it builds masks of its own"
    if hasattr(module, "build_alibi_tensor") and getattr(config, "alibi", True):
        return f"{prefix} its ALiBi counts positions by a padding mask, which has no blocks"
    reasons = (reason for name, reason in COUPLING.items() if hasattr(config, name))
    return next((f"{prefix} {reason}" for reason in reasons), None)


def check_packing(language: Any) -> None:
    """Raise SpecError for a language model that cannot keep packed samples apart."""
    if (reason := packing_refusal(language.config, type(language))) is not None:
        raise SpecError(f"packing: {reason}. Fix: set the stage's data.packing=none")


def reads_padding(language: Any) -> bool:
    """Return whether padding before a text changes it: a recurrent state without a padding mask."""
    cls = type(language)
    masked = hasattr(sys.modules[cls.__module__], "create_recurrent_attention_mask")
    return _is_recurrent(language.config, cls) and not masked


def can_cache_prompt(language: Any, length: int) -> bool:
    """Return whether a model's cache of a prompt is valid for any continuation up to `length`."""
    recurrent = _is_recurrent(language.config, type(language))
    return not recurrent and length <= rotary_limit(language.config)


def takes_any_mask(language: Any, length: int) -> bool:
    """Return whether a causal model obeys any mask and any positions in a row of `length` tokens.

    It does not if a token depends on more than its mask shows, if a distance is counted in the row
    (MPT's ALiBi), if a layer's window is shorter than the row, or if the row is longer than the
    position embeddings.
    """
    config, cls = language.config, type(language)
    arguments = inspect.signature(language.forward).parameters
    if packing_refusal(config, cls) or "position_ids" not in arguments:
        return False
    bounds = [getattr(config, name, None) for name in (*WINDOWS, "max_position_embeddings")]
    return length <= min(bound or inf for bound in bounds)


def _layers(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ())


def _is_recurrent(config: Any, cls: Any) -> bool:
    """Return whether a layer has a state instead of attention."""
    from transformers import masking_utils

    known = masking_utils.LAYER_PATTERN_TO_MASK_FUNCTION_MAPPING
    masks: list[Any] = []
    for kind in _layers(config):  # a kind of layer may have several masks, by name
        mask = known.get(kind)
        masks += mask.values() if isinstance(mask, dict) else [mask]
    recurrent = masking_utils.create_recurrent_attention_mask in masks
    return recurrent or getattr(cls, "_is_stateful", False)


def rotary_limit(config: Any) -> float:
    """Return the tokens up to which no rotary angle depends on the text's length; usually inf."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in parameters.values() if isinstance(kind, dict)] or [parameters]
    limits = [
        kind.get("original_max_position_embeddings") or config.max_position_embeddings
        for kind in kinds
        if kind.get("rope_type") in BY_LENGTH
    ]
    return min(limits, default=inf)


def padded_positions(attention_BT: Tensor) -> Tensor:
    """Return (B, T) int64 position ids of real tokens alone: padding on the left moves none."""
    return (attention_BT.long().cumsum(-1) - 1).clamp(min=0)


def packed_positions(segments_BT: Tensor) -> Tensor:
    """Return (B, T) int64 position ids that restart at 0 for each sample."""
    place_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    starts_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    starts_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return place_T - torch.where(starts_BT, place_T, 0).cummax(-1).values


def same_sample(segments_BT: Tensor) -> Tensor:
    """Return (..., T, T) bool: true if two tokens are of one sample, or both padding."""
    return segments_BT.unsqueeze(-1) == segments_BT.unsqueeze(-2)


def additive_mask(visible_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, 1, T, T): 0 if a token (dimension 2) sees another, else the minimum of `dtype`."""
    scores_BTT = torch.zeros(visible_BTT.shape, dtype=dtype, device=visible_BTT.device)
    return scores_BTT.masked_fill(~visible_BTT, torch.finfo(dtype).min).unsqueeze(1)


def masks_and_positions(
    language: Any, embeds_BTD: Tensor, attention_BT: Tensor, segments_BT: Tensor | None
) -> dict[str, Any]:
    """Return the mask and positions of a causal language model, by its argument names.

    With `segments`, they are block-diagonal versions of the masks that transformers builds for the
    model's layers (full, sliding, chunked). Padding is a sample of its own, so no row is empty.
    Raises SpecError for a model that cannot pack.
    """
    if segments_BT is None:
        return {"attention_mask": attention_BT, "position_ids": padded_positions(attention_BT)}
    check_packing(language)
    positions_BT = packed_positions(segments_BT)
    if (limit := rotary_limit(language.config)) < inf and int(positions_BT.max()) >= limit:
        raise SpecError(
            f"packing: {language.config.model_type!r} rotates all samples of a sequence by the "
            f"longest. Got a sample of {int(positions_BT.max()) + 1} tokens; "
            f"expected at most {limit}. Fix: set data.max_tokens={limit}, or data.packing=none"
        )
    return {
        "attention_mask": _block_masks(language, embeds_BTD, positions_BT),
        "position_ids": positions_BT,
    }


def _block_masks(language: Any, embeds_BTD: Tensor, positions_BT: Tensor) -> Any:
    """Return the block mask of a model's layers, or a mapping with one per kind of layer."""
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
    # without a padding mask transformers reads restarted positions as bounds of packed samples
    return build(config, embeds_BTD, None, None, position_ids=positions_BT)


def last_image(places_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
    """Return (B, T) int64: the number of the last image place at or before each token.

    Places are numbered in their row, from 1; 0 is none. Images of other samples do not count.
    """
    count_BT = places_BT.cumsum(-1)
    if segments_BT is None:
        return count_BT
    place_T = torch.arange(places_BT.shape[1], device=places_BT.device)
    last_BT = torch.where(places_BT, place_T, -1).cummax(-1).values
    same_BT = segments_BT.gather(1, last_BT.clamp(min=0)) == segments_BT
    return count_BT.masked_fill((last_BT < 0) | ~same_BT, 0)
