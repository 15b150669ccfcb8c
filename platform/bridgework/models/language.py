"""The language tower: a language model of transformers, built from explicit numbers or loaded."""

from collections.abc import Mapping
from dataclasses import field, replace
from typing import Any, Self

import torch

from bridgework.errors import SpecError
from bridgework.models import pretrained as weights_of
from bridgework.models.lora import LoRA
from bridgework.spec import positive, spec

FIELDS = {  # ours -> what configs of transformers call it; the first that a config has
    "width": ("hidden_size",),
    "depth": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "context": ("max_position_embeddings", "max_seq_len"),
    "tied": ("tie_word_embeddings",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
}
ABSENT = ("kv_heads", "context", "norm_eps")  # what a kind of model may do without: T5 has positions without an end
APART = {  # of transformers' configs: what says nothing of the model, or is the tokenizer's to say
    "architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id",
}  # fmt: skip


@spec
class LanguageConfig:
    """A language model of transformers, causal or of two halves: `arch` is transformers' `model_type`.

    Llama's shape (llama, mistral, qwen2, ...) as it is; opt, gpt2, phi3, gemma, t5, ... with what only they have in
    `extra`. A number that a kind of model has no place for says nothing (OPT has no rotary positions). With `weights`,
    the numbers are what the weights must be; `context` may be smaller than what they allow.
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
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields of transformers' config, by its names
    lora: LoRA | None = None  # adapters on its linear layers

    def __post_init__(self) -> None:
        positive("language", self, "width", "depth", "heads", "kv_heads", "ffn", "vocab", "context")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise SpecError(
                f"language: width {self.width} must be a multiple of heads {self.heads}, "
                f"and heads of kv_heads {self.kv_heads}"
            )

    def build(self, *, pretrained: bool = True) -> Any:
        """A transformers language model in float32. Raises SpecError for the arch, WeightsError for weights."""
        if pretrained and self.weights is not None:
            model = self._load(self.weights)
        else:
            config = self.config()
            model = _model_class(config).from_config(config, dtype=torch.float32)
        return model if self.lora is None else self.lora.add(model)

    @classmethod
    def of(cls, config: Any, tokenizer: str) -> Self:
        """The spec of a config of transformers; what differs from its kind's defaults and is no number of ours is
        `extra`."""
        names = _names(config)
        numbers = {ours: getattr(config, theirs) for ours, theirs in names.items()}
        numbers = {"kv_heads": numbers["heads"], "context": 512} | numbers  # T5 was trained on 512 tokens
        numbers["ffn"] = numbers["ffn"] or 4 * numbers["width"]  # GPT-2 leaves it out
        if rope := getattr(config, "rope_parameters", None):
            numbers["rope_theta"] = rope["rope_theta"]
        bare = cls(arch=config.model_type, tokenizer=tokenizer, **numbers)
        made, apart = bare.config().to_dict(), APART | set(names.values())
        if not config.is_encoder_decoder:
            apart |= {"pad_token_id"}
        extra = {k: v for k, v in config.to_dict().items() if k not in apart and k in made and made[k] != v}
        return replace(bare, extra=extra)

    def config(self) -> Any:
        """transformers' config of these numbers. Raises SpecError for an arch that has no place for them."""
        from transformers import AutoConfig

        try:
            known = AutoConfig.for_model(self.arch)
        except ValueError:
            raise SpecError(f"language.arch: transformers has no model type {self.arch!r}; try 'llama'") from None
        names = _names(known)
        if missing := [ours for ours in FIELDS if ours not in names and ours not in ABSENT]:
            raise SpecError(f"language.arch {self.arch!r} is of another shape: it has no {', '.join(missing)}")
        if "kv_heads" not in names and self.kv_heads != self.heads:
            raise SpecError(f"language.arch {self.arch!r} does not group heads; set kv_heads={self.heads}")
        numbers = {theirs: getattr(self, ours) for ours, theirs in names.items()}
        if hasattr(known, "rope_parameters"):
            numbers["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        # the tokenizer knows these; transformers' defaults are Llama's and would end a generation at any byte 2
        numbers |= {"bos_token_id": None, "eos_token_id": None}
        if known.is_encoder_decoder:  # the pad token starts its decoder
            numbers["decoder_start_token_id"] = known.pad_token_id
        else:
            numbers["pad_token_id"] = None
        return AutoConfig.for_model(self.arch, **numbers | dict(self.extra))

    def _load(self, weights: str) -> Any:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights)
        found = {ours: getattr(config, theirs) for ours, theirs in _names(config).items()}
        if found["ffn"] is None:
            found["ffn"] = 4 * found["width"]  # GPT-2 leaves it out
        found |= {"arch": config.model_type} | {name: getattr(config, name, None) for name in self.extra}
        if hasattr(config, "rope_parameters"):
            found["rope_theta"] = (config.rope_parameters or {}).get("rope_theta")
        if "context" in found:
            found["context"] = min(self.context, found["context"])
        weights_of.check(weights, {name: self.extra.get(name, getattr(self, name, None)) for name in found}, found)
        return weights_of.load(_model_class(config), weights)

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
            lora=None if self.lora is None else self.lora.tiny(),
        )


def _names(config: Any) -> dict[str, str]:
    """Our fields, and what this config calls them by its own names; those that it has no place for are left out."""
    has = {ours: next((name for name in names if hasattr(config, name)), None) for ours, names in FIELDS.items()}
    return {ours: type(config).attribute_map.get(name, name) for ours, name in has.items() if name is not None}


def _model_class(config: Any) -> Any:
    import transformers  # takes seconds: not before a model is built

    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}")
