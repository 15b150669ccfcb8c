"""The text of an answer while it is written: transformers' `generate` in a thread, its reader in the caller's.

Each stream draws from a generator of its own, so that a seed means the same beside other requests; it ends cleanly
whenever its reader stops.
"""

# B batch  V vocabulary

from collections.abc import Generator, Iterator, Mapping, Sequence
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
UNFINISHED = "\ufffd"  # what a tokenizer decodes the first bytes of a character to


class Sampling(TypedDict, total=False):
    """How an answer is written; what is left out is greedy, and 128 tokens at most."""

    max_new_tokens: int
    min_new_tokens: int  # before these, nothing that ends an answer by itself is written
    temperature: float  # 0 is greedy
    top_p: float  # (0, 1]: draw from the likeliest tokens that have this share of the probability
    stop: Sequence[str]  # the answer ends before any of these
    seed: int | None  # of the draws; None differs every time
    beams: int  # above 1: search this wide instead of drawing; the answer then comes in one piece
    length_penalty: (
        float  # exponent of the length that a beam's score is divided by; below 0: short answers
    )
    repetition_penalty: (
        float  # above 1: what was written before gets less likely (CTRL, arXiv:1909.05858)
    )


class StopConditions(NamedTuple):
    """What ends an answer by itself."""

    ids: frozenset[int]
    strings: tuple[str, ...]

    @classmethod
    def of(cls, streams: SampleEncoder, own: frozenset[int]) -> "StopConditions":
        """The eos token, the wiring's own, and what the template writes behind an answer, as a token if it is one."""
        tokenizer = streams.tokenizer
        after = templates.stop(streams.template, tokenizer)
        special = tokenizer.get_added_vocab().get(after)
        ids = frozenset({tokenizer.eos_token_id, special} - {None}) | own
        return cls(ids, (after,) if after and special is None else ())


@dataclass
class Usage:
    """What a generation has taken so far."""

    prompt_tokens: int  # images included
    completion_tokens: int = 0  # with the token that ended it
    finish_reason: FinishReason | None = (
        None  # None until the end, and when the reader was first to stop
    )


