"""Helpers of the tests of serving: pictures, ports, and where the apps under test are."""

import base64
import io
import socket
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
from PIL import Image

KEY = "the-key-of-the-tests"


@dataclass(frozen=True)
class Apps:
    """Where they are, and clients with the key."""

    address: str
    chat: openai.OpenAI
    embed: openai.OpenAI
    http: httpx.Client
    home: Path


def picture(colour: str = "red", size: tuple[int, int] = (40, 30), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, kind)
    return stream.getvalue()


def url(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
