"""Replica methods: text is read or rejected, and cancelled work ends."""

import asyncio
import threading
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from torch.nn.modules.module import register_module_forward_hook

from bridgework.data.samples import Part
from bridgework.errors import DataError
from bridgework.inference.status import EngineLimits
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options
from bridgework.serving.protocol import Answer, Delta
from bridgework.serving.replica import Model
from tests.serving.support import picture

IMAGE = picture("red")
SHOWN = [Part("user", image=0)]
ASKED = [*SHOWN, Part("user", text="\n"), Part("user", text="What is it?")]
GREEDY: Any = {"max_new_tokens": 4, "temperature": 0.0}


def model(artifact: str) -> Model:
    return Model(artifact, Options(model=artifact, device="cpu"))


@pytest.fixture(scope="module")
def chat(weights: str) -> Model:
    return model(weights)


@pytest.fixture(scope="module")
def pairs(pairs_only: str) -> Model:
    return model(pairs_only)


def refused(call: Coroutine[Any, Any, Any]) -> APIError:
    with pytest.raises(APIError) as caught:
        asyncio.run(call)
    assert caught.value.status == 400
    return caught.value


def test_text_that_the_template_leaves_out_is_rejected(pairs: Model) -> None:
    calls = {
        "messages": [
            pairs.generate(ASKED, [IMAGE], GREEDY),
            pairs.generate([Part("system", text="Be terse."), *SHOWN], [IMAGE], GREEDY),
            pairs.choose(ASKED, [IMAGE], ["a", "b"]),
        ],
        "prompt": [pairs.caption(IMAGE, "a photo of", GREEDY)],
        "question": [pairs.rank(IMAGE, ["a circle"], "What is it?")],
    }
    for param, some in calls.items():
        for call in some:
            refusal = refused(call)
            assert (refusal.code, refusal.param) == ("unread_text", param)
            assert "plain" in str(refusal) and "align" in str(refusal)


def test_stream_rejects_unread_text_before_its_first_piece(pairs: Model) -> None:
    async def first() -> Any:
        return await anext(pairs.stream(ASKED, [IMAGE], GREEDY))

    assert refused(first()).code == "unread_text"


@pytest.mark.parametrize("answers", [1, 3])
def test_pieces_beyond_the_rate_are_joined_without_a_loss(weights: str, answers: int) -> None:
    options = Options(model=weights, device="cpu", pieces_per_s=0.001)
    slow, drawn = Model(weights, options), {**GREEDY, "max_new_tokens": 24, "temperature": 1.0}
    drawn["seed"] = 3

    async def streamed() -> list[Any]:
        return [piece async for piece in slow.stream(ASKED, [IMAGE], drawn, answers)]

    async def complete() -> list[Answer]:
        return await slow.generate_several(ASKED, [IMAGE], drawn, answers)

    pieces, expected = asyncio.run(streamed()), asyncio.run(complete())
    ends = {piece.index: piece for piece in pieces if isinstance(piece, Answer)}
    assert sorted(ends) == list(range(answers))
    for answer in expected:
        mine = [p for p in pieces if isinstance(p, Delta) and p.index == answer.index]
        assert "".join(piece.text for piece in mine) == answer.text
        assert replace(ends[answer.index], text=answer.text) == answer
    # without the rate, each token of these models is a piece; an end sends what is waiting
    tokens = sum(answer.completion_tokens for answer in expected)
    assert len(pieces) - len(ends) <= 1 + 2 * answers**2 < tokens


def test_model_without_text_input_accepts_an_image_alone(pairs: Model) -> None:
    async def both() -> tuple[Any, Any]:
        return await pairs.generate(SHOWN, [IMAGE], GREEDY), await pairs.caption(
            IMAGE, None, GREEDY
        )

    asked, captioned = asyncio.run(both())
    assert asked == captioned
    assert asked.prompt_tokens > 0


def test_every_character_of_a_prompt_is_read(chat: Model) -> None:
    """Placeholders of a recipe's prompt, {} and {ocr}, are plain text in a caller's prompt."""

    async def tokens(prompt: str) -> int:
        return (await chat.caption(IMAGE, prompt, GREEDY)).prompt_tokens

    for prompt in ("{}", "{ocr}", "a {} b {ocr} c"):
        plain = "x" * len(prompt)
        assert asyncio.run(tokens(prompt)) == asyncio.run(
            tokens(plain)
        )  # bytes: one token a character


