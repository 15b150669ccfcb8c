"""BLIP's text encoder and decoder: BERT with cross-attention in every layer.

Li et al. 2022, arXiv:2201.12086, 3.2. Both are transformers' BLIP modules. A captioning decoder
with an encoder shares all of its modules except self-attention: embeddings, cross-attention and
feed-forward.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from bridgework.config import config_class, positive
from bridgework.errors import SpecError, WeightsError
from bridgework.models import pretrained as weights_of

FIELDS = {  # ours -> transformers'
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "context": "max_position_embeddings",
}
# settings of transformers' BLIP modules that never differ here
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}


class TextModules(NamedTuple):
    """Text modules of a model; None for a module that its tasks do not need."""

    encoder: Any | None  # BlipTextModel
    writer: Any | None  # BlipTextLMHeadModel: the complete decoder and its head
    decoder: nn.Module | None  # the writer without shared modules, under the writer's names


@config_class
class MEDTextConfig:
    """BLIP's text modules; defaults: BERT-base, uncased (configs/med_config.json)."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    vocab: int = 30_522  # of the tokenizer, without the rows of [DEC] and [ENC] that follow
    context: int = 512  # positions
    dropout: float = 0.1
    tokenizer: str = "google-bert/bert-base-uncased"  # folder, hub name, `package:` path or "bytes"
    weights: str | None = None  # folder or hub name of a BERT

    def __post_init__(self) -> None:
        positive("text", self, "width", "depth", "heads", "ffn", "vocab", "context")
        if self.width % self.heads:
            raise SpecError(
                f"text.width {self.width} must be a multiple of text.heads {self.heads}"
            )

    @property
    def dec(self) -> int:
        """The id of [DEC], the first token of decoder inputs."""
        return self.vocab

    @property
    def enc(self) -> int:
        """The id of [ENC], the first token of texts that are read together with an image."""
        return self.vocab + 1

    def config(self, image_width: int) -> Any:
        """Return transformers' config of encoder and decoder, without special ids."""
        from transformers import BlipTextConfig

        options: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in FIELDS.items()}
        options |= {"vocab_size": self.vocab + 2, "encoder_hidden_size": image_width}
        options |= dict.fromkeys(
            ("hidden_dropout_prob", "attention_probs_dropout_prob"), self.dropout
        )
        # the tokenizer has the special ids
        options |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"))
        return BlipTextConfig(**options)

    def build(
        self, image_width: int, *, reads: bool, writes: bool, shares: bool, pretrained: bool = True
    ) -> TextModules:
        """Return the requested modules in float32; WeightsError for weights of another size."""
        from transformers import BlipTextLMHeadModel, BlipTextModel

        config = self.config(image_width)
        encoder: Any = BlipTextModel(config, add_pooling_layer=False) if reads else None
        writer: Any = BlipTextLMHeadModel(config) if writes else None
        if pretrained and self.weights is not None:
            state = self._bert(self.weights)
            if reads:
                bert = {
                    n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")
                }
                _load_bert(encoder, bert)
            if writes:
                _load_bert(writer, state)
        for module in filter(None, (encoder, writer and writer.bert)):
            _mask_padding(module)
        decoder = writer.bert if writes else None
        if shares and reads and writes:
            decoder = _share(encoder, writer)
        return TextModules(encoder, writer, decoder)

    def _bert(self, weights: str) -> dict[str, Tensor]:
        from transformers import AutoConfig, BertForMaskedLM

        config = weights_of.load_config(AutoConfig, weights)
        found = {ours: getattr(config, theirs, None) for ours, theirs in FIELDS.items()}
        expected = {name: getattr(self, name) for name in found} | FIXED
        found |= {name: getattr(config, name, None) for name in FIXED}
        weights_of.check_fields(weights, expected, found)
        state: dict[str, Tensor] = weights_of.load(BertForMaskedLM, weights).state_dict()
        return state

    def tiny(self) -> "MEDTextConfig":
        """Return a config of width 32, two layers, a byte tokenizer and no dropout."""
        return replace(
            self,
            width=32,
            depth=2,
            heads=2,
            ffn=64,
            vocab=260,
            context=min(self.context, 512),
            tokenizer="bytes",
            weights=None,
            dropout=0.0,
        )


def _mask_padding(text: Any) -> None:
    """Let cross-attention read its padding mask.

    transformers 5.23 gives it the mask as `attention_mask` and reads `encoder_attention_mask`, so a
    decoder attends to the padding of the questions of its batch.
    """
    for layer in text.encoder.layer:
        attention = layer.crossattention.self
        attention.register_forward_pre_hook(_rename_mask, with_kwargs=True)


def _rename_mask(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"encoder_attention_mask": kwargs.get("attention_mask")}


def _share(encoder: Any, writer: Any) -> nn.Module:
    """Give the writer the encoder's modules; return what is left of it, its self-attention."""
    writer.bert.embeddings = encoder.embeddings
    writer.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
    for own, shared in zip(writer.bert.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention = shared.crossattention
        own.intermediate, own.output = shared.intermediate, shared.output
    layers = nn.ModuleList(
        nn.ModuleDict({"attention": layer.attention}) for layer in writer.bert.encoder.layer
    )
    return nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})


def _load_bert(module: Any, bert: dict[str, Tensor]) -> None:
    """Copy BERT's weights in place. Cross-attention and the rows of [DEC] and [ENC] stay random."""
    state: dict[str, Tensor] = module.state_dict()
    for name, tensor in state.items():
        source = bert.get(name)
        if source is None and ".crossattention." not in name:
            raise WeightsError(
                f"text.weights: the BERT has no {name}. Fix: name the weights of a BertForMaskedLM"
            )
        if source is not None:  # matrices over the vocabulary have two rows more than BERT's
            tensor[: len(source)] = source
