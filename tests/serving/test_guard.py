"""AuthMiddleware and Admission: keys, slots, body limits before parsing, and cancellation."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import Message

from bridgework.serving.admission import Admission
from bridgework.serving.auth import AuthMiddleware, Keys, digest, request_id
from bridgework.serving.options import RequestLimits

KEYS = Keys(frozenset({digest("key")}))
BEARER = {"authorization": "Bearer key"}


async def echo(request: Request) -> PlainTextResponse:
    return PlainTextResponse(await request.body())


def guard(
    routes: list[Route],
    keys: Keys | None,
    places: int,
    *,
    body_s: float = 30.0,
    held_bytes: int = 2**20,
) -> AuthMiddleware:
    admission = Admission(slots=places, per_key=places, held_bytes=held_bytes)
    limits = replace(RequestLimits(body_bytes=1000), body_s=body_s)
    return AuthMiddleware(Starlette(routes=routes), keys=keys, admission=admission, limits=limits)


def ask(
    method: str, path: str, *, keys: Keys | None = KEYS, client: str = "127.0.0.1", **how: Any
) -> httpx.Response:
    return asyncio.run(_ask(method, path, keys, client, **how))


async def _ask(
    method: str, path: str, keys: Keys | None, client: str, **how: Any
) -> httpx.Response:
    paths = ("/", "/health", "/health/live", "/v1/models", "/v1/x")
    app = guard([Route(path, echo, methods=["GET", "POST"]) for path in paths], keys, 4)
    transport = httpx.ASGITransport(app, client=(client, 1))
    async with httpx.AsyncClient(
        transport=transport, base_url=how.pop("base", "http://localhost:8000")
    ) as http:
        return await http.request(method, path, **how)


@pytest.mark.parametrize(
    "value",
    [None, "", "key", "Basic key", "Bearer", "Bearer no", "Bearer key key", "Bearer k\u00e9y"],
)
def test_every_route_except_health_and_page_needs_a_key(value: str | None) -> None:
    headers = {} if value is None else {"authorization": value.encode("utf-8")}
    for path in ("/v1/models", "/v1/x", "/nowhere", "/health/", "/openapi.json"):
        reply = ask("GET", path, headers=headers)
        assert reply.status_code == 401, path
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/health", "/health/live"):
        assert ask("GET", path, headers=headers).status_code == 200
        assert ask("POST", path, headers=headers, content=b"x").status_code == 401, (
            "a body needs a key everywhere"
        )


def test_valid_key_passes_the_complete_body() -> None:
    assert ask("POST", "/v1/x", headers=BEARER, content=b"a" * 1000).content == b"a" * 1000


def test_body_above_the_limit_is_rejected_with_and_without_content_length() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"a" * 100

    for content in (b"a" * 1001, chunks()):
        reply = ask("POST", "/v1/x", headers=BEARER, content=content)
        assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 5000, "\u0663".encode()])
def test_invalid_content_length_is_rejected(length: str | bytes) -> None:
    reply = ask("POST", "/v1/x", headers=BEARER | {"content-length": length}, content=b"a")
    assert reply.status_code == 413


def test_development_server_answers_only_local_requests() -> None:
    local: dict[str, Any] = {"keys": None}
    assert ask("GET", "/v1/models", **local).status_code == 200
    assert ask("GET", "/v1/models", **local, base="http://127.0.0.1:8000").status_code == 200
    assert ask("GET", "/v1/models", **local, base="http://[::1]:8000").status_code == 200
    for how in (
        {"client": "10.0.0.7"},
        {
            "base": "http://rebound.example:8000"
        },  # a page elsewhere whose name was made to point at 127.0.0.1
        {"headers": {"x-forwarded-for": "10.0.0.7"}},
        {"headers": {"host": "["}},  # not a host at all
    ):
        assert ask("GET", "/v1/models", **local, **how).json()["error"]["code"] == "not_local", how


def test_well_formed_request_id_is_kept() -> None:
    assert request_id({"x-request-id": "job-7:row_3.a"}) == "job-7:row_3.a"
    for odd in ("", "a b", "x" * 129, "a\nb", "\u00e9"):
        assert request_id({"x-request-id": odd}) not in ("", odd)


class Call:
    """One request to an ASGI app, with control of when the body arrives and the client disconnects."""

    def __init__(self, app: AuthMiddleware, key: str = "key", path: str = "/v1/x") -> None:
        self._incoming: asyncio.Queue[Message] = asyncio.Queue()
        self.sent: list[Message] = []
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "root_path": "",
            "query_string": b"",
            "client": ("127.0.0.1", 1),
            "headers": [(b"host", b"localhost"), (b"authorization", f"Bearer {key}".encode())],
        }
        self.done = asyncio.ensure_future(app(scope, self._incoming.get, self._send))

    async def _send(self, message: Message) -> None:
        self.sent.append(message)

    def body(self, data: bytes, *, more: bool = False) -> None:
        self._incoming.put_nowait({"type": "http.request", "body": data, "more_body": more})

    def leave(self) -> None:
        self._incoming.put_nowait({"type": "http.disconnect"})

    async def status(self) -> int:
        await self.done
        status: int = self.sent[0]["status"]
        return status

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


TWO = Keys(frozenset({digest("key"), digest("other")}))


def test_unfinished_bodies_hold_no_slot_and_time_out() -> None:
    async def run() -> None:
        # below the age at which a body is evicted
        app = guard([Route("/v1/x", echo, methods=["POST"])], KEYS, 4, body_s=0.9)
        slow = [Call(app) for _ in range(4)]
        for call in slow:
            call.body(b"{", more=True)
        await settle()
        late = [
            Call(app) for _ in range(2)
        ]  # while the slow ones are still young: no room for more bodies
        assert [await call.status() for call in late] == [429, 429]
        assert [await call.status() for call in slow] == [408] * 4
        assert slow[0].headers[b"connection"] == b"close"
        quick = Call(app)
        quick.body(b"done")
        assert await quick.status() == 200

    asyncio.run(run())


def test_oldest_body_of_the_busiest_key_is_evicted() -> None:
    async def run() -> None:
        app = guard([Route("/v1/x", echo, methods=["POST"])], TWO, 4)
        slow = [Call(app) for _ in range(4)]
        await settle()
        other = Call(app, "other")
        other.body(b"done")
        assert await other.status() == 200
        assert await slow[0].status() == 429  # the oldest made room
        await settle()
        assert not any(call.done.done() for call in slow[1:])
        for call in slow[1:]:
            call.body(b"done")
        assert [await call.status() for call in slow[1:]] == [200] * 3

    asyncio.run(run())


def test_bytes_of_all_bodies_are_limited_and_the_largest_key_is_evicted() -> None:
    async def run() -> None:
        app = guard([Route("/v1/x", echo, methods=["POST"])], TWO, 9, held_bytes=2000)
        greedy = [Call(app) for _ in range(2)]
        for call in greedy:
            call.body(b"a" * 900, more=True)
        await settle()
        other = Call(app, "other")
        other.body(b"b" * 500)
        assert await other.status() == 200
        assert await greedy[0].status() == 429
        third = Call(app)
        third.body(b"a" * 1000, more=True)
        third.body(b"a" * 0)
        assert await third.status() == 200
        fourth = Call(app)
        fourth.body(b"a" * 1000, more=True)
        await settle()
        fifth = Call(app)
        fifth.body(b"a" * 200)
        assert await fifth.status() == 429

    asyncio.run(run())


def test_request_without_a_slot_is_429_with_retry_after() -> None:
    async def run() -> None:
        hold = asyncio.Event()

        async def wait(request: Request) -> PlainTextResponse:
            await hold.wait()
            return PlainTextResponse("")

        app = guard([Route("/v1/x", wait, methods=["POST"])], KEYS, 2)
        calls = [Call(app) for _ in range(6)]
        for call in calls:
            call.body(b"x")
        await settle()
        assert [call.done.done() for call in calls] == [False] * 2 + [True] * 4
        hold.set()
        assert [await call.status() for call in calls] == [200] * 2 + [429] * 4
        assert int(calls[-1].headers[b"retry-after"]) >= 1
        error = json.loads(calls[-1].sent[1]["body"])["error"]
        assert error["type"] == "rate_limit_error"

    asyncio.run(run())


def test_one_of_several_keys_cannot_hold_every_slot() -> None:
    async def run() -> None:
        hold = asyncio.Event()

        async def wait(request: Request) -> PlainTextResponse:
            await hold.wait()
            return PlainTextResponse("")

        admission = Admission(slots=4, per_key=3, held_bytes=2**20)
        app = AuthMiddleware(
            Starlette(routes=[Route("/v1/x", wait, methods=["POST"])]),
            keys=TWO,
            admission=admission,
            limits=RequestLimits(),
        )
        calls = [Call(app, key) for key in ("key", "key", "key", "key", "other", "other")]
        for call in calls:
            call.body(b"x")
        await settle()
        assert [call.done.done() for call in calls] == [False, False, False, True, False, True]
        hold.set()
        assert [await call.status() for call in calls] == [200, 200, 200, 429, 200, 429]

    asyncio.run(run())


def test_disconnected_client_cancels_the_work() -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def work(request: Request) -> PlainTextResponse:
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return PlainTextResponse("")

        app = guard([Route("/v1/x", work, methods=["POST"])], KEYS, 1)
        for part in (True, False):  # before the body is complete, and after
            call = Call(app)
            call.body(b"x", more=part)
            await settle()
            call.leave()
            await call.done
            assert ended.is_set() is not part
            assert call.sent == []
            assert app.admission.running == 0

    asyncio.run(run())


def test_draining_completes_running_and_rejects_new_requests() -> None:
    async def run() -> None:
        hold = asyncio.Event()

        async def wait(request: Request) -> PlainTextResponse:
            await hold.wait()
            return PlainTextResponse("")

        app = guard([Route("/v1/x", wait, methods=["POST"])], KEYS, 4)
        running = Call(app)
        running.body(b"x")
        await settle()
        draining = asyncio.ensure_future(app.admission.drain(60))
        await settle()
        new = Call(app)
        assert await new.status() == 503
        assert json.loads(new.sent[1]["body"])["error"]["code"] == "shutting_down"
        assert not draining.done()
        hold.set()
        assert (await running.status(), await draining) == (200, 0)
        assert await app.admission.drain(0) == 0

    asyncio.run(run())
