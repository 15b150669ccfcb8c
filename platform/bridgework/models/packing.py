"""Samples that share a sequence stay strangers: attention in blocks, positions that begin again.

`segments` (B, T) says whose token each is, -1 on padding. What is computed for a sample is then what would be computed
for it alone (as in BERT-style sequence packing; Krell et al. 2021, arXiv:2107.02027, 3.2).
"""

# B sequences  T tokens

from typing import Any

import torch
from torch import Tensor


def positions(segments_BT: Tensor) -> Tensor:
    """(B, T) int64: the place of each token in its own sample, from 0."""
    place_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return place_T - torch.where(begins_BT, place_T, 0).cummax(-1).values


def causal_blocks(segments_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), what attention adds to its scores: 0 where a token looks back within its sample, else the lowest.

    A model of transformers takes a mask of four dimensions as it is. Padding looks at padding, so no row is empty.
    """
    return added(own(segments_BT).tril(), dtype)


def own(segments_BT: Tensor) -> Tensor:
    """(B, T, T) bool: whether two tokens are of one sample, or both padding."""
    return segments_BT.unsqueeze(-1) == segments_BT.unsqueeze(-2)


def added(seen_BTT: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 1, T, T), 0 where a token (the second dimension) sees another, else the lowest number of `dtype`."""
    scores_BTT = torch.zeros(seen_BTT.shape, dtype=dtype, device=seen_BTT.device)
    return scores_BTT.masked_fill(~seen_BTT, torch.finfo(dtype).min).unsqueeze(1)


def decoding(attention_BT: Tensor, segments_BT: Tensor | None, dtype: torch.dtype) -> dict[str, Any]:
    """The mask and positions of a causal language model, by its names for them."""
    if segments_BT is None:
        places_BT = (attention_BT.long().cumsum(-1) - 1).clamp(min=0)  # padding on the left moves no token
        return {"attention_mask": attention_BT, "position_ids": places_BT}
    return {"attention_mask": causal_blocks(segments_BT, dtype), "position_ids": positions(segments_BT)}


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
