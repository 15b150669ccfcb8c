"""The embedding app's routes: vectors of texts and images, zero-shot classes, ranks of candidate captions."""

from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from bridgework.serving import images
from bridgework.serving.conversation import check_count, check_text
from bridgework.serving.guard import request_id
from bridgework.serving.images import Limits
from bridgework.serving.options import Options
from bridgework.serving.protocol import (
    ClassifyRequest,
    EmbeddingRequest,
    Head,
    RankRequest,
    TextInput,
    Usage,
    vector,
)
from bridgework.serving.router import Router


def routes(router: Router, options: Options) -> APIRouter:
    """POST /v1/embeddings, /v1/classify and /v1/rank."""
    api = APIRouter()
    limits = options.limits

    @api.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        embedded = await router.call(served, "embed", _inputs(body, limits))
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
        _check("labels", body.labels, limits)
        texts = [body.template.replace("{}", label) for label in body.labels]
        inputs = [images.read(body.image, limits, "image"), *texts]
        image, *labels = [values for values, _ in await router.call(served, "embed", inputs)]
        cosines = np.stack(labels) @ image
        chances = np.exp(body.scale * (cosines - cosines.max()))
        rows = zip(body.labels, (chances / chances.sum()).tolist(), cosines.tolist(), strict=True)
        data = [{"label": label, "probability": p, "cosine": cosine} for label, p, cosine in rows]
        data.sort(key=lambda row: -row["probability"])
        return Head.of("clas", "classification", served.id, body.model).model_dump() | {"data": data}

    @api.post("/v1/rank")
    async def rank(body: RankRequest, request: Request) -> dict[str, Any]:
        served = router.choose(body.model, request_id(request.headers))
        _check("candidates", body.candidates, limits)
        image = images.read(body.image, limits, "image")
        ranked = await router.call(served, "rank", image, body.candidates, body.question)
        data = [{"candidate": candidate, "score": score} for candidate, score in ranked]
        return Head.of("rank", "ranking", served.id, body.model).model_dump() | {"data": data}

    return api


def _inputs(body: EmbeddingRequest, limits: Limits) -> list[str | bytes]:
    given = body.inputs()
    check_count("inputs", len(given), limits.items, param="input")
    check_text((one.text for one in given if isinstance(one, TextInput)), limits, "input")
    return [
        one.text if isinstance(one, TextInput) else images.read(one.image, limits, f"input.{i}")
        for i, one in enumerate(given)
    ]


def _check(what: str, texts: list[str], limits: Limits) -> None:
    check_count(what, len(texts), limits.items)
    check_text(texts, limits, what)
