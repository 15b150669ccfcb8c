"""Causal language models of transformers: logits, continuations and generation.

Most families cache the keys and values of a prompt. Some have a recurrent state, or rotate keys by
the length of the text: these read a prompt again with every continuation, and some of them must not
see padding before it.
"""

# B batch  T tokens  D width  V vocabulary  C candidates  R tokens of one  L = R - 1
# K tokens of all candidates  N = T + K

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bridgework.errors import BridgeworkError, SpecError
from bridgework.models import attention_masks
from bridgework.system import IGNORE

ROW = 512  # tokens of all candidates: beyond it, attention to hidden tokens costs more than padding


def logits(
    language: Any, embeds_BTD: Tensor, attention_BT: Tensor, segments_BT: Tensor | None = None
) -> Tensor:
    """Return (B, T, V), the next-token logits of every token; padding is on either side.

    Raises SpecError for `segments` that the language model cannot keep apart.
    """
    if segments_BT is not None or not attention_masks.reads_padding(language):
        masks = attention_masks.masks_and_positions(language, embeds_BTD, attention_BT, segments_BT)
        return cast(Tensor, language(inputs_embeds=embeds_BTD, **masks, use_cache=False).logits)
    # move padding to the right
    order_BT = (~attention_BT.bool()).int().argsort(dim=-1, stable=True)
    rows_B1 = torch.arange(len(order_BT), device=order_BT.device).unsqueeze(-1)
    embeds_BTD, attention_BT = embeds_BTD[rows_B1, order_BT], attention_BT[rows_B1, order_BT]
    masks = attention_masks.masks_and_positions(language, embeds_BTD, attention_BT, None)
    logits_BTV: Tensor = language(inputs_embeds=embeds_BTD, **masks, use_cache=False).logits
    return logits_BTV[rows_B1, order_BT.argsort(dim=-1)]


def continuations(language: Any, prompt_1TD: Tensor, rest_CR: Tensor) -> Tensor:
    """Return (C, R, V), the logits of every token of `rest` after one prompt.

    rest: padded on the right with IGNORE; the logits of padding mean nothing.

    The last token of a candidate is not read, because its output would predict the token after it.
    Short candidates follow the prompt in one row, in which each sees the prompt and itself: equal
    lengths, which a batch needs, would double the tokens. Otherwise the prompt is read once, if the
    model can cache it.
    """
    (candidates, columns), prompt = rest_CR.shape, prompt_1TD.shape[1]
    long = prompt + columns > attention_masks.rotary_limit(language.config)
    if long and candidates > 1:  # rotary angles depend on the length of a text
        texts = [row_R[row_R != IGNORE].unsqueeze(0) for row_R in rest_CR]
        found = [continuations(language, prompt_1TD, text_1R)[0] for text_1R in texts]
        return pad_sequence(found, batch_first=True)
    read_CL, real_CL = rest_CR[:, :-1], rest_CR[:, 1:] != IGNORE
    tokens = int(real_CL.sum())
    if not long and tokens <= ROW and attention_masks.takes_any_mask(language, prompt + tokens):
        return _in_one_row(language, prompt_1TD, read_CL, real_CL)
    rest_CR = rest_CR.masked_fill(rest_CR == IGNORE, 0)
    cache: Any = None
    if attention_masks.can_cache_prompt(language, prompt + columns):
        first = language(inputs_embeds=prompt_1TD, use_cache=True, **last_logits(language))
        cache = getattr(first, "past_key_values", None)  # GPT-1 has no cache
    if cache is None:
        return _with_prompt(language, prompt_1TD, rest_CR)
    before_C1V: Tensor = first.logits[:, -1:].expand(candidates, 1, -1)
    if columns == 1:
        return before_C1V
    cache.batch_repeat_interleave(candidates)
    after_CLV = language(input_ids=rest_CR[:, :-1], past_key_values=cache, use_cache=True).logits
    return torch.cat([before_C1V, after_CLV], dim=1)


