"""The prefix wiring: image tokens inside the token stream of a language model (LLaVA, BLIP-2).

A row of ids holds IMAGE wherever one image token goes: the data reserves the places and the model
fills them in order (Liu et al. 2023, arXiv:2304.08485, 4.1). An encoder-decoder language model
encodes the row up to the first label and decodes the rest. With `grids`, an image is its base
square and the tiles of one grid (LLaVA-NeXT, xGen-MM).
"""

# B batch  T tokens  N images of the batch, in order  P patches, then bridge tokens
# S pixels of a side  F width of the tower's features  D width of the language model  V vocabulary
# I tokens of the instructions  R samples  K chosen tokens

from dataclasses import replace
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
from bridgework.models.base import LanguageWiringConfig, Outputs, VLMModule
from bridgework.models.blip_vit import EvaConfig
from bridgework.models.language import LanguageConfig
from bridgework.models.origin import Origin
from bridgework.models.projectors import ConcatConfig, LinearConfig, MLPConfig
from bridgework.models.qformer import QFormerConfig
from bridgework.models.resampler import Resampler, ResamplerConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig
from bridgework.system import IGNORE, IMAGE, Layout, Pixels

LOGITS = frozenset({"logits"})


@config_class
class PrefixVLMConfig(LanguageWiringConfig):
    """A vision tower, a bridge and a language model: causal, or an encoder-decoder."""

    vision: ViTConfig | EvaConfig | EfficientNetConfig
    bridge: LinearConfig | MLPConfig | ConcatConfig | QFormerConfig | ResamplerConfig
    language: LanguageConfig
    # (columns, rows) of tiles next to the base square; each image takes the best of these grids
    grids: tuple[tuple[int, int], ...] = ()
    tiles: tiling.Tiles = "resample"  # how tiles become tokens, see bridgework.models.tiles
    # reference model of DPO; "frozen_copy" keeps a second copy of the parameters that train
    reference: dpo_reference.Reference = "adapters_off"
    origin: Origin | None = added(default=None)  # of an imported model: fields for its export

    def __post_init__(self) -> None:
        most = max(self.num_image_tokens(Layout(*grid, *grid)) for grid in [*self.grids, (0, 0)])
        if most >= self.context:
            raise SpecError(
                f"model: an image takes {most} tokens and language.context is {self.context}. "
                "Fix: take a longer context, smaller images, fewer tiles or a bridge with "
                "fewer tokens"
            )
        tokens = self.image_tokens if self.tiles == "unpad" else self.vision.tokens
        if self.grids and isqrt(self.vision.tokens) ** 2 != tokens:
            raise SpecError(
                "model.grids: tiles need a square grid of patches. "
                f"Got {self.vision.tokens} vectors per square from the tower, {self.image_tokens} "
                'tokens from the bridge. Fix: set vision.select="patch", and with tiles="unpad" '
                "take a bridge that keeps each patch"
            )

    @property
    def pixels(self) -> Pixels:
        return replace(self.vision.pixels, grids=self.grids)

    def unshardable(self, requested: frozenset[str]) -> str | None:
        if self.reference == "frozen_copy" and "preference" in requested:
            return 'model.reference="frozen_copy" needs complete parameters on every worker'
        return None

    @property
    def image_tokens(self) -> int:
        return self.bridge.tokens(self.vision.tokens)

    def num_image_tokens(self, layout: Layout) -> int:
        return tiling.num_image_tokens(layout, self.image_tokens, self.tiles)

    @property
    def instruction(self) -> str | None:
        return self.bridge.instruction if isinstance(self.bridge, QFormerConfig) else None

    @property
    def pretrained(self) -> tuple[str, ...]:
        bridge = (
            self.bridge.pretrained if isinstance(self.bridge, QFormerConfig | ConcatConfig) else ()
        )
        return (*super().pretrained, *(f"bridge.{glob}" for glob in bridge))

    def build(self, *, pretrained: bool = True) -> "PrefixVLM":
        """Return the model in float32.

        Without weights, or with `pretrained=False`, it is drawn from torch's generator.
        """
        has_weights = isinstance(self.bridge, QFormerConfig | ConcatConfig)
        options = {"pretrained": pretrained} if has_weights else {}
        return PrefixVLM(
            self.vision.build(pretrained=pretrained),
            self.bridge.build(self.vision.feature_width, self.language.width, **options),
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


class PrefixVLM(VLMModule):
    """`vision`, `bridge`, `language`, and `tiles` if rows of patches end with a newline.

    Takes pixels, or cached features of the same tower.

    Every forward runs the same modules in the same order, so that the collectives of ZeRO-3 agree
    between ranks: a batch without images runs one blank image and drops its tokens. An empty tensor
    names the kind of input of the other ranks, `features` of (0, P, F) or `pixels` of (0, 3, S, S).
    The default is pixels.
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
        self.reference = reference  # of DPO; None: this model with its adapters off

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
        """Return the requested outputs: `logits`, `pooled` (image and text vectors), `preference`.

        ids: (B, T) int64 with IMAGE places. attention: (B, T) bool, padding on either side.
        labels: (B, T) int64, IGNORE where there is no loss.
        pixels: (N, 3, S, S) uint8, or features: (N, P, F); every tile is one of the N.
        layouts: (images, 4) int64, if images are cut into tiles.
        instruction: (B, I) int64 and its attention, for a bridge that reads the user's text.
        segments: (B, T) int64, if samples share rows: the sample of each token, -1 on padding. The
            instruction then has one row per sample.
        requested: with `preference`, the second half of the rows is the first's worse answers.

        Raises DataError if places and image tokens do not match, and for an encoder-decoder
        without labels.
        """
        self.check(requested)
        embeds_BTD = self.embed(
            ids, pixels, features, instruction, instruction_attention, layouts, segments
        )
        outputs = Outputs(labels_BT=labels, segments_BT=segments)
        if "preference" in requested:
            inputs = {
                "ids": ids,
                "attention": attention,
                "labels": labels,
                "pixels": pixels,
                "features": features,
                "layouts": layouts,
                "instruction": instruction,
                "instruction_attention": instruction_attention,
            }
            likelihoods = dpo_reference.log_likelihoods(
                self,
                lambda: self._logits(embeds_BTD, ids, attention, labels),
                inputs,
                self.reference,
            )
            outputs = replace(outputs, **likelihoods)
        if "pooled" in requested:
            if labels is None:
                raise DataError("pooled text needs labels, because they mark the caption's tokens")
            outputs.image_BD = _mean(embeds_BTD, ids == IMAGE, "image", segments)
            outputs.text_BD = _mean(embeds_BTD, labels != IGNORE, "labeled token", segments)
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
        if encoder_decoder.is_encoder_decoder(self.language):
            if labels_BT is None:
                raise DataError(
                    "an encoder-decoder needs labels, because they mark the prompt's end"
                )
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
        """Return (B, T, D): token embeddings, with bridge tokens in the IMAGE places, in order."""
        places_BT = ids_BT == IMAGE
        places_R = _places_per_sample(places_BT, segments_BT)
        images_NPD = self.images(
            pixels_N3SS, features_NPF, instruction_BI, attention_BI, places_R, layouts_N4
        )
        tokens_KD = (
            images_NPD.flatten(0, 1) if self.tiles is None else self.tiles(images_NPD, layouts_N4)
        )
        if int(places_BT.sum()) != len(tokens_KD):
            raise DataError(
                f"the batch has {int(places_BT.sum())} image places in its ids, and "
                f"{images_NPD.shape[0]} images of {images_NPD.shape[1]} tokens. "
                "Expected one place for each token, in order"
            )
        text_BTD = self.language.get_input_embeddings()(ids_BT.masked_fill(places_BT, 0))
        if text_BTD.shape[-1] != tokens_KD.shape[-1]:
            raise SpecError(
                "model: image tokens and token embeddings differ in width. "
                f"Got {tokens_KD.shape[-1]} and {text_BTD.shape[-1]}; expected one width. "
                "Fix: take a language model whose embeddings are as wide as its layers"
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
        """Return (N, P, D), the bridge's tokens. If N is 0, the bridge is in the graph too.

        An instruction belongs to a sample. `places` (R,), the number of image places of each
        sample, assigns images to samples; without it every sample has one image. Of images cut
        into tiles each square is one of the N, and a resampler masks their padding.
        """
        self.check_images(pixels_N3SS, features_NPF)
        if features_NPF is None:
            pixels_N3SS = self._no_pixels() if pixels_N3SS is None else pixels_N3SS
            count, patches_NPF = len(pixels_N3SS), self.vision(_at_least_one(pixels_N3SS))
        else:
            count, patches_NPF = len(features_NPF), _at_least_one(features_NPF)
        patches_NPF = patches_NPF.to(next(self.bridge.parameters()).dtype)
        if isinstance(self.bridge, Resampler) and layouts_N4 is not None:
            mask_NP = tiling.patch_mask(layouts_N4, patches_NPF.shape[1]).to(patches_NPF.device)
            return cast(Tensor, self.bridge(patches_NPF, mask_NP)[:count])
        if instruction_BI is None:
            return cast(Tensor, self.bridge(patches_NPF)[:count])
        if attention_BI is None:
            attention_BI = torch.ones_like(instruction_BI, dtype=torch.bool)
        rows_N = _sample_of_image(count, places_R, instruction_BI)
        tokens_NPD = self.bridge(patches_NPF, instruction_BI[rows_N], attention_BI[rows_N])
        return cast(Tensor, tokens_NPD[:count])

    def _no_pixels(self) -> Tensor:
        size, device = self.vision.config.pixels.size, next(self.bridge.parameters()).device
        return torch.zeros(0, 3, size, size, dtype=torch.uint8, device=device)

    # --- inference ---

    @torch.no_grad()
    def embed_images(self, features: Tensor) -> Tensor:
        """Return (N, D) float32 of unit length: each image's mean token; features (N, P, F)."""
        return normalize(self.images(None, features).float().mean(1), dim=-1)

    @torch.no_grad()
    def embed_texts(self, ids: Tensor, attention: Tensor, labels: Tensor) -> Tensor:
        """Return (B, D) float32 of unit length: each row's mean labeled token, without images."""
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
        """Return (C, R, V): the logits of every token of `rest` (C, R) after one `prompt` (1, T).

        `rest` is padded on the right with IGNORE. The language model reads the prompt and its
        images, features (N, P, F), once for all C.
        """
        prompt_1TD = self.embed(prompt, None, features, instruction, instruction_attention, layouts)
        if encoder_decoder.is_encoder_decoder(self.language):
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
        """Return (B, new) ids after prompts padded on the left.

        `generation` is passed to transformers' `generate`.
        """
        embeds_BTD = self.embed(ids, pixels, features, instruction, instruction_attention, layouts)
        if encoder_decoder.is_encoder_decoder(self.language):
            return encoder_decoder.generate(self.language, embeds_BTD, attention, **generation)
        return decoder_only.generate(self.language, embeds_BTD, attention, **generation)


def _at_least_one(rows: Tensor) -> Tensor:
    return rows if len(rows) else rows.new_zeros(1, *rows.shape[1:])


def _places_per_sample(places_BT: Tensor, segments_BT: Tensor | None) -> Tensor:
    """Return (R,) the number of image places of each sample: a row, or with `segments` a part."""
    if segments_BT is None:
        return places_BT.sum(-1)
    return torch.bincount(segments_BT[places_BT], minlength=int(segments_BT.max()) + 1)


def _sample_of_image(images: int, places_R: Tensor | None, instruction_RI: Tensor) -> Tensor:
    """Return (N,) the sample of each image; the blank image of an empty batch takes the first."""
    rows_R = torch.arange(len(instruction_RI), device=instruction_RI.device)
    if images == 0:
        return rows_R[:1]
    if places_R is None:
        return rows_R
    rows_N = rows_R.repeat_interleave(places_R * images // max(1, int(places_R.sum())))
    if len(rows_N) != images:
        raise DataError(
            f"{images} images do not share {places_R.tolist()} places in the samples. "
            "Expected the same number of places for each image"
        )
    return rows_N


def _mean(
    embeds_BTD: Tensor, chosen_BT: Tensor, name: str, segments_BT: Tensor | None = None
) -> Tensor:
    """Return (R, D) float32, the mean of each sample's chosen tokens; DataError if it has none.

    A sample is a row, or with `segments` a part of a row.
    """
    owner_BT = (
        torch.arange(len(chosen_BT), device=chosen_BT.device).unsqueeze(1).expand_as(chosen_BT)
        if segments_BT is None
        else segments_BT
    )
    owner_K, samples = owner_BT[chosen_BT], int(owner_BT.max()) + 1
    count_R = torch.bincount(owner_K, minlength=samples)
    if bool((count_R == 0).any()):
        sample = int((count_R == 0).nonzero()[0])
        raise DataError(
            f"sample {sample} of the batch has no {name}: "
            "pooling needs an image and a caption in every sample"
        )
    # indexed: a product with a mask would carry a NaN from a padded place into the mean
    chosen_KD = embeds_BTD[chosen_BT].float()
    sum_RD = chosen_KD.new_zeros(samples, chosen_KD.shape[-1]).index_add(0, owner_K, chosen_KD)
    return sum_RD / count_R.unsqueeze(-1)
