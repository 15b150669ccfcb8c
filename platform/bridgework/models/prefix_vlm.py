"""The prefix wiring: bridge tokens stand in the token stream of a causal language model (LLaVA, BLIP-2 stage 2).

A row of ids holds IMAGE wherever one image token goes, so the data lays out the places and the model fills them in
order (Liu et al. 2023, arXiv:2304.08485, 4.1).
"""

# B batch  T tokens  N images of the batch, in order  P patches, then bridge tokens  S pixels of a side
# F width of the tower's features  D width of the language model  V vocabulary

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from bridgework.errors import DataError, SpecError
from bridgework.models.bridges import MLP, Linear
from bridgework.models.freezing import Freezable
from bridgework.models.language import LanguageConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig
from bridgework.spec import spec
from bridgework.system import IGNORE, IMAGE, Pixels

LOGITS = frozenset({"logits"})


@spec
class PrefixVLM:
    """A vision tower, a bridge and a causal language model."""

    vision: ViTConfig | EfficientNetConfig
    bridge: Linear | MLP
    language: LanguageConfig

    def __post_init__(self) -> None:
        if self.image_tokens >= self.context:
            raise SpecError(
                f"an image takes {self.image_tokens} tokens and language.context is {self.context}: "
                "take a longer context, smaller images or a bridge with fewer tokens"
            )

    @property
    def pixels(self) -> Pixels:
        return self.vision.pixels

    @property
    def tokenizer(self) -> str:
        return self.language.tokenizer

    @property
    def context(self) -> int:
        return self.language.context

    @property
    def image_tokens(self) -> int:
        return self.bridge.tokens(self.vision.tokens)

    @property
    def pretrained(self) -> tuple[str, ...]:
        towers = {"vision.*": self.vision.weights, "language.*": self.language.weights}
        return tuple(glob for glob, weights in towers.items() if weights is not None)

    def build(self, *, pretrained: bool = True) -> "PrefixModel":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        return PrefixModel(
            self.vision.build(pretrained=pretrained),
            self.bridge.build(self.vision.feature_width, self.language.width),
            self.language.build(pretrained=pretrained),
        )

    def tiny(self) -> "PrefixVLM":
        return replace(self, vision=self.vision.tiny(), language=self.language.tiny())


@dataclass
class Outputs:
    """What a forward gives; None is what `wants` did not name."""

    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None
    image_BD: Tensor | None = None
    text_BD: Tensor | None = None


