"""BLIP-2's first stage: a Q-Former with its text stream learns to read a frozen vision tower.

One set of layers under three masks, for contrast, matching and captioning (Li et al. 2023, arXiv:2301.12597, 3.2).
The text has no places for images, and every sample has exactly one.
"""

# b samples of this rank  B samples of all ranks  T tokens  P patches  F their width  Q queries  W width of the Q-Former
# E width of the shared space  V vocabulary  S pixels of a side

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.losses.matching import FLOOR, group_by_sample, matching_pairs
from bridgework.models import pretrained as weights_of
from bridgework.models.base import PairModelConfig, VLMModule
from bridgework.models.blip_vit import EvaConfig
from bridgework.models.origin import Origin
from bridgework.models.qformer import QFormer, QFormerConfig, bidirectional
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig

LOGITS, JUDGED = frozenset({"logits"}), frozenset({"match", "match_lane", "match_all"})


@config_class
class QFormerPretrainerConfig(PairModelConfig):
    """A vision tower, a Q-Former with a text stream, and the heads of the three objectives."""

    vision: ViTConfig | EvaConfig | EfficientNetConfig
    bridge: QFormerConfig
    embed: int = 256  # width of the space that images and texts share (LAVIS, blip2_qformer.py)
    temperature: float = 0.07  # where the learned one begins
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        if not self.bridge.text:
            raise SpecError(
                "the Q-Former learns to read images by reading captions: set bridge.text=true"
            )

    @property
    def tokenizer(self) -> str:
        return self.bridge.tokenizer

    @property
    def context(self) -> int:
        return self.bridge.positions

    @property
    def pretrained(self) -> tuple[str, ...]:
        vision = ("vision.*",) if self.vision.weights is not None else ()
        return vision + tuple(f"bridge.{glob}" for glob in self.bridge.pretrained)

    def build(self, *, pretrained: bool = True) -> "QFormerPretrainer":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        bridge = self.bridge.build(self.vision.feature_width, None, pretrained=pretrained)
        heads = Heads(self, bridge)
        if pretrained and self.bridge.bert is not None:
            heads.begin_as_bert(self.bridge.bert)
        return QFormerPretrainer(self.vision.build(pretrained=pretrained), bridge, heads)

    def tiny(self) -> "QFormerPretrainerConfig":
        return replace(
            self, vision=self.vision.tiny(), bridge=self.bridge.tiny(), embed=16, origin=None
        )


@dataclass
class Outputs:
    """What a forward gives; None is what `wants` did not name."""

    image_BQD: Tensor | None = None  # not of length 1 yet
    text_BD: Tensor | None = None
    logit_scale: Tensor | None = None  # (b,) 1 / temperature
    identity_B: Tensor | None = (
        None  # int64: rows of one identity show one image; below 0 it is not known
    )
    match_B3C: Tensor | None = (
        None  # own pair, own text with a negative image, own image with a negative text
    )
    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None


class Heads(nn.Module):
    """Two projections into the shared space, the matching head, the temperature, and BERT's head over the words."""

    def __init__(self, config: QFormerPretrainerConfig, bridge: QFormer) -> None:
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLMPredictionHead

        super().__init__()
        width, vocab = config.bridge.width, config.bridge.vocab
        self.vision_projection = nn.Linear(width, config.embed)
        self.text_projection = nn.Linear(width, config.embed)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(
            torch.tensor([config.temperature])
        )  # (1,): DeepSpeed 0.19 takes no ()
        self.lm: Any = BertLMPredictionHead(BertConfig(vocab_size=vocab, hidden_size=width))
        self.lm.apply(bridge.qformer._init_weights)
        self.lm.bias = self.lm.decoder.bias
        self.lm.decoder.weight = bridge.embeddings.word_embeddings.weight

    def forward(self, samples: int) -> Tensor:
        """(samples,) float32: 1 / temperature, once for every sample."""
        return (1 / self.temperature.float()).expand(samples)

    def begin_as_bert(self, weights: str) -> None:
        """The head over the words as BERT's; the bias of [DEC], which BERT has not, stays 0."""
        from transformers import BertForMaskedLM

        theirs = weights_of.load(BertForMaskedLM, weights).cls.predictions
        self.lm.transform.load_state_dict(theirs.transform.state_dict())
        with torch.no_grad():
            self.lm.bias[: len(theirs.bias)] = theirs.bias[: len(self.lm.bias)]


