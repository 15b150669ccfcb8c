"""BLIP-2's first stage: pretrain a Q-Former with text stream on a frozen vision tower.

One set of layers under three masks, for contrast, matching and captioning (Li et al. 2023,
arXiv:2301.12597, 3.2). The text has no image places, and every sample has exactly one image.
"""

# b samples of this rank  B samples of all ranks  T tokens  P patches  F their width  Q queries
# W width of the Q-Former  E width of the shared space  V vocabulary  S pixels of a side

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import SpecError
from bridgework.losses.matching import FLOOR, group_by_sample, matching_pairs
from bridgework.models import pretrained as weights_of
from bridgework.models.base import Outputs, PairModel, PairModelConfig
from bridgework.models.blip_vit import EvaConfig
from bridgework.models.origin import Origin
from bridgework.models.qformer import QFormer, QFormerConfig, bidirectional
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig

LOGITS, MATCH = frozenset({"logits"}), frozenset({"match", "match_lane", "match_all"})


@config_class
class QFormerPretrainerConfig(PairModelConfig):
    """A vision tower, a Q-Former with a text stream, and the heads of the three objectives."""

    vision: ViTConfig | EvaConfig | EfficientNetConfig
    bridge: QFormerConfig
    embed: int = 256  # width of the shared space (LAVIS, blip2_qformer.py)
    temperature: float = 0.07  # initial value of the learned one
    origin: Origin | None = added(default=None)  # of an imported model: fields for its export

    def __post_init__(self) -> None:
        if not self.bridge.text:
            raise SpecError(
                "model.bridge: the Q-Former is pretrained with captions. Fix: set bridge.text=true"
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
        """Return the model in float32.

        Without weights, or with `pretrained=False`, it is drawn from torch's generator.
        """
        bridge = self.bridge.build(self.vision.feature_width, None, pretrained=pretrained)
        heads = QFormerHeads(self, bridge)
        if pretrained and self.bridge.bert is not None:
            heads.load_bert(self.bridge.bert)
        return QFormerPretrainer(self.vision.build(pretrained=pretrained), bridge, heads)

    def tiny(self) -> "QFormerPretrainerConfig":
        return replace(
            self, vision=self.vision.tiny(), bridge=self.bridge.tiny(), embed=16, origin=None
        )


class QFormerHeads(nn.Module):
    """Two projections into the shared space, matching head, temperature, vocabulary head."""

    def __init__(self, config: QFormerPretrainerConfig, bridge: QFormer) -> None:
        from transformers import BertConfig
        from transformers.models.bert.modeling_bert import BertLMPredictionHead

        super().__init__()
        width, vocab = config.bridge.width, config.bridge.vocab
        self.vision_projection = nn.Linear(width, config.embed)
        self.text_projection = nn.Linear(width, config.embed)
        self.itm_head = nn.Linear(width, 2)
        # (1,), because DeepSpeed 0.19 takes no scalar parameter
        self.temperature = nn.Parameter(torch.tensor([config.temperature]))
        self.lm: Any = BertLMPredictionHead(BertConfig(vocab_size=vocab, hidden_size=width))
        self.lm.apply(bridge.qformer._init_weights)
        self.lm.bias = self.lm.decoder.bias
        self.lm.decoder.weight = bridge.embeddings.word_embeddings.weight

    def forward(self, samples: int) -> Tensor:
        """Return (samples,) float32, 1 / temperature repeated for every sample."""
        return (1 / self.temperature.float()).expand(samples)

    def load_bert(self, weights: str) -> None:
        """Initialize the vocabulary head from BERT; the bias of [DEC], missing there, stays 0."""
        from transformers import BertForMaskedLM

        theirs = weights_of.load(BertForMaskedLM, weights).cls.predictions
        self.lm.transform.load_state_dict(theirs.transform.state_dict())
        with torch.no_grad():
            self.lm.bias[: len(theirs.bias)] = theirs.bias[: len(self.lm.bias)]


class QFormerPretrainer(PairModel):
    """`vision`, `bridge` and `heads`. Takes pixels, or cached features of the same tower."""

    provides = frozenset({"pooled"}) | MATCH | LOGITS

    def __init__(self, vision: VisionTower, bridge: QFormer, heads: QFormerHeads) -> None:
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
        """Return the requested outputs.

        `pooled` is queries and texts in the shared space. `match`, `match_lane` and `match_all` are
        logits of pairs with negatives of this rank, of the same lane or of all ranks. `logits` are
        those of the caption, decoded after the queries.

        ids: (b, T) int64 of CLS, caption, SEP. attention: (b, T) bool.
        pixels: (b, 3, S, S) uint8, or features: (b, P, F).
        identity: (b,) int64, equal for rows that show one image.
        lane, floor: (b,) int64 and a probability, for hard negatives.

        Raises DataError unless every sample has one image.
        """
        self.check(requested)
        patches_bPF = self._patches(pixels, features, samples=len(ids))
        states = self.bridge.encode_image(patches_bPF)
        outputs = Outputs(labels_BT=labels, identity_B=identity)
        if requested - LOGITS:
            outputs.image_BQD = self.heads.vision_projection(states[-1])
            outputs.text_BD = self._embed_texts(ids, attention)
            outputs.logit_scale = self.heads(len(ids))
            if requested & MATCH:
                negatives = {
                    "everywhere": "match_all" in requested,
                    "floor": floor,
                    "lane_b": lane if "match_lane" in requested else None,
                }
                outputs.match_B3C = self._match(outputs, patches_bPF, ids, attention, negatives)
        if "logits" in requested:
            # [DEC] instead of CLS
            decoder_ids_bT = ids.scatter(1, _first(attention)[:, None], self.bridge.config.start)
            hidden_bTW = self.bridge.decode_text(decoder_ids_bT, attention, states)
            outputs.logits_BTV = self.heads.lm(hidden_bTW)
        return outputs

    def _patches(
        self, pixels: Tensor | None, features: Tensor | None, *, samples: int | None = None
    ) -> Tensor:
        """Return (b, P, F) in the bridge's dtype."""
        patches_bPF = self.image_patches(pixels, features, samples=samples)
        return patches_bPF.to(next(self.bridge.parameters()).dtype)

    def _embed_texts(self, ids_bT: Tensor, attention_bT: Tensor) -> Tensor:
        """Return (b, E), the projected CLS token of each text."""
        hidden_bTW = self.bridge.encode_text(ids_bT, attention_bT)
        cls_bW = hidden_bTW[torch.arange(len(ids_bT), device=ids_bT.device), _first(attention_bT)]
        return cast(Tensor, self.heads.text_projection(cls_bW))

    def _match(
        self,
        outputs: Outputs,
        patches_bPF: Tensor,
        ids_bT: Tensor,
        attention_bT: Tensor,
        negatives: Mapping[str, Any],
    ) -> Tensor:
        """Return (b, 3, 2), in one pass: logits of own pairs, negative images, negative texts."""
        image_bQE, text_bE = (
            normalize(cast(Tensor, vectors).detach().float(), dim=-1)
            for vectors in (outputs.image_BQD, outputs.text_BD)
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
            logits_M2 = self._classify(pairs.images_MPF, pairs.ids_MT, pairs.attention_MT)
        return group_by_sample(logits_M2)

    def _classify(self, patches_NPF: Tensor, ids_NT: Tensor, attention_NT: Tensor) -> Tensor:
        """Return (N, 2), the mean of the matching head's logits over the queries."""
        queries = self.bridge.config.queries
        mask_N1LL = bidirectional(attention_NT, queries)
        fused_NLW = self.bridge.fuse(patches_NPF, ids_NT, attention_NT, mask_N1LL)
        return cast(Tensor, self.heads.itm_head(fused_NLW[:, :queries]).mean(1))

    # --- inference ---

    @torch.no_grad()
    def embed_images(self, features: Tensor) -> Tensor:
        """Return (N, Q, E) float32 of unit length, from features (N, P, F).

        An image's similarity to a text is the largest over Q.
        """
        queries_NQW = self.bridge.encode_image(self._patches(None, features))[-1]
        return normalize(self.heads.vision_projection(queries_NQW).float(), dim=-1)

    @torch.no_grad()
    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return (N, E) float32 of unit length; `labels` are ignored."""
        return normalize(self._embed_texts(ids, attention).float(), dim=-1)

    @torch.no_grad()
    def match(self, ids: Tensor, attention: Tensor, features: Tensor) -> Tensor:
        """Return (N,) float32, the log-odds that image i and text i belong together."""
        logits_N2 = self._classify(self._patches(None, features), ids, attention).float()
        return logits_N2.diff(dim=1)[:, 0]


def _first(attention_bT: Tensor) -> Tensor:
    """Return (b,), the index of each row's first real token; padding is on either side."""
    return attention_bT.int().argmax(-1)
