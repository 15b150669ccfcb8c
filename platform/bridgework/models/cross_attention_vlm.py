"""The cross-attention wiring: a frozen language model looks at images between its layers (Flamingo; OpenFlamingo).

An image takes one place in the row of ids, and what it shows goes into gated blocks instead (Alayrac et al. 2022,
arXiv:2204.14198, 2). A video is an image with more than one square: its frames. IMAGE and END, which no vocabulary
has, get two learned rows behind it: column V of the logits is END, V + 1 is IMAGE.

The cross-attention wiring as transformers' `generate` wants to see a language model.
"""

import inspect
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bridgework import rng
from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.models import attention_masks, decoder_only
from bridgework.models.base import VLMModule
from bridgework.models.gated_cross_attention import GatesConfig, insert_blocks
from bridgework.models.language import LanguageConfig
from bridgework.models.origin import Origin
from bridgework.models.resampler import ResamplerConfig
from bridgework.models.vision import EfficientNetConfig, VisionTower, ViTConfig
from bridgework.system import END, IMAGE, Layout, Pixels

# B batch  T tokens  N images and videos of the batch, in order  M of one row at most  P patches  S pixels of a side
# F width of the tower's features and of what the bridge gives  Q tokens of an image  D width of the language model
# V vocabulary  C candidates  R tokens of a candidate


LOGITS = frozenset({"logits"})
_wider: ContextVar[bool] = ContextVar(
    "wider", default=False
)  # of one thread: whether logits have V + 2 columns


@config_class
class CrossAttentionVLMConfig:
    """A vision tower, a resampler, a causal language model, and the blocks between its layers."""

    vision: ViTConfig | EfficientNetConfig
    bridge: ResamplerConfig
    gates: GatesConfig
    language: LanguageConfig
    origin: Origin | None = added(default=None)  # of an import: fields that an export writes again

    def __post_init__(self) -> None:
        if not self.gates.layers(self.language.depth):
            raise SpecError(
                f"gates.first {self.gates.first} lies behind the language model's {self.language.depth} layers: "
                "no layer would look at an image"
            )

    @property
    def pixels(self) -> Pixels:
        return replace(self.vision.pixels, video=True)

    @property
    def tokenizer(self) -> str:
        return self.language.tokenizer

    @property
    def context(self) -> int:
        return self.language.context

    @property
    def image_tokens(self) -> int:
        return 1

    def places(self, layout: Layout) -> int:
        return 1

    @property
    def instruction(self) -> None:
        return None

    def unshardable(self, requested: frozenset[str]) -> None:
        return None

    @property
    def vision_tokens(self) -> int:
        return self.vision.tokens

    @property
    def packing_refusal(self) -> str | None:
        return self.language.packing_refusal

    @property
    def pretrained(self) -> tuple[str, ...]:
        towers = {"vision.*": self.vision.weights, "language.*": self.language.weights}
        return tuple(glob for glob, weights in towers.items() if weights is not None)

    def build(self, *, pretrained: bool = True) -> "CrossAttentionVLM":
        """The model in float32; without weights (or with `pretrained=False`) drawn from torch's generator."""
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


@dataclass
class Outputs:
    """What a forward gives. Labels are columns of the logits: END has become V."""

    logits_BTV: Tensor | None = None
    labels_BT: Tensor | None = None
    segments_BT: Tensor | None = None  # whose each token is, where samples share rows


class ExtraTokenEmbeddings(nn.Module):
    """Rows for END and IMAGE: `words` of the input, `head` of the output; they begin as the mean of the model's own.

    Where the language model has one matrix for both, so has this.
    """

    def __init__(self, language: Any) -> None:
        super().__init__()
        words, head = (
            language.get_input_embeddings().weight,
            language.get_output_embeddings().weight,
        )
        width = words.shape[1]
        self.words = nn.Embedding(2, width)
        self.head = nn.Linear(width, 2, bias=False)
        with torch.no_grad():
            self.words.weight.copy_(words.mean(0))
            self.head.weight.copy_(head.mean(0))
        if words is head:
            self.head.weight = self.words.weight

    def add_to(self, head: nn.Module) -> None:
        """Append this head's two columns to the output of `head`, inside of `_wider` alone.

        So all that a language model does with its logits afterwards (a scale, a soft cap) is done with all columns.
        """
        head.register_forward_hook(_Columns(self.head))


