"""The embedding app's routes: vectors of texts and images, zero-shot classes, ranks of candidate captions."""

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from bridgework.serving import images
from bridgework.serving.bodies import JSONRoute
from bridgework.serving.conversation import check_count, check_text
from bridgework.serving.guard import request_id
from bridgework.serving.images import Limits
from bridgework.serving.options import Options
from bridgework.serving.protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    Head,
    ImageInput,
    RankRequest,
    TextInput,
    Usage,
    vector,
)
from bridgework.serving.refusals import Refusal
from bridgework.serving.router import Router


def routes(router: Router, options: Options) -> APIRouter:
    """POST /v1/embeddings, /v1/classify and /v1/rank."""
    api = APIRouter(route_class=JSONRoute)
    limits = options.limits

    @api.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        inputs = await asyncio.to_thread(_inputs, body, limits)
        embedded = await router.call(served, "embed", inputs)
        width = len(embedded[0][0])
        if body.dimensions not in (None, width):
            message = f"dimensions: the model's own number alone. Got {body.dimensions}; expected {width}"
            raise Refusal(400, message, code="unsupported", param="dimensions")
        rows = [
            {"object": "embedding", "index": i, "embedding": vector(values, body.encoding_format)}
            for i, (values, _) in enumerate(embedded)
        ]
        usage = Usage.of(sum(tokens for _, tokens in embedded))
        head = Head.of("embd", "list", served.id, body.model)
        return head.model_dump() | {"data": rows, "usage": usage.model_dump()}

    @api.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("labels", len(body.labels), limits.items)
        check_text([body.template] * len(body.labels) + body.labels, limits, "labels")  # as they are embedded
        texts = [body.template.replace("{}", label) for label in body.labels]
        image = await _image(body.image, limits)
        seen, *labels = [values for values, _ in await router.call(served, "embed", [image, *texts])]
        cosines = np.stack(labels) @ seen
        chances = np.exp(body.scale * (cosines - cosines.max()))
        rows = zip(body.labels, (chances / chances.sum()).tolist(), cosines.tolist(), strict=True)
        data = [{"label": label, "probability": p, "cosine": cosine} for label, p, cosine in rows]
        data.sort(key=lambda row: -row["probability"])
        return Head.of("clas", "classification", served.id, body.model).model_dump() | {"data": data}

    @api.post("/v1/rank")
    async def rank(body: RankRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("candidates", len(body.candidates), limits.items)
        check_text([*body.candidates, body.question or ""], limits, "candidates")
        image = await _image(body.image, limits)
        ranked = await router.call(served, "rank", image, body.candidates, body.question)
        data = [{"candidate": candidate, "score": score} for candidate, score in ranked]
        return Head.of("rank", "ranking", served.id, body.model).model_dump() | {"data": data}

    return api


async def _image(url: str, limits: Limits) -> bytes:
    return await asyncio.to_thread(images.read, url, limits, "image")


def _inputs(body: EmbeddingRequest, limits: Limits) -> list[str | bytes]:
    given = body.inputs()
    check_count("inputs", len(given), limits.items, param="input")
    check_text((one.text for one in given if isinstance(one, TextInput)), limits, "input")
    where = "input" if isinstance(body.input, str) else "input.{}"
    urls = [(where.format(i), one.image) for i, one in enumerate(given) if isinstance(one, ImageInput)]
    pictures = iter(images.read_all(urls, limits))
    return [one.text if isinstance(one, TextInput) else next(pictures) for one in given]
