"""The language tower: a language model of transformers, built from explicit numbers or loaded."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import field, replace
from typing import Any, Self

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from bridgework.config import config_class, positive
from bridgework.errors import SpecError, WeightsError, suggest
from bridgework.models import attention_masks
from bridgework.models import pretrained as weights_of
from bridgework.models.lora import LoRAConfig

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
ABSENT = ("kv_heads", "context", "norm_eps")  # T5 has positions without an end
MULTIPLE = "intermediate_multiple_size"  # of the width, where a config has it instead of `ffn`
APART = {  # of transformers' configs: what says nothing of the model, or is the tokenizer's to say
    "architectures", "dtype", "transformers_version", "_name_or_path", "use_cache", "bos_token_id", "eos_token_id",
}  # fmt: skip
SEEN = 1e-5  # of the largest logit: what a token that comes later may change
UNBUILT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


@config_class
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
    extra: Mapping[str, Any] = field(
        default_factory=dict
    )  # fields of transformers' config, by its names
    lora: LoRAConfig | None = None  # adapters on its linear layers

    def __post_init__(self) -> None:
        positive("language", self, "width", "depth", "heads", "kv_heads", "ffn", "vocab", "context")
        if self.width % self.heads or self.heads % self.kv_heads:
            raise SpecError(
                f"language: width {self.width} must be a multiple of heads {self.heads}, "
                f"and heads of kv_heads {self.kv_heads}"
            )

    @property
    def packing_refusal(self) -> str | None:
        """Why samples of this language model cannot share a sequence; None where they can."""
        config = self.config()
        return attention_masks.refusal(
            config, _model_class(config)._model_mapping.get(type(config), None)
        )

    def build(self, *, pretrained: bool = True) -> Any:
        """Return a transformers language model in float32.

        Raises SpecError for numbers that transformers cannot build, WeightsError for weights.
        """
        model = (
            self._load(self.weights) if pretrained and self.weights is not None else self._draw()
        )
        return model if self.lora is None else self.lora.add(model)

    @classmethod
    def of(cls, config: Any, tokenizer: str, *, tied: bool | None = None) -> Self:
        """Return the spec of a config of transformers.

        What differs from the defaults of its kind and is not a number of ours is `extra`. `tied` is what the weights
        say, where they are known: T5's configs say that all of them are tied.
        """
        names = _names(config)
        numbers = {ours: getattr(config, theirs) for ours, theirs in names.items()}
        numbers = {
            "kv_heads": numbers["heads"],
            "context": 512,
        } | numbers  # T5 was trained on 512 tokens
        numbers["ffn"] = numbers.get("ffn") or _multiple(config) * numbers["width"]
        if (theta := _rope_theta(config)) is not None:
            numbers["rope_theta"] = theta
        if tied is not None:
            numbers["tied"] = tied
        bare = cls(arch=config.model_type, tokenizer=tokenizer, **numbers)
        made, apart = bare.config().to_dict(), APART | set(names.values())
        if not config.is_encoder_decoder:
            apart |= {"pad_token_id"}
        extra = {
            k: v
            for k, v in config.to_dict().items()
            if k not in apart and k in made and made[k] != v
        }
        return replace(bare, extra=extra)

    def config(self) -> Any:
        """Return transformers' config of these numbers. Raises SpecError for an arch that has no place for them."""
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.arch not in CONFIG_MAPPING:
            raise SpecError(
                f"language.arch: transformers has no model type {self.arch!r}; try 'llama'"
            )
        try:
            return self._config(AutoConfig.for_model(self.arch))
        except SpecError:
            raise
        except (*UNBUILT, StrictDataclassError) as error:
            raise SpecError(self._unbuilt(error)) from None

    def _config(self, known: Any) -> Any:
        from transformers import AutoConfig

        names = _names(known)
        missing = [ours for ours in FIELDS if ours not in names and ours not in (*ABSENT, "ffn")]
        if missing:
            raise SpecError(
                f"language.arch {self.arch!r} is of another shape: it has no {', '.join(missing)}"
            )
        if "kv_heads" not in names and self.kv_heads != self.heads:
            raise SpecError(
                f"language.arch {self.arch!r} does not group heads; set kv_heads={self.heads}"
            )
        numbers = {theirs: getattr(self, ours) for ours, theirs in names.items()}
        if hasattr(known, "rope_parameters"):
            numbers["rope_parameters"] = _rope(known.rope_parameters, self.rope_theta)
        # the tokenizer knows these; transformers' defaults are Llama's and would end a generation at any byte 2
        numbers |= {"bos_token_id": None, "eos_token_id": None}
        if known.is_encoder_decoder:  # the pad token starts its decoder
            numbers["decoder_start_token_id"] = known.pad_token_id
        else:
            numbers["pad_token_id"] = None
        config = AutoConfig.for_model(self.arch, **numbers | deepcopy(dict(self.extra)))
        stray = [name for name in self.extra if hasattr(config, name) and not hasattr(known, name)]
        if stray:  # transformers keeps what it does not know, and nothing reads it
            raise SpecError(
                f"language.extra: the config of {self.arch!r} has no field {stray[0]!r}"
                + suggest(stray[0], known.to_dict())
            )
        return config

    def _draw(self) -> Any:
        config = self.config()
        self._check_ffn(config)
        try:
            model: Any = _model_class(config).from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
            self._try(model)
        except SpecError:
            raise
        except (*UNBUILT, StrictDataclassError) as error:
            raise SpecError(self._unbuilt(error)) from None
        if "ffn" not in _names(config) and not self._has_matrix(model):
            raise SpecError(f"language.arch {self.arch!r} is of another shape: it has no ffn")
        if not self.tied:
            untie(model)
        elif not is_tied(model):
            raise SpecError(
                f"language.tied: {self.arch!r} has an output matrix of its own; set tied=false"
            )
        return model

    def _try(self, model: Any) -> None:
        """Read two tokens, so that sizes that do not fit each other are found where the model is built.

        Raises SpecError for a model that reads in both directions, such as a BERT, and transformers' own errors.
        """
        words = model.get_input_embeddings().weight
        if words.is_meta:
            return
        training = model.training
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first_12D = torch.randn(1, 2, words.shape[1], dtype=words.dtype, device=words.device)
            second_12D = torch.cat([first_12D[:, :1], -first_12D[:, 1:]], dim=1)
            if model.config.is_encoder_decoder:
                start_12 = torch.zeros(1, 2, dtype=torch.long, device=words.device)
                model.eval()(inputs_embeds=first_12D, decoder_input_ids=start_12, use_cache=False)
            else:
                (a_V, _), (b_V, _) = (
                    model.eval()(inputs_embeds=embeds_12D, use_cache=False).logits[0]
                    for embeds_12D in (first_12D, second_12D)
                )
                if float((a_V - b_V).abs().max()) > SEEN * float(a_V.abs().max()):
                    raise SpecError(
                        f"language.arch {self.arch!r} reads a text in both directions: every token would see the next "
                        "one. Fix: set language.extra={'is_decoder': True}, or take another arch"
                    )
        model.train(training)

    def _has_matrix(self, model: nn.Module) -> bool:
        """Whether a linear layer goes from the width to `ffn`, or back; GPT's are of a class of transformers."""
        layers = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
        shapes = [
            p.shape
            for m in layers
            for name, p in m.named_parameters(recurse=False)
            if name == "weight"
        ]
        return any(set(shape) == {self.width, self.ffn} for shape in shapes)

    def _check_ffn(self, config: Any) -> None:
        """Raises SpecError for another `ffn` than that of a config without a field for it."""
        if "ffn" not in _names(config) and self.ffn != (ffn := _multiple(config) * self.width):
            raise SpecError(
                f"language.ffn: {self.arch!r} has no field for it, it is {_multiple(config)} times the width. "
                f"Got {self.ffn}; expected {ffn}. Fix: set ffn={ffn}"
            )

    def _unbuilt(self, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"language.arch {self.arch!r}: transformers cannot build it with these numbers: {reason}. "
            "Fix: set what it needs in language.extra, or take another arch"
        )

    def _load(self, weights: str) -> Any:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights)
        names = _names(config)
        if missing := [
            ours for ours in FIELDS if ours not in names and ours not in (*ABSENT, "ffn")
        ]:
            raise WeightsError(
                f"weights {weights!r} are of a {config.model_type}, which is no language model by itself: its config "
                f"has no {', '.join(missing)}. Fix: name the folder of a language model"
            )
        self._check_ffn(config)
        found = {ours: getattr(config, theirs) for ours, theirs in names.items() if ours != "tied"}
        found["ffn"] = found.get("ffn") or _multiple(config) * found["width"]  # GPT-2 leaves it out
        found |= {"arch": config.model_type} | {
            name: getattr(config, name, None) for name in self.extra
        }
        if hasattr(config, "rope_parameters"):
            found["rope_theta"] = _rope_theta(config)
        if "context" in found:
            found["context"] = min(self.context, found["context"])
        weights_of.check(
            weights,
            {name: self.extra.get(name, getattr(self, name, None)) for name in found},
            found,
        )
        model = weights_of.load(_model_class(config), weights)
        weights_of.check(weights, {"tied": self.tied}, {"tied": is_tied(model)})
        return model

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


