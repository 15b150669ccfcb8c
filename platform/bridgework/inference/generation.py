"""Generation of answers: streamed token by token, by beam search, or for a batch of prompts.

A stream runs transformers' `generate` in a thread and is read in the caller's thread. Each stream
has its own random generator, so that the result of a seed does not depend on other requests. It
ends cleanly when its reader stops.
"""

# B batch  V vocabulary

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from bridgework.data import templates
from bridgework.data.tokenization import SampleEncoder
from bridgework.errors import SpecError
from bridgework.models.prefix_vlm import PrefixVLM

FinishReason = Literal["stop", "length"]
UNFINISHED = "\ufffd"  # a tokenizer decodes the first bytes of a character to this


class Sampling(TypedDict, total=False):
    """Options of generation. The defaults are greedy search and at most 128 tokens."""

    max_new_tokens: int  # default 128
    min_new_tokens: int  # before these, no token that ends the answer; default 0
    temperature: float  # 0, the default, is greedy
    top_p: float  # (0, 1]: sample from the most likely tokens with this total probability
    stop: Sequence[str]  # the answer ends before any of these
    seed: int | None  # of the sampling; None, the default, differs every time
    beams: int  # above 1: beam search without sampling; the answer then comes in one piece
    # exponent of the length by which a beam's score is divided; below 0 prefers short answers
    length_penalty: float
    # above 1: tokens that occurred before become less likely (CTRL, arXiv:1909.05858)
    repetition_penalty: float


class EngineSampling(Sampling, total=False):
    """Options of generation by an engine."""

    presence_penalty: float  # subtracted from the logit of a token that occurred; default 0
    frequency_penalty: float  # the same, times the number of occurrences
    logit_bias: Mapping[int, float]  # added to the logits of these ids
    logprobs: int  # log-probabilities of each token and of so many alternatives; default: none
    json_schema: Mapping[str, Any]  # the answer is JSON that fulfils it


class StopConditions(NamedTuple):
    """Token ids and strings that end an answer."""

    ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def of(cls, streams: SampleEncoder, own: frozenset[int]) -> "StopConditions":
        """Collect the eos token, the wiring's own tokens and the template's text after an answer.

        The template's text is an id if the tokenizer has it as one special token, otherwise a
        string.
        """
        tokenizer = streams.tokenizer
        after = templates.stop(streams.template, tokenizer)
        special = tokenizer.get_added_vocab().get(after)
        ids = frozenset({tokenizer.eos_token_id, special} - {None}) | own
        return cls(ids, (after,) if after and special is None else ())


@dataclass
class Usage:
    """Token counts of a generation so far."""

    prompt_tokens: int  # images included
    completion_tokens: int = 0  # including the token that ended it
    finish_reason: FinishReason | None = None  # None before the end, and if the reader stopped it


class Stream(Iterator[str]):
    """Iterator over the pieces of an answer.

    Generation begins with the first `next`; `close`, or dropping the stream, ends it. Text that may
    be the beginning of a stop string, or of an incomplete character, is held back until this is
    decided.
    """

    def __init__(
        self,
        model: PrefixVLM,
        inputs: Mapping[str, Tensor],
        tokenizer: PreTrainedTokenizerBase,
        endings: StopConditions,
        room: int,
        *,
        max_new_tokens: int = 128,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = None,
        beams: int = 1,
        length_penalty: float = 1.0,
        repetition_penalty: float = 1.0,
    ) -> None:
        """Prepare the generation.

        Args:
            inputs: one prompt, as `PrefixVLM.generate` takes it.
            endings: tokens and strings that end the answer, in addition to `stop`.
            room: tokens that fit into the context after the prompt.

        Raises:
            SpecError: an option is out of range, or `beams` is combined with a temperature.
        """
        if beams < 1 or (beams > 1 and temperature > 0):
            raise SpecError(
                "beams is at least 1, and beam search does not sample. "
                f"Got beams={beams} and temperature={temperature:g}. "
                "Fix: set temperature=0 or beams=1"
            )
        _check_penalties(beams, length_penalty, repetition_penalty)
        lengths = (min_new_tokens, max_new_tokens, room)
        options = _generate_options(
            lengths, temperature, top_p, [seed], tokenizer, endings, inputs["ids"].device
        )
        _add_repetition_penalty(options["logits_processor"], repetition_penalty)
        options["generation_config"].num_beams = beams
        if beams > 1:
            options["generation_config"].length_penalty = length_penalty
        self.usage = Usage(prompt_tokens=inputs["ids"].shape[1])
        strings = (*endings.strings, *(text for text in stop if text))
        reader = TextReader(tokenizer, StopConditions(endings.ids, strings), self.usage)
        self._streamer = _TokenStreamer()
        self._pieces = (_stream_pieces if beams == 1 else _beam_search_pieces)(
            model, {**inputs, **options}, reader, self._streamer
        )

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def stop(self) -> None:
        """End the generation at its next token, from any thread.

        The reader gets the text generated so far.
        """
        self._streamer.stopped.set()

    def close(self) -> None:
        """End the generation and wait for its thread."""
        self._pieces.close()


