"""CLIP's text tower: maps token ids to one vector per text."""

# B texts  T tokens  D width

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bridgework.config import config_class, positive
from bridgework.errors import DataError, SpecError
from bridgework.models import pretrained as weights_of
from bridgework.models.attention_masks import padded_positions

FIELDS = {  # ours -> transformers'
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "act": "hidden_act",
    "eos": "eos_token_id",
}


@config_class
class CLIPTextConfig:
    """CLIP's causal text tower; defaults: ViT-B/32 (Radford et al. 2021, arXiv:2103.00020, 2.4)."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    ffn: int = 2048
    # bytes, bytes that end a word, merges, start and end (openai/CLIP; the paper says 49,152)
    vocab: int = 49_408
    context: int = 77  # tokens, start and end included
    # the released weights lose accuracy under gelu
    act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    # as in transformers, whose old configs have 2 and mean the largest id of a text
    eos: int = 49_407
    tokenizer: str = "openai/clip-vit-base-patch32"  # folder, hub name, `package:` path or "bytes"
    weights: str | None = None  # folder or hub name, of a text tower or a complete CLIP

    def __post_init__(self) -> None:
        positive("text", self, "width", "depth", "heads", "ffn", "vocab", "context")
        if self.width % self.heads:
            raise SpecError(
                f"text.width {self.width} must be a multiple of text.heads {self.heads}"
            )

    def config(self) -> Any:
        """Return transformers' config of the tower."""
        import transformers  # takes seconds: not before a model is built

        sizes: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in FIELDS.items()}
        return transformers.CLIPTextConfig(**sizes, bos_token_id=None, pad_token_id=None)

    def build(self, *, pretrained: bool = True) -> "CLIPText":
        """Return the tower in float32. Raises WeightsError for weights of another size."""
        from transformers import CLIPTextModel

        if pretrained and self.weights is not None:
            config = self._checked(self.weights)
            return CLIPText(self, weights_of.load(CLIPTextModel, self.weights, config=config))
        tower: Any = CLIPTextModel(self.config())
        self._initialize(tower)
        return CLIPText(self, tower)

    def _initialize(self, tower: Any) -> None:
        """Draw parameters as openai/CLIP does.

        transformers swaps the standard deviations of q, k, v and of the output projection.
        """
        nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.01)
        for block in tower.encoder.layers:
            attention = block.self_attn
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
                nn.init.normal_(projection.weight, std=self.width**-0.5)
            nn.init.normal_(
                attention.out_proj.weight, std=self.width**-0.5 * (2 * self.depth) ** -0.5
            )

    def _checked(self, weights: str) -> Any:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights)
        config = getattr(config, "text_config", config)  # of a complete CLIP
        found = {
            ours: getattr(config, theirs, None) for ours, theirs in FIELDS.items() if ours != "eos"
        }
        weights_of.check_fields(weights, {name: getattr(self, name) for name in found}, found)
        return config

    def tiny(self) -> "CLIPTextConfig":
        """Return a config of width 32, two layers, a byte tokenizer (end token 259)."""
        return replace(
            self,
            width=32,
            depth=2,
            heads=2,
            ffn=64,
            vocab=260,
            context=min(self.context, 128),
            eos=259,
            tokenizer="bytes",
            weights=None,
        )


class CLIPText(nn.Module):
    """`tower` is transformers' CLIPTextModel; a text is the hidden state of its end token."""

    def __init__(self, config: CLIPTextConfig, tower: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.tower = tower

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """Map (B, T) int64 and bool, padding on either side, to (B, D).

        Raises DataError for more than `context` tokens.
        """
        if ids_BT.shape[1] > self.config.context:
            raise DataError(
                f"the text tower reads {self.config.context} tokens, got {ids_BT.shape[1]}. "
                "Fix: set data.max_tokens"
            )
        hidden_BTD: Tensor = self.tower(
            input_ids=ids_BT,
            attention_mask=attention_BT.long(),
            position_ids=padded_positions(attention_BT),
        ).last_hidden_state
        end_B = (attention_BT * torch.arange(ids_BT.shape[1], device=ids_BT.device)).argmax(-1)
        return hidden_BTD[torch.arange(len(end_B), device=end_B.device), end_B]
