"""Authentication and admission of a request, before its body is parsed.

A request is cancelled when its client disconnects.

API keys are kept as sha256, compared in constant time and never logged. BRIDGEWORK_API_KEYS holds
keys or their `sha256:` digests, separated by commas. A key file holds digests, one a line; `#`
begins a comment. Create a key with `python -m bridgework.serving.auth`.
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
from bridgework.serving import webhook
from bridgework.serving.admission import Admission
from bridgework.serving.errors import APIError
from bridgework.serving.options import RequestLimits

VARIABLE = "BRIDGEWORK_API_KEYS"
OPEN = frozenset(
    {"/", "/health", "/health/ready", "/health/live"}
)  # without a key: a static page, health checks
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class ClientDisconnected(Exception):
    """The client disconnected before its body was complete."""


class AuthMiddleware:
    """ASGI middleware.

    Without `keys` (development) only requests from this machine are answered.
    """

    def __init__(
        self, app: ASGIApp, *, keys: "Keys | None", admission: Admission, limits: RequestLimits
    ) -> None:
        self.app = app
        self.keys = keys
        self.admission = admission
        self.limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # startup and shutdown; no route uses WebSocket
            await self.app(scope, receive, send)
            return
        body = b""
        with ExitStack() as held:
            try:
                headers = Headers(scope=scope)
                key = self._authenticate(scope, headers)
                if scope["method"] == "POST":  # the only method whose body a route reads
                    limit = self._body_limit(key)
                    self._check_length(headers, limit)
                    self.admission.check(key)
                    body = await self._read_body(key, receive, limit)
                    self._check_signature(key, headers, body)
                    held.enter_context(self.admission.slot(key, len(body)))
            except ClientDisconnected:
                return
            except APIError as error:
                await error.response()(scope, receive, send)
                return
            await _run_until_disconnect(self.app, scope, body, receive, send)

    def _authenticate(self, scope: Scope, headers: Headers) -> str:
        """Return the digest of the caller's key, "" if none is required. Raises APIError."""
        if self.keys is None:
            if not _is_local(scope, headers):
                message = (
                    "the development server (dev=true) answers its own machine only. "
                    "Fix: call it by a loopback address"
                )
                raise APIError(403, message, code="not_local")
            return ""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["method"] in ("GET", "HEAD") and path in OPEN:
            return ""
        signed = "x-mlflow-signature" in headers and self.keys.webhook_secret is not None
        if scope["method"] == "POST" and path == webhook.PATH and signed:
            return webhook.PATH  # its body is checked before the route sees it
        scheme, _, key = headers.get("authorization", "").partition(" ")
        known = self.keys.match(key.strip()) if scheme.lower() == "bearer" else None
        if known is None:
            message = "no valid API key. Fix: send the header Authorization: Bearer KEY"
            raise APIError(401, message, code="invalid_api_key")
        return known

    def _body_limit(self, key: str) -> int:
        allowed = self.limits.body_bytes
        return min(allowed, webhook.MAX_BYTES) if key == webhook.PATH else allowed

    def _check_signature(self, key: str, headers: Headers, body: bytes) -> None:
        """Raise APIError (401) for an event of a webhook that MLflow did not sign."""
        if key == webhook.PATH and self.keys is not None and self.keys.webhook_secret is not None:
            webhook.check_signature(self.keys.webhook_secret, headers, body)

    def _check_length(self, headers: Headers, limit: int) -> None:
        """Raise APIError (413) for a content-length that is too large or not a number."""
        length = headers.get("content-length", "0")
        is_number = length.isascii() and length.isdigit()
        if not is_number or int(length[:20]) > limit:
            raise _too_large(limit)

    async def _read_body(self, key: str, receive: Receive, limit: int) -> bytes:
        """Return the body.

        Raises APIError if it is too large or too slow, and ClientDisconnected.
        """
        parts: list[bytes] = []
        async with self.admission.arrival(key, self.limits.body_s) as arrival:
            more = True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnected
                parts.append(message.get("body", b""))
                more = message.get("more_body", False)
                if arrival.size + len(parts[-1]) > limit:
                    raise _too_large(limit)
                self.admission.grow(arrival, len(parts[-1]))
        return b"".join(parts)


async def _run_until_disconnect(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Run the app; cancel it when the client disconnects. The app gets the body as one message."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    disconnected = asyncio.Event()

    async def replay() -> Message:
        if not pending:
            await disconnected.wait()
            return {"type": "http.disconnect"}
        return pending.pop()

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass  # parts of a body that no route reads
        disconnected.set()

    work = asyncio.ensure_future(app(scope, replay, send))
    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
    finally:
        watching.cancel()
        if not work.done():
            work.cancel()
            await asyncio.wait((work,))
    if not work.cancelled():
        work.result()


class Keys:
    """The accepted API keys of an app, as digests, and the secret of MLflow's webhook."""

    def __init__(self, digests: frozenset[str], webhook_secret: bytes | None = None) -> None:
        self._digests = digests
        self.webhook_secret = webhook_secret

    def __len__(self) -> int:
        return len(self._digests)

    def match(self, key: str) -> str | None:
        """Return the digest of an accepted key, else None; the time does not depend on the key."""
        given = digest(key)
        # a list, not a generator: every digest is compared
        return next(
            iter([known for known in sorted(self._digests) if compare_digest(given, known)]), None
        )

    @classmethod
    def load(cls, file: str | None) -> "Keys":
        """Read the key file if one is given, else the environment. Raises SpecError for no keys."""
        digests = _from_file(Path(file)) if file else _from_environment()
        keys = cls(digests, webhook.secret_from_environment())
        if not len(keys):
            raise SpecError(
                f"no API key. Fix: set {VARIABLE}, or keys=FILE with one sha256: digest a line, "
                "or dev=true for a server that needs no key and answers this machine only"
            )
        return keys


def digest(key: str) -> str:
    """Return `sha256:` and 64 hex digits. Keys are long and random, so a slow hash adds nothing."""
    return "sha256:" + hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def _from_environment() -> frozenset[str]:
    keys = [key.strip() for key in os.environ.get(VARIABLE, "").split(",") if key.strip()]
    return frozenset(key if _DIGEST.fullmatch(key) else digest(key) for key in keys)


def _from_file(path: Path) -> frozenset[str]:
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise SpecError(
            f"keys={path} cannot be read: {error.strerror}. Fix: give a readable file"
        ) from None
    digests = [line for line in lines if line]
    for number, line in enumerate(digests, 1):
        if not _DIGEST.fullmatch(line):  # the message leaves the line out: it may be a key
            raise SpecError(
                f"{path}, key {number}: a key file holds digests only. "
                "Expected sha256: and 64 hex digits"
            )
    return frozenset(digests)


def request_id(headers: Mapping[str, str]) -> str:
    """Return the caller's x-request-id if it is well-formed, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid4().hex


def is_loopback(host: str) -> bool:
    """Return True for an address that only this machine reaches."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _is_local(scope: Scope, headers: Headers) -> bool:
    """Return True if client and Host header are loopback.

    The Host header is checked because a web page can point its own name at 127.0.0.1 (DNS
    rebinding).
    """
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


def _too_large(limit: int) -> APIError:
    message = f"the body is too large. Expected at most {limit} bytes"
    return APIError(413, message, code="body_too_large", close=True)


if __name__ == "__main__":
    new = secrets.token_urlsafe(32)
    print(f"key     {new}\ndigest  {digest(new)}")
