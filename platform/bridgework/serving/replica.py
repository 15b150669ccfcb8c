"""One replica of a model: the Pipeline behind an asyncio face."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from ray import serve
from torch import Tensor

from bridgework.data.samples import Part, pair
from bridgework.data.transforms import read_square
from bridgework.generation import Sampling
from bridgework.inference import Generation, Pipeline
from bridgework.serving.options import Options
from bridgework.serving.protocol import Answer
from bridgework.system import IGNORE

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Vector = NDArray[np.float32]  # (D,) of length 1


class Model:
    """The deployment that holds the weights of one artefact; a thread for each request that it may hold at once.

    Every method raises DataError for what the caller sent: an image that cannot be decoded, a prompt that does not fit.
    """

    def __init__(self, artefact: str, options: Options) -> None:
        self._pipeline = Pipeline.load(artefact, options.device)
        self._threads = ThreadPoolExecutor(options.ongoing, "model")
        self._embed_text = self._batched(self._pipeline.embed_texts, options)
        self._embed_square = self._batched(self._pipeline.embed_images, options)

    async def generate(self, parts: Sequence[Part], images: Sequence[bytes], draw: Sampling) -> Answer:
        """The whole answer to a conversation."""
        return _answer(await self._run(self._pipeline.generate, parts, images, **draw))

    async def choose(self, parts: Sequence[Part], images: Sequence[bytes], choices: Sequence[str]) -> Answer:
        """The one of `choices` that answers the conversation best."""
        best, *_ = await self._run(self._pipeline.choose, parts, images, choices)
        tokens = await self._run(self._pipeline.inputs.prompt_tokens, parts, images)
        return Answer(best.candidate, tokens, 0, "stop")  # nothing is written, all is read

    async def stream(
        self, parts: Sequence[Part], images: Sequence[bytes], draw: Sampling
    ) -> AsyncIterator[str | Answer]:
        """The answer piece by piece, and at last what it took."""
        pieces = await self._run(self._pipeline.stream, parts, images, **draw)
        while True:
            step = asyncio.ensure_future(self._run(next, pieces, None))
            try:
                piece = await asyncio.shield(step)  # a thread cannot be cancelled
            except asyncio.CancelledError:
                await asyncio.wait([step])  # nor a generator be closed while it runs
                await self._run(pieces.close)
                raise
            if piece is None:
                break
            yield piece
        taken = pieces.usage
        yield Answer("", taken.prompt_tokens, taken.completion_tokens, taken.finish_reason or "length")

    async def caption(self, image: bytes, question: str | None, draw: Sampling) -> Answer:
        """What the model says to an image: asked as its training asked, or with a question of the caller's."""
        asked = self._pipeline.inputs.ask(pair("image", image, "caption"), None if question is None else (question,))
        return _answer(await self._run(self._pipeline.generate, asked, [image], **draw))

    async def rank(self, image: bytes, candidates: Sequence[str], question: str | None) -> list[tuple[str, float]]:
        """Candidates with their scores, best first."""
        ranked = await self._run(self._pipeline.rank, image, candidates, question)
        return [(one.candidate, one.score) for one in ranked]

    async def embed(self, inputs: Sequence[str | bytes]) -> list[tuple[Vector, int]]:
        """A vector for each text (str) or image (bytes), and its tokens; the inputs of all requests share batches."""
        return list(await asyncio.gather(*(self._embed(one) for one in inputs)))

    async def _embed(self, one: str | bytes) -> tuple[Vector, int]:
        """What is wrong with an input is found before it joins a batch: it spoils nobody else's answer."""
        model = self._pipeline.stage.model
        if isinstance(one, bytes):
            square = await self._run(read_square, one, model.pixels)
            return await self._embed_square(square), model.image_tokens
        encoded = await self._run(
            self._pipeline.inputs.encode, self._pipeline.inputs.ask(pair("text", b"", one)), answer=True
        )
        return await self._embed_text(one), sum(label != IGNORE for label in encoded.labels)

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(function, *args, **kwargs))

    def _batched(self, embed: Callable[[Sequence[T]], Tensor], options: Options) -> Callable[[T], Awaitable[Vector]]:
        async def batch(items: list[T]) -> list[Vector]:
            return list((await self._run(embed, items)).cpu().numpy())

        return serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=options.batch_wait_s)(batch)


def _answer(written: Generation) -> Answer:
    return Answer(written.text, written.prompt_tokens, written.completion_tokens, written.finish_reason)
