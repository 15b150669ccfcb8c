"""One replica of a model: the Pipeline behind an asyncio face."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from ray import serve
from torch import Tensor

from bridgework.data.samples import Part
from bridgework.data.transforms import decode
from bridgework.inference import Generation, Pipeline
from bridgework.serving.options import Options

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Model:
    """The deployment that holds the weights of one artefact.

    All work on the model is done by one thread, in the order in which it arrives; streams take turns piece by piece.
    """

    def __init__(self, artefact: str, options: Options) -> None:
        self._pipeline = Pipeline.load(artefact, options.device)
        self._max_pixels = options.limits.pixels
        self._thread = ThreadPoolExecutor(1, "model")
        self._embed_text = self._batched(self._pipeline.embed_texts, options)
        self._embed_image = self._batched(self._pipeline.embed_images, options)

    async def generate(self, parts: Sequence[Part], images: Sequence[bytes], draw: dict[str, Any]) -> Generation:
        """One answer. Raises DataError for an image that cannot be decoded or a prompt that does not fit."""
        return await self._run(self._pipeline.generate, parts, await self._decode(images), **draw)

    async def stream(
        self, parts: Sequence[Part], images: Sequence[bytes], draw: dict[str, Any]
    ) -> AsyncIterator[str | Generation]:
        """The answer's pieces of text, and at last the whole."""
        pieces = await self._run(self._pipeline.stream, parts, await self._decode(images), **draw)
        try:
            while (piece := await self._run(next, pieces, None)) is not None:
                yield piece
        finally:
            await self._run(pieces.close)

    async def rank(self, image: bytes, candidates: Sequence[str], question: str) -> list[tuple[str, float]]:
        """Candidates with their scores, best first."""
        (picture,) = await self._decode([image])
        return await self._run(self._pipeline.rank, picture, candidates, question)

    async def embed(self, inputs: Sequence[str | bytes]) -> list[NDArray[np.float32]]:
        """A unit vector for each text (str) or image (bytes); inputs of all requests share batches."""
        return list(await asyncio.gather(*(self._embed(one) for one in inputs)))

    async def _embed(self, one: str | bytes) -> NDArray[np.float32]:
        if isinstance(one, str):
            return await self._embed_text(one)
        (picture,) = await self._decode([one])  # before it joins a batch: a broken image spoils no other's answer
        return await self._embed_image(picture)

    async def _decode(self, images: Sequence[bytes]) -> list[Image.Image]:
        size = self._pipeline.stage.model.pixels.size
        one = partial(decode, max_pixels=self._max_pixels, size=size)
        return [await asyncio.to_thread(one, data) for data in images]

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(function, *args, **kwargs))

    def _batched(
        self, embed: Callable[[Sequence[T]], Tensor], options: Options
    ) -> Callable[[T], Awaitable[NDArray[np.float32]]]:
        async def batch(items: list[T]) -> list[NDArray[np.float32]]:
            return list((await self._run(embed, items)).float().cpu().numpy())

        return serve.batch(max_batch_size=options.batch, batch_wait_timeout_s=options.batch_wait_s)(batch)