class QFormerPretrainer(VLMModule):
    """`vision`, `bridge` and `heads`. Takes pixels, or features that the same tower gave before."""

    provides = frozenset({"pooled"}) | JUDGED | LOGITS

    def __init__(self, vision: VisionTower, bridge: QFormer, heads: Heads) -> None:
        super().__init__()
        self.vision = vision
        self.bridge = bridge
        self.heads = heads

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        identity: Tensor | None = None,
        lane: Tensor | None = None,
        floor: float = FLOOR,
        requested: frozenset[str] = LOGITS,
    ) -> Outputs:
        """ids (b, T) int64: CLS, caption, SEP; attention (b, T) bool; pixels (b, 3, S, S) uint8 or features (b, P, F).

        `wants` names `pooled` (queries and texts in the shared space), `match`, `match_lane` and `match_all` (negatives
        of this rank, of the same lane (b,), or of all ranks, drawn with a floor), `logits` (the caption written after
        the queries). identity (b,) int64 is equal for rows that show one image. Raises DataError unless every sample
        has one image.
        """
        self.check(requested)
        patches_bPF = self._patches(pixels, features)
        if len(patches_bPF) != len(ids):
            raise DataError(
                f"{len(ids)} texts come with {len(patches_bPF)} images; every sample needs exactly one"
            )
        states, outputs = (
            self.bridge.read(patches_bPF),
            Outputs(labels_BT=labels, identity_B=identity),
        )
        if requested - LOGITS:
            outputs.image_BQD = self.heads.vision_projection(states[-1])
            outputs.text_BD = self._text(ids, attention)
            outputs.logit_scale = self.heads(len(ids))
            if requested & JUDGED:
                negatives = {"everywhere": "match_all" in requested, "floor": floor,
                             "lane_b": lane if "match_lane" in requested else None}  # fmt: skip
                outputs.match_B3C = self._match(outputs, patches_bPF, ids, attention, negatives)
        if "logits" in requested:
            outputs.logits_BTV = self.heads.lm(
                self.bridge.write(self._written(ids, attention), attention, states)
            )
        return outputs

    def _patches(self, pixels_b3SS: Tensor | None, features_bPF: Tensor | None) -> Tensor:
        if (pixels_b3SS is None) == (features_bPF is None):
            raise DataError("the vision tower takes pixels or cached features, exactly one of them")
        patches_bPF = features_bPF if features_bPF is not None else self.vision(pixels_b3SS)
        shape = (self.vision.config.tokens, self.vision.config.feature_width)
        if patches_bPF.shape[1:] != shape:
            raise DataError(
                f"the cached features are {tuple(patches_bPF.shape[1:])} an image and this tower's are {shape}: "
                "they come from another tower; compute them again"
            )
        return cast(Tensor, patches_bPF.to(next(self.bridge.parameters()).dtype))

    def _text(self, ids_bT: Tensor, attention_bT: Tensor) -> Tensor:
        """(b, E): the CLS token of a text that sees no image."""
        hidden_bTW = self.bridge.text(ids_bT, attention_bT)
        cls_bW = hidden_bTW[torch.arange(len(ids_bT), device=ids_bT.device), _first(attention_bT)]
        return cast(Tensor, self.heads.text_projection(cls_bW))

    def _written(self, ids_bT: Tensor, attention_bT: Tensor) -> Tensor:
        """[DEC] instead of CLS: this text is written."""
        return ids_bT.scatter(1, _first(attention_bT)[:, None], self.bridge.config.start)

    def _match(
        self,
        outputs: Outputs,
        patches_bPF: Tensor,
        ids_bT: Tensor,
        attention_bT: Tensor,
        negatives: Mapping[str, Any],
    ) -> Tensor:
        """(b, 3, 2): each pair, its text with a negative image, its image with a negative text, in one pass."""
        image_bQE, text_bE = (
            normalize(cast(Tensor, given).detach().float(), dim=-1)
            for given in (outputs.image_BQD, outputs.text_BD)
        )
        pairs = matching_pairs(
            ids_bT,
            attention_bT,
            patches_bPF,
            image_bQD=image_bQE,
            text_bD=text_bE,
            scale=cast(Tensor, outputs.logit_scale)[0].detach(),
            identity_b=outputs.identity_B,
            **negatives,
        )
        with rng.repeated(3):
            return group_by_sample(self._judge(pairs.images_MPF, pairs.ids_MT, pairs.attention_MT))

    def _judge(self, patches_NPF: Tensor, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        """(N, 2): the mean over the queries of what each says."""
        queries = self.bridge.config.queries
        fused_NLW = self.bridge.fuse(
            patches_NPF, ids_NT, attention_NT, bidirectional(attention_NT, queries)
        )
        return cast(Tensor, self.heads.itm_head(fused_NLW[:, :queries]).mean(1))

    # --- inference ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_images(self, features: Tensor) -> Tensor:
        """(N, Q, E) float32 of length 1, from features (N, P, F); the largest similarity over Q is the image's."""
        queries_NQW = self.bridge.read(self._patches(None, features))[-1]
        return normalize(self.heads.vision_projection(queries_NQW).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor | None = None) -> Tensor:
        """(N, E) float32 of length 1."""
        return normalize(self._text(ids, attention).float(), dim=-1)

    @torch.no_grad()
    def match(self, ids: Tensor, attention: Tensor, features: Tensor) -> Tensor:
        """(N,) float32: the log-odds that image i and text i belong together."""
        return self._judge(self._patches(None, features), ids, attention).float().diff(dim=1)[:, 0]


def _first(attention_bT: Tensor) -> Tensor:
    """(b,) where each row begins, whichever side is padded."""
    return attention_bT.int().argmax(-1)
