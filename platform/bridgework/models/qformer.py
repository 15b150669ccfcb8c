"""Q-Former: learned queries that attend to an image and, optionally, share attention with a text.

Li et al. 2023, arXiv:2301.12597, 3.1, and Dai et al. 2023, arXiv:2305.06500, 2.3. Queries and text
pass the same self-attention. Only queries attend to the image, in every `cross_every`-th layer, and
each stream has its own feed-forward part. Each objective has an attention mask (BLIP-2, figure 2):

unimodal       contrast      queries see queries, text sees text
causal         captioning    queries see queries; text sees the queries and the text before it
bidirectional  matching      all see all; with it an instruction shapes the queries (InstructBLIP)
"""

# N images  P patches  F width of the tower's features  Q queries  W width of the Q-Former
# T tokens of text  L = Q + T  D width of the language model

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bridgework.config import config_class, positive
from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import pretrained as weights_of
from bridgework.models.attention_masks import padded_positions

# settings of transformers' layers that never differ here
FIXED = {"hidden_act": "gelu", "layer_norm_eps": 1e-12}
WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"


@config_class
class QFormerConfig:
    """A Q-Former, with a text stream if `text` is set; defaults: BERT-base (2301.12597, 3.1)."""

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_every: int = 2  # the layers 0, 2, 4, ... read the image
    # token embeddings, positions and their feed-forward: for BLIP-2's first stage and InstructBLIP
    text: bool = False
    vocab: int = 30_523  # BERT's and, last, [DEC], the first token of decoder inputs
    positions: int = 512  # tokens of text at most
    dropout: float = 0.1
    ln_vision: bool = True  # a LayerNorm on the tower's output
    tokenizer: str = "google-bert/bert-base-uncased"
    bert: str | None = (
        None  # initial weights of layers and embeddings: folder or hub name of a BERT
    )
    weights: str | None = None  # folder or hub name of a complete BLIP-2 with this Q-Former

    def __post_init__(self) -> None:
        positive("bridge", self, "width", "depth", "heads", "ffn")
        for name in ("queries", "depth", "cross_every"):
            if getattr(self, name) < 1:
                raise SpecError(f"bridge.{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.heads:
            raise SpecError(
                f"bridge.width {self.width} must be a multiple of bridge.heads {self.heads}"
            )

    @property
    def start(self) -> int:
        """The id of [DEC]."""
        return self.vocab - 1

    @property
    def instruction(self) -> str | None:
        """The tokenizer of the instruction, or None without a text stream."""
        return self.tokenizer if self.text else None

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs of the parameters that `weights` hold; `bert` is only an initialization."""
        return () if self.weights is None else ("queries", "qformer.*", "ln_vision.*")

    def tokens(self, patches: int) -> int:
        return self.queries

    def build(self, in_width: int, out_width: int | None, *, pretrained: bool = True) -> "QFormer":
        """Return the Q-Former in float32; without `out_width` it has no projection.

        Raises WeightsError for weights that do not fit.
        """
        model = QFormer(self, in_width, out_width)
        if pretrained and self.bert is not None:
            _load_bert(model, self.bert)
        if pretrained and self.weights is not None:
            _load_blip2(model, self.weights)
        return model

    def tiny(self) -> "QFormerConfig":
        """Return a config: 4 queries of width 32, 4 layers, a byte tokenizer, no dropout."""
        return replace(
            self,
            queries=4,
            width=32,
            depth=4,
            heads=4,
            ffn=64,
            vocab=320,
            positions=512,
            tokenizer="bytes",
            bert=None,
            weights=None,
            dropout=0.0,
        )

    def config(self, in_width: int) -> Any:
        """Return transformers' config of the layers."""
        from transformers import Blip2QFormerConfig

        return cast(Any, Blip2QFormerConfig)(
            vocab_size=self.vocab,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.heads,
            intermediate_size=self.ffn,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.dropout,
            max_position_embeddings=self.positions,
            cross_attention_frequency=self.cross_every,
            encoder_hidden_size=in_width,
            use_qformer_text_input=self.text,
            attn_implementation="sdpa",  # takes boolean masks
        )


def unimodal(attention_NT: Tensor, queries: int) -> Tensor:
    """Return the mask (N, 1, L, L) bool: neither stream sees the other."""
    mask_N1LL = bidirectional(attention_NT, queries).clone()
    mask_N1LL[:, :, :queries, queries:] = False
    mask_N1LL[:, :, queries:, :queries] = False
    return mask_N1LL


def causal(attention_NT: Tensor, queries: int) -> Tensor:
    """Return the mask (N, 1, L, L) bool: no query sees text, no token sees a later one."""
    mask_N1LL = bidirectional(attention_NT, queries).clone()
    mask_N1LL[:, :, :queries, queries:] = False
    text_TT = torch.ones_like(mask_N1LL[0, 0, queries:, queries:]).tril()
    mask_N1LL[:, :, queries:, queries:] &= text_TT
    return mask_N1LL


def bidirectional(attention_NT: Tensor, queries: int) -> Tensor:
    """Return the mask (N, 1, L, L) bool: all see all but padding (attention False)."""
    real_NL = nn.functional.pad(attention_NT.bool(), (queries, 0), value=True)
    return real_NL[:, None, None, :].expand(-1, 1, real_NL.shape[1], -1)


class QFormer(nn.Module):
    """`queries` and transformers' layers, under our masks.

    `forward` is the bridge; the other public methods are the passes of the three objectives. Each
    runs through `__call__`, because ZeRO-3's hooks gather parameters there, for forward and
    backward.
    """

    def __init__(self, config: QFormerConfig, in_width: int, out_width: int | None) -> None:
        from transformers import Blip2QFormerModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        self.config = config
        theirs = config.config(in_width)
        # the tower ends without a norm; the epsilon is that of transformers, whose tower has it
        self.ln_vision = nn.LayerNorm(in_width, eps=1e-6) if config.ln_vision else nn.Identity()
        self.queries = nn.Parameter(torch.empty(1, config.queries, config.width).normal_(std=0.02))
        self.qformer = Blip2QFormerModel(theirs)
        self.embeddings: Any = Blip2TextEmbeddings(theirs) if config.text else None
        if self.embeddings is not None:
            self.embeddings.apply(self.qformer._init_weights)
        self.projection = None if out_width is None else nn.Linear(config.width, out_width)

    @property
    def layers(self) -> Any:
        return self.qformer.encoder.layer

    def forward(
        self,
        *args: Any,
        run: Literal["bridge", "encode_image", "encode_text", "decode_text", "fuse"] = "bridge",
    ) -> Any:
        """Map (N, P, F) to (N, Q, D), by default; or run another pass on its arguments.

        args: patches_NPF, and for an instruction its instruction_NT and attention_NT, padded on
        either side. The instruction shapes the queries and is dropped afterwards.
        """
        passes: dict[str, Callable[..., Any]] = {
            "bridge": self._bridge,
            "encode_image": self._encode_image,
            "encode_text": self._encode_text,
            "decode_text": self._decode_text,
            "fuse": self._fuse,
        }
        return passes[run](*args)

    def encode_image(self, patches_NPF: Tensor) -> list[Tensor]:
        """Return the queries (N, Q, W): the input of each layer, then the output of the last.

        Queries see no text in the unimodal and the causal mask, so it is their half of both.
        `decode_text` needs nothing else of an image.
        """
        return cast(list[Tensor], self(patches_NPF, run="encode_image"))

    def encode_text(self, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        """Return (N, T, W), states of the text alone: the other half of the unimodal mask."""
        return cast(Tensor, self(ids_NT, attention_NT, run="encode_text"))

    def decode_text(self, ids_NT: Tensor, attention_NT: Tensor, states: list[Tensor]) -> Tensor:
        """Return (N, T, W), the text half of the causal mask, from `encode_image` of the images."""
        return cast(Tensor, self(ids_NT, attention_NT, states, run="decode_text"))

    def fuse(
        self, patches_NPF: Tensor, ids_NT: Tensor, attention_NT: Tensor, mask_N1LL: Tensor
    ) -> Tensor:
        """Return (N, L, W), queries and text in one pass, under any mask."""
        return cast(Tensor, self(patches_NPF, ids_NT, attention_NT, mask_N1LL, run="fuse"))

    def _bridge(
        self,
        patches_NPF: Tensor,
        instruction_NT: Tensor | None = None,
        attention_NT: Tensor | None = None,
    ) -> Tensor:
        if instruction_NT is None:
            queries_NQW = self._encode_image(patches_NPF)[-1]
        else:
            attention_NT = torch.ones_like(instruction_NT) if attention_NT is None else attention_NT
            mask_N1LL = bidirectional(attention_NT, self.config.queries)
            fused_NLW = self._fuse(patches_NPF, instruction_NT, attention_NT, mask_N1LL)
            queries_NQW = fused_NLW[:, : self.config.queries]
        if self.projection is None:
            return queries_NQW
        return cast(Tensor, self.projection(queries_NQW))

    def _encode_image(self, patches_NPF: Tensor) -> list[Tensor]:
        image_NPF = self.ln_vision(patches_NPF)
        states = [self._norm_and_drop(self.queries.expand(len(image_NPF), -1, -1))]
        for layer in self.layers:
            states.append(layer(states[-1], None, image_NPF, query_length=self.config.queries))
        return states

    def _encode_text(self, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        queries = self.config.queries
        mask_N1TT = unimodal(attention_NT, queries)[:, :, queries:, queries:]
        hidden_NTW = self._norm_and_drop(self._embed(ids_NT, attention_NT))
        for layer in self.layers:
            hidden_NTW = layer(hidden_NTW, mask_N1TT, query_length=0)
        return hidden_NTW

    def _decode_text(self, ids_NT: Tensor, attention_NT: Tensor, states: list[Tensor]) -> Tensor:
        mask_N1TL = causal(attention_NT, self.config.queries)[:, :, self.config.queries :]
        hidden_NTW = self._norm_and_drop(self._embed(ids_NT, attention_NT))
        # not strict: the last state is an output
        for layer, queries_NQW in zip(self.layers, states, strict=False):
            both_NLW = torch.cat([queries_NQW, hidden_NTW], dim=1)
            # self-attention takes other keys than its input's under the names of an encoder's
            hidden_NTW = layer.attention(
                hidden_NTW, encoder_hidden_states=both_NLW, encoder_attention_mask=mask_N1TL
            )
            hidden_NTW = layer.feed_forward_chunk(hidden_NTW)
        return hidden_NTW

    def _fuse(
        self, patches_NPF: Tensor, ids_NT: Tensor, attention_NT: Tensor, mask_N1LL: Tensor
    ) -> Tensor:
        image_NPF, embeds_NTW = self.ln_vision(patches_NPF), self._embed(ids_NT, attention_NT)
        queries_NQW = self.queries.expand(len(image_NPF), -1, -1)
        hidden_NLW = self._norm_and_drop(torch.cat([queries_NQW, embeds_NTW], dim=1))
        for layer in self.layers:
            hidden_NLW = layer(hidden_NLW, mask_N1LL, image_NPF, query_length=self.config.queries)
        return hidden_NLW

    def _embed(self, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        """Return (N, T, W), token and position embeddings."""
        if self.embeddings is None:
            raise SpecError("the Q-Former has no text stream. Fix: set bridge.text=true")
        if ids_NT.shape[1] > self.config.positions:
            raise DataError(
                f"the Q-Former reads {self.config.positions} tokens. "
                f"Got a text of {ids_NT.shape[1]} tokens. Fix: shorten it, or set bridge.positions"
            )
        return cast(Tensor, self.embeddings(ids_NT, padded_positions(attention_NT)))

    def _norm_and_drop(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.qformer.dropout(self.qformer.layernorm(hidden)))


def _load_bert(model: QFormer, weights: str) -> None:
    """Initialize self-attention, both feed-forwards and embeddings from BERT (3.1).

    Cross-attention stays random.
    """
    from transformers import BertForMaskedLM

    theirs = weights_of.load(BertForMaskedLM, weights)
    _check_fixed(weights, theirs.config)
    bert = theirs.bert.state_dict()
    names = [n for n in model.qformer.state_dict() if "crossattention" not in n]
    state = {f"qformer.{name}": bert.get(_name_in_bert(name)) for name in names}
    _load_state(model, state, weights)
    if model.config.text:
        bert_VW = bert[WORDS]
        # the row of [DEC], which BERT does not have
        random_VW = model.embeddings.word_embeddings.weight.detach()[len(bert_VW) :]
        table_VW = torch.cat([bert_VW[: model.config.vocab], random_VW])
        _load_state(model, {WORDS: table_VW, POSITIONS: bert[POSITIONS]}, weights)


def _name_in_bert(name: str) -> str:
    """Return BERT's name of a layer parameter; both feed-forwards map to BERT's one.

    As in LAVIS, blip2_qformer.py.
    """
    name = name.replace("attention.attention.", "attention.self.").replace("_query.", ".")
    if name.startswith("layernorm."):
        return f"embeddings.LayerNorm.{name.removeprefix('layernorm.')}"
    return name


def _load_blip2(model: QFormer, weights: str) -> None:
    """Load the Q-Former of a complete BLIP-2 or InstructBLIP; it may lack a text stream."""
    from transformers import AutoConfig

    _check_fixed(weights, weights_of.load_config(AutoConfig, weights).qformer_config)
    prefixes = ("query_tokens", "qformer.", "embeddings.", "vision_model.post_layernorm.")
    found = weights_of.load_tensors(weights, prefixes)
    state = {
        name: next((found[theirs] for theirs in names_in_blip2(name) if theirs in found), None)
        for name in model.state_dict()
        if not name.startswith("projection.")
    }
    state = {n: tensor for n, tensor in state.items() if tensor is not None or not is_text(n)}
    _load_state(model, state, weights)


def _check_fixed(weights: str, config: Any) -> None:
    weights_of.check_fields(weights, FIXED, {name: getattr(config, name, None) for name in FIXED})


def names_in_blip2(name: str) -> tuple[str, str]:
    """Return the names of a bridge parameter in transformers' BLIP-2 and InstructBLIP."""
    for ours, blip2, instructblip in (
        ("queries", "query_tokens", "query_tokens"),
        ("ln_vision.", "vision_model.post_layernorm.", "vision_model.post_layernorm."),
        ("embeddings.", "embeddings.", "qformer.embeddings."),
        ("qformer.layernorm.", "qformer.layernorm.", "qformer.embeddings.layernorm."),
        ("projection.", "language_projection.", "language_projection."),
    ):
        if name.startswith(ours):
            return blip2 + name.removeprefix(ours), instructblip + name.removeprefix(ours)
    return name, name


def is_text(name: str) -> bool:
    """Return whether a bridge parameter belongs to the text stream alone."""
    return name.startswith("embeddings.") or bool(
        re.search(r"layer\.\d+\.(intermediate|output)\.", name)
    )


def _load_state(model: QFormer, state: Mapping[str, Tensor | None], weights: str) -> None:
    """Load `state`. Raises WeightsError for a parameter that is missing or has another shape."""
    own = model.state_dict()
    wrong = [n for n, tensor in state.items() if tensor is None or tensor.shape != own[n].shape]
    if wrong:
        raise WeightsError(
            f"weights {weights!r} do not fit the bridge in {len(wrong)} of {len(state)} "
            f"parameters, e.g. {wrong[0]}: they are of another size or kind. "
            "Fix: change bridge's fields or the weights"
        )
    model.load_state_dict({n: t for n, t in state.items() if t is not None}, strict=False)
