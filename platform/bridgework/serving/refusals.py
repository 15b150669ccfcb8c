"""How a request is refused: one exception, one JSON shape (OpenAI's), one table from what went wrong to a status."""

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from bridgework.errors import BridgeworkError, DataError

RETRY_AFTER_S = 1
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(DataError):
    """A request that is answered with an error: HTTP status, code and the field at fault beside the message."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}, as the OpenAI clients read it."""
        kind = _KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def busy() -> Refusal:
    return Refusal(429, f"every place is taken; try again in {RETRY_AFTER_S} s", code="overloaded")


def of(error: BaseException) -> Refusal:
    """The refusal that an exception from a model replica becomes; what is not the client's doing tells no detail."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, Refusal):
        return cause
    if isinstance(cause, DataError):
        return Refusal(400, str(cause), code="invalid_request")
    if isinstance(cause, BackPressureError):
        return busy()
    if isinstance(cause, TimeoutError):
        return Refusal(504, "the model did not answer in time; ask for fewer tokens or try again", code="timeout")
    if isinstance(cause, RayActorError | DeploymentUnavailableError):
        return Refusal(503, "the model is restarting; try again", code="model_unavailable")
    if isinstance(cause, BridgeworkError):
        return Refusal(500, str(cause), code="model_error")
    return Refusal(500, f"the server failed ({type(cause).__name__}); its log has the reason", code="internal_error")


def of_validation(error: RequestValidationError) -> Refusal:
    """The first thing that is wrong with a body, by its path: `messages.0.content.1.image_url.url`."""
    first = error.errors()[0]
    param = _path(first["loc"])
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    if first["type"] == "extra_forbidden":
        return Refusal(
            400, f"{param}: this server does not know or support it; leave it out", code="unknown", param=param
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    return Refusal(400, f"{param}: {message}" if param else message, code="invalid_value", param=param or None)


def _path(where: Sequence[str | int]) -> str:
    return ".".join(str(step) for step in where[1:])