def generate_batch(
    model: PrefixVLM,
    inputs: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    endings: StopConditions,
    room: int,
    seeds: Sequence[int],
    *,
    max_new_tokens: int = 128,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
) -> list[str]:
    """Return the complete answers to B prompts, generated together.

    Row i is sampled with `seeds[i]`. `room` is the number of tokens that fit into the context after
    the prompts. Raises SpecError for an option out of range.
    """
    _check_penalties(1, 1.0, repetition_penalty)
    lengths = (min_new_tokens, max_new_tokens, room)
    options = _generate_options(
        lengths, temperature, top_p, seeds, tokenizer, endings, inputs["ids"].device
    )
    _add_repetition_penalty(options["logits_processor"], repetition_penalty)
    rows_BT = model.generate(**inputs, **options)
    return ["".join(TextReader(tokenizer, endings, Usage(0)).read(row)) for row in rows_BT.tolist()]


def _check_penalties(beams: int, length_penalty: float, repetition_penalty: float) -> None:
    """Check the penalties.

    Raises SpecError if one is out of range, or the length penalty has no effect.
    """
    if not isfinite(length_penalty) or not 0 < repetition_penalty < inf:
        raise SpecError(
            "length_penalty is a finite number and repetition_penalty is above 0. "
            f"Got {length_penalty:g} and {repetition_penalty:g}. Fix: use 1, which has no effect"
        )
    if length_penalty != 1 and beams == 1:
        raise SpecError(
            f"length_penalty ranks the beams of a search. Got {length_penalty:g} with beams=1; "
            "expected beams above 1. Fix: set beams=5, or leave out the length penalty"
        )


def _add_repetition_penalty(processors: LogitsProcessorList, penalty: float) -> None:
    """Insert the penalty before all other processors.

    It applies to generated ids and to the prompt's ids that the decoder reads. We add the processor
    ourselves, because `generate` warns about the option if the prompt is embeddings.
    """
    if penalty != 1:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(float(penalty)))


