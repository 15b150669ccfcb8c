"""The choice of the model for a request, and a second try when a replica dies before a byte was sent."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from bridgework.errors import suggest
from bridgework.serving import errors as refusals
from bridgework.serving.errors import APIError

TRIES = 2


@dataclass(frozen=True)
class ServedModel:
    """One model of an app: `id` is the deployment's, and part of the id of every answer."""

    id: str
    app: str
    model: str  # as clients name it
    version: str  # "" for a plain folder
    artifact: str
    digest: str
    tiled: bool = False  # images are cut into tiles: their number depends on the size of an image

    @property
    def pinned(self) -> str:
        """The name that always means this model, whatever the challenger's share."""
        return f"{self.model}:{self.version}" if self.version else self.model


class Router:
    """The models of one app: the champion, and perhaps a challenger that takes a share of its requests."""

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
        """What `model` of a request may be: the champion's name, and the name that pins each model."""
        served = [m for m in (self.champion, self.challenger) if m is not None]
        return list(dict.fromkeys([self.champion.model, *(m.pinned for m in served)]))

    def choose(self, model: str, request_id: str) -> ServedModel:
        """The same model for the same request id, always. Raises Refusal (404) for an unknown name."""
        if model == self.champion.model:
            taken = self.challenger is not None and place(request_id) < self._share
            return self.challenger if taken and self.challenger is not None else self.champion
        for served in (self.champion, self.challenger):
            if served is not None and model == served.pinned:
                return served
        message = f"there is no model {model!r} here" + suggest(model, self.names())
        raise APIError(404, message, code="model_not_found", param="model")

    async def call(self, served: ServedModel, method: str, *args: Any, **kwargs: Any) -> Any:
        """A replica's answer. Raises Refusal."""
        for left in reversed(range(TRIES)):
            answer = getattr(self._handles[served.id], method).remote(*args, **kwargs)
            try:
                async with asyncio.timeout(self._timeout_s):
                    return await answer
            except asyncio.CancelledError:  # the client left
                answer.cancel()
                raise
            except RayActorError as error:
                if not left:
                    raise refusals.of(error) from error
            except Exception as error:
                if isinstance(error, TimeoutError):  # the replica is still at work; else nothing is
                    answer.cancel()
                raise refusals.of(error) from error
        raise AssertionError("the last try returns or raises")

    async def stream(
        self, served: ServedModel, method: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """A replica's pieces. Raises Refusal; a replica that dies after the first piece is not tried again.

        Closing it ends the replica's work.
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
            except (asyncio.CancelledError, GeneratorExit):  # the client left
                pieces.cancel()
                raise
            except RayActorError as error:
                if started or not left:
                    raise refusals.of(error) from error
            except Exception as error:
                if isinstance(error, TimeoutError):
                    pieces.cancel()
                raise refusals.of(error) from error


def place(request_id: str) -> float:
    """A number in [0, 1) that is the request id's own."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") / 2**64
