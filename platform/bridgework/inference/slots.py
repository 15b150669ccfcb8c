"""Decoding of several sequences of different lengths in one forward pass per token.

The rows of a batch end at the same column and begin at different ones, as if padded on the left.
Transformers builds the masks (full, sliding, chunked, ALiBi, relative positions) from a padding
mask, so a model needs nothing but a standard cache of keys and values. A row joins or leaves
between two steps.
"""

# n rows  H heads  C columns  T tokens  D width  S tokens of an encoder  V vocabulary

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from bridgework.inference.caches import KeyValues
from bridgework.models import attention_masks
from bridgework.models.decoder_only import last_logits
from bridgework.models.encoder_decoder import is_encoder_decoder

STEP = 64  # columns by which the buffers grow
CLOSE = 1e-3  # allowed difference of logits between one row and a batch, as a share of the largest


@dataclass
class Prefilled:
    """A prompt after its prefill."""

    logits_V: Tensor  # of the first token of the answer
    values: KeyValues
    cross: KeyValues = field(default_factory=list)  # of an encoder-decoder: (H, S, D) per layer

    @property
    def tokens(self) -> int:
        """Number of cached tokens."""
        return next(kv[0].shape[1] for kv in self.values if kv is not None)


class _Columns:
    """Columns in use, which all layers share: the last `length` before `end`."""

    def __init__(self) -> None:
        self.rows = self.end = self.length = 0
        self.capacity = self.room = 0  # rows and columns of the buffers


