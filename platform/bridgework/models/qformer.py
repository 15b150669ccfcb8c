"""The Q-Former: learned queries that read an image and, where there is a text stream, share attention with a text.

Li et al. 2023, arXiv:2301.12597, 3.1, and Dai et al. 2023, arXiv:2305.06500, 2.3. Queries and text pass through the
same self-attention; only queries attend to the image, in every `cross_every`-th layer, and each stream has a
feed-forward of its own. What sees what is a mask, one for each objective (BLIP-2, figure 2):

unimodal       contrast      queries see queries, text sees text
causal         captioning    queries see queries; text sees the queries and the text before it
bidirectional  matching      everything sees everything; so an instruction shapes the queries (InstructBLIP)
"""

# N images  P patches  F width of the tower's features  Q queries  W width of the Q-Former  T tokens of text
# L = Q + T  D width of the language model

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bridgework.config import config_class, positive
from bridgework.errors import DataError, SpecError, WeightsError
from bridgework.models import pretrained as weights_of

FIXED = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
}  # of transformers' layers: never otherwise here
WORDS, POSITIONS = "embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"


@config_class
class QFormerConfig:
    """Queries of BERT-base's size (2301.12597, 3.1); the text stream is kept with `text`."""

    queries: int = 32
    width: int = 768
    depth: int = 12
    heads: int = 12
    ffn: int = 3072
    cross_every: int = 2  # the layers 0, 2, 4, ... read the image
    text: bool = False  # words, positions and their feed-forward: for BLIP-2's first stage and for InstructBLIP
    vocab: int = 30_523  # BERT's and, last, [DEC]: what a caption begins with when it is written
    positions: int = 512  # tokens of text at most
    dropout: float = 0.1
    ln_vision: bool = True  # a LayerNorm of its own on what the tower gives
    tokenizer: str = "google-bert/bert-base-uncased"
    bert: str | None = None  # where the layers and words begin: folder or hub name of a BERT
    weights: str | None = None  # folder or hub name of a whole BLIP-2 whose Q-Former this is

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
        """The tokenizer of the text that shapes the queries, if there is one."""
        return self.tokenizer if self.text else None

    @property
    def pretrained(self) -> tuple[str, ...]:
        """Globs of the parameters that `weights` bring back; BERT's are only where training begins."""
        return () if self.weights is None else ("queries", "qformer.*", "ln_vision.*")

    def tokens(self, patches: int) -> int:
        return self.queries

    def build(self, in_width: int, out_width: int | None, *, pretrained: bool = True) -> "QFormer":
        """In float32; without `out_width` it has no projection. Raises WeightsError for weights that do not fit."""
        model = QFormer(self, in_width, out_width)
        if pretrained and self.bert is not None:
            _begin_as_bert(model, self.bert)
        if pretrained and self.weights is not None:
            _load(model, self.weights)
        return model

    def tiny(self) -> "QFormerConfig":
        """Four queries of width 32, four layers, a byte tokenizer, no dropout; which layers read the image stays."""
        return replace(
            self, queries=4, width=32, depth=4, heads=4, ffn=64, vocab=320, positions=512, tokenizer="bytes",
            bert=None, weights=None, dropout=0.0,
        )  # fmt: skip

    def config(self, in_width: int) -> Any:
        """transformers' config of the layers."""
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
            attn_implementation="sdpa",  # takes masks of booleans
        )


def unimodal(attention_NT: Tensor, queries: int) -> Tensor:
    """(N, 1, L, L) bool: neither stream sees the other."""
    seen_N1LL = bidirectional(attention_NT, queries).clone()
    seen_N1LL[:, :, :queries, queries:] = False
    seen_N1LL[:, :, queries:, :queries] = False
    return seen_N1LL


def causal(attention_NT: Tensor, queries: int) -> Tensor:
    """(N, 1, L, L) bool: no query sees text, and no token sees one that comes after it."""
    seen_N1LL = bidirectional(attention_NT, queries).clone()
    seen_N1LL[:, :, :queries, queries:] = False
    seen_N1LL[:, :, queries:, queries:] &= torch.ones_like(
        seen_N1LL[0, 0, queries:, queries:]
    ).tril()
    return seen_N1LL


def bidirectional(attention_NT: Tensor, queries: int) -> Tensor:
    """(N, 1, L, L) bool: everything is seen but padding (attention False)."""
    seen_NL = nn.functional.pad(attention_NT.bool(), (queries, 0), value=True)
    return seen_NL[:, None, None, :].expand(-1, 1, seen_NL.shape[1], -1)


