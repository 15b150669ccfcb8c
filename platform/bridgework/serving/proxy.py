"""Middleware of Serve's HTTP proxies: writes Serve's own errors in the form of the apps' errors.

Serve's own errors are plain text (404 without an app, 408, 429, 500, 503), and /-/routes lists the
apps to everyone. The proxies load `middlewares` if VARIABLE has the value IMPORT_PATH in the
environment of Serve's controller.
"""

from collections.abc import Mapping

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bridgework.serving.errors import APIError

VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
IMPORT_PATH = f"{__name__}:middlewares"
CONTROLLER = {"runtime_env": {"env_vars": {VARIABLE: IMPORT_PATH}}}  # `controller_options` of Serve

_HIDDEN = "/-/routes"
_NO_CANCEL = b"x-request-disconnect-disabled"  # keeps a request running without its client
_REASONS: Mapping[int, tuple[str, str]] = {  # status -> code, message
    400: ("invalid_request", "the request is not valid HTTP, or not allowed"),
    404: ("not_found", "no app is served at this path"),
    408: ("timeout", "the server did not answer in time. Fix: try again"),
    429: ("overloaded", "every slot is taken. Fix: try again"),
    503: ("model_unavailable", "the server is starting or restarting. Fix: try again"),
}


def middlewares() -> list[Middleware]:
    """Return the middlewares of a proxy; Serve calls this in every proxy."""
    return [Middleware(OpenAIErrors)]


class OpenAIErrors:
    """ASGI middleware that writes plain-text errors as OpenAI-style JSON, with the same status."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["path"] == _HIDDEN:
            await _error(404).response()(scope, receive, send)
            return
        plain: int | None = None  # status of an error in plain text, whose body is dropped
        started = False

        async def answer(message: Message) -> None:
            nonlocal plain, started
            if message["type"] == "http.response.start":
                started = True
                kind = Headers(raw=message["headers"]).get("content-type", "")
                if message["status"] >= 400 and kind.startswith("text/plain"):
                    plain = message["status"]
            if plain is None:
                await send(message)

        headers = [pair for pair in scope["headers"] if pair[0].lower() != _NO_CANCEL]
        await self.app({**scope, "headers": headers}, receive, answer)
        if plain is not None or not started:
            await _error(plain or 500).response()(scope, receive, send)


def _error(status: int) -> APIError:
    code, message = _REASONS.get(
        status, ("internal_error", "the server failed. Fix: look into its log")
    )
    return APIError(status, message, code=code)
