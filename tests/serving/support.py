"""Helpers of the serving tests: images, and clients of the apps under test."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from fastapi import APIRouter
from PIL import Image

from bridgework.serving import routes as caption
from bridgework.serving import routes as embed
from bridgework.serving.options import Options
from bridgework.serving.router import Router

KEY = "the-key-of-the-tests"
ORIGIN = "https://app.example"


@dataclass(frozen=True)
class Apps:
    """Address of the apps, and clients with the key."""

    address: str
    chat: openai.OpenAI
    embed: openai.OpenAI
    http: httpx.Client
    home: Path


def picture(color: str = "red", size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, color).save(stream, kind)
    return stream.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def embed_and_caption(router: Router, options: Options) -> APIRouter:
    """Return the routes of two apps over one model, which saves a replica."""
    api = APIRouter()
    api.include_router(embed.embedding_routes(router, options))
    api.include_router(caption.caption_routes(router, options))
    return api