class QFormer(nn.Module):
    """`queries` and transformers' layers, under our masks.

    `forward` is the bridge; `read`, `text`, `write` and `fuse` are the passes of the three objectives. Each goes
    through `__call__`, where the hooks of ZeRO-3 gather the parameters that it uses, and again for its backward.
    """

    def __init__(self, config: QFormerConfig, in_width: int, out_width: int | None) -> None:
        from transformers import Blip2QFormerModel
        from transformers.models.blip_2.modeling_blip_2 import Blip2TextEmbeddings

        super().__init__()
        self.config = config
        theirs = config.config(in_width)
        # the tower ends in no norm of its own; the epsilon is that of transformers, which holds it in the tower
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
        self, *given: Any, run: Literal["bridge", "read", "text", "write", "fuse"] = "bridge"
    ) -> Any:
        """(N, P, F) -> (N, Q, D); an instruction, padded on either side, shapes the queries and is then left out.

        given: patches_NPF, and with an instruction its instruction_NT and attention_NT; or what the pass `run` takes.
        """
        passes: dict[str, Callable[..., Any]] = {
            "bridge": self._bridge, "read": self._read, "text": self._text, "write": self._write, "fuse": self._fuse,
        }  # fmt: skip
        return passes[run](*given)

    def read(self, patches_NPF: Tensor) -> list[Tensor]:
        """(N, Q, W) as each layer takes the queries in, and last what comes out: all that `write` needs of an image.

        No text is seen, so it is the query half of the unimodal and of the causal mask at once.
        """
        return cast(list[Tensor], self(patches_NPF, run="read"))

    def text(self, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        """(N, T, W): the text alone, the other half of the unimodal mask."""
        return cast(Tensor, self(ids_NT, attention_NT, run="text"))

    def write(self, ids_NT: Tensor, attention_NT: Tensor, states: list[Tensor]) -> Tensor:
        """(N, T, W): the text half of the causal mask, after the queries that `read` gave for the same images."""
        return cast(Tensor, self(ids_NT, attention_NT, states, run="write"))

    def fuse(
        self, patches_NPF: Tensor, ids_NT: Tensor, attention_NT: Tensor, seen_N1LL: Tensor
    ) -> Tensor:
        """(N, L, W): queries and text in one pass, under any mask."""
        return cast(Tensor, self(patches_NPF, ids_NT, attention_NT, seen_N1LL, run="fuse"))

    def _bridge(
        self,
        patches_NPF: Tensor,
        instruction_NT: Tensor | None = None,
        attention_NT: Tensor | None = None,
    ) -> Tensor:
        if instruction_NT is None:
            queries_NQW = self._read(patches_NPF)[-1]
        else:
            attention_NT = torch.ones_like(instruction_NT) if attention_NT is None else attention_NT
            seen_N1LL = bidirectional(attention_NT, self.config.queries)
            queries_NQW = self._fuse(patches_NPF, instruction_NT, attention_NT, seen_N1LL)[
                :, : self.config.queries
            ]
        return (
            queries_NQW if self.projection is None else cast(Tensor, self.projection(queries_NQW))
        )

    def _read(self, patches_NPF: Tensor) -> list[Tensor]:
        image_NPF = self.ln_vision(patches_NPF)
        states = [self._enter(self.queries.expand(len(image_NPF), -1, -1))]
        for layer in self.layers:
            states.append(layer(states[-1], None, image_NPF, query_length=self.config.queries))
        return states

    def _text(self, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        queries = self.config.queries
        seen_N1TT = unimodal(attention_NT, queries)[:, :, queries:, queries:]
        hidden_NTW = self._enter(self._words(ids_NT, attention_NT))
        for layer in self.layers:
            hidden_NTW = layer(hidden_NTW, seen_N1TT, query_length=0)
        return hidden_NTW

    def _write(self, ids_NT: Tensor, attention_NT: Tensor, states: list[Tensor]) -> Tensor:
        seen_N1TL = causal(attention_NT, self.config.queries)[:, :, self.config.queries :]
        hidden_NTW = self._enter(self._words(ids_NT, attention_NT))
        for layer, queries_NQW in zip(
            self.layers, states, strict=False
        ):  # the last state is no layer's input
            both_NLW = torch.cat([queries_NQW, hidden_NTW], dim=1)
            # the layers' self-attention takes its keys from elsewhere when it is told that they are an encoder's
            hidden_NTW = layer.attention(
                hidden_NTW, encoder_hidden_states=both_NLW, encoder_attention_mask=seen_N1TL
            )
            hidden_NTW = layer.feed_forward_chunk(hidden_NTW)
        return hidden_NTW

    def _fuse(
        self, patches_NPF: Tensor, ids_NT: Tensor, attention_NT: Tensor, seen_N1LL: Tensor
    ) -> Tensor:
        image_NPF, words_NTW = self.ln_vision(patches_NPF), self._words(ids_NT, attention_NT)
        hidden_NLW = self._enter(
            torch.cat([self.queries.expand(len(image_NPF), -1, -1), words_NTW], dim=1)
        )
        for layer in self.layers:
            hidden_NLW = layer(hidden_NLW, seen_N1LL, image_NPF, query_length=self.config.queries)
        return hidden_NLW

    def _words(self, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        """Words and positions; positions count real tokens, so padding on the left moves none."""
        if self.embeddings is None:
            raise SpecError("this Q-Former has no text stream; set bridge.text=true")
        if ids_NT.shape[1] > self.config.positions:
            raise DataError(
                f"a text of {ids_NT.shape[1]} tokens goes into the Q-Former, which has {self.config.positions} "
                "positions; shorten it, or set bridge.positions"
            )
        positions_NT = (attention_NT.long().cumsum(-1) - 1).clamp(min=0)
        return cast(Tensor, self.embeddings(ids_NT, positions_NT))

    def _enter(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.qformer.dropout(self.qformer.layernorm(hidden)))


def _begin_as_bert(model: QFormer, weights: str) -> None:
    """Self-attention, both feed-forwards, words and positions as in BERT; cross-attention stays as drawn (3.1)."""
    from transformers import BertForMaskedLM

    theirs = weights_of.load(BertForMaskedLM, weights)
    weights_of.check(weights, FIXED, {name: getattr(theirs.config, name, None) for name in FIXED})
    bert = theirs.bert.state_dict()
    names = [n for n in model.qformer.state_dict() if "crossattention" not in n]
    _put(model, {f"qformer.{name}": bert.get(_in_bert(name)) for name in names}, weights)
    if model.config.text:
        words_VW = bert[WORDS]
        drawn_VW = model.embeddings.word_embeddings.weight.detach()[
            len(words_VW) :
        ]  # [DEC], which BERT has not
        table_VW = torch.cat([words_VW[: model.config.vocab], drawn_VW])
        _put(model, {WORDS: table_VW, POSITIONS: bert[POSITIONS]}, weights)


def _in_bert(name: str) -> str:
    """What BERT calls a parameter of the layers; its one feed-forward is where both begin (LAVIS, blip2_qformer.py)."""
    name = name.replace("attention.attention.", "attention.self.").replace("_query.", ".")
    return (
        f"embeddings.LayerNorm.{name.removeprefix('layernorm.')}"
        if name.startswith("layernorm.")
        else name
    )


def _load(model: QFormer, weights: str) -> None:
    """The Q-Former of a whole BLIP-2 or InstructBLIP; a text stream that it lacks stays as it is."""
    from transformers import AutoConfig

    theirs = weights_of.load_config(AutoConfig, weights).qformer_config
    weights_of.check(weights, FIXED, {name: getattr(theirs, name, None) for name in FIXED})
    found = weights_of.tensors(
        weights, ("query_tokens", "qformer.", "embeddings.", "vision_model.post_layernorm.")
    )
    state = {
        name: next((found[theirs] for theirs in names_in_blip2(name) if theirs in found), None)
        for name in model.state_dict()
        if not name.startswith("projection.")
    }
    _put(model, {n: t for n, t in state.items() if t is not None or not is_text(n)}, weights)


def names_in_blip2(name: str) -> tuple[str, str]:
    """What transformers' BLIP-2 and its InstructBLIP call a parameter of the bridge."""
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
    """Whether a parameter of the bridge belongs to the text stream alone."""
    return name.startswith("embeddings.") or bool(
        re.search(r"layer\.\d+\.(intermediate|output)\.", name)
    )


def _put(model: QFormer, state: Mapping[str, Tensor | None], weights: str) -> None:
    """Raises WeightsError for a parameter that is absent or has another shape."""
    own = model.state_dict()
    wrong = [n for n, tensor in state.items() if tensor is None or tensor.shape != own[n].shape]
    if wrong:
        raise WeightsError(
            f"weights {weights!r} do not fit the bridge in {len(wrong)} of {len(state)} parameters, e.g. {wrong[0]}: "
            "they are of another size or kind; change bridge's fields or the weights"
        )
    model.load_state_dict({n: t for n, t in state.items() if t is not None}, strict=False)