class PrefixModel(Freezable):
    """`vision`, `bridge` and `language`. Takes pixels, or features that the same tower gave before.

    Every forward runs the same modules in the same order, so that the collectives of ZeRO-3 agree between ranks: a
    batch without images sends one blank image through and keeps none of its tokens. Which kind of input the other
    ranks have is told by an empty tensor, `features` of (0, P, F) or `pixels` of (0, 3, S, S); without either it is
    pixels.
    """

    def __init__(self, vision: VisionTower, bridge: nn.Module, language: Any) -> None:
        super().__init__()
        self.vision = vision
        self.bridge = bridge
        self.language = language

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        wants: frozenset[str] = LOGITS,
    ) -> Outputs:
        """Logits for every token, and/or one pooled vector per sample for image and text.

        ids (B, T) int64 with IMAGE places; attention (B, T) bool, padding on either side; labels (B, T) int64, IGNORE
        where there is no loss; pixels (N, 3, S, S) uint8 or features (N, P, F). `wants` names `logits`, `pooled`.
        Raises DataError when places and image tokens do not match.
        """
        if unknown := wants - {"logits", "pooled"}:
            raise SpecError(f"the prefix wiring gives 'logits' and 'pooled', not {sorted(unknown)}")
        embeds_BTD = self.embed(ids, pixels, features)
        outputs = Outputs(labels_BT=labels)
        if "pooled" in wants:
            if labels is None:
                raise DataError("pooled text needs labels: they say which tokens are the caption")
            outputs.image_BD = _mean(embeds_BTD, ids == IMAGE, "image")
            outputs.text_BD = _mean(embeds_BTD, labels != IGNORE, "labelled token")
        if "logits" in wants:
            positions_BT = (attention.long().cumsum(-1) - 1).clamp(min=0)  # padding on the left moves no token
            outputs.logits_BTV = self.language(
                inputs_embeds=embeds_BTD, attention_mask=attention, position_ids=positions_BT, use_cache=False
            ).logits
        return outputs

    def embed(self, ids_BT: Tensor, pixels_N3SS: Tensor | None = None, features_NPF: Tensor | None = None) -> Tensor:
        """(B, T, D): the language model's own embeddings, with bridge tokens in the IMAGE places, in order."""
        places_BT = ids_BT == IMAGE
        images_NPD = self.images(pixels_N3SS, features_NPF)
        if int(places_BT.sum()) != images_NPD.shape[0] * images_NPD.shape[1]:
            raise DataError(
                f"the batch has {int(places_BT.sum())} image places in its ids, and {images_NPD.shape[0]} images of "
                f"{images_NPD.shape[1]} tokens: every image needs exactly its places, in order"
            )
        text_BTD = self.language.get_input_embeddings()(ids_BT.masked_fill(places_BT, 0))
        return cast(Tensor, text_BTD.masked_scatter(places_BT.unsqueeze(-1), images_NPD.to(text_BTD.dtype)))

    def images(self, pixels_N3SS: Tensor | None, features_NPF: Tensor | None) -> Tensor:
        """(N, P, D): the bridge's tokens; N may be 0, and the bridge is in the graph all the same."""
        if pixels_N3SS is not None and features_NPF is not None:
            raise DataError("both pixels and cached features are given; the vision tower takes one of them")
        if features_NPF is None:
            given_N3SS = pixels_N3SS if pixels_N3SS is not None else self._no_pixels()
            count, patches_NPF = len(given_N3SS), self.vision(_one_at_least(given_N3SS))
        else:
            self._check_features(features_NPF)
            count, patches_NPF = len(features_NPF), _one_at_least(features_NPF)
        tokens_NPD = self.bridge(patches_NPF.to(next(self.bridge.parameters()).dtype))
        return cast(Tensor, tokens_NPD[:count])

    def _no_pixels(self) -> Tensor:
        size, device = self.vision.config.pixels.size, next(self.bridge.parameters()).device
        return torch.zeros(0, 3, size, size, dtype=torch.uint8, device=device)

    def _check_features(self, features_NPF: Tensor) -> None:
        shape = (self.vision.config.tokens, self.vision.config.feature_width)
        if features_NPF.shape[1:] != shape:
            raise DataError(
                f"the cached features are {tuple(features_NPF.shape[1:])} an image and this tower's are {shape}: "
                "they come from another tower; compute them again"
            )

    @torch.no_grad()
    def continuations(self, prompt: Tensor, rest: Tensor, features: Tensor) -> Tensor:
        """(C, R, V): the logits of every token of `rest` (C, R) behind one `prompt` (1, T), padded on the right.

        The prompt with its images (features (N, P, D)) goes through the language model once, whatever C is.
        """
        first = self.language(inputs_embeds=self.embed(prompt, None, features), use_cache=True)
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(rest))
        behind_CRV = self.language(input_ids=rest, past_key_values=cache, use_cache=True).logits
        before_C1V = first.logits[:, -1:].expand(len(rest), 1, -1)
        return torch.cat([before_C1V, behind_CRV[:, :-1]], dim=1)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        attention: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """(B, new) ids behind prompts padded on the left; `generation` goes to transformers' `generate`."""
        embeds_BTD = self.embed(ids, pixels, features)
        new_BT = self.language.generate(inputs_embeds=embeds_BTD, attention_mask=attention.long(), **generation)
        return cast(Tensor, new_BT)


def _one_at_least(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


def _mean(embeds_BTD: Tensor, chosen_BT: Tensor, what: str) -> Tensor:
    """(B, D) in float32: the mean of each row's chosen tokens. Raises DataError for a row with none."""
    count_B = chosen_BT.sum(-1)
    if bool((count_B == 0).any()):
        row = int((count_B == 0).nonzero()[0])
        raise DataError(f"row {row} of the batch has no {what}: pooling needs an image and a caption in every sample")
    # a product with the mask would carry a NaN from a padded place into the mean
    sum_BD = embeds_BTD.float().masked_fill(~chosen_BT.unsqueeze(-1), 0.0).sum(1)
    return sum_BD / count_B.unsqueeze(-1)
