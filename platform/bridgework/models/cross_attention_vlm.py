"""The cross-attention wiring: blocks between the layers of a frozen language model read images.

Flamingo and OpenFlamingo (Alayrac et al. 2022, arXiv:2204.14198, 2). An image takes one place in
the row of ids, and its tokens are the keys of gated cross-attention blocks. A video is an image
with more than one square: its frames. IMAGE and END are in no vocabulary, so they get two learned
rows after it: column V of the logits is END, V + 1 is IMAGE.
"""

from contextvars import ContextVar
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.models import attention_masks, decoder_only
from bridgework.models.base import LanguageWiringConfig, Outputs, VLMModule
from bridgework.models.gated_cross_attention import GatesConfig, insert_blocks
from bridgework.models.language import LanguageConfig
from bridgework.models.origin import Origin
from bridgework.models.resampler import ResamplerConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig
from bridgework.system import END, IGNORE, IMAGE, Layout, Pixels

# B batch  T tokens  N images and videos of the batch, in order  M of one row at most  P patches
# S pixels of a side  F width of the tower's features and of the bridge's tokens
# Q tokens of an image  D width of the language model  V vocabulary  C candidates
# R tokens of a candidate  L = R - 1


LOGITS = frozenset({"logits"})
# true if logits have V + 2 columns, in this thread
_extra_columns: ContextVar[bool] = ContextVar("extra_columns", default=False)


@config_class
class CrossAttentionVLMConfig(LanguageWiringConfig):
    """A vision tower, a resampler, a causal language model and the blocks between its layers."""

    vision: ViTConfig | EfficientNetConfig
    bridge: ResamplerConfig
    gates: GatesConfig
    language: LanguageConfig
    origin: Origin | None = added(default=None)  # of an imported model: fields for its export

    def __post_init__(self) -> None:
        if not self.gates.layers(self.language.depth):
            raise SpecError(
                f"gates.first: no layer would read an image. Got {self.gates.first}; "
                f"expected less than the language model's {self.language.depth} layers"
            )

    @property
    def pixels(self) -> Pixels:
        return replace(self.vision.pixels, video=True)

    @property
    def image_tokens(self) -> int:
        return 1

    def num_image_tokens(self, layout: Layout) -> int:
        return 1

    @property
    def instruction(self) -> None:
        return None

    def unshardable(self, requested: frozenset[str]) -> None:
        return None

    def build(self, *, pretrained: bool = True) -> "CrossAttentionVLM":
        """Return the model in float32.

        Without weights, or with `pretrained=False`, it is drawn from torch's generator.
        """
        media_width, width = self.vision.feature_width, self.language.width
        return CrossAttentionVLM(
            self.vision.build(pretrained=pretrained),
            self.bridge.build(media_width, media_width),
            self.gates.build(self.language.depth, width, media_width),
            self.language.build(pretrained=pretrained),
        )

    def tiny(self) -> "CrossAttentionVLMConfig":
        return replace(
            self,
            vision=self.vision.tiny(),
            bridge=self.bridge.tiny(),
            gates=self.gates.tiny(),
            language=self.language.tiny(),
            origin=None,
        )


