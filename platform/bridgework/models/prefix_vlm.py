"""The prefix wiring: bridge tokens stand in the token stream of a language model (LLaVA, BLIP-2's second stage).

A row of ids holds IMAGE wherever one image token goes, so the data lays out the places and the model fills them in
order (Liu et al. 2023, arXiv:2304.08485, 4.1). A language model of two halves reads the row up to the first label and
writes the rest. With `grids`, an image is its base square and the tiles of one grid (LLaVA-NeXT, xGen-MM).

The module of the prefix wiring: see bridgework.models.prefix_vlm, whose spec builds it.
"""

from dataclasses import dataclass, replace
from math import isqrt
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.models import decoder_only, dpo_reference, encoder_decoder
from bridgework.models import tiles as tiling
from bridgework.models.base import VLMModule
from bridgework.models.blip_vit import EvaConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.origin import Origin
from bridgework.models.projectors import ConcatConfig, LinearConfig, MLPConfig
from bridgework.models.qformer import QFormerConfig
from bridgework.models.resampler import Resampler, ResamplerConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig
from bridgework.system import IGNORE, IMAGE, Layout, Pixels

__all__ = ["Outputs", "PrefixVLM", "PrefixVLMConfig"]


@config_class
class PrefixVLMConfig:
    """A vision tower, a bridge and a language model, causal or of two halves."""

    vision: ViTConfig | EvaConfig | EfficientNetConfig
    bridge: LinearConfig | MLPConfig | ConcatConfig | QFormerConfig | ResamplerConfig
    language: LanguageConfig
    grids: tuple[
        tuple[int, int], ...
    ] = ()  # (columns, rows) of tiles beside the base square, to choose from
    tiles: tiling.Tiles = "resample"  # how tiles become tokens, see bridgework.models.tiles
    reference: dpo_reference.Reference = (
        "adapters_off"  # of preference learning; "frozen_copy" holds what trains twice
    )
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        most = max(self.places(Layout(*grid, *grid)) for grid in [*self.grids, (0, 0)])
        if most >= self.context:
            raise SpecError(
                f"an image takes {most} tokens and language.context is {self.context}: "
                "take a longer context, smaller images, fewer tiles or a bridge with fewer tokens"
            )
        read = self.image_tokens if self.tiles == "unpad" else self.vision.tokens
        if self.grids and isqrt(self.vision.tokens) ** 2 != read:
            raise SpecError(
                f"tiles lie in a grid of patches; the tower gives {self.vision.tokens} vectors a square and the "
                f'bridge {self.image_tokens}: take vision.select="patch", and with tiles="unpad" a bridge '
                "that keeps each patch"
            )

    @property
    def pixels(self) -> Pixels:
        return replace(self.vision.pixels, grids=self.grids)

    def unshardable(self, requested: frozenset[str]) -> str | None:
        if self.reference == "frozen_copy" and "preference" in requested:
            return 'model.reference="frozen_copy" holds what trains complete on every worker'
        return None

    @property
    def tokenizer(self) -> str:
        return self.language.tokenizer

    @property
    def context(self) -> int:
        return self.language.context

    @property
    def image_tokens(self) -> int:
        return self.bridge.tokens(self.vision.tokens)

    def places(self, layout: Layout) -> int:
        return tiling.places(layout, self.image_tokens, self.tiles)

    @property
    def instruction(self) -> str | None:
        return self.bridge.instruction if isinstance(self.bridge, QFormerConfig) else None

    @property
    def vision_tokens(self) -> int:
        return self.vision.tokens

    @property
    def packing_refusal(self) -> str | None:
        return self.language.packing_refusal

    @property
    def pretrained(self) -> tuple[str, ...]:
        towers = {"vision.*": self.vision.weights, "language.*": self.language.weights}
        bridge = (
            self.bridge.pretrained if isinstance(self.bridge, QFormerConfig | ConcatConfig) else ()
        )
        return tuple(glob for glob, weights in towers.items() if weights is not None) + tuple(
            f"bridge.{glob}" for glob in bridge
        )

    def build(self, *, pretrained: bool = True) -> "PrefixVLM":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
        vision, widths = (
            self.vision.build(pretrained=pretrained),
            (self.vision.feature_width, self.language.width),
        )
        own_weights = (
            {"pretrained": pretrained}
            if isinstance(self.bridge, QFormerConfig | ConcatConfig)
            else {}
        )
        return PrefixVLM(
            vision,
            self.bridge.build(*widths, **own_weights),
            self.language.build(pretrained=pretrained),
            tiling.Unpad(self.language.width) if self.tiles == "unpad" else None,
            dpo_reference.FrozenCopy() if self.reference == "frozen_copy" else None,
        )

    def tiny(self) -> "PrefixVLMConfig":
        return replace(
            self,
            vision=self.vision.tiny(),
            bridge=self.bridge.tiny(),
            language=self.language.tiny(),
            origin=None,
        )


