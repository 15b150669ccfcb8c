"""The caption app's route: POST /v1/captions, one caption for each image.

The chat app's routes: OpenAI's /v1/chat/completions with images and streaming, and a page to try it at /.

The embedding app's routes: vectors of texts and images, zero-shot classes, ranks of candidate captions.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.resources import files
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from bridgework.serving import requests
from bridgework.serving.auth import request_id
from bridgework.serving.bodies import JSONRoute
from bridgework.serving.errors import APIError
from bridgework.serving.options import Limits, Options
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
from bridgework.serving.requests import check_count, check_text, draw, read_conversation
from bridgework.serving.router import Router


def caption_routes(router: Router, options: Options) -> APIRouter:
    """POST /v1/captions."""
    api = APIRouter(route_class=JSONRoute)

    @api.post("/v1/captions")
    async def captions(body: CaptionRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("images", len(body.images), options.limits.images, param="image")
        check_text([body.prompt or ""], options.limits, "prompt")
        how = draw(body, options)
        if body.beams > 1:
            how |= {"beams": body.beams, "temperature": 0.0}
        urls = [
            ("image" if isinstance(body.image, str) else f"image.{i}", url)
            for i, url in enumerate(body.images)
        ]
        pictures = await asyncio.to_thread(requests.read_images, urls, options.limits)
        # one after the other: a request takes one place in the queue, however many images it holds
        answers: list[Answer] = [
            await router.call(served, "caption", one, body.prompt, how) for one in pictures
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


PAGE_POLICY = (  # the page's own script and style, pictures dropped on it, this server; no other host
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DONE = "data: [DONE]\n\n"


def chat_routes(router: Router, options: Options) -> APIRouter:
    """GET / and POST /v1/chat/completions."""
    api = APIRouter(route_class=JSONRoute)
    page = files("bridgework.serving").joinpath("playground.html").read_text("utf-8")

    @api.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})

    @api.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        served = router.choose(body.model, request_id(request.headers))
        parts, images = await asyncio.to_thread(
            read_conversation, body, options.limits, tiled=served.tiled
        )
        how = draw(body, options)
        if not body.stream:
            head = ResponseHeader.of("chatcmpl", "chat.completion", served.id, body.model)
            if body.choices is not None:
                answer: Answer = await router.call(served, "choose", parts, images, body.choices)
            else:
                answer = await router.call(served, "generate", parts, images, how)
            return JSONResponse(completion(head, answer))
        head = ResponseHeader.of("chatcmpl", "chat.completion.chunk", served.id, body.model)
        pieces = router.stream(served, "stream", parts, images, how)
        first = await anext(pieces)  # what fails before it is answered by a status, not by an event
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = _events(head, first, pieces, usage)
        return StreamingResponse(
            events, media_type="text/event-stream", headers={"cache-control": "no-cache"}
        )

    return api


async def _events(
    head: ResponseHeader, first: str | Answer, rest: AsyncGenerator[str | Answer, None], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. A stream that breaks ends with an error and without [DONE]: never as if complete."""
    try:
        yield _event(chunk(head, {"role": "assistant", "content": ""}))
        piece: str | Answer | None = first
        while isinstance(piece, str):
            yield _event(chunk(head, {"content": piece}))
            piece = await anext(rest, None)
        if piece is None:
            raise APIError(500, "the model broke off its answer", code="broken_stream")
        yield _event(chunk(head, {}, piece.finish_reason))
        if usage:
            yield _event(last_chunk(head, piece.usage))
        yield DONE
    except APIError as refusal:
        yield _event(refusal.body())
    finally:
        await rest.aclose()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def embedding_routes(router: Router, options: Options) -> APIRouter:
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
            message = (
                f"dimensions: the model's own number alone. Got {body.dimensions}; expected {width}"
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
        check_text(
            [body.template] * len(body.labels) + body.labels, limits, "labels"
        )  # as they are embedded
        texts = [body.template.replace("{}", label) for label in body.labels]
        image = await _image(body.image, limits)
        seen, *labels = [
            values for values, _ in await router.call(served, "embed", [image, *texts])
        ]
        cosines = np.stack(labels) @ seen
        chances = np.exp(body.scale * (cosines - cosines.max()))
        rows = zip(body.labels, (chances / chances.sum()).tolist(), cosines.tolist(), strict=True)
        data = [{"label": label, "probability": p, "cosine": cosine} for label, p, cosine in rows]
        data.sort(key=lambda row: -row["probability"])
        return ResponseHeader.of("clas", "classification", served.id, body.model).model_dump() | {
            "data": data
        }

    @api.post("/v1/rank")
    async def rank(body: RankRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        check_count("candidates", len(body.candidates), limits.items)
        check_text([*body.candidates, body.question or ""], limits, "candidates")
        image = await _image(body.image, limits)
        ranked = await router.call(served, "rank", image, body.candidates, body.question)
        data = [{"candidate": candidate, "score": score} for candidate, score in ranked]
        return ResponseHeader.of("rank", "ranking", served.id, body.model).model_dump() | {
            "data": data
        }

    return api


async def _image(url: str, limits: Limits) -> bytes:
    return await asyncio.to_thread(requests.read_image, url, limits, "image")


def _inputs(body: EmbeddingRequest, limits: Limits) -> list[str | bytes]:
    given = body.inputs()
    check_count("inputs", len(given), limits.items, param="input")
    check_text((one.text for one in given if isinstance(one, TextInput)), limits, "input")
    where = "input" if isinstance(body.input, str) else "input.{}"
    urls = [
        (where.format(i), one.image) for i, one in enumerate(given) if isinstance(one, ImageInput)
    ]
    pictures = iter(requests.read_images(urls, limits))
    return [one.text if isinstance(one, TextInput) else next(pictures) for one in given]
