"""Replica of a model: the Pipeline with asynchronous methods. A cancelled request ends its work."""

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Generic, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve
from torch import Tensor

from bridgework.data import templates
from bridgework.data.images import load_image
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.templates import Segment
from bridgework.inference.engine import EngineStatus, RequestTimes
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

Vector = NDArray[np.float32]  # (D,) with norm 1
SCORED_AT_ONCE = 2 * ROWS  # texts; a request can be cancelled between two such batches


class Model:
    """Deployment with the weights of one artifact, and one thread per concurrent request.

    Every method raises DataError for a wrong request, e.g. an image that cannot be decoded, a
    prompt that is too long, or a text that the stage's template leaves out. A cancelled method ends
    its work before it raises.
    """

    def __init__(
        self,
        artifact: str,
        options: Options,
        observe: Callable[[RequestTimes], None] = lambda times: None,
    ) -> None:
        self._observe = observe
        self._running = 0
        self._prompt_tokens = self._generation_tokens = 0
        self._pipeline = Pipeline.load(artifact, options.device)
        self._threads = ThreadPoolExecutor(options.ongoing, "model")
        self._embed_text = self._batched(self._pipeline.embed_texts, options)
        self._embed_image = self._batched(self._pipeline.embed_images, options)

    async def generate(
        self, parts: Sequence[Part], images: Sequence[bytes], sampling: Sampling
    ) -> Answer:
        """Return the complete answer to a conversation."""
        self._check_template_reads(parts, self._prompt(parts), "messages")
        return await self._answer(parts, images, sampling)

    async def stream(
        self, parts: Sequence[Part], images: Sequence[bytes], sampling: Sampling
    ) -> AsyncGenerator[str | Answer, None]:
        """Yield the answer in pieces of text, then an Answer without text."""
        self._check_template_reads(parts, self._prompt(parts), "messages")
        async with aclosing(self._generate(parts, images, sampling)) as pieces:
            async for piece in pieces:
                yield piece

    async def choose(
        self, parts: Sequence[Part], images: Sequence[bytes], choices: Sequence[str]
    ) -> Answer:
        """Return the choice with the best score as the answer to a conversation."""
        self._check_template_reads(parts, self._prompt(parts), "messages")
        prompt_tokens = await self._run(self._check_choices, parts, images, choices)
        ranked: list[Ranked] = []
        for batch in _batches(choices):
            ranked += await self._run(self._pipeline.rank_answers, parts, images, batch)
        best = max(ranked, key=lambda one: one.score)
        return Answer(best.candidate, prompt_tokens, 0, "stop")  # 0: no token is generated

    async def caption(self, image: bytes, question: str | None, sampling: Sampling) -> Answer:
        """Return the caption of an image; the default question is the one of training."""
        if question is None:
            return await self._answer(
                self._pipeline.inputs.ask(pair("image", image, "caption")), [image], sampling
            )
        # the form in which training pairs an image with its question
        parts = [Part("user", image=0), Part("user", text=f"\n{question}")]
        self._check_template_reads(parts, self._prompt(parts), "prompt")
        return await self._answer(parts, [image], sampling)

    async def rank(
        self, image: bytes, candidates: Sequence[str], question: str | None
    ) -> list[tuple[str, float]]:
        """Return (candidate, score) pairs, best first."""
        await self._run(self._check_candidates, image, candidates, question)
        ranked: list[Ranked] = []
        for batch in _batches(candidates):
            ranked += await self._run(self._pipeline.rank, image, batch, question)
        return sorted(((one.candidate, one.score) for one in ranked), key=lambda pair: -pair[1])

    async def embed(self, inputs: Sequence[str | bytes]) -> list[tuple[Vector, int]]:
        """Return a vector and the number of tokens for each text (str) or image (bytes).

        The inputs of all requests share batches.
        """
        return list(await asyncio.gather(*(self._embed(one) for one in inputs)))

    def status(self) -> EngineStatus:
        """Return the counters of the running and finished requests."""
        return EngineStatus(
            self._running, 0, 0, 0, 0, 0, 0, 0, self._prompt_tokens, self._generation_tokens
        )

    # --- validation that needs the tokenizer

    def _prompt(self, parts: Sequence[Part]) -> list[Segment]:
        streams = self._pipeline.inputs.streams
        return templates.prompt(parts, streams.template, streams.tokenizer)

    def _check_template_reads(
        self, parts: Sequence[Part], segments: Sequence[Segment], param: str
    ) -> None:
        """Raise APIError (400) for a text that the stage's template leaves out."""
        # an iterator, because the contents are in the order of the parts
        contents = iter([segment.text for segment in segments if segment.literal])
        for part in parts:
            text = (part.text or "").strip()
            if text and not any(text in content for content in contents):
                stage, template = self._pipeline.stage.name, self._pipeline.inputs.streams.template
                message = (
                    f"{param}: the model does not read this text, because stage {stage!r} was "
                    f"trained with the template {template!r}. Got {text[:40]!r} of role "
                    f"{part.role!r}. Fix: leave the text out, or serve a stage that reads it"
                )
                raise APIError(400, message, code="unread_text", param=param)

    def _check_choices(
        self, parts: Sequence[Part], images: Sequence[bytes], choices: Sequence[str]
    ) -> int:
        """Return the number of prompt tokens.

        Raises DataError for a choice that would be truncated.
        """
        layouts = self._layouts(parts, images)
        for i, choice in enumerate(choices):
            answered = [*parts, Part("assistant", text=choice)]
            self._check_length(answered, layouts, f"structured_outputs.choice.{i}")
        return self._pipeline.inputs.prompt_tokens(parts, images)

    def _check_candidates(
        self, image: bytes, candidates: Sequence[str], question: str | None
    ) -> None:
        """Raise APIError for a question that is not read or a candidate that would be truncated."""
        if question is not None and ("{}" in question or "{ocr}" in question):
            message = (
                "question: {} and {ocr} are placeholders of a recipe's prompt. "
                f"Got {question[:40]!r}. Fix: leave them out"
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
                self._check_template_reads(
                    [part for part in asked if part.role == "user"], segments, "question"
                )

    def _check_length(
        self, conversation: Sequence[Part], layouts: Sequence[Layout], param: str
    ) -> int:
        """Return the number of tokens with loss.

        Raises APIError (400) for a text that training would truncate.
        """
        streams = self._pipeline.inputs.streams
        encoded = streams.train(conversation, layouts, limit=sys.maxsize)
        if len(encoded.ids) > streams.limit:
            message = (
                f"{param}: too long. Got {len(encoded.ids)} tokens; "
                f"expected at most {streams.limit}"
            )
            raise APIError(400, message, code="text_too_long", param=param)
        return sum(label != IGNORE for label in encoded.labels)

    def _layouts(self, parts: Sequence[Part], images: Sequence[bytes]) -> list[Layout]:
        """Return the layout of tiles of every image; [] for a model without tiles."""
        pictures = self._pipeline.inputs.streams.pictures(
            Sample("request", tuple(images), tuple(parts))
        )
        return [picture.layout for picture in pictures if picture.layout is not None]

    # --- work that ends with its caller

    async def _answer(
        self, parts: Sequence[Part], images: Sequence[bytes], sampling: Sampling
    ) -> Answer:
        text: list[str] = []
        async with aclosing(self._generate(parts, images, sampling)) as pieces:
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

    async def _generate(
        self, parts: Sequence[Part], images: Sequence[bytes], sampling: Sampling
    ) -> AsyncGenerator[str | Answer, None]:
        begun, arrivals = time.monotonic(), []  # seconds at which the pieces arrive
        pieces = await self._run(self._pipeline.stream, parts, images, **sampling)
        self._running += 1
        reason = "error"
        try:
            while True:
                step = asyncio.ensure_future(self._run(next, pieces, None))
                try:
                    piece = await asyncio.shield(step)
                except asyncio.CancelledError:
                    reason = "abort"
                    pieces.stop()
                    await asyncio.wait([step])
                    raise
                if piece is None:
                    break
                arrivals.append(time.monotonic() - begun)
                yield piece
            reason = pieces.usage.finish_reason or "length"
        finally:
            self._running -= 1
            await self._run(pieces.close)
            usage = pieces.usage
            self._prompt_tokens += usage.prompt_tokens
            self._generation_tokens += usage.completion_tokens
            first = arrivals[0] if arrivals else None
            gaps = tuple(b - a for a, b in pairwise(arrivals))
            tokens = usage.prompt_tokens, usage.completion_tokens
            self._observe(RequestTimes(0.0, first, gaps, time.monotonic() - begun, reason, *tokens))
        yield Answer(
            "", usage.prompt_tokens, usage.completion_tokens, usage.finish_reason or "length"
        )

    async def _embed(self, one: str | bytes) -> tuple[Vector, int]:
        """Check an input, then embed it in a batch: a wrong input must not fail other requests."""
        model = self._pipeline.stage.model
        if isinstance(one, bytes):
            pixels = await self._run(load_image, one, model.pixels)
            return await self._embed_image(pixels), model.image_tokens
        asked = self._pipeline.inputs.ask(pair("text", b"", one))
        tokens = await self._run(self._check_length, asked, (), "input")
        return await self._embed_text(one), tokens

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call a function in a thread.

        Threads cannot be cancelled: a cancelled call waits for its thread.
        """
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
        """Return a function that embeds one value, in a batch with those of other requests."""

        @serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=options.batch_wait_s)
        async def embed_batch(items: list[_Item[T]]) -> list[Vector | None]:
            active = [i for i, item in enumerate(items) if not item.cancelled]
            values = [items[i].value for i in active]
            vectors = (await self._run(embed, values)).cpu().numpy() if active else ()
            by_index: dict[int, Vector] = dict(zip(active, vectors, strict=True))
            return [by_index.get(i) for i in range(len(items))]

        async def embed_one(value: T) -> Vector:
            item = _Item(value)
            try:
                vector = await embed_batch(item)
            except asyncio.CancelledError:
                item.cancelled = True
                raise
            assert vector is not None  # only a cancelled item has no vector
            return vector

        return embed_one


@dataclass
class _Item(Generic[T]):
    """An input in the queue of a batch; Serve keeps it there when its request is cancelled."""

    value: T
    cancelled: bool = False


def _batches(texts: Sequence[str]) -> list[Sequence[str]]:
    """Split the texts into batches between which a request can be cancelled."""
    return [texts[i : i + SCORED_AT_ONCE] for i in range(0, len(texts), SCORED_AT_ONCE)]
