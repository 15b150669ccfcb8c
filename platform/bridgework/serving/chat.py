"""The chat app's routes: OpenAI's /v1/chat/completions with images and streaming, and a page to try it at /."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from bridgework.serving.bodies import JSONRoute
from bridgework.serving.conversation import draw, read
from bridgework.serving.guard import request_id
from bridgework.serving.options import Options
from bridgework.serving.protocol import Answer, ChatRequest, Head, chunk, completion, last_chunk
from bridgework.serving.refusals import Refusal
from bridgework.serving.router import Router

PAGE_POLICY = (  # the page's own script and style, pictures dropped on it, this server; no other host
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DONE = "data: [DONE]\n\n"


def routes(router: Router, options: Options) -> APIRouter:
    """GET / and POST /v1/chat/completions."""
    api = APIRouter(route_class=JSONRoute)
    page = files("bridgework.serving").joinpath("playground.html").read_text("utf-8")

    @api.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})

    @api.post("/v1/chat/completions")
    async def complete(body: ChatRequest, request: Request) -> Response:
        served = router.choose(body.model, request_id(request.headers))
        parts, images = await asyncio.to_thread(read, body, options.limits, tiled=served.tiled)
        how = draw(body, options)
        if not body.stream:
            head = Head.of("chatcmpl", "chat.completion", served.id, body.model)
            if body.choices is not None:
                answer: Answer = await router.call(served, "choose", parts, images, body.choices)
            else:
                answer = await router.call(served, "generate", parts, images, how)
            return JSONResponse(completion(head, answer))
        head = Head.of("chatcmpl", "chat.completion.chunk", served.id, body.model)
        pieces = router.stream(served, "stream", parts, images, how)
        first = await anext(pieces)  # what fails before it is answered by a status, not by an event
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        events = _events(head, first, pieces, usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})

    return api


async def _events(
    head: Head, first: str | Answer, rest: AsyncGenerator[str | Answer, None], usage: bool
) -> AsyncIterator[str]:
    """Server-sent events. A stream that breaks ends with an error and without [DONE]: never as if complete."""
    try:
        yield _event(chunk(head, {"role": "assistant", "content": ""}))
        piece: str | Answer | None = first
        while isinstance(piece, str):
            yield _event(chunk(head, {"content": piece}))
            piece = await anext(rest, None)
        if piece is None:
            raise Refusal(500, "the model broke off its answer", code="broken_stream")
        yield _event(chunk(head, {}, piece.finish_reason))
        if usage:
            yield _event(last_chunk(head, piece.usage))
        yield DONE
    except Refusal as refusal:
        yield _event(refusal.body())
    finally:
        await rest.aclose()


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
