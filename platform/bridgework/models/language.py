"""The language tower: a causal language model of transformers, built from explicit numbers or loaded."""

from dataclasses import replace
from typing import Any, cast

import torch

from bridgework.errors import SpecError
from bridgework.models import pretrained as weights_of
from bridgework.spec import spec

FIELDS = {  # ours -> transformers'
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}


@spec
class LanguageConfig:
    """A decoder of Llama's shape (llama, mistral, qwen2, qwen3, ...): `arch` is transformers' `model_type`.

    With `weights`, the numbers are what the weights must be; `context` may be smaller than what they allow.
    """

    arch: str = "llama"
    width: int
    depth: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int  # tokens, images included
    tokenizer: str  # folder, hub name, `package:` path or "bytes"
    weights: str | None = None  # folder, hub name or `package:` path; GGUF is converted once
    tied: bool = False  # one matrix for the input and the output embeddings
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.heads % self.kv_heads:
            raise SpecError(
                f"language: width {self.width} must be a multiple of heads {self.heads}, "
                f"and heads of kv_heads {self.kv_heads}"
            )

    def build(self, *, pretrained: bool = True) -> Any:
        """A transformers causal language model in float32. Raises SpecError for the arch, WeightsError for weights."""
        if pretrained and self.weights is not None:
            return self._load(self.weights)
        from transformers import AutoModelForCausalLM  # takes seconds: not before a model is built

        return cast(Any, AutoModelForCausalLM).from_config(self._config(), dtype=torch.float32)

    def _config(self) -> Any:
        from transformers import AutoConfig

        try:
            known = AutoConfig.for_model(self.arch)
        except ValueError:
            raise SpecError(f"language.arch: transformers has no model type {self.arch!r}; try 'llama'") from None
        missing = [ours for ours, theirs in FIELDS.items() if not hasattr(known, theirs)]
        if missing or not hasattr(known, "rope_parameters"):
            raise SpecError(f"language.arch {self.arch!r} is not of Llama's shape: it has no {', '.join(missing)}")
        return AutoConfig.for_model(
            self.arch,
            **{theirs: getattr(self, ours) for ours, theirs in FIELDS.items()},
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            # the tokenizer knows these; transformers' defaults are Llama's and would end a generation at any byte 2
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )

    def _load(self, weights: str) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = weights_of.load_config(AutoConfig, weights)
        rope = getattr(config, "rope_parameters", None) or {}
        found = {ours: getattr(config, theirs, None) for ours, theirs in FIELDS.items()}
        found |= {"arch": config.model_type, "rope_theta": rope.get("rope_theta")}
        found["context"] = min(self.context, found["context"] or 0)
        weights_of.check(weights, {name: getattr(self, name) for name in found}, found)
        return weights_of.load(AutoModelForCausalLM, weights)

    def tiny(self) -> "LanguageConfig":
        """Width 32, two layers, a byte tokenizer; the grouping of key-value heads stays."""
        heads = 4
        return replace(
            self,
            width=32,
            depth=2,
            heads=heads,
            kv_heads=max(1, heads * self.kv_heads // self.heads),
            ffn=64,
            vocab=320,
            context=min(self.context, 512),
            tokenizer="bytes",
            weights=None,
        )
