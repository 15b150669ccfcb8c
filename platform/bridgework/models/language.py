"""Language towers: language models of transformers, built from explicit sizes or loaded."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import field, replace
from typing import Any, Self, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from bridgework.config import config_class, positive
from bridgework.errors import SpecError, WeightsError, suggest
from bridgework.models import attention_masks
from bridgework.models import pretrained as weights_of
from bridgework.models.lora import LoRAConfig

FIELDS = {  # ours -> names in transformers' configs; the first that a config has counts
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
OPTIONAL = ("kv_heads", "context", "norm_eps")  # e.g. T5 has no largest position
MULTIPLE = "intermediate_multiple_size"  # ffn as a multiple of the width, in some configs
IGNORED = {  # config fields that do not describe the model, or are the tokenizer's
    "architectures", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "bos_token_id", "eos_token_id",
}  # fmt: skip
CAUSAL_TOLERANCE = 1e-5  # allowed effect of a later token, as a share of the largest logit
BUILD_ERRORS = (
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
    """A language model of transformers, causal or encoder-decoder: `arch` is its `model_type`.

    Models of Llama's shape (llama, mistral, qwen2, ...) need nothing else; opt, gpt2, phi3, gemma,
    t5, ... have their own fields in `extra`. A size that a model does not have is ignored, e.g.
    OPT has no `rope_theta`. `weights` must have these sizes; `context` may be below their limit.
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
    # further fields of transformers' config, by its names
    extra: Mapping[str, Any] = field(default_factory=dict)
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
        """Reason why samples cannot share a sequence; None if they can."""
        config = self.config()
        cls = _model_class(config)._model_mapping.get(type(config), None)
        return attention_masks.packing_refusal(config, cls)

    def build(self, *, pretrained: bool = True) -> Any:
        """Return a transformers language model in float32, with adapters if there are any.

        Raises SpecError for sizes that transformers cannot build, WeightsError for weights.
        """
        use_weights = pretrained and self.weights is not None
        model = self._load(cast(str, self.weights)) if use_weights else self._initialize()
        return model if self.lora is None else self.lora.add(model)

    @classmethod
    def of(cls, config: Any, tokenizer: str, *, tied: bool | None = None) -> Self:
        """Return the config of a transformers config.

        `extra` holds fields that are none of ours and differ from the defaults of the arch. `tied`
        is read from the weights if they are known, because all T5 configs claim to be tied.
        """
        names = _names(config)
        # T5 has no context; it was trained on 512 tokens
        sizes: dict[str, Any] = {"context": 512}
        sizes |= {ours: getattr(config, theirs) for ours, theirs in names.items()}
        sizes.setdefault("kv_heads", sizes["heads"])
        sizes["ffn"] = sizes.get("ffn") or _multiple(config) * sizes["width"]
        if (theta := _rope_theta(config)) is not None:
            sizes["rope_theta"] = theta
        if tied is not None:
            sizes["tied"] = tied
        base = cls(arch=config.model_type, tokenizer=tokenizer, **sizes)
        defaults, ignored = base.config().to_dict(), IGNORED | set(names.values())
        if not config.is_encoder_decoder:
            ignored |= {"pad_token_id"}
        extra = {
            name: value
            for name, value in config.to_dict().items()
            if name not in ignored and name in defaults and defaults[name] != value
        }
        return replace(base, extra=extra)

    def config(self) -> Any:
        """Return transformers' config of these sizes; SpecError if the arch lacks a field."""
        from transformers import CONFIG_MAPPING, AutoConfig

        if self.arch not in CONFIG_MAPPING:
            raise SpecError(
                f"language.arch: transformers has no model type {self.arch!r}; try 'llama'"
            )
        try:
            return self._config(AutoConfig.for_model(self.arch))
        except SpecError:
            raise
        except (*BUILD_ERRORS, StrictDataclassError) as error:
            raise SpecError(self._build_error(error)) from None

    def _config(self, known: Any) -> Any:
        from transformers import AutoConfig

        names = _names(known)
        if missing := _missing(names):
            raise SpecError(
                f"language.arch {self.arch!r} is of another shape: it has no {', '.join(missing)}"
            )
        if "kv_heads" not in names and self.kv_heads != self.heads:
            raise SpecError(
                f"language.arch {self.arch!r} does not group heads; set kv_heads={self.heads}"
            )
        options = {theirs: getattr(self, ours) for ours, theirs in names.items()}
        if hasattr(known, "rope_parameters"):
            options["rope_parameters"] = _rope(known.rope_parameters, self.rope_theta)
        # the tokenizer has these; transformers' defaults are Llama's and would stop at any byte 2
        options |= {"bos_token_id": None, "eos_token_id": None}
        if known.is_encoder_decoder:  # the pad token starts its decoder
            options["decoder_start_token_id"] = known.pad_token_id
        else:
            options["pad_token_id"] = None
        config = AutoConfig.for_model(self.arch, **options | deepcopy(dict(self.extra)))
        # transformers stores unknown fields, although nothing reads them
        unknown = [n for n in self.extra if hasattr(config, n) and not hasattr(known, n)]
        if unknown:
            raise SpecError(
                f"language.extra: the config of {self.arch!r} has no field {unknown[0]!r}"
                + suggest(unknown[0], known.to_dict())
            )
        return config

    def _initialize(self) -> Any:
        """Return a model with random weights."""
        config = self.config()
        self._check_ffn(config)
        try:
            model: Any = _model_class(config).from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
            self._check_forward(model)
        except SpecError:
            raise
        except (*BUILD_ERRORS, StrictDataclassError) as error:
            raise SpecError(self._build_error(error)) from None
        if "ffn" not in _names(config) and not self._has_ffn(model):
            raise SpecError(f"language.arch {self.arch!r} is of another shape: it has no ffn")
        if not self.tied:
            untie(model)
        elif not is_tied(model):
            raise SpecError(
                f"language.tied: {self.arch!r} has a separate output matrix. Fix: set tied=false"
            )
        return model

    def _check_forward(self, model: Any) -> None:
        """Run two tokens through the model, to find sizes that do not fit each other early.

        Raises SpecError for a bidirectional model, e.g. a BERT, and transformers' own errors.
        """
        embedding_VD = model.get_input_embeddings().weight
        if embedding_VD.is_meta:
            return
        training, device = model.training, embedding_VD.device
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first_12D = torch.randn(
                1, 2, embedding_VD.shape[1], dtype=embedding_VD.dtype, device=device
            )
            second_12D = torch.cat([first_12D[:, :1], -first_12D[:, 1:]], dim=1)
            if model.config.is_encoder_decoder:
                start_12 = torch.zeros(1, 2, dtype=torch.long, device=device)
                model.eval()(inputs_embeds=first_12D, decoder_input_ids=start_12, use_cache=False)
            else:
                (a_V, _), (b_V, _) = (
                    model.eval()(inputs_embeds=embeds_12D, use_cache=False).logits[0]
                    for embeds_12D in (first_12D, second_12D)
                )
                if float((a_V - b_V).abs().max()) > CAUSAL_TOLERANCE * float(a_V.abs().max()):
                    raise SpecError(
                        f"language.arch {self.arch!r} reads a text in both directions: "
                        "every token would see the next one. "
                        "Fix: set language.extra={'is_decoder': True}, or take another arch"
                    )
        model.train(training)

    def _has_ffn(self, model: nn.Module) -> bool:
        """Return whether a layer's matrix has the sizes `width` and `ffn`, in any class (GPT)."""
        layers = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
        shapes = [
            p.shape
            for m in layers
            for name, p in m.named_parameters(recurse=False)
            if name == "weight"
        ]
        return any(set(shape) == {self.width, self.ffn} for shape in shapes)

    def _check_ffn(self, config: Any) -> None:
        """Raise SpecError if the config fixes `ffn` and ours differs."""
        if "ffn" not in _names(config) and self.ffn != (ffn := _multiple(config) * self.width):
            raise SpecError(
                f"language.ffn: {self.arch!r} has no field for it, "
                f"it is {_multiple(config)} times the width. "
                f"Got {self.ffn}; expected {ffn}. Fix: set ffn={ffn}"
            )

    def _build_error(self, error: Exception) -> str:
        reason = " ".join(str(error).split()) or type(error).__name__
        return (
            f"language.arch {self.arch!r}: transformers cannot build it with these sizes: "
            f"{reason}. Fix: set its fields in language.extra, or take another arch"
        )

    def _load(self, weights: str) -> Any:
        from transformers import AutoConfig

        config = weights_of.load_config(AutoConfig, weights)
        names = _names(config)
        if missing := _missing(names):
            raise WeightsError(
                f"weights {weights!r} are of a {config.model_type}, not of a language model alone: "
                f"its config has no {', '.join(missing)}. Fix: name the folder of a language model"
            )
        self._check_ffn(config)
        found = {ours: getattr(config, theirs) for ours, theirs in names.items() if ours != "tied"}
        found["ffn"] = found.get("ffn") or _multiple(config) * found["width"]  # GPT-2 omits it
        found["arch"] = config.model_type
        found |= {name: getattr(config, name, None) for name in self.extra}
        if hasattr(config, "rope_parameters"):
            found["rope_theta"] = _rope_theta(config)
        if "context" in found:
            found["context"] = min(self.context, found["context"])
        expected = {name: self.extra.get(name, getattr(self, name, None)) for name in found}
        weights_of.check_fields(weights, expected, found)
        model = weights_of.load(_model_class(config), weights)
        weights_of.check_fields(weights, {"tied": self.tied}, {"tied": is_tied(model)})
        return model

    def tiny(self) -> "LanguageConfig":
        """Return a config of width 32, two layers, a byte tokenizer; key-value groups stay."""
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
    """Return whether a transformers model has one matrix for input and output embeddings."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and head.weight is embeddings.weight


def untie(model: Any) -> None:
    """Give the output a separate matrix, drawn like the input's.

    Needed because transformers 5 ties every T5 that it initializes.
    """
    head, embedding_VD = model.get_output_embeddings(), model.get_input_embeddings().weight
    if head.weight is embedding_VD:
        order_V = torch.randperm(len(embedding_VD), device=embedding_VD.device)
        head.weight = nn.Parameter(embedding_VD.detach()[order_V])
        names = [name for name, parameter in model.named_parameters() if parameter is head.weight]
        for name in names:
            model.all_tied_weights_keys.pop(name, None)


def _model_class(config: Any) -> Any:
    import transformers  # takes seconds: not before a model is built

    kind = "Seq2SeqLM" if config.is_encoder_decoder else "CausalLM"
    return getattr(transformers, f"AutoModelFor{kind}")


def _names(config: Any) -> dict[str, str]:
    """Return {our field: this config's own name for it}, without fields that it lacks."""
    has = {
        ours: next((name for name in names if hasattr(config, name)), None)
        for ours, names in FIELDS.items()
    }
    return {
        ours: type(config).attribute_map.get(name, name)
        for ours, name in has.items()
        if name is not None
    }


def _missing(names: Mapping[str, str]) -> list[str]:
    """Return the fields that every language model needs and that are not in `names`."""
    return [ours for ours in FIELDS if ours not in names and ours not in (*OPTIONAL, "ffn")]


def _multiple(config: Any) -> int:
    """Return `ffn` as a multiple of the width; 4 for BLOOM and MPT, whose configs have no field."""
    return int(getattr(config, MULTIPLE, 4))


def _rope(known: Mapping[str, Any] | None, theta: float) -> dict[str, Any]:
    """Return the rotary parameters of an arch, with `theta` for the layers of full attention."""
    parameters: dict[str, Any] = deepcopy(dict(known or {}))
    kind = _full_attention(parameters)
    if kind is None:
        return {"rope_type": "default"} | parameters | {"rope_theta": theta}
    return parameters | {kind: parameters[kind] | {"rope_theta": theta}}


def _rope_theta(config: Any) -> float | None:
    parameters = getattr(config, "rope_parameters", None) or {}
    kind = _full_attention(parameters)
    theta: float | None = (parameters if kind is None else parameters[kind]).get("rope_theta")
    return theta


def _full_attention(parameters: Mapping[str, Any]) -> str | None:
    """Return the kind of layer of `rope_theta` if each kind has its own parameters, else None."""
    kinds = [kind for kind, value in parameters.items() if isinstance(value, Mapping)]
    return "full_attention" if "full_attention" in kinds else next(iter(kinds), None)
