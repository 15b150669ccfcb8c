"""The cross-attention wiring as transformers' `generate` wants to see a language model."""

# B batch  T tokens  M images of a row  Q tokens of an image  F their width  D width of the language model  V vocabulary

from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.models.crossattn_vlm import CrossAttentionModel


class Speaker(PreTrainedModel, GenerationMixin):
    """A view of a model, made for one call: it owns no parameter. Images ride along as arguments of every step."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model: "CrossAttentionModel") -> None:
        config = deepcopy(model.language.config)
        config.vocab_size += 2
        super().__init__(config)
        self.model = model
        self.generation_config = deepcopy(model.language.generation_config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the experts, if there are any, are the language model's

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        *,
        media: Tensor,
        seen: Tensor,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """The logits of the last token; media (B, M, Q, F), seen (B, T) of the prompt, whose embeddings come first.

        What is written behind the prompt sees the image that its last token saw.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, seen = self.model.embed(input_ids), seen[:, -1:].expand(input_ids.shape)
        logits_B1V, cache = self.model.read(
            cast(Tensor, inputs_embeds),
            media,
            seen,
            last=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )
        if cache is None:
            raise SpecError(
                f"generate: {self.config.model_type!r} gives no cache of a prompt to go on from. "
                "Fix: take another language.arch"
            )
        logits_B1V[..., -1] = torch.finfo(logits_B1V.dtype).min  # a model cannot show an image
        return CausalLMOutputWithPast(logits=logits_B1V, past_key_values=cache)
