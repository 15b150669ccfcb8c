"""Continuous batching: one step loop that decodes all running requests of a model together.

A request joins the batch as soon as there is room, in the order of arrival, and leaves it at the
step after its last token or after it is cancelled. A prompt is read alone, without the part whose
keys and values are cached. A model whose cache does not fit into slots generates for the waiting
requests in batches, see `slots.token_limit`.

    engine = Engine(Pipeline.load("export/llava"))
    prompt = engine.prepare(conversation, images)       # in any thread
    sequence = engine.submit(prompt, sink, max_new_tokens=64)
"""

# T tokens  V vocabulary  n rows

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from queue import SimpleQueue
from threading import Condition, Thread
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from bridgework.data.samples import Part
from bridgework.data.tokenization import Encoded
from bridgework.errors import DataError, ResourceError, RunError, SpecError
from bridgework.inference.caches import (
    Boundary,
    ImageCache,
    KeyValues,
    PrefixCache,
    boundaries,
    image_digest,
)
from bridgework.inference.generation import EngineSampling, StopConditions, TextReader, Usage
from bridgework.inference.grammars import Grammars
from bridgework.inference.pipeline import Generation, Pipeline
from bridgework.inference.preprocess import (
    EncodedExample,
    EncodedImage,
    ImageFile,
    TiledImage,
    check_images,
)
from bridgework.inference.sampling import TokenLogprob, TokenSampler
from bridgework.inference.slots import Prefilled, Slots, token_limit
from bridgework.inference.status import EngineLimits as EngineLimits
from bridgework.inference.status import EngineStatus as EngineStatus
from bridgework.inference.status import RequestTimes as RequestTimes
from bridgework.models.attention_masks import reads_padding
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IMAGE

PREFILL_TOKENS = 2_048  # of prompts that join between two steps, so that running answers continue

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Text that a sequence has generated."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()  # of the tokens since the last piece, if asked for


@dataclass(frozen=True)
class End:
    """Last item of a sequence."""

    usage: Usage
    error: Exception | None = None


Sink = Callable[[Piece | End], None]  # called in the engine's thread; it must not block


@dataclass(eq=False)
class _Shown:
    """One image of a prompt."""

    digest: bytes
    places: int  # image tokens
    tiled: TiledImage | None  # decoded; None if the features were cached
    encoded: EncodedImage | None = None


@dataclass(eq=False)
class Prompt:
    """An encoded conversation, which any number of sequences can answer."""

    encoded: Encoded
    instruction: list[int]
    shown: list[_Shown]
    boundaries: list[Boundary]
    room: int  # tokens that fit into the context after it
    prefilled: Prefilled | None = None  # until its last sequence has joined
    waiting: int = 0  # sequences that have not joined

    @property
    def tokens(self) -> int:
        """Number of tokens, images included."""
        return len(self.encoded.ids)


@dataclass(eq=False)
class GeneratedSequence:
    """One answer that is generated."""

    prompt: Prompt
    sampler: TokenSampler
    reader: TextReader
    limit: int  # generated tokens
    sink: Sink
    scored: bool  # logprobs are asked for
    history: list[int] = field(default_factory=list)  # ids that the decoder has read
    cancelled: bool = False
    finished: bool = False
    submitted: float = field(default_factory=time.perf_counter)
    joined: float | None = None
    times: list[float] = field(default_factory=list)  # of the tokens
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def usage(self) -> Usage:
        """Counts so far."""
        return self.reader.usage

    @property
    def longest(self) -> int:
        """Largest number of tokens that the sequence can have."""
        return self.prompt.tokens + self.limit

    def choose(self, logits_V: Tensor, history: list[int]) -> int:
        """Choose the next token by the sampler, and emit it."""
        choice = self.sampler(logits_V, history)
        if self.scored:
            self.logprobs.append(choice)
        self.emit(choice.token)
        return choice.token

    def emit(self, token: int) -> None:
        """Add a token, and pass on the text that it completes."""
        self.times.append(time.perf_counter())
        self.history.append(token)
        text = self.reader.push(token)
        self.finished = self.usage.finish_reason is not None
        if not self.finished and self.usage.completion_tokens >= self.limit:
            text += self.reader.flush()
            self.finished = True
        if text or (self.finished and self.logprobs):
            self.sink(Piece(text, tuple(self.logprobs)))
            self.logprobs.clear()


