"""Errors of the HTTP API: one exception, OpenAI's JSON, and the table from exceptions to statuses."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from bridgework.errors import BridgeworkError, DataError, SpecError

RETRY_AFTER_S = 1
PARAM_CHARS = 200
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(DataError):
    """A request that is answered with an error: the HTTP status, OpenAI's code, and the field that is wrong.

    With `close` the connection ends with the answer.
    """

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.close = close

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (self.status, str(self), self.code, self.param, self.close)

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}, as the OpenAI clients read it."""
        kind = _TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        param = None if self.param is None else _encodable(self.param[:PARAM_CHARS])
        return {
            "error": {
                "message": _encodable(str(self)),
                "type": kind,
                "param": param,
                "code": self.code,
            }
        }

    def response(self) -> JSONResponse:
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


def _rebuilt(status: int, message: str, code: str, param: str | None, close: bool) -> APIError:
    return APIError(status, message, code=code, param=param, close=close)


def _encodable(text: str) -> str:
    """The text with half characters replaced: JSON input can hold them, and UTF-8 output cannot."""
    return text.encode(errors="replace").decode()


def shown(value: Any) -> str:
    """A short form of a JSON value for a message."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        text = (
            json.dumps(value)
            if len(value) == 1 and all(isinstance(v, str) for v in value.values())
            else ""
        )
        return text if 0 < len(text) <= 60 else "an object"
    if isinstance(value, str) and len(value) > 40:
        return f"{json.dumps(value[:30])}.. of {len(value)} characters"
    text = (
        json.dumps(value)
        if isinstance(value, str | int | float | bool | None)
        else type(value).__name__
    )
    return text if len(text) <= 60 else f"{text[:40]}.."


def busy(*, close: bool = False) -> APIError:
    message = f"every place is taken. Fix: try again in {RETRY_AFTER_S} s"
    return APIError(429, message, code="overloaded", close=close)


def of(error: BaseException) -> APIError:
    """The refusal for an exception from a model replica. What the client did not cause is reported without details."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, APIError):
        return cause
    if isinstance(cause, DataError):
        return APIError(400, str(cause), code="invalid_request")
    if isinstance(cause, SpecError):  # the model cannot do what the request asks for
        return APIError(400, str(cause), code="unsupported")
    if isinstance(cause, BackPressureError):
        return busy()
    if isinstance(cause, TimeoutError):
        return APIError(
            504,
            "the model did not answer in time. Fix: ask for fewer tokens, or try again",
            code="timeout",
        )
    if isinstance(cause, RayActorError | DeploymentUnavailableError):
        return APIError(503, "the model is restarting. Fix: try again", code="model_unavailable")
    if isinstance(cause, BridgeworkError):
        return APIError(500, str(cause), code="model_error")
    return APIError(
        500,
        f"the server failed ({type(cause).__name__}); its log has the reason",
        code="internal_error",
    )


# --- validation ------------------------------------------------------------------------------------------------------

_EXPECTED = {  # by pydantic's error type; {} are of its context
    "string_type": "a string",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a whole number of 64 bits",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "literal_error": "{expected}",
    "union_tag_invalid": "{expected_tags}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "at least {min_length}",
    "too_long": "at most {max_length}",
}


def of_validation(error: RequestValidationError) -> APIError:
    """The first error in a body, with its path in the body: `messages.0.content.1.image_url.url`."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return APIError(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    where, context = first["loc"][1:], first.get("ctx", {})
    missing = first["type"] == "missing"
    path = _path(where, error.body, missing)
    cause = context.get("error")
    if isinstance(cause, APIError):
        param = ".".join(filter(None, (path, cause.param)))
        message = f"{path}.{cause}" if path else str(cause)
        return APIError(cause.status, message, code=cause.code, param=param)
    return APIError(
        400,
        f"{path or 'the body'}: {_wrong(first, where)}",
        code="invalid_value",
        param=path or None,
    )


def _wrong(first: Mapping[str, Any], where: Sequence[Any]) -> str:
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return "missing. Fix: add it"
    if kind == "union_tag_not_found":
        return "the field 'type' is missing. Fix: add it"
    if "error" in context:
        return str(context["error"])
    expected = _EXPECTED.get(kind, "another value").format_map(context)
    if kind == "list_type" and where[-1:] == ("list",):  # the branch of what may be a string too
        expected = "a string or a list"
    given = repr(context["tag"]) if kind == "union_tag_invalid" else shown(first["input"])
    return f"invalid value. Got {given}; expected {expected}"


def _path(where: Sequence[str | int], body: Any, missing: bool) -> str:
    """The steps of a location that lead through the body; pydantic writes its own branches between them."""
    steps: list[str] = []
    node = body
    for i, step in enumerate(where):
        within = isinstance(step, int) and step < len(node) if isinstance(node, list) else False
        if within or (isinstance(node, dict) and step in node):
            node = node[step]
        elif not (missing and i == len(where) - 1):
            continue
        steps.append(str(step))
    return ".".join(steps)