class CrossAttentionVLM(VLMModule):
    """`vision`, `bridge`, `gates` (by the number of the layer after them), `language`, `extra`.

    Every forward runs the same modules in the same order, so that the collectives of ZeRO-3 agree
    between ranks: a batch without images runs one blank image, which no token sees.
    """

    provides = LOGITS

    def __init__(
        self, vision: VisionTower, bridge: nn.Module, gates: nn.ModuleDict, language: Any
    ) -> None:
        super().__init__()
        if language.config.is_encoder_decoder or not hasattr(language.get_decoder(), "layers"):
            raise SpecError(
                "model.language: the blocks go between the layers of a causal language model, "
                f"and {language.config.model_type!r} has no such list. "
                "Fix: take llama, mistral, qwen2, phi3, opt, ..."
            )
        self.vision = vision
        self.bridge = bridge
        self.gates = gates
        self.language = language
        self.extra = ExtraTokenEmbeddings(language)
        self._vocab = int(language.get_output_embeddings().weight.shape[0])
        insert_blocks(language.get_decoder().layers, gates)
        self.extra.add_to(language.get_output_embeddings())
        self._last_logits = decoder_only.last_logits(language)

    @property
    def endings(self) -> frozenset[int]:
        """Ids in the output of `generate` that end a chunk, for every template."""
        return frozenset({self._vocab})

    def forward(
        self,
        ids: Tensor,
        attention: Tensor,
        labels: Tensor | None = None,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        layouts: Tensor | None = None,
        segments: Tensor | None = None,
        requested: frozenset[str] = LOGITS,
    ) -> Outputs:
        """Return logits (B, T, V + 2) of every token, and labels as columns of them: END is V.

        ids: (B, T) int64 with one IMAGE per image, and END after chunks.
        attention: (B, T) bool, padding on either side.
        labels: (B, T) int64, IGNORE where there is no loss.
        pixels: (squares, 3, S, S) uint8, or features: (squares, P, F).
        layouts: (N, 4) int64, if images have more than one square.
        segments: (B, T) int64, if samples share rows: the sample of each token, -1 on padding.

        Raises DataError if images and places do not match.
        """
        self.check(requested)
        media_BMQF, seen_BT = self.media(ids, pixels, features, layouts, segments)
        embeds_BTD = self.embed(ids)
        masks = attention_masks.masks_and_positions(self.language, embeds_BTD, attention, segments)
        logits_BTV, _ = self.run_language(embeds_BTD, media_BMQF, seen_BT, **masks, use_cache=False)
        targets_BT = None if labels is None else self.targets(labels)
        return Outputs(logits_BTV=logits_BTV, labels_BT=targets_BT, segments_BT=segments)

    def targets(self, labels_BT: Tensor) -> Tensor:
        """Return labels as columns of the logits."""
        return labels_BT.masked_fill(labels_BT == END, self._vocab)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Return token embeddings (B, T, D), with learned rows for END (or V), IMAGE (or V + 1)."""
        image_BT = torch.where(ids_BT == IMAGE, 1, ids_BT - self._vocab)
        extra_BT = torch.where(ids_BT == END, 0, image_BT)
        text_BT = extra_BT < 0
        text_BTD = self.language.get_input_embeddings()(ids_BT.masked_fill(~text_BT, 0))
        extra_BTD = self.extra.words(extra_BT.masked_fill(text_BT, 0))
        return torch.where(text_BT.unsqueeze(-1), text_BTD, extra_BTD.to(text_BTD.dtype))

    def media(
        self,
        ids_BT: Tensor,
        pixels: Tensor | None,
        features: Tensor | None,
        layouts_N4: Tensor | None,
        segments_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return (B, M, Q, F), the images of each row, and (B, T), the image that a token sees.

        It is the last image before the token, numbered from 1; 0 is none.
        """
        places_BT = ids_BT == IMAGE
        count_B = places_BT.sum(-1)
        images_NQF = self.images(pixels, features, layouts_N4)
        if int(count_B.sum()) != len(images_NQF):
            raise DataError(
                f"the batch has {int(count_B.sum())} image places in its ids, and "
                f"{len(images_NQF)} images. Expected one place for each image, in order"
            )
        most = max(1, int(count_B.max()))
        seen_BT = attention_masks.last_image(places_BT, segments_BT)
        return _pad_rows(images_NQF, count_B, most), seen_BT

    @rng.images()
    def images(
        self, pixels: Tensor | None, features: Tensor | None, layouts_N4: Tensor | None = None
    ) -> Tensor:
        """Return (N, Q, F), the bridge's tokens. If N is 0, the bridge is in the graph too."""
        patches = self._patches(pixels, features)
        squares_N = torch.ones(len(patches), dtype=torch.int64, device=patches.device)
        if layouts_N4 is not None:
            squares_N = (1 + layouts_N4[:, 0] * layouts_N4[:, 1]).to(patches.device)
        if int(squares_N.sum()) != len(patches):
            raise DataError(
                f"the layouts are of {int(squares_N.sum())} squares, and {len(patches)} are given"
            )
        count = len(squares_N)
        if not count:
            blank_11PF = patches.new_zeros(1, 1, *patches.shape[1:])
            return cast(Tensor, self.bridge(blank_11PF, None)[:0])
        most = max(1, int(squares_N.max()))
        frames_NTPF = _pad_rows(patches, squares_N, most)
        mask_NTP = None
        if not bool((squares_N == most).all()):
            mask_NTP = _real(squares_N, most).unsqueeze(-1).expand(frames_NTPF.shape[:-1])
        return cast(Tensor, self.bridge(frames_NTPF, mask_NTP))

    def _patches(self, pixels: Tensor | None, features: Tensor | None) -> Tensor:
        """Return (squares, P, F) in the bridge's dtype; the tower runs even without images."""
        self.check_images(pixels, features)
        parameter = next(self.bridge.parameters())
        if features is not None:
            return features.to(parameter.dtype)
        size = self.vision.config.pixels.size
        blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=parameter.device)
        count = 0 if pixels is None else len(pixels)
        patches: Tensor = self.vision(pixels if count else blank)
        return patches[:count].to(parameter.dtype)

    def run_language(
        self,
        embeds_BTD: Tensor,
        media_BMQF: Tensor,
        seen_BT: Tensor,
        *,
        last: bool = False,
        **decoding: Any,
    ) -> tuple[Tensor, Any]:
        """Return (B, T, V + 2) logits, of the last token alone with `last`, and the cache.

        `decoding` is passed to the language model's own forward, whose output matrix has two
        columns more.
        """
        options = self._last_logits if last else {}
        reached: list[nn.Module] = []
        images = {"media": media_BMQF, "seen": seen_BT, "reached": reached}
        token = _extra_columns.set(True)
        try:
            outputs = self.language(inputs_embeds=embeds_BTD, **images, **decoding, **options)
        finally:
            _extra_columns.reset(token)
        logits_BTV: Tensor = outputs.logits
        if not reached or logits_BTV.shape[-1] != self._vocab + 2:
            raise SpecError(
                f"language.arch {self.language.config.model_type!r} passes no images to its "
                "layers, or its output has a head of its own: the blocks do not fit into it. "
                "Fix: take llama, mistral, qwen2, phi3, opt, ..."
            )
        cache = getattr(outputs, "past_key_values", None)
        return logits_BTV[:, -1:] if last else logits_BTV, cache

    def embed_images(self, features_NPF: Tensor) -> Tensor:
        """Return (N, F) float32 of unit length: the mean tower output, which RICES compares."""
        return nn.functional.normalize(features_NPF.float().mean(1), dim=-1)

    @torch.no_grad()
    def continuations(
        self, prompt: Tensor, rest: Tensor, features: Tensor, layouts: Tensor | None = None
    ) -> Tensor:
        """Return (C, R, V + 2), the logits of each token of `rest` (C, R) after `prompt` (1, T).

        `rest` is padded on the right with IGNORE. The images, features (N, P, F), are read once,
        and the prompt too if the language model can cache it.
        """
        length = prompt.shape[1] + rest.shape[1]
        if len(rest) > 1 and length > attention_masks.rotary_limit(self.language.config):
            texts = [row_R[row_R != IGNORE].unsqueeze(0) for row_R in rest]
            found = [self.continuations(prompt, text, features, layouts)[0] for text in texts]
            return pad_sequence(found, batch_first=True)
        rest = rest.masked_fill(rest == IGNORE, 0)
        media_1MQF, seen_1T = self.media(prompt, None, features, layouts)
        media_CMQF = media_1MQF.expand(len(rest), -1, -1, -1)
        if not attention_masks.can_cache_prompt(self.language, length):
            embeds_CTD = torch.cat(
                [self.embed(prompt).expand(len(rest), -1, -1), self.embed(rest)], dim=1
            )
            seen_CR = seen_1T[:, -1:].expand(rest.shape)
            seen_CT = torch.cat([seen_1T.expand(len(rest), -1), seen_CR], dim=1)
            # with the last column: the rotary angles of some models depend on the length
            logits_CTV, _ = self.run_language(embeds_CTD, media_CMQF, seen_CT, use_cache=False)
            return logits_CTV[:, prompt.shape[1] - 1 : -1]
        # the output of the last column would predict the token after it
        read_CL = rest[:, :-1]
        seen_CL = seen_1T[:, -1:].expand(read_CL.shape)
        first_11V, cache = self.run_language(
            self.embed(prompt), media_1MQF, seen_1T, last=True, use_cache=True
        )
        first_C1V = first_11V.expand(len(rest), 1, -1)
        if not read_CL.shape[1]:
            return first_C1V
        cache.batch_repeat_interleave(len(rest))
        after_CLV, _ = self.run_language(
            self.embed(read_CL), media_CMQF, seen_CL, past_key_values=cache, use_cache=True
        )
        return torch.cat([first_C1V, after_CLV], dim=1)

    @torch.no_grad()
    def generate(
        self,
        ids: Tensor,
        attention: Tensor,
        pixels: Tensor | None = None,
        features: Tensor | None = None,
        layouts: Tensor | None = None,
        **generation: Any,
    ) -> Tensor:
        """Return (B, new) ids after prompts padded on the left, V for END.

        Images are read once, and all new tokens see the last image of the prompt. `generation` is
        passed to transformers' `generate`.
        """
        from bridgework.models.cross_attention_generation import CrossAttentionGenerationAdapter

        media_BMQF, seen_BT = self.media(ids, pixels, features, layouts)
        inputs = {
            "inputs_embeds": self.embed(ids),
            "attention_mask": attention.long(),
            "media": media_BMQF,
            "seen": seen_BT,
        }
        adapter: Any = CrossAttentionGenerationAdapter(self)
        with decoder_only.generating(self.language, attention):
            return cast(Tensor, adapter.generate(**inputs, **generation))


