"""One replica of a model: the Pipeline with asynchronous methods, whose work ends when its caller leaves."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve
from torch import Tensor

from bridgework.data import templates
from bridgework.data.images import load_image
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.templates import Segment
from bridgework.inference.generation import Sampling
from bridgework.inference.pipeline import Pipeline, Ranked
from bridgework.inference.preprocess import ROWS
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options
from bridgework.serving.protocol import Answer
from bridgework.system import IGNORE, Layout

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Vector = NDArray[np.float32]  # (D,) of length 1
PORTION = 2 * ROWS  # texts that are scored between two chances to cancel


class Model:
    """The deployment that holds the weights of one artifact; a thread for each request that it may hold at once.

    Every method raises DataError for what the caller sent: an image that cannot be decoded, a prompt that does not fit,
    a text that the stage's template leaves out. A method that is cancelled ends its work before it raises.
    """

    def __init__(self, artifact: str, options: Options) -> None:
        self._pipeline = Pipeline.load(artifact, options.device)
        self._threads = ThreadPoolExecutor(options.ongoing, "model")
        self._embed_text = self._batched(self._pipeline.embed_texts, options)
        self._embed_square = self._batched(self._pipeline.embed_images, options)

    async def generate(
        self, parts: Sequence[Part], images: Sequence[bytes], draw: Sampling
    ) -> Answer:
        """The complete answer to a conversation."""
        self._check_read(parts, self._prompt(parts), "messages")
        return await self._answer(parts, images, draw)

    async def stream(
        self, parts: Sequence[Part], images: Sequence[bytes], draw: Sampling
    ) -> AsyncGenerator[str | Answer, None]:
        """The answer piece by piece, and at last an Answer without text."""
        self._check_read(parts, self._prompt(parts), "messages")
        async with aclosing(self._written(parts, images, draw)) as pieces:
            async for piece in pieces:
                yield piece

    async def choose(
        self, parts: Sequence[Part], images: Sequence[bytes], choices: Sequence[str]
    ) -> Answer:
        """The one of `choices` that answers the conversation best."""
        self._check_read(parts, self._prompt(parts), "messages")
        prompt_tokens = await self._run(self._check_choices, parts, images, choices)
        ranked: list[Ranked] = []
        for some in _portions(choices):
            ranked += await self._run(self._pipeline.rank_answers, parts, images, some)
        best = max(ranked, key=lambda one: one.score)
        return Answer(best.candidate, prompt_tokens, 0, "stop")  # nothing is written, all is read

    async def caption(self, image: bytes, question: str | None, draw: Sampling) -> Answer:
        """The model's description of an image: asked as its training asked, or with a question of the caller's."""
        if question is None:
            return await self._answer(
                self._pipeline.inputs.ask(pair("image", image, "caption")), [image], draw
            )
        parts = [
            Part("user", image=0),
            Part("user", text=f"\n{question}"),
        ]  # as the pair of an image and a caption
        self._check_read(parts, self._prompt(parts), "prompt")
        return await self._answer(parts, [image], draw)

    async def rank(
        self, image: bytes, candidates: Sequence[str], question: str | None
    ) -> list[tuple[str, float]]:
        """Candidates with their scores, best first."""
        await self._run(self._check_candidates, image, candidates, question)
        ranked: list[Ranked] = []
        for some in _portions(candidates):
            ranked += await self._run(self._pipeline.rank, image, some, question)
        return sorted(((one.candidate, one.score) for one in ranked), key=lambda pair: -pair[1])

    async def embed(self, inputs: Sequence[str | bytes]) -> list[tuple[Vector, int]]:
        """A vector for each text (str) or image (bytes), and its tokens; the inputs of all requests share batches."""
        return list(await asyncio.gather(*(self._embed(one) for one in inputs)))

    # --- what a request may hold -------------------------------------------------------------------------------------

    def _prompt(self, parts: Sequence[Part]) -> list[Segment]:
        streams = self._pipeline.inputs.streams
        return templates.prompt(parts, streams.template, streams.tokenizer)

    def _check_read(self, parts: Sequence[Part], segments: Sequence[Segment], param: str) -> None:
        """Raises Refusal (400) for a text that the stage's template leaves out."""
        contents = iter(
            [segment.text for segment in segments if segment.literal]
        )  # in the order of the parts
        for part in parts:
            text = (part.text or "").strip()
            if text and not any(text in content for content in contents):
                stage, template = self._pipeline.stage.name, self._pipeline.inputs.streams.template
                message = (
                    f"{param}: text that the model does not read. Stage {stage!r} was trained with the template "
                    f"{template!r}, which has no place for it. Got {text[:40]!r} of role {part.role!r}. "
                    "Fix: leave the text out, or serve a stage that reads it"
                )
                raise APIError(400, message, code="unread_text", param=param)

    def _check_choices(
        self, parts: Sequence[Part], images: Sequence[bytes], choices: Sequence[str]
    ) -> int:
        """The tokens of the prompt. Raises DataError for a choice that would be cut."""
        layouts = self._layouts(parts, images)
        for i, choice in enumerate(choices):
            answered = [*parts, Part("assistant", text=choice)]
            self._check_length(answered, layouts, f"structured_outputs.choice.{i}")
        return self._pipeline.inputs.prompt_tokens(parts, images)

    def _check_candidates(
        self, image: bytes, candidates: Sequence[str], question: str | None
    ) -> None:
        """Raises Refusal for a question that is not read, and DataError for a candidate that would be cut."""
        if question is not None and ("{}" in question or "{ocr}" in question):
            message = (
                f"question: {{}} and {{ocr}} are places in a recipe's prompt. Got {question[:40]!r}"
            )
            raise APIError(400, message, code="unread_text", param="question")
        inputs = self._pipeline.inputs
        for i, candidate in enumerate(candidates):
            asked = inputs.ask(
                pair("candidate", image, candidate), None if question is None else (question,)
            )
            self._check_length(asked, self._layouts(asked, [image]), f"candidates.{i}")
            if question is not None and not i:
                segments = templates.render(
                    asked, inputs.streams.template, inputs.streams.tokenizer
                )
                self._check_read(
                    [part for part in asked if part.role == "user"], segments, "question"
                )

    def _check_length(
        self, conversation: Sequence[Part], layouts: Sequence[Layout], param: str
    ) -> int:
        """The tokens with loss. Raises Refusal (400) for a text that training would have cut."""
        streams = self._pipeline.inputs.streams
        encoded = streams.train(conversation, layouts, limit=sys.maxsize)
        if len(encoded.ids) > streams.limit:
            message = f"{param}: too long. Got {len(encoded.ids)} tokens; expected at most {streams.limit}"
            raise APIError(400, message, code="text_too_long", param=param)
        return sum(label != IGNORE for label in encoded.labels)

    def _layouts(self, parts: Sequence[Part], images: Sequence[bytes]) -> list[Layout]:
        """The tiles of every image; [] for a model without tiles."""
        pictures = self._pipeline.inputs.streams.pictures(
            Sample("request", tuple(images), tuple(parts))
        )
        return [picture.layout for picture in pictures if picture.layout is not None]

    # --- work that ends with its caller ------------------------------------------------------------------------------

    async def _answer(
        self, parts: Sequence[Part], images: Sequence[bytes], draw: Sampling
    ) -> Answer:
        text: list[str] = []
        async with aclosing(self._written(parts, images, draw)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Answer):
                    return Answer(
                        "".join(text),
                        piece.prompt_tokens,
                        piece.completion_tokens,
                        piece.finish_reason,
                    )
                text.append(piece)
        raise AssertionError("the last piece is an Answer")

    async def _written(
        self, parts: Sequence[Part], images: Sequence[bytes], draw: Sampling
    ) -> AsyncGenerator[str | Answer, None]:
        pieces = await self._run(self._pipeline.stream, parts, images, **draw)
        try:
            while True:
                step = asyncio.ensure_future(self._run(next, pieces, None))
                try:
                    piece = await asyncio.shield(step)
                except asyncio.CancelledError:
                    pieces.stop()
                    await asyncio.wait([step])
                    raise
                if piece is None:
                    break
                yield piece
        finally:
            await self._run(pieces.close)
        taken = pieces.usage
        yield Answer(
            "", taken.prompt_tokens, taken.completion_tokens, taken.finish_reason or "length"
        )

    async def _embed(self, one: str | bytes) -> tuple[Vector, int]:
        """An input is checked before it joins a batch, so that a bad one spoils nobody else's answer."""
        model = self._pipeline.stage.model
        if isinstance(one, bytes):
            square = await self._run(load_image, one, model.pixels)
            return await self._embed_square(square), model.image_tokens
        asked = self._pipeline.inputs.ask(pair("text", b"", one))
        tokens = await self._run(self._check_length, asked, (), "input")
        return await self._embed_text(one), tokens

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in a thread, which cannot be cancelled: a cancelled call returns when the thread has."""
        job = self._threads.submit(partial(function, *args, **kwargs))
        call = asyncio.wrap_future(job)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            if not job.cancel():
                await asyncio.wait([call])
            raise

    def _batched(
        self, embed: Callable[[Sequence[T]], Tensor], options: Options
    ) -> Callable[[T], Awaitable[Vector]]:
        async def batch(items: list[_Item[T]]) -> list[Vector | None]:
            wanted = [i for i, item in enumerate(items) if not item.abandoned]
            vectors = (
                (await self._run(embed, [items[i].value for i in wanted])).cpu().numpy()
                if wanted
                else ()
            )
            found: dict[int, Vector] = dict(zip(wanted, vectors, strict=True))
            return [found.get(i) for i in range(len(items))]

        together = serve.batch(
            max_batch_size=options.batch, batch_wait_timeout_s=options.batch_wait_s
        )(batch)

        async def one(value: T) -> Vector:
            item = _Item(value)
            try:
                found = await together(item)
            except asyncio.CancelledError:
                item.abandoned = True
                raise
            assert found is not None  # only what is abandoned has no vector
            return found

        return one


@dataclass
class _Item(Generic[T]):
    """An input in the queue of a batch, which Serve does not take out when its caller leaves."""

    value: T
    abandoned: bool = False


def _portions(texts: Sequence[str]) -> list[Sequence[str]]:
    """A few at a time, between which a call can be cancelled: each text is scored on its own."""
    return [texts[i : i + PORTION] for i in range(0, len(texts), PORTION)]
