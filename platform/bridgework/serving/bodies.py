"""JSON bodies: bounded before they are parsed, and parsed without loss.

FastAPI would parse any number of values on the event loop, and of a name that is given twice keep the second.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from bridgework.serving.errors import APIError

MAX_VALUES = 100_000  # of one body; the text of a request may hold 65,536 commas of its own
_SEPARATORS = (
    b"[",
    b"{",
    b",",
)  # every value but the first of its list or object follows one; base64 has none
_HALVES = re.compile(
    rb"\\u[dD]|\xed[\xa0-\xbf]"
)  # of a character, as an escape or in bytes; most come in pairs


class JSONRoute(APIRoute):
    """A route whose body is read by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            if self.body_field is not None:
                _check_type(request.headers.get("content-type", ""))
            return await handle(_Request(request.scope, request.receive))

        return read


class _Request(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def parse(body: bytes) -> Any:
    """The value that a JSON text holds.

    Raises json.JSONDecodeError, and Refusal (400) for too many values, a name given twice, nesting too deep, and half
    a character.
    """
    values = sum(map(body.count, _SEPARATORS))
    if values > MAX_VALUES:
        message = f"the body: too many values. Got about {values}; expected at most {MAX_VALUES}"
        raise APIError(400, message, code="too_many")
    try:
        value = json.loads(body, object_pairs_hook=_object)
        if _HALVES.search(body):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise APIError(
            400, "the body: half a character (a lone surrogate)", code="invalid_value"
        ) from None
    except (json.JSONDecodeError, APIError):
        raise
    except RecursionError:
        raise APIError(400, "the body: nested too deep", code="invalid_request") from None
    except ValueError as error:  # a number of thousands of digits, or bytes that are not UTF-8
        raise APIError(
            400, f"the body is not JSON: {str(error)[:100]}", code="invalid_request"
        ) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise APIError(
            400, f"{twice[:64]}: given twice. Fix: leave one out", code="invalid_value", param=twice
        )
    return found


def _check_type(given: str) -> None:
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        message = f"content-type: not JSON. Got {given[:60]!r}; expected application/json"
        raise APIError(415, message, code="unsupported_media_type")
