"""Rows of one token stream, read by a language model of two halves: the prompt is encoded, the answer decoded.

What has loss says where the answer begins, so data and losses need not know which kind of language model there is
(prefix language modeling; Li et al. 2023, arXiv:2301.12597, 3.3).
"""

# B batch  T tokens of the row  N tokens of the longest answer  D width  V vocabulary  C candidates  R tokens of one

from typing import Any, cast

import torch
from torch import Tensor

from bridgework.errors import DataError
from bridgework.models import attention_masks
from bridgework.system import IGNORE, IMAGE


def is_one(language: Any) -> bool:
    """Whether a language model of transformers has two halves."""
    return bool(language.config.is_encoder_decoder)


def logits(
    language: Any, embeds_BTD: Tensor, ids_BT: Tensor, attention_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """(B, T, V): at every place the logits of the token behind it, as a causal model gives them; 0 before the answer.

    The answer begins at the first label (the second token at the earliest: a row begins with a prompt) and goes to the
    end of the row. Raises DataError for an image in it.
    """
    length = ids_BT.shape[1]
    has_BT = labels_BT != IGNORE
    first_B = torch.where(has_BT.any(-1), has_BT.int().argmax(-1), length).clamp(min=1)
    place_BN = (
        first_B[:, None]
        - 1
        + torch.arange(max(1, length - int(first_B.min())), device=ids_BT.device)
    )
    real_BN = place_BN < length
    said_BN = ids_BT.gather(1, place_BN.clamp(max=length - 1))
    said_BN[:, 0] = _start(language)
    if bool((said_BN.eq(IMAGE) & real_BN).any()):
        raise DataError(
            "an image stands behind the first answer, and an encoder-decoder reads all images before it"
        )
    read = int(first_B.max())
    prompt_BT = attention_BT.bool() & (
        torch.arange(length, device=ids_BT.device) < first_B[:, None]
    )
    logits_BNV = language(
        inputs_embeds=embeds_BTD[:, :read],
        attention_mask=prompt_BT[:, :read].long(),
        decoder_input_ids=said_BN.clamp(min=0),
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
    """`logits` of rows that samples share: each half reads the whole row, and in it each sample its own prompt.

    The decoder's places are those of the row, so all that it does not write is computed for nothing: prompts are.
    Raises DataError for an image behind a sample's first label, SpecError for a model that cannot pack.
    """
    attention_masks.check(language)
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    has_BT = labels_BT != IGNORE
    first_R = torch.full((int(segments_BT.max()) + 1,), len(place_T), device=ids_BT.device)
    first_R = first_R.scatter_reduce(
        0, segments_BT[has_BT], place_T.expand_as(ids_BT)[has_BT], "amin"
    )
    real_BT = segments_BT >= 0
    first_BT = first_R[segments_BT.clamp(min=0)]
    if bool((real_BT & (place_T >= first_BT) & ids_BT.eq(IMAGE)).any()):
        raise DataError(
            "an image stands behind the first answer, and an encoder-decoder reads all images before it"
        )
    prompt_BT, answer_BT = real_BT & (place_T < first_BT), real_BT & (place_T >= first_BT - 1)
    said_BT = torch.where(place_T == first_BT - 1, _start(language), ids_BT).clamp(min=0)
    own_BTT = attention_masks.own(segments_BT)
    itself_TT = torch.eye(
        len(place_T), dtype=torch.bool, device=ids_BT.device
    )  # no softmax over nothing
    read = attention_masks.sum_masks(
        own_BTT & prompt_BT.unsqueeze(1) | itself_TT & ~real_BT.unsqueeze(-1), embeds_BTD.dtype
    )
    written = attention_masks.sum_masks(
        (own_BTT & answer_BT.unsqueeze(1)).tril() | itself_TT, embeds_BTD.dtype
    )
    outputs = language(
        inputs_embeds=embeds_BTD,
        attention_mask=read,  # of the encoder, and of what the decoder sees of it
        decoder_input_ids=said_BT,
        decoder_attention_mask=written,
        use_cache=False,
    )
    return cast(Tensor, outputs.logits)


def continuations(language: Any, prompt_1TD: Tensor, rest_CR: Tensor) -> Tensor:
    """(C, R, V): the logits of every token of `rest` behind one prompt, which is encoded once."""
    encoded_1TD = language.get_encoder()(inputs_embeds=prompt_1TD).last_hidden_state
    start_C1 = torch.full_like(rest_CR[:, :1], _start(language))
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
    """(B, new): what transformers' `generate` writes, and streams, without the token that starts the decoder."""
    if generation.get("streamer") is not None:
        generation["streamer"] = _BehindStart(generation["streamer"])
    new_BT = language.generate(
        inputs_embeds=prompts_BTD, attention_mask=attention_BT.long(), **generation
    )
    return cast(Tensor, new_BT[:, 1:])


class _BehindStart:
    """A streamer that keeps the first call, which brings what the decoder starts with, from another."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._begun = False

    def put(self, value: Tensor) -> None:
        if self._begun:
            self._streamer.put(value)
        self._begun = True

    def end(self) -> None:
        self._streamer.end()


def _start(language: Any) -> int:
    return int(language.generation_config.decoder_start_token_id)
