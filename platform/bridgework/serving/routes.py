"""Routes of the three apps: chat, embed and caption.

A route chooses a model (`Router`), validates the request (requests.py), calls a replica and writes
OpenAI's form. The gateway adds the routes that all apps share (gateway.py).
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from bridgework.serving.auth import request_id
from bridgework.serving.bodies import JSONRoute
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options, RequestLimits
from bridgework.serving.protocol import (
    Answer,
    CaptionRequest,
    ChatRequest,
    ClassifyRequest,
    EmbeddingRequest,
    ImageInput,
    RankRequest,
    ResponseHeader,
    TextInput,
    Usage,
    chunk,
    completion,
    last_chunk,
    vector,
)
from bridgework.serving.requests import (
    check_count,
    check_text,
    read_conversation,
    read_image,
    read_images,
    sampling_arguments,
)
from bridgework.serving.router import Router

DONE = "data: [DONE]\n\n"


def chat_routes(router: Router, options: Options) -> APIRouter:
    """Return the route POST /v1/chat/completions."""
    api = APIRouter(route_class=JSONRoute)

    @api.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        served = router.choose(body.model, request_id(request.headers))
        parts, images = await asyncio.to_thread(
            read_conversation, body, options.limits, tiled=served.tiled
        )
        sampling = sampling_arguments(body, options)
        if not body.stream:
            head = ResponseHeader.of("chatcmpl", "chat.completion", served.id, body.model)
            if body.choices is not None:
                answer: Answer = await router.call(served, "choose", parts, images, body.choices)
            else:
                answer = await router.call(served, "generate", parts, images, sampling)
            return JSONResponse(completion(head, answer))
        head = ResponseHeader.of("chatcmpl", "chat.completion.chunk", served.id, body.model)
        pieces = router.stream(served, "stream", parts, images, sampling)
        first = await anext(pieces)  # an error before the first piece is a status, not an event
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return StreamingResponse(
            _events(head, first, pieces, usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache"},
        )

    return api


async def _events(
    head: ResponseHeader, first: str | Answer, rest: AsyncGenerator[str | Answer, None], usage: bool
) -> AsyncIterator[str]:
    """Yield server-sent events. A broken stream ends with an error event and without [DONE]."""
    try:
        yield _event(chunk(head, {"role": "assistant", "content": ""}))
        piece: str | Answer | None = first
        while isinstance(piece, str):
            yield _event(chunk(head, {"content": piece}))
            piece = await anext(rest, None)
        if piece is None:
            message = "the stream ended before the answer was complete. Fix: try again"
            raise APIError(500, message, code="broken_stream")
        yield _event(chunk(head, {}, piece.finish_reason))
        if usage:
            yield _event(last_chunk(head, piece.usage))
        yield DONE
    except APIError as error:
        yield _event(error.body())
    finally:
        await rest.aclose()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def embedding_routes(router: Router, options: Options) -> APIRouter:
    """Return the routes POST /v1/embeddings, /v1/classify (zero-shot) and /v1/rank (candidates)."""
    api = APIRouter(route_class=JSONRoute)
    limits = options.limits

    @api.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        inputs = await asyncio.to_thread(_read_inputs, body, limits)
        embedded = await router.call(served, "embed", inputs)
        width = len(embedded[0][0])
        if body.dimensions not in (None, width):
            message = (
                "dimensions: the model has one embedding size. "
                f"Got {body.dimensions}; expected {width}"
            )
            raise APIError(400, message, code="unsupported", param="dimensions")
        rows = [
            {"object": "embedding", "index": i, "embedding": vector(values, body.encoding_format)}
            for i, (values, _) in enumerate(embedded)
        ]
        usage = Usage.of(sum(tokens for _, tokens in embedded))
        head = ResponseHeader.of("embd", "list", served.id, body.model)
        return head.model_dump() | {"data": rows, "usage": usage.model_dump()}

    @api.post("/v1/classify")
    async def classify(body: ClassifyRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("labels", len(body.labels), limits.items)
        # counted with the template, because it is embedded with every label
        check_text([body.template] * len(body.labels) + body.labels, limits, "labels")
        texts = [body.template.replace("{}", label) for label in body.labels]
        image = await asyncio.to_thread(read_image, body.image, limits, "image")
        embedded = await router.call(served, "embed", [image, *texts])
        image_vector, *label_vectors = [values for values, _ in embedded]
        cosines = np.stack(label_vectors) @ image_vector
        scores = np.exp(body.scale * (cosines - cosines.max()))
        rows = zip(body.labels, (scores / scores.sum()).tolist(), cosines.tolist(), strict=True)
        data = [{"label": label, "probability": p, "cosine": cosine} for label, p, cosine in rows]
        data.sort(key=lambda row: -row["probability"])
        head = ResponseHeader.of("clas", "classification", served.id, body.model)
        return head.model_dump() | {"data": data}

    @api.post("/v1/rank")
    async def rank(body: RankRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("candidates", len(body.candidates), limits.items)
        check_text([*body.candidates, body.question or ""], limits, "candidates")
        image = await asyncio.to_thread(read_image, body.image, limits, "image")
        ranked = await router.call(served, "rank", image, body.candidates, body.question)
        data = [{"candidate": candidate, "score": score} for candidate, score in ranked]
        head = ResponseHeader.of("rank", "ranking", served.id, body.model)
        return head.model_dump() | {"data": data}

    return api


def _read_inputs(body: EmbeddingRequest, limits: RequestLimits) -> list[str | bytes]:
    inputs = body.inputs()
    check_count("inputs", len(inputs), limits.items, param="input")
    check_text((one.text for one in inputs if isinstance(one, TextInput)), limits, "input")
    where = "input" if isinstance(body.input, str) else "input.{}"
    urls = [
        (where.format(i), one.image) for i, one in enumerate(inputs) if isinstance(one, ImageInput)
    ]
    images = iter(read_images(urls, limits))
    return [one.text if isinstance(one, TextInput) else next(images) for one in inputs]


def caption_routes(router: Router, options: Options) -> APIRouter:
    """Return the route POST /v1/captions: one caption for each image."""
    api = APIRouter(route_class=JSONRoute)

    @api.post("/v1/captions")
    async def captions(body: CaptionRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("images", len(body.images), options.limits.images, param="image")
        check_text([body.prompt or ""], options.limits, "prompt")
        sampling = sampling_arguments(body, options)
        if body.beams > 1:
            sampling |= {"beams": body.beams, "temperature": 0.0}
        urls = [
            ("image" if isinstance(body.image, str) else f"image.{i}", url)
            for i, url in enumerate(body.images)
        ]
        images = await asyncio.to_thread(read_images, urls, options.limits)
        # in sequence, because a request takes one slot however many images it has
        answers: list[Answer] = [
            await router.call(served, "caption", image, body.prompt, sampling) for image in images
        ]
        usage = Usage.of(
            sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
        )
        rows = [
            {"index": i, "caption": a.text, "finish_reason": a.finish_reason}
            for i, a in enumerate(answers)
        ]
        head = ResponseHeader.of("capt", "list", served.id, body.model)
        return head.model_dump() | {"data": rows, "usage": usage.model_dump()}

    return api
