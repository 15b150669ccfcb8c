"""The door: who is let in, and that a body is measured before it is parsed."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from bridgework.serving.auth import Keys, digest
from bridgework.serving.guard import Guard, request_id

KEYS = Keys(frozenset({digest("key")}))
BEARER = {"authorization": "Bearer key"}


async def echo(request: Request) -> PlainTextResponse:
    await asyncio.sleep(0.05 if b"slow" in await request.body() else 0)
    return PlainTextResponse(await request.body())


def ask(method: str, path: str, *, keys: Keys | None = KEYS, client: str = "127.0.0.1", **how: Any) -> httpx.Response:
    return asyncio.run(_ask(method, path, keys, client, **how))[0]


async def _ask(
    method: str, path: str, keys: Keys | None, client: str, times: int = 1, places: int = 4, **how: Any
) -> list[httpx.Response]:
    routes = [Route(p, echo, methods=["GET", "POST"]) for p in ("/", "/health", "/v1/models", "/v1/x")]
    app = Guard(Starlette(routes=routes), keys=keys, body_bytes=1000, places=places)
    transport = httpx.ASGITransport(app, client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url=how.pop("base", "http://localhost:8000")) as http:
        return list(await asyncio.gather(*(http.request(method, path, **how) for _ in range(times))))


@pytest.mark.parametrize(
    "value", [None, "", "key", "Basic key", "Bearer", "Bearer no", "Bearer key key", "Bearer k\u00e9y"]
)
def test_every_route_but_health_and_the_page_needs_a_key(value: str | None) -> None:
    headers = {} if value is None else {"authorization": value.encode("utf-8")}
    for path in ("/v1/models", "/v1/x", "/nowhere", "/health/", "/openapi.json"):
        reply = ask("GET", path, headers=headers)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    assert ask("GET", "/health", headers=headers).status_code == 200
    assert ask("GET", "/", headers=headers).status_code == 200


def test_a_key_opens_and_the_body_arrives_whole() -> None:
    assert ask("POST", "/v1/x", headers=BEARER, content=b"a" * 1000).content == b"a" * 1000


def test_a_body_above_the_limit_is_refused_with_and_without_its_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"a" * 100

    for content in (b"a" * 1001, chunks()):
        reply = ask("POST", "/v1/x", headers=BEARER, content=content)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 5000, "\u0663".encode()])
def test_a_length_that_is_no_number_is_refused(length: str | bytes) -> None:
    reply = ask("POST", "/v1/x", headers=BEARER | {"content-length": length}, content=b"a")
    assert reply.status_code == 413


def test_what_finds_no_place_is_answered_429_with_a_time_to_come_back() -> None:
    replies = asyncio.run(_ask("POST", "/v1/x", KEYS, "127.0.0.1", 6, 2, headers=BEARER, content=b"slow"))
    assert sorted(r.status_code for r in replies) == [200, 200, 429, 429, 429, 429]
    busy = next(r for r in replies if r.status_code == 429)
    assert int(busy.headers["retry-after"]) >= 1
    assert busy.json()["error"]["type"] == "rate_limit_error"


def test_a_development_server_answers_its_own_machine_only() -> None:
    local: dict[str, Any] = {"keys": None}
    assert ask("GET", "/v1/models", **local).status_code == 200
    assert ask("GET", "/v1/models", **local, base="http://127.0.0.1:8000").status_code == 200
    assert ask("GET", "/v1/models", **local, base="http://[::1]:8000").status_code == 200
    for how in (
        {"client": "10.0.0.7"},
        {"base": "http://rebound.example:8000"},  # a page elsewhere whose name was made to point at 127.0.0.1
        {"headers": {"x-forwarded-for": "10.0.0.7"}},
    ):
        assert ask("GET", "/v1/models", **local, **how).json()["error"]["code"] == "not_local", how


def test_a_request_id_is_honoured_if_it_is_well_formed() -> None:
    assert request_id({"x-request-id": "job-7:row_3.a"}) == "job-7:row_3.a"
    for odd in ("", "a b", "x" * 129, "a\nb", "\u00e9"):
        assert request_id({"x-request-id": odd}) not in ("", odd)