class _SlotLayer(CacheLayerMixin):
    """Keys and values of all rows in one layer, (capacity, H, room, D)."""

    is_sliding = False  # all tokens are kept; the mask hides those outside of a window

    def __init__(self, columns: _Columns) -> None:
        start: Any = super().__init__  # it has no annotations
        start()
        self._columns = columns
        self.keys: Tensor
        self.values: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        at = self._columns
        for name, states in (("keys", key_states), ("values", value_states)):
            shape = (at.capacity, states.shape[-3], at.room, states.shape[-1])
            setattr(self, name, states.new_zeros(shape))
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the next column of all rows. Returns views of the columns in use."""
        at = self._columns
        self.keys[: at.rows, :, at.end] = key_states[:, :, 0]
        self.values[: at.rows, :, at.end] = value_states[:, :, 0]
        first = at.end - at.length
        return (
            self.keys[: at.rows, :, first : at.end + 1],
            self.values[: at.rows, :, first : at.end + 1],
        )

    def write(self, row: int, keys_HTD: Tensor, values_HTD: Tensor) -> None:
        """Write a row's columns before `end`, and zeros to the left of them."""
        if not self.is_initialized:
            self.lazy_initialization(keys_HTD, values_HTD)
        begin, end = self._columns.end - keys_HTD.shape[1], self._columns.end
        for buffer, states in ((self.keys, keys_HTD), (self.values, values_HTD)):
            buffer[row, :, :begin] = 0  # a NaN of an earlier row would pass through the mask
            buffer[row, :, begin:end] = states

    def move(self, source: int, target: int) -> None:
        for buffer in (self.keys, self.values):
            buffer[target] = buffer[source]

    def rebuild(self, capacity: int, room: int, end: int) -> None:
        """Copy the columns in use into new buffers, or within the old ones, so that they end there.

        The columns to the left of them are 0.
        """
        at = self._columns
        for name in ("keys", "values"):
            old = getattr(self, name)
            used = old[: at.rows, :, at.end - at.length : at.end].clone()
            same = (capacity, room) == (at.capacity, at.room)
            new = old if same else old.new_zeros(capacity, old.shape[1], room, old.shape[3])
            new[: at.rows, :, : end - at.length] = 0
            new[: at.rows, :, end - at.length : end] = used
            setattr(self, name, new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._columns.length + query_length, 0

    def get_seq_length(self) -> int:
        return self._columns.length

    def get_max_length(self) -> int:
        return -1


class Slots:
    """The running sequences of a language model of transformers, causal or encoder-decoder."""

    def __init__(self, language: Any, max_tokens: int) -> None:
        """Prepare an empty batch; memory is allocated when rows join.

        The buffers hold at most `max_tokens` places, unless the rows in use need more.
        """
        self._language = language
        self._max_tokens = max_tokens
        # id of the first token of an encoder-decoder's answers
        self.start: int | None = None
        if is_encoder_decoder(language):
            self.start = int(language.generation_config.decoder_start_token_id)
        parameters = inspect.signature(language.forward).parameters
        self._keep = last_logits(language)
        self._positions = "position_ids" in parameters
        self._columns = _Columns()
        self._layers: list[_SlotLayer | None] = []
        self._lengths: list[int] = []  # tokens of each row
        self._cross: list[KeyValues] = []
        self._cross_batch: tuple[Cache, Tensor] | None = None

    @property
    def lengths(self) -> Sequence[int]:
        """Cached tokens of each row."""
        return self._lengths

    @property
    def cached_tokens(self) -> int:
        """Places of the rows in use: as many as the longest has, for each."""
        return len(self._lengths) * max(self._lengths, default=0)

    def prefill(self, embeds_1TD: Tensor, prefix: KeyValues) -> Prefilled:
        """Read the rest of a prompt after a known prefix ([]: the complete prompt)."""
        if self.start is not None:
            return self._encode(embeds_1TD)
        cache = DynamicCache()
        for i, layer in enumerate(prefix):
            if layer is not None:
                cache.update(layer[0][None], layer[1][None], i)
        past = cache.get_seq_length()
        length = past + embeds_1TD.shape[1]
        options = self._position_ids(torch.arange(past, length, device=embeds_1TD.device)[None])
        outputs = self._language(
            inputs_embeds=embeds_1TD,
            attention_mask=embeds_1TD.new_ones(1, length, dtype=torch.long),
            past_key_values=cache,
            use_cache=True,
            **self._keep,
            **options,
        )
        return Prefilled(outputs.logits[0, -1], _values(cache))

    def join(self, prompt: Prefilled) -> int:
        """Add a row. Returns its index, which is the last."""
        at, length = self._columns, prompt.tokens
        if not self._lengths:  # nothing to keep
            at.rows = at.length = at.end = 0
        self._reserve(at.rows + 1, max(at.length, length))
        if not self._layers:
            self._layers = [None if kv is None else _SlotLayer(at) for kv in prompt.values]
        if length > at.end:
            self._rebuild(at.capacity, at.room, length)
        for layer, kv in zip(self._layers, prompt.values, strict=True):
            if layer is not None and kv is not None:
                layer.write(at.rows, *kv)
        self._lengths.append(length)
        self._cross.append(prompt.cross)
        self._changed()
        return at.rows - 1

    def leave(self, row: int) -> None:
        """Remove a row; the last row takes its index."""
        last = len(self._lengths) - 1
        if row != last:
            for layer in filter(None, self._layers):
                layer.move(last, row)
        self._lengths[row], self._cross[row] = self._lengths[last], self._cross[last]
        self._lengths.pop()
        self._cross.pop()
        self._changed()

    def clear(self) -> None:
        """Remove all rows and free their memory."""
        self._columns = _Columns()
        self._layers, self._lengths, self._cross, self._cross_batch = [], [], [], None

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Append a token to each row. Returns the logits (n, V) of the next tokens."""
        at, device = self._columns, self._language.device
        if at.end == at.room:
            if at.length + STEP // 2 <= at.room:
                self._rebuild(at.capacity, at.room, at.length)
            else:
                self._reserve(at.rows, at.room + 1)
        lengths_n1 = torch.tensor(self._lengths, device=device)[:, None]
        places_C = torch.arange(at.length + 1, device=device)
        options = {
            "past_key_values": Cache(layers=[layer or _SlotLayer(at) for layer in self._layers]),
            "use_cache": True,
        }
        mask_nC = (places_C >= at.length - lengths_n1).long()
        ids_n1 = torch.tensor(tokens, device=device)[:, None]
        logits_n1V = (
            self._decode(ids_n1, mask_nC, options)
            if self.start is not None
            else self._language(
                input_ids=ids_n1,
                attention_mask=mask_nC,
                **self._position_ids(lengths_n1),
                **options,
            ).logits
        )
        at.end += 1
        self._lengths = [length + 1 for length in self._lengths]
        at.length += 1
        return cast(Tensor, logits_n1V[:, -1])

    def _position_ids(self, positions: Tensor) -> dict[str, Tensor]:
        return {"position_ids": positions} if self._positions else {}

    # --- encoder-decoder

    def _encode(self, embeds_1SD: Tensor) -> Prefilled:
        attention_1S = embeds_1SD.new_ones(embeds_1SD.shape[:2], dtype=torch.long)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        outputs = self._language(
            inputs_embeds=embeds_1SD,
            attention_mask=attention_1S,
            decoder_input_ids=torch.full((1, 1), cast(int, self.start), device=embeds_1SD.device),
            past_key_values=cache,
            use_cache=True,
        )
        return Prefilled(
            outputs.logits[0, -1],
            _values(cache.self_attention_cache),
            _values(cache.cross_attention_cache),
        )

    def _decode(self, ids_n1: Tensor, mask_nC: Tensor, options: dict[str, Any]) -> Tensor:
        if self._cross_batch is None:
            self._cross_batch = self._batch_cross(ids_n1.device)
        cross, attention_nS = self._cross_batch
        cache = EncoderDecoderCache(options["past_key_values"], cross)
        # the keys and values of the encoder are cached: of its states only the shape is read
        states_nSD = (
            next(self._language.parameters())
            .new_zeros(1, 1, 1)
            .expand(*attention_nS.shape, self._language.config.hidden_size)
        )
        outputs = self._language(
            encoder_outputs=(states_nSD,),
            attention_mask=attention_nS,
            decoder_input_ids=ids_n1,
            decoder_attention_mask=mask_nC,
            **options | {"past_key_values": cache},
        )
        return cast(Tensor, outputs.logits)

    def _batch_cross(self, device: torch.device) -> tuple[Cache, Tensor]:
        """Return the encoder's keys and values of all rows, padded on the right, and their mask."""
        rows = [[kv for kv in row if kv is not None] for row in self._cross]
        lengths_n1 = torch.tensor([row[0][0].shape[1] for row in rows], device=device)[:, None]
        most = int(lengths_n1.max())
        cache = DynamicCache()
        for i, layer in enumerate(zip(*rows, strict=True)):
            keys, values = (
                torch.stack([pad(kv[k], (0, 0, 0, most - kv[k].shape[1])) for kv in layer])
                for k in (0, 1)
            )
            cache.update(keys, values, i)
        return cache, (torch.arange(most, device=device) < lengths_n1).long()

    # --- buffers

    def _reserve(self, rows: int, columns: int) -> None:
        """Make room for `rows` rows of `columns` columns and one more token.

        They double in number, because a batch that grows mostly grows further.
        """
        at = self._columns
        if rows <= at.capacity and columns < at.room:
            return
        least = (columns // STEP + 1) * STEP
        room = max(at.room, least)
        capacity = at.capacity if rows <= at.capacity else 2 * rows
        if capacity * room > self._max_tokens:
            capacity, room = max(rows, self._max_tokens // least), least
        self._rebuild(capacity, room, at.end if at.end < room else at.length)

    def _rebuild(self, capacity: int, room: int, end: int) -> None:
        """Move the columns in use so that they end at `end`, and set the size of the buffers."""
        at = self._columns
        for layer in self._layers:
            if layer is not None and layer.is_initialized:
                layer.rebuild(capacity, room, end)
        at.capacity, at.room, at.end = capacity, room, end

    def _changed(self) -> None:
        self._columns.rows = len(self._lengths)
        self._columns.length = max(self._lengths, default=0)
        self._cross_batch = None


def token_limit(language: Any) -> float:
    """Return the largest number of tokens of a sequence that `Slots` decode as one alone.

    0 if the model's cache is not one of keys and values, or a batch changes its answers; then a
    caller generates without `Slots`. Two short sequences are decoded to find out.
    """
    if not _has_standard_cache(language):
        return 0
    device = language.device
    generator = torch.Generator().manual_seed(0)
    width = language.get_input_embeddings().weight.shape[1]
    dtype = language.get_input_embeddings().weight.dtype
    prompts = [0.02 * torch.randn(1, length, width, generator=generator) for length in (3, 7)]
    try:
        with torch.inference_mode():
            alone = [_probe(language, [prompt.to(device, dtype)]) for prompt in prompts]
            together = _probe(language, [prompt.to(device, dtype) for prompt in prompts])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return 0
    expected = torch.cat(alone).float()
    tolerance = CLOSE if dtype == torch.float32 else 50 * CLOSE
    off = float((together.float() - expected).abs().max())
    if not off <= tolerance * float(expected.abs().max()):
        return 0
    return attention_masks.rotary_limit(language.config)


def _probe(language: Any, prompts: Sequence[Tensor]) -> Tensor:
    """Return the logits (n, V) of the third token after each prompt."""
    slots = Slots(language, max_tokens=0)
    for prompt in prompts:
        slots.join(slots.prefill(prompt, []))
    slots.step([1] * len(prompts))
    return slots.step([2] * len(prompts))


def _has_standard_cache(language: Any) -> bool:
    config = language.config
    if hasattr(config, "expert_capacity"):  # its experts take a fixed number of a batch's tokens
        return False
    if is_encoder_decoder(language):
        # absolute positions of a decoder cannot differ between the rows of a batch
        return hasattr(config, "relative_attention_num_buckets")
    if attention_masks.reads_padding(language) or not attention_masks.can_cache_prompt(language, 0):
        return False
    return all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
        for layer in DynamicCache(config=config).layers
    )


def _values(cache: Cache) -> KeyValues:
    """Return the keys and values (H, T, D) of a cache of one row."""
    layers: Sequence[Any] = cache.layers
    return [(layer.keys[0], layer.values[0]) if layer.is_initialized else None for layer in layers]