def test_question_with_recipe_placeholders_is_rejected(chat: Model) -> None:
    assert refused(chat.rank(IMAGE, ["a"], "what {}?")).code == "unread_text"


def test_text_that_training_would_truncate_is_rejected(chat: Model) -> None:
    long = "x" * 5000
    for param, call in {
        "structured_outputs.choice.1": chat.choose(ASKED, [IMAGE], ["a", long]),
        "candidates.1": chat.rank(IMAGE, ["a", long], None),
        "input": chat.embed([long]),
    }.items():
        refusal = refused(call)
        assert (refusal.code, refusal.param) == ("text_too_long", param)
    with pytest.raises(DataError, match="at most"):
        asyncio.run(chat.generate([Part("user", text=long)], [], GREEDY))


async def when(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_cancelled_answer_stops_generation(chat: Model) -> None:
    endless: Any = {"max_new_tokens": 400, "min_new_tokens": 400, "temperature": 1.0}

    async def run() -> None:
        answer = asyncio.ensure_future(chat.generate_several(ASKED, [IMAGE], endless, 3))
        await when(lambda: chat.status().running == 3)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer
        await when(lambda: not chat.status().running)
        stream = chat.stream(ASKED, [IMAGE], endless)
        await anext(stream)
        await stream.aclose()
        await when(lambda: not chat.status().running)

    before = chat.status().generation_tokens
    asyncio.run(run())
    assert chat.status().generation_tokens - before < 4 * 400  # which four complete answers have


def test_requests_at_once_share_one_batch(chat: Model) -> None:
    drawn: Any = {"max_new_tokens": 40, "temperature": 1.0}

    async def run() -> list[Any]:
        calls = [chat.generate(ASKED, [IMAGE], drawn | {"seed": i % 3}) for i in range(9)]
        return await asyncio.gather(*calls)

    threads = threading.active_count()
    answers = asyncio.run(run())
    assert threading.active_count() <= threads + 4  # of preparation; none for a request
    assert answers[:3] == answers[3:6] == answers[6:] and len({a.text for a in answers}) == 3


def test_too_many_waiting_requests_are_refused_and_no_others(weights: str) -> None:
    limits = EngineLimits(rows=1, waiting=2)
    model = Model(weights, Options(model=weights, device="cpu", engine=limits))
    long: Any = {"max_new_tokens": 60, "min_new_tokens": 60}

    async def run() -> list[Any]:
        calls = [model.generate(ASKED, [IMAGE], long) for _ in range(12)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(run())
    refused = [one for one in answers if isinstance(one, APIError)]
    assert {one.status for one in refused} == {429} and 0 < len(refused) < 12
    assert len({one.text for one in answers if not isinstance(one, APIError)}) == 1


class Forwards:
    """Counts the forward calls of all modules; the first one waits until `resume` is set."""

    def __init__(self) -> None:
        self.count = 0
        self.resume = threading.Event()
        self._hook = register_module_forward_hook(self._counted)

    def _counted(self, *_: object) -> None:
        self.count += 1
        assert self.resume.wait(60)

    def remove(self) -> None:
        self._hook.remove()


@pytest.mark.parametrize("kind", ["beams", "choose", "rank"])
def test_cancelled_beam_search_and_scoring_end_early(chat: Model, kind: str) -> None:
    many = [f"choice {i}" for i in range(256)]
    beams: Any = {"max_new_tokens": 300, "min_new_tokens": 300, "temperature": 0.0, "beams": 3}

    def call() -> Coroutine[Any, Any, Any]:
        if kind == "beams":
            return chat.caption(IMAGE, None, beams)
        return (
            chat.choose(ASKED, [IMAGE], many) if kind == "choose" else chat.rank(IMAGE, many, None)
        )

    async def run(leave: bool) -> int:
        forwards = Forwards()
        work = asyncio.ensure_future(call())
        if leave:
            await when(lambda: forwards.count)
            work.cancel()
            await asyncio.sleep(0)  # the cancelled call sees it
        forwards.resume.set()
        await asyncio.wait([work])
        count = forwards.count
        await chat._call(lambda: None)
        assert forwards.count == count  # no thread is still running
        forwards.remove()
        return count

    assert asyncio.run(run(leave=True)) < asyncio.run(run(leave=False)) / 2
