"""Encoder-decoder language models on token streams: encode the prompt, decode the answer.

The first label marks the start of the answer, so data and losses do not depend on the kind of
language model (prefix language modeling; Li et al. 2023, arXiv:2301.12597, 3.3).
"""

# B batch  T tokens of the row  N tokens of the longest answer  D width  V vocabulary  C candidates
# R tokens of one

from typing import Any, cast

import torch
from torch import Tensor

from bridgework.errors import DataError
from bridgework.models import attention_masks
from bridgework.system import IGNORE, IMAGE

IMAGE_AFTER_ANSWER = (
    "an image comes after the first answer. An encoder-decoder reads all images before it. "
    "Fix: put images into the prompt, or take a causal language model"
)


def is_encoder_decoder(language: Any) -> bool:
    """Return whether a transformers language model is an encoder-decoder."""
    return bool(language.config.is_encoder_decoder)


def logits(
    language: Any, embeds_BTD: Tensor, ids_BT: Tensor, attention_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """Return (B, T, V), the next-token logits of every token as of a causal model, 0 in the prompt.

    The answer starts at the first label (at the second token at the earliest, after a prompt) and
    ends with the row. Raises DataError for an image in it.
    """
    length = ids_BT.shape[1]
    has_BT = labels_BT != IGNORE
    first_B = torch.where(has_BT.any(-1), has_BT.int().argmax(-1), length).clamp(min=1)
    answer_N = torch.arange(max(1, length - int(first_B.min())), device=ids_BT.device)
    place_BN = first_B[:, None] - 1 + answer_N
    real_BN = place_BN < length
    decoder_ids_BN = ids_BT.gather(1, place_BN.clamp(max=length - 1))
    decoder_ids_BN[:, 0] = _start(language)
    if bool((decoder_ids_BN.eq(IMAGE) & real_BN).any()):
        raise DataError(IMAGE_AFTER_ANSWER)
    prompt_length = int(first_B.max())
    place_T = torch.arange(length, device=ids_BT.device)
    prompt_BT = attention_BT.bool() & (place_T < first_B[:, None])
    logits_BNV = language(
        inputs_embeds=embeds_BTD[:, :prompt_length],
        attention_mask=prompt_BT[:, :prompt_length].long(),
        decoder_input_ids=decoder_ids_BN.clamp(min=0),
        use_cache=False,
    ).logits
    rows_BN = torch.arange(len(ids_BT), device=ids_BT.device)[:, None].expand_as(place_BN)
    logits_BTV = logits_BNV.new_zeros(*ids_BT.shape, logits_BNV.shape[-1])
    return cast(
        Tensor, logits_BTV.index_put((rows_BN[real_BN], place_BN[real_BN]), logits_BNV[real_BN])
    )


def packed_logits(
    language: Any, embeds_BTD: Tensor, ids_BT: Tensor, labels_BT: Tensor, segments_BT: Tensor
) -> Tensor:
    """Return `logits` of packed rows: encoder and decoder read the complete row, masked by sample.

    The decoder's places are those of the row, so it also computes unused logits of the prompts.
    Raises DataError for an image after a sample's first label, SpecError for a model that cannot
    pack.
    """
    attention_masks.check_packing(language)
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    has_BT = labels_BT != IGNORE
    first_R = torch.full((int(segments_BT.max()) + 1,), len(place_T), device=ids_BT.device)
    first_R = first_R.scatter_reduce(
        0, segments_BT[has_BT], place_T.expand_as(ids_BT)[has_BT], "amin"
    )
    real_BT = segments_BT >= 0
    first_BT = first_R[segments_BT.clamp(min=0)]
    if bool((real_BT & (place_T >= first_BT) & ids_BT.eq(IMAGE)).any()):
        raise DataError(IMAGE_AFTER_ANSWER)
    prompt_BT, answer_BT = real_BT & (place_T < first_BT), real_BT & (place_T >= first_BT - 1)
    decoder_ids_BT = torch.where(place_T == first_BT - 1, _start(language), ids_BT).clamp(min=0)
    same_BTT = attention_masks.same_sample(segments_BT)
    # every token sees itself, because a softmax over nothing is NaN
    itself_TT = torch.eye(len(place_T), dtype=torch.bool, device=ids_BT.device)
    encoder_BTT = same_BTT & prompt_BT.unsqueeze(1) | itself_TT & ~real_BT.unsqueeze(-1)
    decoder_BTT = (same_BTT & answer_BT.unsqueeze(1)).tril() | itself_TT
    outputs = language(
        inputs_embeds=embeds_BTD,
        # of the encoder, and of the decoder's cross-attention
        attention_mask=attention_masks.additive_mask(encoder_BTT, embeds_BTD.dtype),
        decoder_input_ids=decoder_ids_BT,
        decoder_attention_mask=attention_masks.additive_mask(decoder_BTT, embeds_BTD.dtype),
        use_cache=False,
    )
    return cast(Tensor, outputs.logits)


def continuations(language: Any, prompt_1TD: Tensor, rest_CR: Tensor) -> Tensor:
    """Return (C, R, V), the logits of every token of `rest` after one prompt, encoded once."""
    encoded_1TD = language.get_encoder()(inputs_embeds=prompt_1TD).last_hidden_state
    start_C1 = torch.full_like(rest_CR[:, :1], _start(language))
    rest_CR = rest_CR.masked_fill(rest_CR == IGNORE, 0)
    outputs = language(
        encoder_outputs=(encoded_1TD.expand(len(rest_CR), -1, -1),),
        attention_mask=torch.ones(
            len(rest_CR), encoded_1TD.shape[1], dtype=torch.long, device=rest_CR.device
        ),
        decoder_input_ids=torch.cat([start_C1, rest_CR[:, :-1]], dim=1),
        use_cache=False,
    )
    return cast(Tensor, outputs.logits)


def generate(language: Any, prompts_BTD: Tensor, attention_BT: Tensor, **generation: Any) -> Tensor:
    """Return (B, new) ids, and stream them, without the token that starts the decoder."""
    if generation.get("streamer") is not None:
        generation["streamer"] = SkipPromptStreamer(generation["streamer"])
    new_BT = language.generate(
        inputs_embeds=prompts_BTD, attention_mask=attention_BT.long(), **generation
    )
    return cast(Tensor, new_BT[:, 1:])


class SkipPromptStreamer:
    """A streamer that passes on all but the first call, in which transformers puts the prompt."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._prompt_passed = False

    def put(self, value: Tensor) -> None:
        if self._prompt_passed:
            self._streamer.put(value)
        self._prompt_passed = True

    def end(self) -> None:
        self._streamer.end()


def _start(language: Any) -> int:
    return int(language.generation_config.decoder_start_token_id)
