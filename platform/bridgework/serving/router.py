"""Router: selects the model of a request and calls its replica.

If the replica dies before the first byte of the answer, the call is repeated once.
"""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from bridgework.errors import suggest
from bridgework.serving.errors import APIError, from_exception

TRIES = 2  # calls of a replica per request


@dataclass(frozen=True)
class ServedModel:
    """One model of an app."""

    id: str  # of the deployment; part of the id of every answer
    app: str
    model: str  # as clients name it
    version: str  # "" for a plain folder
    artifact: str
    digest: str
    tiled: bool = False  # images are cut into tiles; their number depends on the image size

    @property
    def pinned(self) -> str:
        """The name that always selects this model, for any share of the challenger."""
        return f"{self.model}:{self.version}" if self.version else self.model


class Router:
    """The models of one app: the champion, and optionally a challenger with a share of requests."""

    def __init__(
        self,
        handles: Sequence[tuple[ServedModel, DeploymentHandle[Any]]],
        share: float,
        timeout_s: float,
    ) -> None:
        self.champion = handles[0][0]
        self.challenger = handles[1][0] if len(handles) > 1 else None
        self._handles: Mapping[str, DeploymentHandle[Any]] = {
            served.id: handle for served, handle in handles
        }
        self._share = share
        self._timeout_s = timeout_s

    def names(self) -> list[str]:
        """Return the valid values of `model`: the champion's name and all pinned names."""
        served = [m for m in (self.champion, self.challenger) if m is not None]
        return list(dict.fromkeys([self.champion.model, *(m.pinned for m in served)]))

    def choose(self, model: str, request_id: str) -> ServedModel:
        """Return the model for a request; equal request ids get the same one.

        Raises APIError (404) for an unknown name.
        """
        if model == self.champion.model:
            if self.challenger is not None and hash_uniform(request_id) < self._share:
                return self.challenger
            return self.champion
        for served in (self.champion, self.challenger):
            if served is not None and model == served.pinned:
                return served
        raise self.unknown_model(model)

    def unknown_model(self, model: str) -> APIError:
        """Return the error 404 for a model that this app does not serve."""
        message = f"model: not served here. Got {model!r}{suggest(model, self.names())}"
        return APIError(404, message, code="model_not_found", param="model")

    async def call(self, served: ServedModel, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return a replica's answer. Raises APIError."""
        for left in reversed(range(TRIES)):
            answer = getattr(self._handles[served.id], method).remote(*args, **kwargs)
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await answer
            except asyncio.CancelledError:  # the client disconnected
                answer.cancel()
                raise
            except RayActorError as error:
                if not left:
                    raise from_exception(error) from error
            except Exception as error:
                if isinstance(error, TimeoutError):  # the replica still works on it
                    answer.cancel()
                raise from_exception(error) from error
        raise AssertionError("the last try returns or raises")

    async def stream(
        self, served: ServedModel, method: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield a replica's pieces; closing the generator cancels the replica's work.

        Raises APIError. There is no retry after the first piece.
        """
        for left in reversed(range(TRIES)):
            started = False
            pieces = getattr(self._handles[served.id].options(stream=True), method).remote(
                *args, **kwargs
            )
            try:
                while True:
                    async with asyncio.timeout(self._timeout_s):
                        piece = await anext(pieces)
                    started = True
                    yield piece
            except StopAsyncIteration:
                return
            except (asyncio.CancelledError, GeneratorExit):  # the client disconnected
                pieces.cancel()
                raise
            except RayActorError as error:
                if started or not left:
                    raise from_exception(error) from error
            except Exception as error:
                if isinstance(error, TimeoutError):
                    pieces.cancel()
                raise from_exception(error) from error


def hash_uniform(request_id: str) -> float:
    """Return a number in [0, 1) that depends on the request id alone."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") / 2**64