class _Columns:
    """The hook of the language model's output matrix."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def __call__(
        self, own: nn.Module, given: tuple[Tensor, ...], logits_BTV: Tensor
    ) -> Tensor | None:
        if not _wider.get():
            return None
        return torch.cat([logits_BTV, self._head(given[0]).to(logits_BTV.dtype)], dim=-1)


class CrossAttentionVLM(VLMModule):
    """`vision`, `bridge`, `gates` (by the number of the layer behind them), `language` and `extra`.

    Every forward runs the same modules in the same order, so that the collectives of ZeRO-3 agree between ranks: a
    batch without images sends one blank image through, which no token sees.
    """

    provides = LOGITS

    def __init__(
        self, vision: VisionTower, bridge: nn.Module, gates: nn.ModuleDict, language: Any
    ) -> None:
        super().__init__()
        if language.config.is_encoder_decoder or not hasattr(language.get_decoder(), "layers"):
            raise SpecError(
                f"the blocks go between the layers of a causal language model, and {language.config.model_type!r} "
                "has no such list; take llama, mistral, qwen2, phi3, opt, ..."
            )
        self.vision = vision
        self.bridge = bridge
        self.gates = gates
        self.language = language
        self.extra = ExtraTokenEmbeddings(language)
        self._vocab = int(language.get_output_embeddings().weight.shape[0])
        insert_blocks(language.get_decoder().layers, gates)
        self.extra.add_to(language.get_output_embeddings())
        self._keeps = "logits_to_keep" in inspect.signature(language.forward).parameters

    @property
    def endings(self) -> frozenset[int]:
        """The ids, as `generate` gives them, that end a chunk whatever the template says."""
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
        """Logits (B, T, V + 2) for every token.

        ids (B, T) int64 with one IMAGE an image and END behind chunks; attention (B, T) bool, padding on either side;
        labels (B, T) int64, IGNORE where there is no loss; pixels (squares, 3, S, S) uint8 or features (squares, P,
        F); layouts (N, 4) int64 where images have more than one square; segments (B, T) int64, the number of each
        token's sample, -1 on padding, where samples share rows. Raises DataError when images and places do
        not match.
        """
        self.check(requested)
        media_BMQF, seen_BT = self.media(ids, pixels, features, layouts, segments)
        embeds_BTD = self.embed(ids)
        read = attention_masks.decoding(self.language, embeds_BTD, attention, segments)
        logits_BTV, _ = self.read(embeds_BTD, media_BMQF, seen_BT, **read, use_cache=False)
        return Outputs(logits_BTV, None if labels is None else self.targets(labels), segments)

    def targets(self, labels_BT: Tensor) -> Tensor:
        """Labels as columns of the logits."""
        return labels_BT.masked_fill(labels_BT == END, self._vocab)

    def embed(self, ids_BT: Tensor) -> Tensor:
        """(B, T, D): the language model's own embeddings, and the learned rows of END (or V) and IMAGE (or V + 1)."""
        extra_BT = torch.where(
            ids_BT == END, 0, torch.where(ids_BT == IMAGE, 1, ids_BT - self._vocab)
        )
        own_BT = extra_BT < 0
        words_BTD = self.language.get_input_embeddings()(ids_BT.masked_fill(~own_BT, 0))
        rows_BTD = self.extra.words(extra_BT.masked_fill(own_BT, 0))
        return torch.where(own_BT.unsqueeze(-1), words_BTD, rows_BTD.to(words_BTD.dtype))

    def media(
        self,
        ids_BT: Tensor,
        pixels: Tensor | None,
        features: Tensor | None,
        layouts_N4: Tensor | None,
        segments_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, M, Q, F) what each row shows, and (B, T) which of it a token sees: the last one before it, 0 for none."""
        places_BT = ids_BT == IMAGE
        count_B = places_BT.sum(-1)
        images_NQF = self.images(pixels, features, layouts_N4)
        if int(count_B.sum()) != len(images_NQF):
            raise DataError(
                f"the batch has {int(count_B.sum())} image places in its ids, and {len(images_NQF)} images: "
                "every image needs its place, in order"
            )
        most = max(1, int(count_B.max()))
        return _scattered(images_NQF, count_B, most), attention_masks.last_seen(
            places_BT, segments_BT
        )

    @rng.images()
    def images(
        self, pixels: Tensor | None, features: Tensor | None, layouts_N4: Tensor | None = None
    ) -> Tensor:
        """(N, Q, F): the bridge's tokens; N may be 0, and the bridge is in the graph all the same."""
        patches = self._patches(pixels, features)
        squares_N = torch.ones(len(patches), dtype=torch.int64, device=patches.device)
        if layouts_N4 is not None:
            squares_N = (1 + layouts_N4[:, 0] * layouts_N4[:, 1]).to(patches.device)
        if int(squares_N.sum()) != len(patches):
            raise DataError(
                f"the layouts are of {int(squares_N.sum())} squares, and {len(patches)} are given"
            )
        count, most = len(squares_N), max(1, int(squares_N.max())) if len(squares_N) else 1
        shown_NTPF = (
            _scattered(patches, squares_N, most)
            if count
            else patches.new_zeros(1, 1, *patches.shape[1:])
        )
        even = not count or bool((squares_N == most).all())
        real_NTP = (
            None if even else _first(squares_N, most).unsqueeze(-1).expand(shown_NTPF.shape[:-1])
        )
        return cast(Tensor, self.bridge(shown_NTPF, real_NTP)[:count])

    def _patches(self, pixels: Tensor | None, features: Tensor | None) -> Tensor:
        """(squares, P, F) in the bridge's dtype; none at all still runs the tower."""
        if pixels is not None and features is not None:
            raise DataError(
                "both pixels and cached features are given; the vision tower takes one of them"
            )
        first = next(self.bridge.parameters())
        if features is None:
            size = self.vision.config.pixels.size
            given = (
                pixels if pixels is not None else torch.zeros(0, 3, size, size, dtype=torch.uint8)
            )
            blank = torch.zeros(1, 3, size, size, dtype=torch.uint8, device=first.device)
            return cast(
                Tensor, self.vision(given if len(given) else blank)[: len(given)].to(first.dtype)
            )
        shape = (self.vision.config.tokens, self.vision.config.feature_width)
        if features.shape[1:] != shape:
            raise DataError(
                f"the cached features are {tuple(features.shape[1:])} an image and this tower's are {shape}: "
                "they come from another tower; compute them again"
            )
        return features.to(first.dtype)

    def read(
        self,
        embeds_BTD: Tensor,
        media_BMQF: Tensor,
        seen_BT: Tensor,
        *,
        last: bool = False,
        **decoding: Any,
    ) -> tuple[Tensor, Any]:
        """Return (B, T, V + 2) logits, of the last token alone with `last`, and the cache.

        They are what the language model's own forward makes of V + 2 columns; `decoding` goes to it.
        """
        kept = {"logits_to_keep": 1} if last and self._keeps else {}
        looked: list[nn.Module] = []
        given = {"media": media_BMQF, "seen": seen_BT, "looked": looked}
        wider = _wider.set(True)
        try:
            read = self.language(inputs_embeds=embeds_BTD, **given, **decoding, **kept)
        finally:
            _wider.reset(wider)
        if not looked or read.logits.shape[-1] != self._vocab + 2:
            raise SpecError(
                f"language.arch {self.language.config.model_type!r} gives its layers no images, or its output has a "
                "head of its own: the blocks cannot go into it. Fix: take llama, mistral, qwen2, phi3, opt, ..."
            )
        return read.logits[:, -1:] if last else read.logits, getattr(read, "past_key_values", None)

    def embed_images(self, features_NPF: Tensor) -> Tensor:
        """(N, F) float32 of length 1: the mean of what the frozen tower sees, by which RICES compares images."""
        return nn.functional.normalize(features_NPF.float().mean(1), dim=-1)

    @torch.no_grad()
    def continuations(
        self, prompt: Tensor, rest: Tensor, features: Tensor, layouts: Tensor | None = None
    ) -> Tensor:
        """Return (C, R, V + 2), the logits of each token of `rest` (C, R) after one prompt (1, T); padding is right.

        The images (features (N, P, F)) are read once, and the prompt where the language model can cache it.
        """
        media_1MQF, seen_1T = self.media(prompt, None, features, layouts)
        media_CMQF, seen_CR = (
            media_1MQF.expand(len(rest), -1, -1, -1),
            seen_1T[:, -1:].expand(rest.shape),
        )
        if not attention_masks.caches(self.language, prompt.shape[1] + rest.shape[1]):
            embeds_CTD = torch.cat(
                [self.embed(prompt).expand(len(rest), -1, -1), self.embed(rest)], dim=1
            )
            seen_CT = torch.cat([seen_1T.expand(len(rest), -1), seen_CR], dim=1)
            logits_CTV, _ = self.read(embeds_CTD, media_CMQF, seen_CT, use_cache=False)
            return logits_CTV[:, prompt.shape[1] - 1 : -1]
        first_11V, cache = self.read(
            self.embed(prompt), media_1MQF, seen_1T, last=True, use_cache=True
        )
        cache.batch_repeat_interleave(len(rest))
        after_CRV, _ = self.read(
            self.embed(rest), media_CMQF, seen_CR, past_key_values=cache, use_cache=True
        )
        return torch.cat([first_11V.expand(len(rest), 1, -1), after_CRV[:, :-1]], dim=1)

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
        """(B, new) ids behind prompts padded on the left, V for END; `generation` goes to transformers' `generate`.

        Images are read once; all that is written sees the last image of its prompt.
        """
        media_BMQF, seen_BT = self.media(ids, pixels, features, layouts)
        given = {"inputs_embeds": self.embed(ids), "attention_mask": attention.long()}
        speaker: Any = CrossAttentionGenerationAdapter(self)
        with decoder_only.generating(self.language, attention):
            return cast(
                Tensor, speaker.generate(**given, media=media_BMQF, seen=seen_BT, **generation)
            )


