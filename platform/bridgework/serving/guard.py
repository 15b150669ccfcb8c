"""The door of every app, before a byte of the body is read: who asks, how much at once, how large a body."""

import re
from collections.abc import Mapping
from ipaddress import ip_address
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgework.serving.auth import Keys
from bridgework.serving.refusals import Refusal, busy

OPEN = frozenset({"/", "/health"})  # a static page without any data in it, and the health check
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Guard:
    """ASGI middleware. Without `keys` (development) only this machine itself is answered."""

    def __init__(self, app: ASGIApp, *, keys: Keys | None, body_bytes: int, places: int) -> None:
        self.app = app
        self.keys = keys
        self.body_bytes = body_bytes
        self.places = places
        self.taken = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no route speaks WebSocket, so what is left is the start and end of the app
            await self.app(scope, receive, send)
            return
        self.taken += 1
        try:
            self._check(scope)
            body = await _body(receive, self.body_bytes)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
        else:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self.taken -= 1

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_caller(scope, headers)
        if scope["method"] == "POST" and self.taken > self.places:
            raise busy()
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or int(length[:20]) > self.body_bytes:
            raise _too_large(self.body_bytes)

    def _check_caller(self, scope: Scope, headers: Headers) -> None:
        if self.keys is None:
            if not _is_local(scope, headers):
                message = "this is a development server: it answers its own machine only, by a loopback address"
                raise Refusal(403, message, code="not_local")
            return
        if scope["path"].removeprefix(scope.get("root_path", "")) in OPEN:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self.keys.allow(key.strip()):
            raise Refusal(401, "no valid API key; send the header Authorization: Bearer KEY", code="invalid_api_key")


def request_id(headers: Mapping[str, str]) -> str:
    """The caller's x-request-id if it is well-formed, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Both ends are loopback. The Host header is judged too: a name that a web page made point here is not ours."""
    client: tuple[str, int] | None = scope.get("client")
    host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    return client is not None and is_loopback(client[0]) and is_loopback(host) and "x-forwarded-for" not in headers


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


async def _body(receive: Receive, most: int) -> bytes:
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > most:
            raise _too_large(most)
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` with the body as one message; what comes after it (the caller hangs up) passes through."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _too_large(most: int) -> Refusal:
    return Refusal(413, f"the body is larger than {most} bytes", code="body_too_large")
