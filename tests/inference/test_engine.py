"""An engine's answers are those of one request at a time, whatever runs next to it."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bridgework.data.samples import Part
from bridgework.errors import ResourceError, SpecError
from bridgework.inference.engine import (
    End,
    Engine,
    EngineLimits,
    GeneratedSequence,
    Piece,
    RequestTimes,
)
from bridgework.inference.pipeline import Generation, Pipeline
from bridgework.models import LanguageConfig
from bridgework.system import load
from tests.inference import tiny
from tests.models.test_packing import MASKED, RECURRENT, WINDOWED, language

SLOTTED = (
    "llava/instruct", "llava:v1/instruct", "llava:next/instruct", "minigpt4/polish",
    "blip2/generate", "blip2:flan_t5/generate", "instructblip/instruct",
    "instructblip:vicuna_7b/instruct", "xgen_mm/instruct",
)  # fmt: skip
IN_BATCHES = ("flamingo/train", "blip/captioner", "blip:vqa/vqa")
WORDS = ["a", "the", "cat", "dog", "red", "runs", "sleeps", "under", "big", "one", "three"]


class Collected:
    """Sinks of several sequences, and their answers."""

    def __init__(self) -> None:
        self.answers: dict[int, list[Piece]] = {}
        self.ends: dict[int, End] = {}

    def sink(self, number: int) -> Any:
        def take(item: Piece | End) -> None:
            if isinstance(item, End):
                self.ends[number] = item
            else:
                self.answers.setdefault(number, []).append(item)

        return take

    def generation(self, number: int) -> Generation:
        end = self.ends[number]
        assert end.error is None, end.error
        text = "".join(piece.text for piece in self.answers.get(number, []))
        usage = end.usage
        assert usage.finish_reason is not None
        return Generation(text, usage.prompt_tokens, usage.completion_tokens, usage.finish_reason)


@contextmanager
def running(
    pipe: Pipeline, limits: EngineLimits | None = None, observe: Any = None
) -> Iterator[Engine]:
    engine = Engine(pipe, limits, observe)
    try:
        yield engine
    finally:
        engine.close()


def wait(engine: Engine, collected: Collected, ends: int) -> None:
    """Until so many sequences have ended."""
    while len(collected.ends) < ends:
        assert engine.alive
        engine._thread.join(0.01)


Request = tuple[Sequence[Part], list[bytes], dict[str, Any]]


def request(pipe: Pipeline, number: int, most: int = 12) -> Request:
    """A conversation of its own length, about one image of several, or none."""
    draws = np.random.default_rng(number)
    text = " ".join(draws.choice(WORDS, 1 + number % 5))
    options = {"max_new_tokens": int(draws.integers(1, most + 1))}
    if pipe.stage.data.template in ("plain", "caption") or not pipe.inputs.streams.template:
        return pipe.inputs.question(), [tiny.picture(number % 3)], options
    if number % 4 == 3 and pipe.stage.model.image_tokens:
        return [Part("user", text=text)], [], options
    return pipe.inputs.question(text), [tiny.picture(number % 3)], options


def together(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    collected = Collected()
    for number, (parts, images, options) in enumerate(requests):
        engine.submit(engine.prepare(parts, images), collected.sink(number), **options)
    wait(engine, collected, len(requests))
    return [collected.generation(number) for number in range(len(requests))]


@pytest.mark.parametrize("name", [*SLOTTED, *IN_BATCHES])
def test_greedy_answers_are_those_of_one_request_at_a_time(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = exact(tiny.pipe_of(name))
    requests = [request(pipe, number) for number in range(9)]
    expected = [pipe.generate(parts, images, **options) for parts, images, options in requests]
    with caplog.at_level(logging.WARNING), running(pipe, EngineLimits(rows=4)) as engine:
        assert together(engine, requests) == expected
        assert together(engine, requests[::-1]) == expected[::-1]  # now with known prefixes
        status = engine.status()
    assert bool(caplog.records) == (name in IN_BATCHES)  # said once, where slots do not fit
    assert status.generation_tokens == 2 * sum(one.completion_tokens for one in expected)
    assert status.prompt_tokens == 2 * sum(one.prompt_tokens for one in expected)
    assert status.image_hits >= status.image_queries / 2


def exact(pipe: Pipeline) -> Pipeline:
    """In float64: in float32 a batch rounds otherwise than a row, which decides near ties."""
    pipe.model.double()
    return pipe


def of_family(config: LanguageConfig) -> Pipeline:
    stage = tiny.stage(prompts=())
    stage = replace(stage, model=replace(stage.model, language=replace(config, vocab=320)))
    torch.manual_seed(0)
    model = stage.model.build().eval()
    for parameter in model.language.parameters():
        if parameter.ndim > 1 and parameter.requires_grad:
            nn.init.normal_(parameter, std=0.15)
    return exact(Pipeline(model, stage))


GROUPED = replace(language("llama"), kv_heads=2)
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
FAMILIES = {
    "grouped": GROUPED,
    "bloom": replace(language("bloom"), ffn=128),
    "gpt2": language("gpt2"),
    "falcon alibi": language("falcon", {"alibi": True}),
    "dynamic": replace(language("llama", DYNAMIC), context=90),
    **{arch: language(arch, WINDOWED[arch] | {"sliding_window": 8}) for arch in ("mistral", "gemma3_text")},
    **{arch: language(arch, MASKED[arch]) for arch in ("opt", "mpt")},
    "recurrent_gemma": language("recurrent_gemma", RECURRENT["recurrent_gemma"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_language_models_answer_as_alone(name: str) -> None:
    """Grouped heads, windows, ALiBi, learned positions, scaled rotary positions, a recurrence."""
    pipe = of_family(FAMILIES[name])
    requests = [request(pipe, number) for number in range(6)]
    expected = [pipe.generate(parts, images, **options) for parts, images, options in requests]
    with running(pipe, EngineLimits(rows=3)) as engine:
        assert together(engine, requests) == expected


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return exact(tiny.pipe_of("llava/instruct"))


def test_fifty_mixed_requests_are_answered_as_alone(pipe: Pipeline) -> None:
    requests = [request(pipe, number, most=24) for number in range(50)]
    expected = [pipe.generate(parts, images, **options) for parts, images, options in requests]
    with running(pipe, EngineLimits(rows=8, tokens=2_000, prefix_bytes=200_000)) as engine:
        assert together(engine, requests) == expected


ASKED = [Part("user", image=0), Part("user", text="\nWhat is it?")]
DRAWN: Any = {"max_new_tokens": 16, "temperature": 1.0, "top_p": 0.9}


def test_draw_of_a_seed_does_not_depend_on_other_requests(pipe: Pipeline) -> None:
    alone = pipe.generate(ASKED, [tiny.picture()], seed=7, **DRAWN)
    others = [(*request(pipe, number)[:2], DRAWN) for number in range(6)]
    with running(pipe, EngineLimits(rows=4)) as engine:
        mixed = together(engine, [*others, (ASKED, [tiny.picture()], DRAWN | {"seed": 7})])
        other_seed = engine.generate(ASKED, [tiny.picture()], seed=8, **DRAWN)
    assert mixed[-1] == alone != other_seed


def test_several_answers_to_one_prompt_are_read_once(pipe: Pipeline) -> None:
    collected = Collected()
    with running(pipe, EngineLimits(rows=2, prefix_bytes=0)) as engine:
        prompt = engine.prepare(ASKED, [tiny.picture()])
        for seed in range(5):
            engine.submit(prompt, collected.sink(seed), seed=seed, **DRAWN)
        wait(engine, collected, 5)
        assert engine.status().prefix_queries == prompt.tokens
    expected = [pipe.generate(ASKED, [tiny.picture()], seed=seed, **DRAWN) for seed in range(5)]
    assert [collected.generation(seed) for seed in range(5)] == expected
    assert prompt.prefilled is None


@pytest.mark.parametrize("name", ["llava/instruct", "flamingo/train"])
def test_stop_strings_and_limits_are_those_of_each_request(name: str) -> None:
    pipe = exact(tiny.pipe_of(name))
    full = pipe.generate(ASKED, [tiny.picture()], max_new_tokens=24).text
    stops = [full[3:5], full[8:10], "never"]
    requests: list[Request] = [
        (ASKED, [tiny.picture()], {"max_new_tokens": 10 + 7 * i, "stop": [stop]})
        for i, stop in enumerate(stops)
    ]
    expected = [pipe.generate(parts, images, **options) for parts, images, options in requests]
    with running(pipe) as engine:
        assert together(engine, requests) == expected
    assert [one.finish_reason for one in expected] == ["stop", "stop", "length"]


def test_penalties_are_those_of_the_pipeline(pipe: Pipeline) -> None:
    options: Any = {"max_new_tokens": 20, "repetition_penalty": 1.5, "min_new_tokens": 9}
    expected = pipe.generate(ASKED, [tiny.picture()], **options)
    with running(pipe) as engine:
        assert engine.generate(ASKED, [tiny.picture()], **options) == expected


def test_frequency_and_presence_lower_tokens_that_occurred(pipe: Pipeline) -> None:
    collected = Collected()
    with running(pipe) as engine:
        prompt = engine.prepare(ASKED, [tiny.picture()])
        for number, penalty in enumerate(
            ({}, {"presence_penalty": 1e4}, {"frequency_penalty": 1e4})
        ):
            options: Any = {"max_new_tokens": 40, "logprobs": 0} | penalty
            engine.submit(prompt, collected.sink(number), **options)
        wait(engine, collected, 3)
    tokens = {
        number: [score.token for piece in pieces for score in piece.logprobs]
        for number, pieces in collected.answers.items()
    }
    assert len(set(tokens[0])) < len(tokens[0])
    assert all(len(set(tokens[number])) == len(tokens[number]) for number in (1, 2))


def test_bias_forces_and_bans_tokens(pipe: Pipeline) -> None:
    letter = pipe.tokenizer.convert_tokens_to_ids("z")
    with running(pipe) as engine:
        forced = engine.generate(
            ASKED, [tiny.picture()], max_new_tokens=5, logit_bias={letter: 1e4}
        )
        banned = engine.generate(
            ASKED, [tiny.picture()], max_new_tokens=40, logit_bias={letter: -1e4}
        )
    assert forced.text == "zzzzz" and "z" not in banned.text


def test_logprobs_are_those_of_the_model(pipe: Pipeline) -> None:
    collected = Collected()
    with running(pipe) as engine:
        engine.submit(
            engine.prepare(ASKED, [tiny.picture()]), collected.sink(0), max_new_tokens=4,
            temperature=0.5, seed=1, logprobs=3,
        )  # fmt: skip
        wait(engine, collected, 1)
    scores = [score for piece in collected.answers[0] for score in piece.logprobs]
    assert len(scores) == collected.ends[0].usage.completion_tokens
    batch = pipe.inputs.batch([ASKED], [[tiny.picture()]], answer=False)
    with torch.no_grad():
        logits_V = pipe.model(**batch.inputs()).logits_BTV[0, -1]
    first_V = logits_V.log_softmax(-1)
    assert scores[0].logprob == pytest.approx(float(first_V[scores[0].token]), abs=1e-4)
    assert [token for token, _ in scores[0].top] == first_V.topk(3).indices.tolist()


# --- bounds


def test_cancelled_sequence_leaves_at_the_next_step(pipe: Pipeline) -> None:
    seen: list[RequestTimes] = []
    collected = Collected()
    long: Any = {"max_new_tokens": 300, "min_new_tokens": 300}
    with running(pipe, EngineLimits(rows=1), seen.append) as engine:
        prompt = engine.prepare(ASKED, [tiny.picture()])
        sequences: list[GeneratedSequence] = []

        def cancel_at_once(item: Piece | End) -> None:
            engine.cancel(sequences[0])

        sequences.append(engine.submit(prompt, cancel_at_once, **long))
        waiting = engine.submit(prompt, collected.sink(1), **long)
        engine.cancel(waiting)
        engine.submit(prompt, collected.sink(2), max_new_tokens=3)
        wait(engine, collected, 1)
    assert collected.ends.keys() == {2}  # a cancelled sequence says nothing more
    reasons = sorted(one.finish_reason for one in seen)
    assert reasons == ["abort", "abort", "length"]
    assert max(one.completion_tokens for one in seen if one.finish_reason == "abort") < 100


def test_cancelled_sequence_between_two_steps_ends_no_other(pipe: Pipeline) -> None:
    """The step has passed row 1 when row 0 cancels it, and row 2 takes its place in the batch."""
    seen: list[RequestTimes] = []
    collected = Collected()
    sequences: list[GeneratedSequence] = []
    with running(pipe, EngineLimits(rows=3), seen.append) as engine:

        def first(item: Piece | End) -> None:
            collected.sink(0)(item)
            if len(engine._rows) == 3:
                engine.cancel(sequences[1])

        prompt, most = engine.prepare(ASKED, [tiny.picture()]), 40
        long: Any = {"max_new_tokens": most, "min_new_tokens": most}
        for sink in (first, collected.sink(1), collected.sink(2)):
            sequences.append(engine.submit(prompt, sink, **long))
        wait(engine, collected, 2)
    assert sorted(one.finish_reason for one in seen) == ["abort", "length", "length"]
    assert collected.generation(0) == collected.generation(2)
    assert collected.generation(0).completion_tokens == most


def test_times_of_a_request_add_up(pipe: Pipeline) -> None:
    seen: list[RequestTimes] = []
    with running(pipe, observe=seen.append) as engine:
        engine.generate(ASKED, [tiny.picture()], max_new_tokens=8, min_new_tokens=8)
    (one,) = seen
    assert one.first_token_s is not None and len(one.inter_token_s) == 7
    assert 0 <= one.queue_s <= one.first_token_s <= one.end_to_end_s
    assert one.first_token_s + sum(one.inter_token_s) <= one.end_to_end_s + 1e-6
    assert (one.finish_reason, one.completion_tokens) == ("length", 8)


def test_sequences_beyond_the_bound_are_refused(pipe: Pipeline) -> None:
    collected = Collected()
    with running(pipe, EngineLimits(rows=1, waiting=2)) as engine:
        prompt = engine.prepare(ASKED, [tiny.picture()])
        with pytest.raises(ResourceError, match="Got 3; expected at most 2"):
            for number in range(100):
                engine.submit(prompt, collected.sink(number), max_new_tokens=300)
        engine._closed = True


def test_batch_never_takes_more_places_than_its_limit(pipe: Pipeline) -> None:
    requests = [request(pipe, number) for number in range(12)]
    most = 0
    with running(pipe, EngineLimits(rows=8, tokens=300)) as engine:
        collected = Collected()

        def watch(number: int) -> Any:
            take = collected.sink(number)

            def both(item: Piece | End) -> None:
                nonlocal most
                most = max(most, engine._slots.cached_tokens)
                take(item)

            return both

        for number, (parts, images, options) in enumerate(requests):
            engine.submit(engine.prepare(parts, images), watch(number), **options)
        wait(engine, collected, 12)
    assert 0 < most <= 300
    assert len(collected.ends) == 12


def test_an_error_ends_the_sequences_of_its_step_alone(pipe: Pipeline) -> None:
    collected = Collected()
    with running(pipe) as engine:
        with pytest.raises(SpecError, match="top_p"):
            engine.submit(engine.prepare(ASKED, [tiny.picture()]), print, top_p=2.0)
        sound = engine.prepare(ASKED, [tiny.picture()])
        broken = engine.prepare([Part("user", text="x")], [])
        broken.encoded.ids[0] = 10**6  # no such token
        engine.submit(broken, collected.sink(0), max_new_tokens=4)
        engine.submit(sound, collected.sink(1), max_new_tokens=4)
        wait(engine, collected, 2)
    assert isinstance(collected.ends[0].error, IndexError)
    assert collected.generation(1) == pipe.generate(ASKED, [tiny.picture()], max_new_tokens=4)


@pytest.mark.slow
def test_a_thousand_mixed_requests_are_answered_as_alone(pipe: Pipeline) -> None:
    requests = [request(pipe, number, most=24) for number in range(1_000)]
    expected = [pipe.generate(parts, images, **options) for parts, images, options in requests]
    with running(pipe, EngineLimits(waiting=1_000)) as engine:
        assert together(engine, requests) == expected


@pytest.mark.slow
def test_a_pretrained_language_model_answers_as_alone(smollm2: object) -> None:
    quick = load("llava:quickstart")["instruct"]
    stage = replace(tiny.stage(), model=replace(tiny.stage().model, language=quick.model.language))
    torch.manual_seed(0)
    pretrained = Pipeline(stage.model.build().double().eval(), stage)
    requests = [request(pretrained, number, most=32) for number in range(24)]
    expected = [pretrained.generate(parts, images, **how) for parts, images, how in requests]
    with running(pretrained) as engine:
        assert together(engine, requests) == expected