def _first(count_N: Tensor, most: int) -> Tensor:
    """(N, most) bool: the first `count` of each row."""
    return torch.arange(most, device=count_N.device) < count_N.unsqueeze(-1)


def _scattered(parts: Tensor, count_N: Tensor, most: int) -> Tensor:
    """(total, ...) -> (N, most, ...): each row's own, in order, and zeros behind them."""
    there = _first(count_N, most).view(len(count_N), most, *[1] * (parts.ndim - 1))
    empty = parts.new_zeros(len(count_N), most, *parts.shape[1:])
    return empty.masked_scatter(there, parts)


# B batch  T tokens  M images of a row  Q tokens of an image  F their width  D width of the language model  V vocabulary


class CrossAttentionGenerationAdapter(PreTrainedModel, GenerationMixin):
    """A view of a model, made for one call: it owns no parameter. Images ride along as arguments of every step."""

    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model: "CrossAttentionVLM") -> None:
        config = deepcopy(model.language.config)
        config.vocab_size += 2
        super().__init__(config)
        self.model = model
        self.generation_config = deepcopy(model.language.generation_config)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the experts, if there are any, are the language model's

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        *,
        media: Tensor,
        seen: Tensor,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """The logits of the last token; media (B, M, Q, F), seen (B, T) of the prompt, whose embeddings come first.

        What is written behind the prompt sees the image that its last token saw.
        """
        if inputs_embeds is None and input_ids is not None:
            inputs_embeds, seen = self.model.embed(input_ids), seen[:, -1:].expand(input_ids.shape)
        logits_B1V, cache = self.model.read(
            cast(Tensor, inputs_embeds),
            media,
            seen,
            last=True,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=True,
        )
        if cache is None:
            raise SpecError(
                f"generate: {self.config.model_type!r} gives no cache of a prompt to go on from. "
                "Fix: take another language.arch"
            )
        logits_B1V[..., -1] = torch.finfo(logits_B1V.dtype).min  # a model cannot show an image
        return CausalLMOutputWithPast(logits=logits_B1V, past_key_values=cache)
