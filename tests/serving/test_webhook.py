"""MLflow's webhooks: an event that MLflow signed makes the app look at its aliases at once."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from mlflow import MlflowClient
from mlflow.webhooks.delivery import _generate_hmac_signature

from bridgework.serving import launch
from bridgework.serving.admission import Admission
from bridgework.serving.auth import VARIABLE as KEYS_VARIABLE
from bridgework.serving.auth import AuthMiddleware, Keys, digest
from bridgework.serving.gateway import answer_errors
from bridgework.serving.options import RequestLimits
from bridgework.serving.webhook import PATH, VARIABLE, webhook_routes
from tests.lineage.test_relay import mlflow_server
from tests.serving.support import KEY, ModelHome, ServeChat, until

SECRET = "the secret of the webhook"
EVENT = json.dumps({
    "entity": "model_version_alias", "action": "created", "timestamp": "2026-01-01T00:00:00+00:00",
    "data": {"name": "m", "alias": "champion", "version": "3"},
})  # fmt: skip


def signed(body: str = EVENT, secret: str = SECRET, age_s: int = 0) -> dict[str, str]:
    """Return the headers of MLflow's own delivery."""
    sent = str(int(time.time()) - age_s)
    return {
        "content-type": "application/json",
        "x-mlflow-delivery-id": "d",
        "x-mlflow-timestamp": sent,
        "x-mlflow-signature": _generate_hmac_signature(secret, "d", sent, body),
    }


def post(
    headers: Mapping[str, str],
    body: str = EVENT,
    *,
    path: str = PATH,
    follows: bool = True,
    secret: bytes | None = SECRET.encode(),
) -> tuple[int, Any, int]:
    """Post an event; return the status, the body, and how often the aliases were looked at."""
    looks = []

    def moved() -> bool:
        looks.append(1)
        return follows

    api = FastAPI()
    api.include_router(webhook_routes(moved))
    answer_errors(api)
    keys = Keys(frozenset({digest(KEY)}), secret)
    admission = Admission(slots=2, per_key=1, held_bytes=2**20)
    app = AuthMiddleware(api, keys=keys, admission=admission, limits=RequestLimits())

    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, client=("10.0.0.7", 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://app") as http:
            return await http.post(path, content=body, headers=headers)

    reply = asyncio.run(send())
    return reply.status_code, reply.json(), len(looks)


def test_event_that_mlflow_signed_starts_a_look_at_the_aliases() -> None:
    assert post(signed()) == (202, {"status": "accepted"}, 1)
    assert post({"authorization": f"Bearer {KEY}"})[0] == 202  # a person with a key


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (signed(secret="another"), EVENT),
        (signed(), EVENT.replace("3", "4")),
        (signed(age_s=3600), EVENT),
        (signed(age_s=-3600), EVENT),
        (signed() | {"x-mlflow-timestamp": "now"}, EVENT),
        (signed() | {"x-mlflow-timestamp": "9" * 5000}, EVENT),
        (signed() | {"x-mlflow-signature": "v1,"}, EVENT),
        (signed() | {"x-mlflow-signature": ""}, EVENT),
        ({}, EVENT),
    ],
)
def test_other_events_are_401_and_start_nothing(headers: dict[str, str], body: str) -> None:
    status, error, looks = post(headers, body)
    assert (status, looks) == (401, 0)
    assert error["error"]["code"] == ("invalid_signature" if headers else "invalid_api_key")


def test_signature_opens_no_other_route_and_no_large_body() -> None:
    assert post(signed(), path="/v1/chat/completions")[0] == 401
    large = EVENT + " " * 100_000
    assert post(signed(large), large)[0] == 413
    assert post(signed(), secret=None)[1]["error"]["code"] == "invalid_api_key"


def test_app_that_follows_no_alias_says_so() -> None:
    status, error, _ = post(signed(), follows=False)
    assert status == 409 and "follow=alias" in error["error"]["message"]


@pytest.mark.slow
def test_moved_alias_is_served_at_once_after_mlflows_webhook(
    serve_chat: ServeChat, model_home: ModelHome, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a registry that is asked every hour, only the webhook can be the reason."""
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOWED_SCHEMES", "http")
    monkeypatch.setenv("MLFLOW_WEBHOOK_ALLOW_PRIVATE_IPS", "true")
    monkeypatch.setenv(VARIABLE, SECRET)
    monkeypatch.setenv(KEYS_VARIABLE, KEY)
    arguments = {"follow": "alias", "poll_s": 3600, "dev": False}
    with (
        mlflow_server(model_home.path, launch.free_port()) as uri,
        serve_chat(model_home.path, tracking=uri, **arguments) as http,
    ):
        http.headers["authorization"] = f"Bearer {KEY}"

        def served() -> list[str]:
            return [model["id"] for model in http.get("/v1/models").json()["data"]]

        assert served() == ["m", "m:1"]
        client = MlflowClient(uri)
        client.create_webhook(
            name="bridgework", url=f"{http.base_url}{PATH.lstrip('/')}", secret=SECRET,
            events=["model_version_alias.created"],
        )  # fmt: skip
        client.set_registered_model_alias("m", "champion", "3")
        until(lambda: "m:3" in served())