class Stream(Iterator[str]):
    """Pieces of an answer. Work begins with the first `next`; `close`, or dropping the stream, ends it.

    What may turn out to be the beginning of a stop string, or of a character, is held back until it is known.
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
        """`inputs` hold one prompt, as `PrefixModel.generate` takes it; `room` tokens fit behind it."""
        if beams < 1 or (beams > 1 and temperature > 0):
            raise SpecError(
                f"beams is at least 1, and 1 where temperature draws; got {beams} and {temperature:g}"
            )
        _check_penalties(beams, length_penalty, repetition_penalty)
        lengths = (min_new_tokens, max_new_tokens, room)
        how = _generation(
            lengths, temperature, top_p, [seed], tokenizer, endings, inputs["ids"].device
        )
        _repel(how["logits_processor"], repetition_penalty)
        how["generation_config"].num_beams = beams
        if beams > 1:
            how["generation_config"].length_penalty = length_penalty
        self.usage = Usage(prompt_tokens=inputs["ids"].shape[1])
        reader = _Reader(
            tokenizer,
            StopConditions(endings.ids, (*endings.strings, *(s for s in stop if s))),
            self.usage,
        )
        self._relay = _TokenStreamer()
        self._pieces = (_pieces if beams == 1 else _searched)(
            model, {**inputs, **how}, reader, self._relay
        )

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> str:
        return next(self._pieces)

    def stop(self) -> None:
        """End the work at its next token, from any thread; the reader then gets what was written so far."""
        self._relay.enough.set()

    def close(self) -> None:
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
    """A whole answer to each of B prompts, written side by side; row i draws from a generator of its own."""
    _check_penalties(1, 1.0, repetition_penalty)
    lengths = (min_new_tokens, max_new_tokens, room)
    how = _generation(lengths, temperature, top_p, seeds, tokenizer, endings, inputs["ids"].device)
    _repel(how["logits_processor"], repetition_penalty)
    rows_BT = model.generate(**inputs, **how)
    return [
        "".join(_Reader(tokenizer, endings, Usage(0)).read(iter(row))) for row in rows_BT.tolist()
    ]


def _check_penalties(beams: int, length_penalty: float, repetition_penalty: float) -> None:
    """Raises SpecError for penalties out of range, and for a length penalty that would do nothing."""
    if not isfinite(length_penalty) or not 0 < repetition_penalty < inf:
        raise SpecError(
            "length_penalty is a finite number and repetition_penalty is above 0. "
            f"Got {length_penalty:g} and {repetition_penalty:g}. Fix: leave out what is not meant, 1 is neutral"
        )
    if length_penalty != 1 and beams == 1:
        raise SpecError(
            f"length_penalty ranks the beams of a search. Got {length_penalty:g} with beams=1; expected beams above 1. "
            "Fix: set beams=5, or leave out the length penalty"
        )


def _repel(processors: LogitsProcessorList, penalty: float) -> None:
    """Apply the penalty before all others, to ids that were written and to those of a prompt that the decoder reads.

    A processor of our own, because `generate` warns about the option where a prompt is embeddings.
    """
    if penalty != 1:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(float(penalty)))


@dataclass
class _Reader:
    """From tokens to text that is certain."""

    tokenizer: PreTrainedTokenizerBase
    endings: StopConditions
    usage: Usage

    def read(self, tokens: Iterator[int]) -> Iterator[str]:
        ids: list[int] = []
        text, sent = "", 0
        for token in tokens:
            self.usage.completion_tokens += 1
            if token in self.endings.ids:
                self.usage.finish_reason = "stop"
                break
            ids.append(token)
            text = str(
                self.tokenizer.decode(
                    ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )
            found = [at for at in map(text.find, self.endings.strings) if at >= 0]
            if found:
                text, self.usage.finish_reason = text[: min(found)], "stop"
                break
            known = text[: len(text) - self._unsure(text)]
            if piece := known[sent or _blanks(known) :]:
                yield piece
                sent = len(known)
        else:
            self.usage.finish_reason = "length"
        if rest := text[sent or _blanks(text) :]:
            yield rest

    def _unsure(self, text: str) -> int:
        """How many characters at the end may still change or belong to a stop string."""
        longest = [
            (s, min(len(s), len(text) + 1)) for s in self.endings.strings
        ]  # lengths that can match
        begun = max(
            (n for s, most in longest for n in range(1, most) if text.endswith(s[:n])), default=0
        )
        return max(begun, len(text) - len(text.rstrip(UNFINISHED)))


def _blanks(text: str) -> int:
    """How many blanks stand between the prompt and the answer; they belong to neither."""
    return len(text) - len(text.lstrip())


def _pieces(
    model: PrefixVLM, arguments: dict[str, Any], reader: _Reader, relay: "_TokenStreamer"
) -> Generator[str, None, None]:
    thread = Thread(target=relay.run, args=(model, arguments), name="generate", daemon=True)
    thread.start()
    try:
        yield from reader.read(relay.tokens())
    finally:
        relay.enough.set()
        thread.join()


def _searched(
    model: PrefixVLM, arguments: dict[str, Any], reader: _Reader, relay: "_TokenStreamer"
) -> Generator[str, None, None]:
    """Beams are known when all are done."""
    (row_T,) = model.generate(**arguments, stopping_criteria=StoppingCriteriaList([relay]))
    yield from reader.read(iter(row_T.tolist()))


class _TokenStreamer(BaseStreamer, StoppingCriteria):
    """Between the thread that writes and the one that reads: tokens go out, `enough` comes in."""

    def __init__(self) -> None:
        self.enough = Event()
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
        """New ids; the first call brings the prompt's, and there are none beside embeddings."""
        for token in value.flatten().tolist():
            self._queue.put(token)

    def end(self) -> None:
        """`run` marks the end, which an error has too."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), self.enough.is_set(), device=input_ids.device)


class _Draw(LogitsProcessor):
    """Sampling as a processor: `generate` draws from the process's one generator, which every request would share."""

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        """One generator for all rows, or one for each."""
        self._generators = generators

    def __call__(self, input_ids: Tensor, scores_BV: Tensor) -> Tensor:
        shares = scores_BV.float().softmax(-1).chunk(len(self._generators))
        drawn = [
            torch.multinomial(s, 1, generator=g)
            for s, g in zip(shares, self._generators, strict=True)
        ]
        return torch.full_like(scores_BV, float("-inf")).scatter(-1, torch.cat(drawn), 0.0)


def _generation(
    lengths: tuple[int, int, int],
    temperature: float,
    top_p: float,
    seeds: Sequence[int | None],
    tokenizer: PreTrainedTokenizerBase,
    endings: StopConditions,
    device: torch.device,
) -> dict[str, Any]:
    """What `generate` is told beside its inputs; `lengths` are tokens: least, most, and how many there is room for."""
    least, most, room = lengths
    if not 0 <= least <= most or most < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise SpecError(
            "max_new_tokens is at least 1, min_new_tokens no more than that, temperature at least 0 and top_p in "
            f"(0, 1]; got {most}, {least}, {temperature:g} and {top_p:g}"
        )
    config = GenerationConfig(
        max_new_tokens=min(most, room),
        min_new_tokens=min(least, room) or None,
        do_sample=False,  # where there is to be sampling, _Draw has done it
        eos_token_id=sorted(endings.ids) or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return {
        "generation_config": config,
        "logits_processor": _processors(temperature, top_p, seeds, device),
    }


def _processors(
    temperature: float, top_p: float, seeds: Sequence[int | None], device: torch.device
) -> LogitsProcessorList:
    if temperature == 0:
        return LogitsProcessorList()
    nucleus = [TopPLogitsWarper(top_p)] if top_p < 1 else []
    draw = _Draw([_generator(seed, device) for seed in seeds])
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), *nucleus, draw])


def _generator(seed: int | None, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator
