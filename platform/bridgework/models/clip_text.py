"""Text towers: token ids in, one vector per text out."""

# B texts  T tokens  D width

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bridgework.config import config_class, positive
from bridgework.errors import DataError, SpecError
from bridgework.models import pretrained as weights_of

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
    """CLIP's causal text tower; the defaults are ViT-B/32's (Radford et al. 2021, arXiv:2103.00020, 2.4)."""

    width: int = 512
    depth: int = 12
    heads: int = 8
    ffn: int = 2048
    vocab: int = 49_408  # bytes, bytes that end a word, merges, start and end (openai/CLIP; the paper says 49,152)
    context: int = 77  # tokens, start and end included
    act: Literal["quick_gelu", "gelu"] = (
        "quick_gelu"  # the released weights lose accuracy under gelu
    )
    eos: int = 49_407  # what transformers looks for; its old configs say 2, and mean the largest id of a text
    tokenizer: str = "openai/clip-vit-base-patch32"  # folder, hub name, `package:` path or "bytes"
    weights: str | None = None  # folder or hub name, of a text tower or of a whole CLIP

    def __post_init__(self) -> None:
        positive("text", self, "width", "depth", "heads", "ffn", "vocab", "context")
        if self.width % self.heads:
            raise SpecError(
                f"text.width {self.width} must be a multiple of text.heads {self.heads}"
            )

    def config(self) -> Any:
        """Return transformers' config of the tower."""
        from transformers import (
            CLIPTextConfig as Config,
        )  # takes seconds: not before a model is built

        numbers: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in FIELDS.items()}
        return Config(**numbers, bos_token_id=None, pad_token_id=None)

    def build(self, *, pretrained: bool = True) -> "CLIPText":
        """The tower in float32. Raises WeightsError for weights that do not fit the numbers."""
        from transformers import CLIPTextModel

        if pretrained and self.weights is not None:
            return CLIPText(
                self,
                weights_of.load(CLIPTextModel, self.weights, config=self._checked(self.weights)),
            )
        tower: Any = CLIPTextModel(self.config())
        self._draw(tower)
        return CLIPText(self, tower)

    def _draw(self, tower: Any) -> None:
        """As openai/CLIP draws; transformers swaps the spreads of q, k, v with those of what comes behind them."""
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
        config = getattr(config, "text_config", config)  # of a whole CLIP
        found = {
            ours: getattr(config, theirs, None) for ours, theirs in FIELDS.items() if ours != "eos"
        }
        weights_of.check(weights, {name: getattr(self, name) for name in found}, found)
        return config

    def tiny(self) -> "CLIPTextConfig":
        """Width 32, two layers, a byte tokenizer, whose texts end with 259; the activation stays."""
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
    """`tower` is transformers' CLIPTextModel; a text is what its last token, the end, has read."""

    def __init__(self, config: CLIPTextConfig, tower: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.tower = tower

    def forward(self, ids_BT: Tensor, attention_BT: Tensor) -> Tensor:
        """(B, T) int64 and bool, padding on either side -> (B, D). Raises DataError for more than `context` tokens."""
        if ids_BT.shape[1] > self.config.context:
            raise DataError(
                f"the text tower reads {self.config.context} tokens, got {ids_BT.shape[1]}; set data.max_tokens"
            )
        positions_BT = (attention_BT.long().cumsum(-1) - 1).clamp(
            min=0
        )  # padding on the left moves no token
        hidden_BTD: Tensor = self.tower(
            input_ids=ids_BT, attention_mask=attention_BT.long(), position_ids=positions_BT
        ).last_hidden_state
        end_B = (attention_BT * torch.arange(ids_BT.shape[1], device=ids_BT.device)).argmax(-1)
        return hidden_BTD[torch.arange(len(end_B), device=end_B.device), end_B]