class TextReader:
    """Decodes tokens one by one, and returns the text that can no longer change.

    `usage` gets the counts, and `finish_reason` once a token or a stop string ends the answer. Only
    the tokens after the last complete character are decoded again, so a token costs the same at any
    length of the answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, endings: StopConditions, usage: Usage
    ) -> None:
        self.usage = usage
        self._tokenizer, self._endings = tokenizer, endings
        self._longest = max(map(len, endings.strings), default=0)
        self._ids: list[int] = []
        self._start = self._read = 0  # of the ids that are decoded again, and of the new ones
        self._complete = ""  # text up to the last complete character
        self._text = ""
        self._sent = 0  # characters

    def push(self, token: int) -> str:
        """Return the text that one more token completes; "" if it completes none."""
        self.usage.completion_tokens += 1
        if token in self._endings.ids:
            self.usage.finish_reason = "stop"
            return self._take(len(self._text))
        searched = max(0, len(self._complete) - self._longest)
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._read])
        now = self._decode(self._ids[self._start :])
        self._text = self._complete + now[len(before) :]
        if len(now) > len(before) and not now.endswith(UNFINISHED):
            self._complete, self._start, self._read = self._text, self._read, len(self._ids)
        found = [self._text.find(string, searched) for string in self._endings.strings]
        positions = [at for at in found if at >= 0]
        if positions:
            self._text, self.usage.finish_reason = self._text[: min(positions)], "stop"
            return self._take(len(self._text))
        return self._take(len(self._text) - self._pending())

    def flush(self) -> str:
        """Return the rest of an answer that ends here because of its length."""
        self.usage.finish_reason = "length"
        return self._take(len(self._text))

    def read(self, tokens: Iterable[int]) -> Iterator[str]:
        """Yield the pieces of an answer, up to the token that ends it."""
        for token in tokens:
            if piece := self.push(token):
                yield piece
            if self.usage.finish_reason is not None:
                return
        if piece := self.flush():
            yield piece

    def _decode(self, ids: list[int]) -> str:
        return str(
            self._tokenizer.decode(
                ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def _take(self, end: int) -> str:
        """Return the text from the last character sent to `end`, without blanks at its start."""
        piece = self._text[self._sent : end]
        if not self._sent:  # blanks between prompt and answer are not part of the answer
            piece = piece.lstrip()
        if piece:
            self._sent = end
        return piece

    def _pending(self) -> int:
        """Count the characters at the end that may still change or belong to a stop string."""
        # a prefix that can match is shorter than its stop string and not longer than the text
        text = self._text
        limits = [(s, min(len(s), len(text) + 1)) for s in self._endings.strings]
        prefix = max(
            (n for s, limit in limits for n in range(1, limit) if text.endswith(s[:n])), default=0
        )
        return max(prefix, len(text) - len(text.rstrip(UNFINISHED)))


def _stream_pieces(
    model: PrefixVLM, arguments: dict[str, Any], reader: TextReader, streamer: "_TokenStreamer"
) -> Generator[str, None, None]:
    thread = Thread(target=streamer.run, args=(model, arguments), name="generate", daemon=True)
    thread.start()
    try:
        yield from reader.read(streamer.tokens())
    finally:
        streamer.stopped.set()
        thread.join()


def _beam_search_pieces(
    model: PrefixVLM, arguments: dict[str, Any], reader: TextReader, streamer: "_TokenStreamer"
) -> Generator[str, None, None]:
    """Yield the answer in one piece, because the best beam is known only at the end."""
    (row_T,) = model.generate(**arguments, stopping_criteria=StoppingCriteriaList([streamer]))
    yield from reader.read(row_T.tolist())


class _TokenStreamer(BaseStreamer, StoppingCriteria):
    """Queue between the generating thread and the reading one; `stopped` ends the generation."""

    def __init__(self) -> None:
        self.stopped = Event()
        self._queue: SimpleQueue[int | BaseException | None] = SimpleQueue()

    def run(self, model: PrefixVLM, arguments: dict[str, Any]) -> None:
        try:
            model.generate(
                **arguments, streamer=self, stopping_criteria=StoppingCriteriaList([self])
            )
        except BaseException as error:  # raised again in the reader's thread
            self._queue.put(error)
        finally:
            self._queue.put(None)

    def tokens(self) -> Iterator[int]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    def put(self, value: Tensor) -> None:
        """Queue new ids.

        The first call has the prompt's ids, which are empty if the prompt is embeddings.
        """
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        """Do nothing: `run` marks the end, also after an error."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.stopped.is_set(), device=input_ids.device)


class _Sample(LogitsProcessor):
    """Samples with own generators, because all requests share the global one of `generate`."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        """Take one generator for all rows, or one per row."""
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        probabilities = scores_BV.float().softmax(-1).chunk(len(self._generators))
        ids = [
            torch.multinomial(p, 1, generator=g)
            for p, g in zip(probabilities, self._generators, strict=True)
        ]
        return torch.full_like(scores_BV, float("-inf")).scatter(-1, torch.cat(ids), 0.0)


def _generate_options(
    lengths: tuple[int, int, int],
    temperature: float,
    top_p: float,
    seeds: Sequence[int | None],
    tokenizer: PreTrainedTokenizerBase,
    endings: StopConditions,
    device: torch.device,
) -> dict[str, Any]:
    """Return the options of `generate`.

    `lengths` are the minimum, the maximum and the room, in tokens.
    """
    minimum, maximum, room = lengths
    if not 0 <= minimum <= maximum or maximum < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise SpecError(
            "sampling: max_new_tokens is at least 1, min_new_tokens from 0 to max_new_tokens, "
            "temperature at least 0 and top_p in (0, 1]. "
            f"Got {maximum}, {minimum}, {temperature:g} and {top_p:g}"
        )
    config = GenerationConfig(
        max_new_tokens=min(maximum, room),
        min_new_tokens=min(minimum, room) or None,
        do_sample=False,  # _Sample does the sampling
        eos_token_id=sorted(endings.ids) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "generation_config": config,
        "logits_processor": sampling_processors(temperature, top_p, seeds, device),
    }


def sampling_processors(
    temperature: float, top_p: float, seeds: Sequence[int | None], device: torch.device
) -> LogitsProcessorList:
    if temperature == 0:
        return LogitsProcessorList()
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    sample = _Sample([_generator(seed, device) for seed in seeds])
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), *nucleus, sample])


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