def _with_prompt(language: Any, prompt_1TD: Tensor, rest_CR: Tensor) -> Tensor:
    """Return (C, R, V) logits of complete texts: the prompt is read with every candidate.

    The last token is read too, because the rotary angles of some models depend on the length.
    """
    words_CRD = language.get_input_embeddings()(rest_CR).to(prompt_1TD.dtype)
    embeds_CTD = torch.cat([prompt_1TD.expand(len(rest_CR), -1, -1), words_CRD], dim=1)
    real_CT = torch.ones(embeds_CTD.shape[:2], dtype=torch.bool, device=embeds_CTD.device)
    return logits(language, embeds_CTD, real_CT)[:, prompt_1TD.shape[1] - 1 : -1]


def _in_one_row(language: Any, prompt_1TD: Tensor, read_CL: Tensor, real_CL: Tensor) -> Tensor:
    """Return (C, R, V) logits from one row: the prompt, then the real tokens of each candidate."""
    prompt, device = prompt_1TD.shape[1], prompt_1TD.device
    owner_K, place_K = real_CL.nonzero().unbind(1)
    words_KD = language.get_input_embeddings()(read_CL[real_CL]).to(prompt_1TD.dtype)
    embeds_1ND = torch.cat([prompt_1TD, words_KD.unsqueeze(0)], dim=1)
    positions_N = torch.cat([torch.arange(prompt, device=device), prompt + place_K])
    owner_N = torch.cat([torch.full((prompt,), -1, device=device), owner_K])  # -1: the prompt
    visible_NN = (owner_N == -1) | attention_masks.same_sample(owner_N)
    visible_1NN = visible_NN.tril().unsqueeze(0)
    outputs = language(
        inputs_embeds=embeds_1ND,
        attention_mask=attention_masks.additive_mask(visible_1NN, embeds_1ND.dtype),
        position_ids=positions_N.unsqueeze(0),
        use_cache=False,
        **last_logits(language, len(owner_K) + 1),
    )
    found_KV = outputs.logits[0, -len(owner_K) - 1 :]
    candidates, rest = len(read_CL), read_CL.shape[1] + 1
    logits_CRV: Tensor = found_KV.new_zeros(candidates, rest, found_KV.shape[-1])
    logits_CRV[:, 0] = found_KV[0]
    logits_CRV[owner_K, place_K + 1] = found_KV[1:]
    return logits_CRV


def last_logits(language: Any, tokens: int = 1) -> dict[str, int]:
    """Return the option by which a forward pass computes the logits of the last tokens alone.

    It is empty for a model without that option.
    """
    known = "logits_to_keep" in inspect.signature(language.forward).parameters
    return {"logits_to_keep": tokens} if known else {}


def generate(language: Any, embeds_BTD: Tensor, attention_BT: Tensor, **generation: Any) -> Tensor:
    """Return (B, new) ids after prompts padded on the left; SpecError if transformers cannot."""
    with generating(language, attention_BT):
        new_BT = language.generate(
            inputs_embeds=embeds_BTD, attention_mask=attention_BT.long(), **generation
        )
    return cast(Tensor, new_BT)


@contextmanager
def generating(language: Any, attention_BT: Tensor) -> Iterator[None]:
    """Run the block and report errors of transformers' `generate` as a SpecError of one line.

    Raises SpecError also for padded prompts of a model whose recurrent state reads padding.
    """
    arch = language.config.model_type
    if attention_masks.reads_padding(language) and not bool(attention_BT.all()):
        raise SpecError(
            f"generate: {arch!r} reads padding into its recurrent state. "
            "Got prompts of unequal lengths; expected one length. "
            "Fix: generate for one prompt at a time, or take another language.arch"
        )
    try:
        yield
    except BridgeworkError:
        raise
    except ValueError as error:
        reason = str(error).strip().partition("\n")[0]
        raise SpecError(
            f"generate: transformers cannot generate with this {arch!r}: {reason}"
        ) from error