def is_tied(model: Any) -> bool:
    """Return whether a model of transformers has one matrix for the input and the output embeddings."""
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head.weight is words.weight


def untie(model: Any) -> None:
    """Give the output a matrix of its own, drawn like the input's; transformers 5 ties every T5 that it draws."""
    head, words = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head.weight is words:
        order_V = torch.randperm(len(words), device=words.device)
        head.weight = nn.Parameter(words.detach()[order_V])
        own = [name for name, parameter in model.named_parameters() if parameter is head.weight]
        for name in own:
            model.all_tied_weights_keys.pop(name, None)


def _model_class(config: Any) -> Any:
    import transformers  # takes seconds: not before a model is built

    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}")


def _names(config: Any) -> dict[str, str]:
    """Our fields, and what this config calls them by its own names; those that it has no place for are left out."""
    has = {
        ours: next((name for name in names if hasattr(config, name)), None)
        for ours, names in FIELDS.items()
    }
    return {
        ours: type(config).attribute_map.get(name, name)
        for ours, name in has.items()
        if name is not None
    }


def _multiple(config: Any) -> int:
    return int(
        getattr(config, MULTIPLE, 4)
    )  # BLOOM and MPT, whose configs say nothing, are built with 4


def _rope(known: Mapping[str, Any] | None, theta: float) -> dict[str, Any]:
    """Return the rotary parameters of a kind of model, with `theta` for the layers that see the whole text."""
    parameters: dict[str, Any] = deepcopy(dict(known or {}))
    kind = _seeing_all(parameters)
    if kind is None:
        return {"rope_type": "default"} | parameters | {"rope_theta": theta}
    return parameters | {kind: parameters[kind] | {"rope_theta": theta}}


def _rope_theta(config: Any) -> float | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = _seeing_all(parameters)
    theta: float | None = (parameters if kind is None else parameters[kind]).get("rope_theta")
    return theta


def _seeing_all(parameters: Mapping[str, Any]) -> str | None:
    """The kind of layer that `rope_theta` is for, where each kind has parameters of its own; else None."""
    kinds = [kind for kind, own in parameters.items() if isinstance(own, Mapping)]
    return "full_attention" if "full_attention" in kinds else next(iter(kinds), None)
