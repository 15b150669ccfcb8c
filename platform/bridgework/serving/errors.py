"""Errors of the HTTP API: APIError in OpenAI's JSON, and the conversion of other exceptions."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from bridgework.errors import BridgeworkError, DataError, SpecError

RETRY_AFTER_S = 1
PARAM_CHARS = 200  # a longer `param` is cut
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class APIError(DataError):
    """An error answer to a request: the HTTP status, OpenAI's code, and the wrong field (`param`).

    With `close` the connection is closed after the answer.
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
        return _rebuild, (self.status, str(self), self.code, self.param, self.close)

    def body(self) -> dict[str, Any]:
        """Return {"error": {"message", "type", "param", "code"}}, as OpenAI's clients read it."""
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
        """Return the HTTP answer, with Retry-After for 429 and 503."""
        headers = {"retry-after": str(RETRY_AFTER_S)} if self.status in (429, 503) else {}
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.close:
            headers["connection"] = "close"
        return JSONResponse(self.body(), self.status, headers)


def _rebuild(status: int, message: str, code: str, param: str | None, close: bool) -> APIError:
    return APIError(status, message, code=code, param=param, close=close)


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON input can have and UTF-8 output cannot."""
    return text.encode(errors="replace").decode()


def summarize(value: Any) -> str:
    """Return a short form of a JSON value for a message."""
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
    """Return the error 429 for a request that finds no free slot."""
    message = f"every slot is taken. Fix: try again in {RETRY_AFTER_S} s"
    return APIError(429, message, code="overloaded", close=close)


def from_exception(error: BaseException) -> APIError:
    """Return the APIError for an exception of a replica, without details if it is unexpected."""
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
        f"the server failed ({type(cause).__name__}). Fix: look into its log",
        code="internal_error",
    )


_EXPECTED = {  # by pydantic's error type; {} are fields of its context
    "string_type": "a string",
    "string_too_short": "at least {min_length} characters",
    "string_too_long": "at most {max_length} characters",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "int_parsing_size": "an integer of 64 bits",
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


def from_validation_error(error: RequestValidationError) -> APIError:
    """Return the first error of a body, with its path, e.g.

    `messages.0.content.1.image_url.url`.
    """
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
        f"{path or 'the body'}: {_reason(first, where)}",
        code="invalid_value",
        param=path or None,
    )


def _reason(first: Mapping[str, Any], where: Sequence[Any]) -> str:
    """Return a sentence about the error, without pydantic's terms."""
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return "missing. Fix: add it"
    if kind == "union_tag_not_found":
        return "the field 'type' is missing. Fix: add it"
    if "error" in context:
        return str(context["error"])
    expected = _EXPECTED.get(kind, "another value").format_map(context)
    if kind == "list_type" and where[-1:] == ("list",):  # a union of a string and a list
        expected = "a string or a list"
    given = repr(context["tag"]) if kind == "union_tag_invalid" else summarize(first["input"])
    return f"invalid value. Got {given}; expected {expected}"


def _path(where: Sequence[str | int], body: Any, missing: bool) -> str:
    """Return the dotted path of a location in the body, without pydantic's union branches."""
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