# B batch  T tokens  N images of the batch, in order  P patches, then bridge tokens  S pixels of a side
# F width of the tower's features  D width of the language model  V vocabulary  I tokens of the user's texts


LOGITS = frozenset({"logits"})


@dataclass
class Outputs:
    """What a forward gives; None is what `wants` did not name."""

    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None
    segments_BT: Tensor | None = None  # whose each token is, where samples share rows
    image_BD: Tensor | None = None
    text_BD: Tensor | None = None
    chosen_B: Tensor | None = None
    rejected_B: Tensor | None = None
    chosen_reference_B: Tensor | None = None
    rejected_reference_B: Tensor | None = None


class PrefixVLM(VLMModule):
    """`vision`, `bridge`, `language`, and `tiles` where rows of patches end with a newline.

    Takes pixels, or features that the same tower gave before.

    Every forward runs the same modules in the same order, so that the collectives of ZeRO-3 agree between ranks: a
    batch without images sends one blank image through and keeps none of its tokens. Which kind of input the other
    ranks have is told by an empty tensor, `features` of (0, P, F) or `pixels` of (0, 3, S, S); without either it is
    pixels.
    """

    provides = frozenset({"logits", "pooled", "preference"})

    def __init__(
        self,
        vision: VisionTower,
        bridge: nn.Module,
        language: Any,
        tiles: tiling.Unpad | None = None,
        reference: dpo_reference.FrozenCopy | None = None,
    ) -> None:
        super().__init__()
        self.vision = vision
        self.bridge = bridge
        self.language = language
        self.tiles = tiles
        self.reference = reference  # of preference learning; None: this model with its adapters off

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        layouts: Tensor | None = None,
        instruction: Tensor | None = None,
        instruction_attention: Tensor | None = None,
        segments: Tensor | None = None,
        requested: frozenset[str] = LOGITS,
    ) -> Outputs:
        """Logits for every token, and/or one pooled vector per sample for image and text.

        ids (B, T) int64 with IMAGE places; attention (B, T) bool, padding on either side; labels (B, T) int64, IGNORE
        where there is no loss; pixels (N, 3, S, S) uint8 or features (N, P, F), of which every tile is one; layouts
        (images, 4) int64 where images are cut into tiles; instruction (B, I) int64 with its attention, for a bridge
        that reads what the user says; segments (B, T) int64, the number of each token's sample, -1 on padding, where
        samples share rows: an instruction is then one row a sample. `wants` names `logits`, `pooled`, and
        `preference`: then the second half of the rows are the worse answers of the first. Raises DataError when
        places and image tokens do not match, and for a language model of two halves that is given no labels.
        """
        self.check(requested)
        embeds_BTD = self.embed(
            ids, pixels, features, instruction, instruction_attention, layouts, segments
        )
        outputs = Outputs(labels_BT=labels, segments_BT=segments)
        if "preference" in requested:
            given = {
                "ids": ids, "attention": attention, "labels": labels, "pixels": pixels, "features": features,
                "layouts": layouts, "instruction": instruction, "instruction_attention": instruction_attention,
            }  # fmt: skip
            compared = dpo_reference.compared(
                self,
                lambda: self._logits(embeds_BTD, ids, attention, labels),
                given,
                self.reference,
            )
            outputs = replace(outputs, **compared)
        if "pooled" in requested:
            if labels is None:
                raise DataError("pooled text needs labels: they say which tokens are the caption")
            outputs.image_BD = _mean(embeds_BTD, ids == IMAGE, "image")
            outputs.text_BD = _mean(embeds_BTD, labels != IGNORE, "labeled token")
        if "logits" in requested:
            outputs.logits_BTV = self._logits(embeds_BTD, ids, attention, labels, segments)
        return outputs

    def _logits(
        self,
        embeds_BTD: Tensor,
        ids_BT: Tensor,
        attention_BT: Tensor,
        labels_BT: Tensor | None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        if encoder_decoder.is_one(self.language):
            if labels_BT is None:
                raise DataError("an encoder-decoder needs labels: they say where the prompt ends")
            if segments_BT is not None:
                return encoder_decoder.packed_logits(
                    self.language, embeds_BTD, ids_BT, labels_BT, segments_BT
                )
            return encoder_decoder.logits(
                self.language, embeds_BTD, ids_BT, attention_BT, labels_BT
            )
        return decoder_only.logits(self.language, embeds_BTD, attention_BT, segments_BT)

    def embed(
        self,
        ids_BT: Tensor,
        pixels_N3SS: Tensor | None = None,
        features_NPF: Tensor | None = None,
        instruction_BI: Tensor | None = None,
        attention_BI: Tensor | None = None,
        layouts_N4: Tensor | None = None,
        segments_BT: Tensor | None = None,
    ) -> Tensor:
        """(B, T, D): the language model's own embeddings, with bridge tokens in the IMAGE places, in order."""
        places_BT = ids_BT == IMAGE
        samples_B = _places_of(places_BT, segments_BT)
        images_NPD = self.images(
            pixels_N3SS, features_NPF, instruction_BI, attention_BI, samples_B, layouts_N4
        )
        tokens_KD = (
            images_NPD.flatten(0, 1) if self.tiles is None else self.tiles(images_NPD, layouts_N4)
        )
        if int(places_BT.sum()) != len(tokens_KD):
            raise DataError(
                f"the batch has {int(places_BT.sum())} image places in its ids, and {images_NPD.shape[0]} images of "
                f"{images_NPD.shape[1]} tokens: every image needs exactly its places, in order"
            )
        text_BTD = self.language.get_input_embeddings()(ids_BT.masked_fill(places_BT, 0))
        if text_BTD.shape[-1] != tokens_KD.shape[-1]:
            raise SpecError(
                "image tokens go between the words of the language model. Got tokens of "
                f"{tokens_KD.shape[-1]} and words of {text_BTD.shape[-1]}; expected one width. Fix: take a language "
                "model whose embeddings are as wide as its layers"
            )
        return cast(
            Tensor, text_BTD.masked_scatter(places_BT.unsqueeze(-1), tokens_KD.to(text_BTD.dtype))
        )

    @rng.images()
    def images(
        self,
        pixels_N3SS: Tensor | None,
        features_NPF: Tensor | None,
        instruction_BI: Tensor | None = None,
        attention_BI: Tensor | None = None,
        places_R: Tensor | None = None,
        layouts_N4: Tensor | None = None,
    ) -> Tensor:
        """(N, P, D): the bridge's tokens; N may be 0, and the bridge is in the graph all the same.

        An instruction belongs to a sample; `places` (R,), how many each has, say whose images are whose. Without them
        there is one image a sample.
        Of images cut into tiles each square is one of the N, and a resampler does not look at their padding.
        """
        if pixels_N3SS is not None and features_NPF is not None:
            raise DataError(
                "both pixels and cached features are given; the vision tower takes one of them"
            )
        if features_NPF is None:
            given_N3SS = pixels_N3SS if pixels_N3SS is not None else self._no_pixels()
            count, patches_NPF = len(given_N3SS), self.vision(_one_at_least(given_N3SS))
        else:
            self._check_features(features_NPF)
            count, patches_NPF = len(features_NPF), _one_at_least(features_NPF)
        patches_NPF = patches_NPF.to(next(self.bridge.parameters()).dtype)
        if isinstance(self.bridge, Resampler) and layouts_N4 is not None:
            real_NP = tiling.real(layouts_N4, patches_NPF.shape[1]).to(patches_NPF.device)
            return cast(Tensor, self.bridge(patches_NPF, real_NP)[:count])
        if instruction_BI is None:
            return cast(Tensor, self.bridge(patches_NPF)[:count])
        heard_BI = (
            torch.ones_like(instruction_BI, dtype=torch.bool)
            if attention_BI is None
            else attention_BI
        )
        rows_N = _rows(count, places_R, instruction_BI)
        return cast(
            Tensor, self.bridge(patches_NPF, instruction_BI[rows_N], heard_BI[rows_N])[:count]
        )

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

    # --- inference ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def embed_images(self, features: Tensor) -> Tensor:
        """(N, D) float32 of length 1: the mean of each image's bridge tokens; from features (N, P, F)."""
        return normalize(self.images(None, features).float().mean(1), dim=-1)

    @torch.no_grad()
    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        """(B, D) float32 of length 1: the mean embedding of each row's labeled tokens; images are not looked at."""
        embeds_BTD = self.language.get_input_embeddings()(ids.masked_fill(ids == IMAGE, 0))
        return normalize(_mean(embeds_BTD, labels != IGNORE, "labeled token"), dim=-1)

    @torch.no_grad()
    def continuations(
        self,
        prompt: Tensor,
        rest: Tensor,
        features: Tensor,
        instruction: Tensor | None = None,
        instruction_attention: Tensor | None = None,
        layouts: Tensor | None = None,
    ) -> Tensor:
        """(C, R, V): the logits of every token of `rest` (C, R) behind one `prompt` (1, T), padded on the right.

        The prompt with its images (features (N, P, D)) goes through the language model once, whatever C is.
        """
        prompt_1TD = self.embed(prompt, None, features, instruction, instruction_attention, layouts)
        if encoder_decoder.is_one(self.language):
            return encoder_decoder.continuations(self.language, prompt_1TD, rest)
        return decoder_only.continuations(self.language, prompt_1TD, rest)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        attention: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        layouts: Tensor | None = None,
        instruction: Tensor | None = None,
        instruction_attention: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """(B, new) ids behind prompts padded on the left; `generation` goes to transformers' `generate`."""
        embeds_BTD = self.embed(ids, pixels, features, instruction, instruction_attention, layouts)
        if encoder_decoder.is_one(self.language):
            return encoder_decoder.generate(self.language, embeds_BTD, attention, **generation)
        return decoder_only.generate(self.language, embeds_BTD, attention, **generation)


def _one_at_least(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


def _places_of(places_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
    """(R,) how many image places each sample has; a sample is a row, or with `segments` a part of one."""
    if segments_BT is None:
        return places_BT.sum(-1)
    return torch.bincount(segments_BT[places_BT], minlength=int(segments_BT.max()) + 1)


def _rows(images: int, places_R: Tensor | None, instruction_RI: Tensor) -> Tensor:
    """(N,) the sample that each image stands in; the blank image of a batch without images hears the first one."""
    rows_R = torch.arange(len(instruction_RI), device=instruction_RI.device)
    if images == 0:
        return rows_R[:1]
    if places_R is None:
        return rows_R
    rows_N = rows_R.repeat_interleave(places_R * images // max(1, int(places_R.sum())))
    if len(rows_N) != images:
        raise DataError(
            f"{images} images do not share {places_R.tolist()} places in the samples: each needs its own"
        )
    return rows_N


def _mean(embeds_BTD: Tensor, chosen_BT: Tensor, what: str) -> Tensor:
    """(B, D) in float32: the mean of each row's chosen tokens. Raises DataError for a row with none."""
    count_B = chosen_BT.sum(-1)
    if bool((count_B == 0).any()):
        row = int((count_B == 0).nonzero()[0])
        raise DataError(
            f"row {row} of the batch has no {what}: pooling needs an image and a caption in every sample"
        )
    # a product with the mask would carry a NaN from a padded place into the mean
    sum_BD = embeds_BTD.float().masked_fill(~chosen_BT.unsqueeze(-1), 0.0).sum(1)
    return sum_BD / count_B.unsqueeze(-1)
