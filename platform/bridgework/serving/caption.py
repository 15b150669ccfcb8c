"""The caption app's route: POST /v1/captions, one caption for each image."""

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from bridgework.serving import images
from bridgework.serving.bodies import JSONRoute
from bridgework.serving.conversation import check_count, check_text, draw
from bridgework.serving.guard import request_id
from bridgework.serving.options import Options
from bridgework.serving.protocol import Answer, CaptionRequest, Head, Usage
from bridgework.serving.router import Router


def routes(router: Router, options: Options) -> APIRouter:
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
        urls = [("image" if isinstance(body.image, str) else f"image.{i}", url) for i, url in enumerate(body.images)]
        pictures = await asyncio.to_thread(images.read_all, urls, options.limits)
        # one after the other: a request takes one place in the queue, however many images it holds
        answers: list[Answer] = [await router.call(served, "caption", one, body.prompt, how) for one in pictures]
        usage = Usage.of(sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers))
        rows = [{"index": i, "caption": a.text, "finish_reason": a.finish_reason} for i, a in enumerate(answers)]
        head = Head.of("capt", "list", served.id, body.model)
        return head.model_dump() | {"data": rows, "usage": usage.model_dump()}

    return api