class Engine:
    """Answers the requests to one pipeline. `close` ends its thread."""

    def __init__(
        self,
        pipeline: Pipeline,
        limits: EngineLimits | None = None,
        observe: Callable[[RequestTimes], None] | None = None,
    ) -> None:
        """Start the step loop.

        Args:
            pipeline: its model must generate text.
            limits: default: those of `EngineLimits`.
            observe: called with the times of every finished sequence, in the engine's thread.
        """
        self.limits = limits or EngineLimits()
        self._pipeline, self._observe = pipeline, observe
        self._grammars = Grammars(pipeline.tokenizer)
        self._images = ImageCache(self.limits.image_bytes)
        self._prefixes = PrefixCache(self.limits.prefix_bytes)
        model = pipeline.model
        self._slot_tokens = token_limit(model.language) if isinstance(model, PrefixVLM) else 0.0
        self._slots = Slots(model.language, self.limits.tokens) if self._slot_tokens else None
        if self._slots is None:
            name = type(pipeline.model).__name__
            log.warning("%s: its cache does not fit into slots, so waiting requests are generated "
                        "in batches that none joins", name)  # fmt: skip
        self._rows: list[GeneratedSequence] = []
        self._waiting: deque[GeneratedSequence] = deque()
        self._together: list[GeneratedSequence] = []  # generated in one batch without slots
        self._reading: GeneratedSequence | None = None  # its prompt
        self._counts = dict.fromkeys(
            ("image_queries", "image_hits", "prefix_queries", "prefix_hits", "prompt_tokens",
             "generation_tokens"), 0
        )  # fmt: skip
        self._changed = Condition()
        self._closed = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    # --- for callers, in any thread

    def prepare(self, conversation: Sequence[Part], images: Sequence[ImageFile]) -> Prompt:
        """Encode a conversation, and decode those of its images that are not cached.

        Raises:
            DataError: the prompt fills the context, or does not show exactly the images.
            BadSample: the content is not an image.
            SpecError: the model does not generate text.
        """
        pipeline, inputs = self._pipeline, self._pipeline.inputs
        pipeline.check_generates()
        check_images(conversation, len(images))
        layouts = [layout for layout in map(inputs.layout, images) if layout is not None]
        encoded = inputs.encode(conversation, answer=False, layouts=layouts)
        inputs.streams.checked(encoded)
        shown = [
            _Shown(image_digest(images[i], inputs.pixels), places, None)
            for i, places in zip(encoded.images, encoded.places, strict=True)
        ]
        for one, i in zip(shown, encoded.images, strict=True):
            one.encoded = self._images.get(one.digest)
            if one.encoded is None:
                one.tiled = inputs.tiles(images[i])
        instruction = inputs.streams.instruction(conversation)
        pairs = ((one.digest, one.places) for one in shown)
        return Prompt(
            encoded, instruction, shown, boundaries(encoded.ids, pairs, instruction),
            pipeline.stage.model.context - len(encoded.ids),
        )  # fmt: skip

    def prepare_text(self, text: str) -> Prompt:
        """Encode a text that no template changes, with the tokenizer's special tokens.

        Raises DataError if it fills the context, SpecError if the model does not generate text.
        """
        pipeline = self._pipeline
        pipeline.check_generates()
        ids: list[int] = pipeline.tokenizer(text).input_ids
        room = pipeline.stage.model.context - len(ids)
        if not ids or room < 1:
            raise DataError(
                f"prompt: {len(ids)} tokens do not fit. Expected 1 to "
                f"{pipeline.stage.model.context - 1}. Fix: send a shorter text"
            )
        encoded = pipeline.inputs.streams.checked(Encoded(ids, list(ids), [], []))
        return Prompt(encoded, [], [], boundaries(ids, (), []), room)

    def submit(
        self, prompt: Prompt, sink: Sink, **sampling: Unpack[EngineSampling]
    ) -> GeneratedSequence:
        """Queue one answer to a prompt; `sink` gets its pieces and an End.

        Raises:
            SpecError: an option is out of range.
            ResourceError: too many sequences wait.
            RunError: the engine is closed.
        """
        sequence = self._sequence(prompt, sink, dict(sampling))
        with self._changed:
            if self._closed:
                raise RunError("engine: it is closed. Fix: send the request to another replica")
            if len(self._waiting) >= self.limits.waiting:
                raise ResourceError(
                    f"engine: too many sequences wait. Got {len(self._waiting) + 1}; expected at "
                    f"most {self.limits.waiting}. Fix: try again later"
                )
            self._waiting.append(sequence)
            prompt.waiting += 1
            self._changed.notify()
        return sequence

    def cancel(self, sequence: GeneratedSequence) -> None:
        """End a sequence at the next step; its sink gets nothing more."""
        sequence.cancelled = True
        with self._changed:
            self._changed.notify()

    def generate(
        self,
        conversation: Sequence[Part],
        images: Sequence[ImageFile] = (),
        **sampling: Unpack[EngineSampling],
    ) -> Generation:
        """Return the complete answer, as `Pipeline.generate` does, next to other requests."""
        items: SimpleQueue[Piece | End] = SimpleQueue()
        self.submit(self.prepare(conversation, images), items.put, **sampling)
        text = ""
        while isinstance(item := items.get(), Piece):
            text += item.text
        if item.error is not None:
            raise item.error
        usage = item.usage
        return Generation(
            text, usage.prompt_tokens, usage.completion_tokens, usage.finish_reason or "length"
        )

    def status(self) -> EngineStatus:
        """Return the counters of this moment."""
        with self._changed:
            reading = self._reading is not None and self._reading not in self._rows
            return EngineStatus(
                running=len(self._rows) + len(self._together) + reading,
                waiting=len(self._waiting),
                cached_tokens=0 if self._slots is None else self._slots.cached_tokens,
                max_cached_tokens=self.limits.tokens,
                **self._counts,
            )

    @property
    def alive(self) -> bool:
        """True while the step loop runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """End the loop. Running and waiting sequences end with a RunError."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _sequence(self, prompt: Prompt, sink: Sink, options: dict[str, Any]) -> GeneratedSequence:
        pipeline = self._pipeline
        most, least = options.pop("max_new_tokens", 128), options.pop("min_new_tokens", 0)
        if not 0 <= least <= most or most < 1:
            raise SpecError(
                "sampling: max_new_tokens is at least 1 and min_new_tokens from 0 to "
                f"max_new_tokens. Got {most} and {least}"
            )
        ids, strings = pipeline.stop_conditions
        stop = tuple(text for text in options.pop("stop", ()) if text)
        usage = Usage(prompt.tokens)
        reader = TextReader(pipeline.tokenizer, StopConditions(ids, (*strings, *stop)), usage)
        schema = options.pop("json_schema", None)
        self._check_bias(options.get("logit_bias") or {})
        limit = min(most, prompt.room)
        sampler = TokenSampler(
            pipeline.inputs.device,
            ids,
            min_new_tokens=min(least, limit),
            constraint=None if schema is None else self._grammars.constraint(schema, ids),
            **options,
        )
        history = []
        if self._slots is not None and self._slots.start is not None:
            history = [self._slots.start]
        scored = options.get("logprobs") is not None
        return GeneratedSequence(prompt, sampler, reader, limit, sink, scored, history)

    def _check_bias(self, bias: Mapping[int, float]) -> None:
        size = len(self._pipeline.tokenizer)
        if unknown := [token for token in bias if not 0 <= token < size]:
            raise SpecError(
                f"logit_bias: no such token. Got {unknown[0]}; expected ids from 0 to {size - 1}"
            )

    # --- the step loop

    @torch.inference_mode()
    def _run(self) -> None:
        while self._wait():
            try:
                self._drop_cancelled()
                self._admit()
                if self._together:
                    self._guarded(self._generate_together, self._together)
                    self._together = []
                if self._rows:
                    self._guarded(self._step, self._rows)
            except Exception as error:  # of this loop itself: the next request gets a new batch
                log.exception("engine: the step loop failed")
                self._end_all(error)
        self._end_all(RunError("engine: it was closed. Fix: send the request again"))

    def _end_all(self, error: Exception) -> None:
        with self._changed:
            sequences = [*self._rows, *self._together, *self._waiting]
            self._rows, self._together, self._reading = [], [], None
            self._waiting.clear()
        if self._slots is not None:
            self._slots.clear()
        for sequence in sequences:
            self._end(sequence, error)

    @property
    def _decoder(self) -> Slots:
        assert self._slots is not None  # no sequence fits into slots that are not there
        return self._slots

    def _wait(self) -> bool:
        """Wait for work. Returns False once the engine is closed."""
        with self._changed:
            while not (self._closed or self._rows or self._waiting):
                self._changed.wait()
            return not self._closed

    def _guarded(self, work: Callable[[], None], sequences: list[GeneratedSequence]) -> None:
        """Run a part of the loop; an error ends the sequences in it, and no others."""
        try:
            work()
        except Exception as error:
            for sequence in sequences:
                if not sequence.finished:
                    self._end(sequence, error)
            self._rows = [row for row in self._rows if row not in sequences]
            if not self._rows and self._slots is not None:
                self._slots.clear()

    def _drop_cancelled(self) -> None:
        for row in reversed(range(len(self._rows))):
            if self._rows[row].cancelled:
                self._leave(row)
        with self._changed:
            gone = [sequence for sequence in self._waiting if sequence.cancelled]
            for sequence in gone:
                self._waiting.remove(sequence)
        for sequence in gone:
            self._joins(sequence)
            self._end(sequence)

    def _admit(self) -> None:
        """Let waiting sequences join, in the order of arrival, while there is room."""
        budget = PREFILL_TOKENS
        while budget > 0 and (sequence := self._next()) is not None:
            budget -= sequence.prompt.tokens
            self._guarded(partial(self._read, sequence), [sequence])
            if not sequence.finished:
                # a half-written batch is of no use to its other rows
                self._guarded(partial(self._join, sequence), [*self._rows, sequence])
            self._reading = None

    def _next(self) -> GeneratedSequence | None:
        """Return the first waiting sequence if it fits next to the running ones."""
        with self._changed:
            if not self._waiting or self._together:
                return None
            first = self._waiting[0]
            if first.longest > self._slot_tokens:
                self._gather()
                return None
            longest = max([first.longest, *(row.longest for row in self._rows)])
            count = len(self._rows) + 1
            too_many = count > self.limits.rows or count * longest > self.limits.tokens
            if too_many and self._rows:
                return None
            self._reading = self._waiting.popleft()
            return self._reading

    def _read(self, sequence: GeneratedSequence) -> None:
        """Read the prompt of a sequence, unless another one has, and choose its first token."""
        prompt = sequence.prompt
        sequence.joined = time.perf_counter()
        if prompt.prefilled is None:
            prompt.prefilled = self._prefill(prompt)
        self._counts["prompt_tokens"] += prompt.tokens
        self._choose(sequence, prompt.prefilled.logits_V)
        if sequence.finished:
            self._joins(sequence)
            self._end(sequence)

    def _join(self, sequence: GeneratedSequence) -> None:
        assert sequence.prompt.prefilled is not None  # `_read` comes first
        self._decoder.join(sequence.prompt.prefilled)
        self._rows.append(sequence)
        self._joins(sequence)

    def _joins(self, sequence: GeneratedSequence) -> None:
        """Free the prefilled prompt after the last of its sequences."""
        sequence.prompt.waiting -= 1
        if not sequence.prompt.waiting:
            sequence.prompt.prefilled = None

    def _prefill(self, prompt: Prompt) -> Prefilled:
        ids = prompt.encoded.ids
        cached: int = 0
        prefix: KeyValues = []
        if self._decoder.start is None:  # a prefix of an encoder's input has other states
            usable = [b for b in prompt.boundaries if b.tokens < len(ids)]
            cached, prefix = self._prefixes.match(usable)
        self._counts["prefix_queries"] += len(ids)
        self._counts["prefix_hits"] += cached
        places, at = [i for i, token in enumerate(ids) if token == IMAGE], 0
        rest: list[_Shown] = []
        for one in prompt.shown:
            if places[at] >= cached:
                rest.append(one)
            at += one.places
        self._count_images(prompt.shown, rest)
        embeds_1TD = self._embed(prompt, cached, self._encode(rest))
        prefilled = self._decoder.prefill(embeds_1TD, prefix)
        if self._decoder.start is None:
            self._prefixes.put(prompt.boundaries, prefilled.values)
        return prefilled

    def _embed(self, prompt: Prompt, first: int, images: Sequence[EncodedImage]) -> Tensor:
        """Return the embeddings (1, T, D) of a prompt from its token `first`, with its images."""
        model, inputs = self._pipeline.model, self._pipeline.inputs
        ids_1T = torch.tensor([prompt.encoded.ids[first:]], device=inputs.device)
        if not images:  # `embed` would run the bridge on a blank image
            return cast(Tensor, model.language.get_input_embeddings()(ids_1T))
        layouts = [image.layout for image in images if image.layout is not None]
        instruction = prompt.instruction
        return cast(
            Tensor,
            model.embed(
                ids_1T,
                None,
                inputs.concat_features(images),
                torch.tensor([instruction], device=inputs.device) if instruction else None,
                None,
                torch.tensor(layouts) if layouts else None,
            ),
        )

    def _encode(self, shown: Sequence[_Shown]) -> list[EncodedImage]:
        """Return the features of images, from the cache or the vision tower."""
        inputs = self._pipeline.inputs
        for one in shown:
            one.encoded = one.encoded or self._images.get(one.digest)
            if one.encoded is None:
                assert one.tiled is not None  # decoded if the features were not cached
                (one.encoded,) = inputs.encode_tiles([one.tiled])
                self._images.put(one.digest, one.encoded)
            one.tiled = None
        return [one.encoded for one in shown if one.encoded is not None]

    def _count_images(self, shown: Sequence[_Shown], rest: Sequence[_Shown]) -> None:
        unknown = sum(one.encoded is None and self._images.get(one.digest) is None for one in rest)
        self._counts["image_queries"] += len(shown)
        self._counts["image_hits"] += len(shown) - unknown

    def _step(self) -> None:
        logits_nV = self._decoder.step([row.history[-1] for row in self._rows])
        likeliest: list[int] = logits_nV.argmax(-1).tolist()
        for row in reversed(range(len(self._rows))):
            sequence = self._rows[row]
            self._choose(sequence, logits_nV[row], likeliest[row])
            if sequence.finished or sequence.cancelled:
                self._leave(row)

    def _choose(
        self, sequence: GeneratedSequence, logits_V: Tensor, likeliest: int | None = None
    ) -> None:
        """Choose a sequence's next token. An error, for example of its sink, ends it alone."""
        self._counts["generation_tokens"] += 1
        try:
            if sequence.sampler.plain:
                token = int(logits_V.argmax()) if likeliest is None else likeliest
                sequence.sampler.accept(token)
                sequence.emit(token)
            else:
                sequence.choose(logits_V, sequence.history)
        except Exception as error:
            self._end(sequence, error)

    def _leave(self, row: int) -> None:
        self._decoder.leave(row)
        sequence, self._rows[row] = self._rows[row], self._rows[-1]
        self._rows.pop()
        self._end(sequence)

    def _end(self, sequence: GeneratedSequence, error: Exception | None = None) -> None:
        """Report the end of a sequence, once."""
        if sequence.joined == -1:
            return
        now, usage = time.perf_counter(), sequence.usage
        reason = "error" if error else "abort" if sequence.cancelled else usage.finish_reason
        times = sequence.times
        observed = RequestTimes(
            queue_s=(sequence.joined or now) - sequence.submitted,
            first_token_s=times[0] - sequence.submitted if times else None,
            inter_token_s=tuple(b - a for a, b in pairwise(times)),
            end_to_end_s=now - sequence.submitted,
            finish_reason=reason or "abort",
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
        )
        sequence.finished, sequence.joined = True, -1
        try:
            if self._observe is not None:
                self._observe(observed)
            if not sequence.cancelled:
                sequence.sink(End(usage, error))
        except Exception:  # the receiver is gone, for example a closed event loop
            log.exception("engine: the end of a sequence could not be reported")

    # --- without slots

    def _gather(self) -> None:
        """Take waiting sequences that are generated in one batch, if slots cannot decode them."""
        language = getattr(self._pipeline.model, "language", None)
        one_length = language is not None and reads_padding(language)
        first = self._waiting[0]
        for sequence in list(self._waiting):
            group = [*self._together, sequence]
            most = max(one.prompt.tokens for one in group) + max(one.limit for one in group)
            fits = (
                sequence.longest > self._slot_tokens
                and (not one_length or sequence.prompt.tokens == first.prompt.tokens)
                # a row that has ended is decoded until the last one ends
                and most <= sequence.prompt.tokens + sequence.prompt.room
            )
            if fits and len(group) <= self.limits.rows:
                self._waiting.remove(sequence)
                self._together.append(sequence)

    def _generate_together(self) -> None:
        sequences, inputs = self._together, self._pipeline.inputs
        now = time.perf_counter()
        examples = []
        for sequence in sequences:
            prompt, sequence.joined = sequence.prompt, now
            self._count_images(prompt.shown, prompt.shown)
            self._counts["prefix_queries"] += prompt.tokens
            self._counts["prompt_tokens"] += prompt.tokens
            self._joins(sequence)
            images = self._encode(prompt.shown)
            examples.append(EncodedExample(prompt.encoded, images, prompt.instruction))
        batch = inputs.collate(examples, answer=False).inputs()
        batch.pop("labels", None)
        config = GenerationConfig(
            max_new_tokens=max(sequence.limit for sequence in sequences),
            do_sample=False,
            eos_token_id=sorted(self._pipeline.stop_conditions.ids) or None,
            pad_token_id=self._pipeline.tokenizer.pad_token_id,
        )
        self._pipeline.model.generate(
            **batch,
            generation_config=config,
            logits_processor=LogitsProcessorList([_ChooseTokens(self, sequences)]),
            stopping_criteria=StoppingCriteriaList([_Finished(sequences)]),
        )


class _ChooseTokens(LogitsProcessor):
    """Chooses the tokens of all rows of a batch, each by its own sampler."""

    def __init__(self, engine: Engine, sequences: Sequence[GeneratedSequence]) -> None:
        self._engine, self._sequences = engine, sequences

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ids = []
        for sequence, read_T, logits_V in zip(self._sequences, input_ids, scores, strict=True):
            if not (sequence.finished or sequence.cancelled):
                sequence.history = read_T.tolist()
                self._engine._choose(sequence, logits_V)
            if sequence.finished or sequence.cancelled:
                self._engine._end(sequence)
            ids.append(sequence.history[-1] if sequence.history else 0)
        ids_n1 = torch.tensor(ids, device=scores.device)[:, None]
        return torch.full_like(scores, float("-inf")).scatter(-1, ids_n1, 0.0)


class _Finished(StoppingCriteria):
    """Ends the rows that are complete or cancelled."""

    def __init__(self, sequences: Sequence[GeneratedSequence]) -> None:
        self._sequences = sequences

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [sequence.finished or sequence.cancelled for sequence in self._sequences]
        return torch.tensor(done, device=input_ids.device)
