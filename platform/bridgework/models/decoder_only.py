"""Causal language models of transformers: logits, continuations and generation.

Most families cache the keys and values of a prompt. Some have a recurrent state, or rotate keys by
the length of the text: these read a prompt again with every continuation, and some of them must not
see padding before it.
"""

# B batch  T tokens  D width  V vocabulary  C candidates  R tokens of one  L = R - 1

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from bridgework.errors import BridgeworkError, SpecError
from bridgework.models import attention_masks


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

    The prompt is read once if the model can cache it. The last column of `rest` is then not read,
    because its output would predict the token after it.
    """
    prompt, candidates = prompt_1TD.shape[1], len(rest_CR)
    cache: Any = None
    before_C1V: Tensor | None = None
    if attention_masks.can_cache_prompt(language, prompt + rest_CR.shape[1]):
        first = language(inputs_embeds=prompt_1TD, use_cache=True, **last_logits(language))
        cache = getattr(first, "past_key_values", None)  # GPT-1 has no cache
        before_C1V = first.logits[:, -1:].expand(candidates, 1, -1)
    if cache is None or before_C1V is None:
        # with the last column: the rotary angles of some models depend on the length
        words_CRD = language.get_input_embeddings()(rest_CR)
        embeds_CTD = torch.cat(
            [prompt_1TD.expand(candidates, -1, -1), words_CRD.to(prompt_1TD.dtype)], dim=1
        )
        real_CT = torch.ones(embeds_CTD.shape[:2], dtype=torch.bool, device=embeds_CTD.device)
        return logits(language, embeds_CTD, real_CT)[:, prompt - 1 : -1]
    read_CL = rest_CR[:, :-1]
    if not read_CL.shape[1]:
        return before_C1V
    cache.batch_repeat_interleave(candidates)
    after_CLV = language(input_ids=read_CL, past_key_values=cache, use_cache=True).logits
    return torch.cat([before_C1V, after_CLV], dim=1)


def last_logits(language: Any) -> dict[str, int]:
    """Return the option by which a forward pass computes the logits of the last token alone.

    It is empty for a model without that option.
    """
    known = "logits_to_keep" in inspect.signature(language.forward).parameters
    return {"logits_to_keep": 1} if known else {}


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
