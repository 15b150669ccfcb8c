"""The text side of BLIP: BERT with cross-attention in every layer, to read and to write (arXiv:2201.12086, 3.2).

Both halves are transformers' BLIP modules. Beside an encoder, a decoder that captions shares all of it but the
self-attention: embeddings, cross-attention and feed-forward are the same modules.
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

FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}  # of transformers' BLIP modules: never otherwise here


class TextModules(NamedTuple):
    """What a model may have of the text side."""

    encoder: Any | None  # BlipTextModel
    writer: Any | None  # BlipTextLMHeadModel: the decoder and its head, complete
    decoder: (
        nn.Module | None
    )  # what of the writer the encoder does not own, under the writer's names


@config_class
class MEDTextConfig:
    """The defaults are BERT-base, uncased (configs/med_config.json of the release)."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    vocab: int = 30_522  # of the tokenizer; behind it come the rows of [DEC] and [ENC]
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
        """The id that begins what is written."""
        return self.vocab

    @property
    def enc(self) -> int:
        """The id that begins what is read together with an image."""
        return self.vocab + 1

    def config(self, image_width: int) -> Any:
        """transformers' config of either half. The tokenizer knows the special ids, so the model names none."""
        from transformers import BlipTextConfig

        numbers: dict[str, Any] = {theirs: getattr(self, ours) for ours, theirs in FIELDS.items()}
        numbers |= {"vocab_size": self.vocab + 2, "encoder_hidden_size": image_width}
        numbers |= dict.fromkeys(
            ("hidden_dropout_prob", "attention_probs_dropout_prob"), self.dropout
        )
        numbers |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id"))
        return BlipTextConfig(**numbers)

    def build(
        self, image_width: int, *, reads: bool, writes: bool, shares: bool, pretrained: bool = True
    ) -> TextModules:
        """The halves that are asked for, in float32. Raises WeightsError for weights that do not fit the numbers."""
        from transformers import BlipTextLMHeadModel, BlipTextModel

        config = self.config(image_width)
        encoder: Any = BlipTextModel(config, add_pooling_layer=False) if reads else None
        writer: Any = BlipTextLMHeadModel(config) if writes else None
        if pretrained and self.weights is not None:
            state = self._bert(self.weights)
            if reads:
                _begin(
                    encoder,
                    {n.removeprefix("bert."): t for n, t in state.items() if n.startswith("bert.")},
                )
            if writes:
                _begin(writer, state)
        decoder = writer.bert if writes else None
        if shares and reads and writes:
            decoder = _share(encoder, writer)
        return TextModules(encoder, writer, decoder)

    def _bert(self, weights: str) -> dict[str, Tensor]:
        from transformers import AutoConfig, BertForMaskedLM

        config = weights_of.load_config(AutoConfig, weights)
        found = {ours: getattr(config, theirs, None) for ours, theirs in FIELDS.items()}
        given = {name: getattr(self, name) for name in found} | FIXED
        weights_of.check(
            weights, given, found | {name: getattr(config, name, None) for name in FIXED}
        )
        state: dict[str, Tensor] = weights_of.load(BertForMaskedLM, weights).state_dict()
        return state

    def tiny(self) -> "MEDTextConfig":
        """Width 32, two layers, a byte tokenizer, no dropout: so the loss is the same on any number of workers."""
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


def _share(encoder: Any, writer: Any) -> nn.Module:
    """The writer reads with the encoder's modules; what stays its own is its self-attention, which is returned."""
    writer.bert.embeddings = encoder.embeddings
    writer.cls.predictions.decoder.weight = encoder.embeddings.word_embeddings.weight
    for own, other in zip(writer.bert.encoder.layer, encoder.encoder.layer, strict=True):
        own.crossattention, own.intermediate, own.output = (
            other.crossattention,
            other.intermediate,
            other.output,
        )
    layers = nn.ModuleList(
        nn.ModuleDict({"attention": layer.attention}) for layer in writer.bert.encoder.layer
    )
    return nn.ModuleDict({"encoder": nn.ModuleDict({"layer": layers})})


def _begin(module: Any, bert: dict[str, Tensor]) -> None:
    """BERT's weights, under the same names. Cross-attention and the rows of [DEC] and [ENC] stay as drawn."""
    state: dict[str, Tensor] = module.state_dict()
    for name, tensor in state.items():
        known = bert.get(name)
        if known is None and ".crossattention." not in name:
            raise WeightsError(
                f"a BERT of other parts: it has no {name}; name the weights of a BertForMaskedLM"
            )
        if known is not None:
            tensor[: len(known)] = (
                known  # a matrix over the vocabulary has two rows more than BERT's
            )
