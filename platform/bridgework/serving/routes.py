"""Routes of the three apps: chat, embed and caption.

A route chooses a model (`Router`), validates the request (requests.py), calls a replica and writes
OpenAI's form. The gateway adds the routes that all apps share (gateway.py).
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
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
    CompletionRequest,
    Delta,
    EmbeddingRequest,
    ImageInput,
    RankRequest,
    ResponseHeader,
    TextInput,
    TextParams,
    TokenizeRequest,
    Usage,
    chunk,
    completion,
    last_chunk,
    shortened,
    text_chunk,
    text_completion,
    vector,
)
from bridgework.serving.requests import (
    check_answers,
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
    """Return the routes POST /v1/chat/completions, /v1/completions and /tokenize."""
    api = APIRouter(route_class=JSONRoute)

    @api.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        served = router.choose(body.model, request_id(request.headers))
        parts, images = await asyncio.to_thread(
            read_conversation,
            body.messages,
            options.limits,
            tiled=served.tiled,
            texts=body.choices or (),
        )
        served = served.about(images)
        check_answers(body, options)
        sampling = sampling_arguments(body, options)
        if body.stream:
            pieces = router.stream(served, "stream", parts, images, sampling, body.answers)
            head = ResponseHeader.of("chatcmpl", "chat.completion.chunk", served.id, body.model)
            return await _stream(pieces, body, partial(_chat_chunks, head), head)
        head = ResponseHeader.of("chatcmpl", "chat.completion", served.id, body.model)
        if body.choices is not None:
            answers = [await router.call(served, "choose", parts, images, body.choices)]
        elif body.answers == 1:
            answers = [await router.call(served, "generate", parts, images, sampling)]
        else:
            answers = await router.call(
                served, "generate_several", parts, images, sampling, body.answers
            )
        return JSONResponse(completion(head, answers, body.top is not None))

    @api.post("/v1/completions")
    async def complete_text(body: CompletionRequest, request: Request) -> Response:
        served = router.choose(body.model, request_id(request.headers))
        check_count("prompts", len(body.prompts), options.limits.items, param="prompt")
        check_text(body.prompts, options.limits, "prompt")
        check_answers(body, options)
        sampling = sampling_arguments(body, options)
        head = ResponseHeader.of("cmpl", "text_completion", served.id, body.model)
        if body.stream:
            pieces = router.stream(served, "stream_text", body.prompts[0], sampling, body.answers)
            return await _stream(pieces, body, partial(_text_chunks, head), head)
        answers: list[Answer] = []
        usages: list[Usage] = []
        # in sequence, because a request takes one slot however many prompts it has
        for prompt in body.prompts:
            some = await router.call(served, "complete", prompt, sampling, body.answers)
            usages.append(Usage.total(some))
            answers += [replace(one, index=len(answers) + one.index) for one in some]
        usage = Usage.of(
            sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
        )
        return JSONResponse(text_completion(head, answers, body.top is not None, usage))

    @api.post("/tokenize")
    async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        parts, images = await asyncio.to_thread(
            read_conversation,
            body.messages or (),
            options.limits,
            tiled=served.tiled,
            texts=[body.prompt or ""],
        )
        served = served.about(images)
        tokens, context = await router.call(served, "tokenize", body.prompt, parts, images)
        return {"count": len(tokens), "max_model_len": context, "tokens": tokens}

    return api


Chunks = Callable[[Delta | Answer], Iterable[dict[str, Any]]]


def _chat_chunks(head: ResponseHeader, piece: Delta | Answer) -> Iterator[dict[str, Any]]:
    if isinstance(piece, Answer):
        yield chunk(head, {}, piece.finish_reason, index=piece.index)
    else:
        content = {"content": piece.text}
        yield chunk(head, content, index=piece.index, logprobs=piece.logprobs)


def _text_chunks(head: ResponseHeader, piece: Delta | Answer) -> Iterator[dict[str, Any]]:
    yield text_chunk(head, piece)


async def _stream(
    pieces: AsyncGenerator[Delta | Answer, None],
    body: TextParams,
    chunks: Chunks,
    head: ResponseHeader,
) -> Response:
    first = await anext(pieces)  # an error before the first piece is a status, not an event
    return StreamingResponse(
        _events(head, first, pieces, body, chunks),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache"},
    )


async def _events(
    head: ResponseHeader,
    first: Delta | Answer,
    rest: AsyncGenerator[Delta | Answer, None],
    body: TextParams,
    chunks: Chunks,
) -> AsyncIterator[str]:
    """Yield server-sent events. A broken stream ends with an error event and without [DONE]."""
    ended: list[Answer] = []
    try:
        if isinstance(body, ChatRequest):
            for index in range(body.answers):
                yield _event(chunk(head, {"role": "assistant", "content": ""}, index=index))
        piece: Delta | Answer | None = first
        while True:
            if piece is None:
                message = "the stream ended before the answer was complete. Fix: try again"
                raise APIError(500, message, code="broken_stream")
            for value in chunks(piece):
                yield _event(value)
            if isinstance(piece, Answer):
                ended.append(piece)
                if len(ended) == body.answers:
                    break
            piece = await anext(rest, None)
        if body.usage_chunk:
            yield _event(last_chunk(head, Usage.total(ended)))
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
        if body.dimensions is not None and body.dimensions > width:
            message = (
                "dimensions: more than the model has. "
                f"Got {body.dimensions}; expected at most {width}"
            )
            raise APIError(400, message, code="invalid_value", param="dimensions")
        vectors = [shortened(values, body.dimensions) for values, _ in embedded]
        rows = [
            {"object": "embedding", "index": i, "embedding": vector(values, body.encoding_format)}
            for i, values in enumerate(vectors)
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
            await router.call(served.about([image]), "caption", image, body.prompt, sampling)
            for image in images
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
