"""JSON bodies: limited before they are parsed, and parsed strictly.

FastAPI alone would parse any number of values on the event loop, and keep the second of two equal
names.
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

MAX_VALUES = 100_000  # per body, estimated; the text of a request may have 65,536 commas itself
# Each value, except the first of its list or object, follows a separator. Base64 has none of them.
_SEPARATORS = (b"[", b"{", b",")
# A surrogate as an escape or in bytes. Most come in pairs, which are valid.
_SURROGATES = re.compile(rb"\\u[dD]|\xed[\xa0-\xbf]")


class JSONRoute(APIRoute):
    """A route whose body is parsed by `parse`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def parse_and_handle(request: Request) -> Response:
            if self.body_field is not None:
                _check_type(request.headers.get("content-type", ""))
            return await handle(_Request(request.scope, request.receive))

        return parse_and_handle


class _Request(Request):
    async def json(self) -> Any:
        return parse(await self.body())


def parse(body: bytes) -> Any:
    """Return the value of a JSON text.

    Raises json.JSONDecodeError, and APIError (400) for too many values, a repeated name, nesting
    that is too deep, and a lone surrogate.
    """
    values = sum(map(body.count, _SEPARATORS))
    if values > MAX_VALUES:
        message = f"the body: too many values. Got about {values}; expected at most {MAX_VALUES}"
        raise APIError(400, message, code="too_many")
    try:
        value = json.loads(body, object_pairs_hook=_object)
        if _SURROGATES.search(body):
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
    """Return the pairs as a dict. Raises APIError (400) for a repeated name."""
    values = dict(pairs)
    if len(values) < len(pairs):
        (name, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise APIError(
            400, f"{name[:64]}: given twice. Fix: leave one out", code="invalid_value", param=name
        )
    return values


def _check_type(given: str) -> None:
    """Raise APIError (415) for a content-type that is not JSON."""
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (
        kind.startswith("application/") and kind.endswith("+json")
    ):
        message = f"content-type: not JSON. Got {given[:60]!r}; expected application/json"
        raise APIError(415, message, code="unsupported_media_type")
