"""Helpers of the serving tests: images, and clients of the apps under test."""

import base64
import io
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from fastapi import APIRouter
from mlflow import MlflowClient
from PIL import Image

from bridgework.data.tokenization import load_tokenizer
from bridgework.serving import launch
from bridgework.serving import routes as caption
from bridgework.serving import routes as embed
from bridgework.serving.options import Options
from bridgework.serving.router import Router
from bridgework.tracking.mlflow_store import MLflowTracker

KEY = "the-key-of-the-tests"
ORIGIN = "https://app.example"
QUESTIONS = 20  # probes of a ModelHome
# a request whose answers end with `max_tokens` alone, for answers that must still run
ENDLESS: dict[str, Any] = {
    "max_tokens": 400,
    "logit_bias": {str(load_tokenizer("bytes").eos_token_id): -100},
}


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


@contextmanager
def chat_app(port: int, home: Path, name: str = "c", **arguments: Any) -> Iterator[httpx.Client]:
    """Serve the chat app of the registered model `m`, without a key, on a Serve that runs."""
    common = {"model": "m", "cpus": 0.5, "ongoing": 4, "home": str(home), "dev": True}
    address = launch.AppAddress(port=port, name=name, route_prefix=f"/{name}")
    endpoint = launch.start("chat", common | arguments, address)
    try:
        with httpx.Client(base_url=endpoint.address, timeout=120, trust_env=False) as http:
            yield http
    finally:
        endpoint.stop()


ServeChat = Callable[..., AbstractContextManager[httpx.Client]]  # `chat_app` without its port


@dataclass(frozen=True)
class ModelHome:
    """A home with the registered model `m`, and a dataset of probes."""

    path: Path
    probes: str

    @property
    def tracker(self) -> MLflowTracker:
        return MLflowTracker(None, self.path, "training")

    def decisions(self) -> list[Any]:
        """Return the finished MLflow runs of the decisions about challengers."""
        client = MlflowClient(f"sqlite:///{self.path}/mlflow.db")
        experiment = client.get_experiment_by_name("serving")
        if experiment is None:
            return []
        runs = client.search_runs([experiment.experiment_id], "attributes.status = 'FINISHED'")
        return [run for run in runs if "challenger" in run.data.tags]


def until(condition: Callable[[], Any], limit_s: float = 300) -> Any:
    """Return the first true value of `condition`."""
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found