class ExtraTokenEmbeddings(nn.Module):
    """Rows for END and IMAGE: `words` of the input and `head` of the output.

    They start as the mean of the language model's own, and share a matrix if the model does.
    """

    def __init__(self, language: Any) -> None:
        super().__init__()
        words = language.get_input_embeddings().weight
        head = language.get_output_embeddings().weight
        width = words.shape[1]
        self.words = nn.Embedding(2, width)
        self.head = nn.Linear(width, 2, bias=False)
        with torch.no_grad():
            self.words.weight.copy_(words.mean(0))
            self.head.weight.copy_(head.mean(0))
        if words is head:
            self.head.weight = self.words.weight

    def add_to(self, head: nn.Module) -> None:
        """Append two columns to the output of `head`, if `_extra_columns` is set.

        The language model applies the rest of its output, e.g. a scale or a soft cap, to all
        columns.
        """
        head.register_forward_hook(_AppendColumns(self.head))


class _AppendColumns:
    """Forward hook of the language model's output matrix."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def __call__(
        self, module: nn.Module, args: tuple[Tensor, ...], logits_BTV: Tensor
    ) -> Tensor | None:
        if not _extra_columns.get():
            return None
        return torch.cat([logits_BTV, self._head(args[0]).to(logits_BTV.dtype)], dim=-1)


def _real(count_N: Tensor, most: int) -> Tensor:
    """Return (N, most) bool: true for the first `count` of each row."""
    return torch.arange(most, device=count_N.device) < count_N.unsqueeze(-1)


def _pad_rows(parts: Tensor, count_N: Tensor, most: int) -> Tensor:
    """Split (total, ...) into rows (N, most, ...), each padded with zeros."""
    real = _real(count_N, most).view(len(count_N), most, *[1] * (parts.ndim - 1))
    empty = parts.new_zeros(len(count_N), most, *parts.shape[1:])
    return empty.masked_scatter(real, parts)
