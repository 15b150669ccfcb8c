"""The cross-attention wiring as a language model for transformers' `generate`.

In a module of its own, because importing transformers' generation takes seconds.
"""

# B batch  T tokens  M images of a row  Q tokens of an image  F their width  V vocabulary

from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.models.cross_attention_vlm import CrossAttentionVLM


class CrossAttentionGenerationAdapter(PreTrainedModel, GenerationMixin):
    """A view of a model for one call, without parameters of its own.

    Images are passed as arguments of every step.
    """

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model: "CrossAttentionVLM") -> None:
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
        """Return the logits of the last token.

        media (B, M, Q, F) and seen (B, T) are those of the prompt, whose embeddings come first. New
        tokens see the image that the prompt's last token saw.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, seen = self.model.embed(input_ids), seen[:, -1:].expand(input_ids.shape)
        logits_B1V, cache = self.model.run_language(
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
                f"generate: {self.config.model_type!r} returns no cache to continue a prompt. "
                "Fix: take another language.arch"
            )
        logits_B1V[..., -1] = torch.finfo(logits_B1V.dtype).min  # a model cannot generate an image
        return CausalLMOutputWithPast(logits=logits_B1V, past_key_values=cache)
