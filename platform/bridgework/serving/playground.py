"""Routes of the playground: its page, and votes between two answers, as a preferences dataset."""

import asyncio
import hashlib
import json
import os
from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any
from uuid import uuid4

from fastapi import APIRouter
from fastapi.responses import HTMLResponse
from filelock import FileLock
from pydantic import Field

from bridgework import storage
from bridgework.data.images import header
from bridgework.data.importers import PLACEHOLDER
from bridgework.data.importers.preferences import preference
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Part
from bridgework.serving.bodies import JSONRoute
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options
from bridgework.serving.protocol import MAX_LIST, Body, Message, Strict
from bridgework.serving.requests import check_text, read_conversation
from bridgework.serving.router import Router
from bridgework.serving.routes import chat_routes

PAGE_POLICY = (  # the page's own script and style, images of its user, this server; no other host
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}  # LLaVA's names of the roles


class RatedAnswer(Strict):
    """One of the two answers of a vote."""

    id: Annotated[str, Field(pattern=r"^chatcmpl-[0-9a-zA-Z-]{1,64}$")]
    text: str


class PreferenceRequest(Body):
    """Body of POST /v1/preferences: a conversation, and the better and the worse answer to it."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_LIST)]
    chosen: RatedAnswer
    rejected: RatedAnswer


def playground_routes(router: Router, options: Options) -> APIRouter:
    """Return the chat routes, with GET / (a page to try the app) and POST /v1/preferences."""
    api = APIRouter(route_class=JSONRoute)
    page = files("bridgework.serving").joinpath("playground.html").read_text("utf-8")
    api.include_router(chat_routes(router, options))

    @api.get("/")
    async def playground() -> HTMLResponse:
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY})

    @api.post("/v1/preferences")
    async def vote(body: PreferenceRequest) -> dict[str, Any]:
        return await asyncio.to_thread(save_preference, body, options)

    return api


def save_preference(body: PreferenceRequest, options: Options) -> dict[str, Any]:
    """Append a vote to <home>/preferences/votes.jsonl, with its images as files; return its id.

    `bridgework data import preferences` reads the file. Raises APIError for a vote that it could
    not read, and for one that is too large for `votes_bytes`.
    """
    check_text([body.chosen.text, body.rejected.text], options.limits, "chosen")
    parts, shown = read_conversation(body.messages, options.limits, tiled=False)
    images = [image for image in shown if isinstance(image, bytes)]
    if len(images) < len(shown):
        message = "messages: a dataset of preferences has images. Got a video"
        raise APIError(400, message, code="unsupported", param="messages")
    folder = storage.locate(str(options.home)) / "preferences"
    if not storage.is_local(folder):
        message = "votes are kept in a folder. Got a home in a store; expected a local one"
        raise APIError(501, message, code="unsupported")
    named = {_file_name(data): data for data in images}
    key = uuid4().hex
    row: dict[str, Any] = {
        "id": key,
        "images": [_file_name(data) for data in images],
        "conversations": _turns(parts),
        "chosen": body.chosen.text,
        "rejected": body.rejected.text,
        "chosen_response": body.chosen.id,
        "rejected_response": body.rejected.id,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        line = json.dumps(row, ensure_ascii=False) + "\n"
        held = sum(entry.stat().st_size for entry in os.scandir(folder))
        if held + len(line) + sum(map(len, images)) > options.votes_bytes:
            message = (
                f"the votes take {held} bytes; expected at most {options.votes_bytes}. "
                "Fix: import them and move the folder, or start with a larger votes_bytes"
            )
            raise APIError(507, message, code="storage_full")
        new = {name: data for name, data in named.items() if not (folder / name).exists()}
        for name, data in new.items():
            (folder / name).write_bytes(data)
        try:
            preference(key, row, str(folder))
        except BadSample as error:
            for name in new:
                (folder / name).unlink()
            raise APIError(400, f"the vote: {error}", code="invalid_value") from None
        with (folder / "votes.jsonl").open("a", encoding="utf-8") as file:
            file.write(line)
    return {"object": "preference", "id": key}


def _file_name(image: bytes) -> str:
    """Return the name of an image's file: by its content, so that it is stored once."""
    kind = str(header(image).format or "png").lower()
    return f"{hashlib.sha256(image).hexdigest()[:32]}.{kind}"


def _turns(parts: Sequence[Part]) -> list[dict[str, str]]:
    """Return the conversation as LLaVA's turns. Raises APIError for a text with `<image>`."""
    turns: list[dict[str, str]] = []
    for part in parts:
        if PLACEHOLDER in (part.text or ""):
            message = f"messages: the text holds {PLACEHOLDER}, the place of an image in a dataset"
            raise APIError(400, message, code="invalid_value", param="messages")
        text = PLACEHOLDER if part.text is None else part.text
        if turns and turns[-1]["from"] == SPEAKERS[part.role]:
            turns[-1]["value"] += text
        else:
            turns.append({"from": SPEAKERS[part.role], "value": text})
    return turns
