"""API keys: kept as sha256, compared in constant time, never logged.

BRIDGEWORK_API_KEYS holds keys (or their `sha256:` digests), separated by commas; a key file holds digests, one a line,
`#` begins a comment. Make one with `python -m bridgework.serving.auth`.

The entrance of every app, before a byte of the body is parsed: who asks, how much at once, how large, how slow.

A request whose client leaves is cancelled.
"""

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import ExitStack
from hmac import compare_digest
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgework.errors import SpecError
from bridgework.serving.admission import Admission
from bridgework.serving.errors import APIError
from bridgework.serving.options import Limits

VARIABLE = "BRIDGEWORK_API_KEYS"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def digest(key: str) -> str:
    """`sha256:` and 64 hex digits. Keys are long and random, so a slow hash would add nothing."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Keys:
    """The keys that open an app."""

    def __init__(self, digests: frozenset[str]) -> None:
        self._digests = digests

    def __len__(self) -> int:
        return len(self._digests)

    def match(self, key: str) -> str | None:
        """The digest of a known key, None of another; every digest is compared, so the time reveals nothing."""
        given = digest(key)
        return next(
            iter([known for known in sorted(self._digests) if compare_digest(given, known)]), None
        )

    @classmethod
    def load(cls, file: str | None) -> "Keys":
        """From the key file if there is one, else from the environment. Raises SpecError where there is no key."""
        keys = cls(_from_file(Path(file)) if file else _from_environment())
        if not len(keys):
            raise SpecError(
                f"no API key: set {VARIABLE}, or keys=FILE with a sha256: digest a line, "
                "or dev=true for a server that answers this machine alone, without a key"
            )
        return keys


def _from_environment() -> frozenset[str]:
    words = [w.strip() for w in os.environ.get(VARIABLE, "").split(",") if w.strip()]
    return frozenset(w if _DIGEST.fullmatch(w) else digest(w) for w in words)


def _from_file(path: Path) -> frozenset[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise SpecError(f"keys={path} cannot be read: {error.strerror}") from None
    words = [line for line in lines if line]
    for number, word in enumerate(words, 1):
        if not _DIGEST.fullmatch(word):
            raise SpecError(
                f"{path}, key {number}: a key file holds digests only, sha256: and 64 hex digits"
            )
    return frozenset(words)


if __name__ == "__main__":
    new = secrets.token_urlsafe(32)
    print(f"key     {new}\ndigest  {digest(new)}")


OPEN = frozenset(
    {"/", "/health", "/health/live"}
)  # a static page without any data in it, and the health checks
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class Gone(Exception):
    """The client left before its body was complete."""


class AuthMiddleware:
    """ASGI middleware. Without `keys` (development) only this machine itself is answered."""

    def __init__(
        self, app: ASGIApp, *, keys: Keys | None, admission: Admission, limits: Limits
    ) -> None:
        self.app = app
        self.keys = keys
        self.admission = admission
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] != "http"
        ):  # no route speaks WebSocket, so what is left is the start and end of the app
            await self.app(scope, receive, send)
            return
        body = b""
        with ExitStack() as held:
            try:
                headers = Headers(scope=scope)
                key = self._caller(scope, headers)
                if scope["method"] == "POST":  # the only method whose body any route reads
                    self._check_length(headers)
                    self.admission.check(key)
                    body = await self._body(key, receive)
                    held.enter_context(self.admission.place(key, len(body)))
            except Gone:
                return
            except APIError as refusal:
                await refusal.response()(scope, receive, send)
                return
            await _until_gone(self.app, scope, body, receive, send)

    def _caller(self, scope: Scope, headers: Headers) -> str:
        """The digest of the caller's key, "" where none is needed. Raises Refusal."""
        if self.keys is None:
            if not _is_local(scope, headers):
                message = "this is a development server: it answers its own machine only, by a loopback address"
                raise APIError(403, message, code="not_local")
            return ""
        if (
            scope["method"] in ("GET", "HEAD")
            and scope["path"].removeprefix(scope.get("root_path", "")) in OPEN
        ):
            return ""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        known = self.keys.match(key.strip()) if scheme.lower() == "bearer" else None
        if known is None:
            raise APIError(
                401,
                "no valid API key; send the header Authorization: Bearer KEY",
                code="invalid_api_key",
            )
        return known

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if (
            not length.isascii()
            or not length.isdigit()
            or int(length[:20]) > self.limits.body_bytes
        ):
            raise _too_large(self.limits.body_bytes)

    async def _body(self, key: str, receive: Receive) -> bytes:
        """Raises Refusal for a body that is too large or too slow, and Gone."""
        parts: list[bytes] = []
        async with self.admission.arrival(key, self.limits.body_s) as arrival:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
                if arrival.size + len(parts[-1]) > self.limits.body_bytes:
                    raise _too_large(self.limits.body_bytes)
                self.admission.grow(arrival, len(parts[-1]))
        return b"".join(parts)


async def _until_gone(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Run the app; cancel it when the client leaves. The app sees the body as one message."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def replayed() -> Message:
        if not pending:
            await gone.wait()
            return {"type": "http.disconnect"}
        return pending.pop()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # what comes of a body that no route reads
        gone.set()

    work = asyncio.ensure_future(app(scope, replayed, send))
    leaving = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((work, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
    if not work.cancelled():
        work.result()


def request_id(headers: Mapping[str, str]) -> str:
    """The caller's x-request-id if it is well-formed, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Both ends are loopback. The Host header is judged too: a name that a web page made point here is not ours."""
    client: tuple[str, int] | None = scope.get("client")
    try:
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:  # a bracket without its pair
        return False
    return (
        client is not None
        and is_loopback(client[0])
        and is_loopback(host)
        and "x-forwarded-for" not in headers
    )


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine reaches."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _too_large(most: int) -> APIError:
    return APIError(413, f"the body is larger than {most} bytes", code="body_too_large", close=True)
