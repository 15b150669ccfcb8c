"""Router: selects the model of a request and calls its replica.

If the replica dies before the first byte of the answer, the call is repeated once. The outcome of
every call is reported to `observe`.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from bridgework.errors import suggest
from bridgework.serving.canary import Group
from bridgework.serving.errors import APIError, from_exception
from bridgework.serving.protocol import Answer

if TYPE_CHECKING:  # it imports torch, which a gateway does not need
    from bridgework.inference.preprocess import ImageFile

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


@dataclass(frozen=True)
class Route:
    """The model of one request, and its group in the comparison of champion and challenger."""

    served: ServedModel
    group: Group | None = None
    image: str = ""  # digest; equal ones prefer the same replica (affinity.py)

    @property
    def id(self) -> str:
        return self.served.id

    @property
    def tiled(self) -> bool:
        return self.served.tiled

    def about(self, images: "Sequence[ImageFile]") -> "Route":
        """Return the route of a request about `images`; the first one selects the replica."""
        if not images:
            return self
        first = images[0] if isinstance(images[0], bytes) else images[0][0]
        return replace(self, image=hashlib.sha256(first).hexdigest()[:16])


@dataclass(frozen=True)
class Outcome:
    """A finished call of a replica."""

    route: Route
    method: str
    seconds: float  # until the last piece of the answer
    result: Literal["ok", "error", "cancelled"]  # cancelled: its client disconnected


class Router:
    """The models of one app: the champion, and optionally a challenger with a share of requests."""

    def __init__(
        self,
        handles: Sequence[tuple[ServedModel, DeploymentHandle[Any]]],
        share: float,
        timeout_s: float,
    ) -> None:
        self.share = share
        self.observe: Callable[[Outcome], None] = lambda outcome: None
        self._timeout_s = timeout_s
        self._handles: dict[str, DeploymentHandle[Any]] = {}
        self._running: Counter[str] = Counter()  # calls by the id of the model
        self._models: tuple[ServedModel, ...] = ()
        self.switch(handles)

    def switch(self, handles: Sequence[tuple[ServedModel, DeploymentHandle[Any]]]) -> None:
        """Send new requests to these models (champion, challenger); the handles of others stay."""
        self._models = tuple(served for served, _ in handles)
        self._handles |= {served.id: handle for served, handle in handles}

    def forget(self, served: ServedModel) -> None:
        """Drop the handle of a model that is no longer selected."""
        self._handles.pop(served.id, None)

    @property
    def champion(self) -> ServedModel:
        """The champion. Raises APIError (503) while it is loading."""
        if not self._models:
            raise APIError(503, "the model is loading. Fix: try again", code="not_ready")
        return self._models[0]

    @property
    def challenger(self) -> ServedModel | None:
        return self._models[1] if len(self._models) > 1 else None

    @property
    def roles(self) -> Mapping[str, ServedModel]:
        """The models by role, champion first."""
        return dict(zip(("champion", "challenger"), self._models, strict=False))

    def has(self, served: ServedModel) -> bool:
        """Return True if there is a handle of a model."""
        return served.id in self._handles

    def handle(self, served: ServedModel) -> DeploymentHandle[Any]:
        return self._handles[served.id]

    def running(self, served: ServedModel) -> int:
        """Return the number of calls of a model that have not ended."""
        return self._running[served.id]

    def names(self) -> list[str]:
        """Return the valid values of `model`: the champion's name and all pinned names."""
        return list(dict.fromkeys([self.champion.model, *(m.pinned for m in self._models)]))

    def choose(self, model: str, request_id: str) -> Route:
        """Return the model for a request; equal request ids get the same one.

        A share of the requests gets the challenger. An equal share, of which the champion answers
        every one, is the baseline. Raises APIError (404) for an unknown name.
        """
        if model == self.champion.model:
            if self.challenger is None or not self.share:
                return Route(self.champion)
            place = hash_uniform(request_id)
            if place < self.share:
                return Route(self.challenger, "challenger")
            return Route(self.champion, "baseline" if place < 2 * self.share else None)
        for served in self._models:
            if model == served.pinned:
                return Route(served)
        raise self.unknown_model(model)

    def unknown_model(self, model: str) -> APIError:
        """Return the error 404 for a model that this app does not serve."""
        message = f"model: not served here. Got {model!r}{suggest(model, self.names())}"
        return APIError(404, message, code="model_not_found", param="model")

    async def call(self, route: Route, method: str, *args: Any, **kwargs: Any) -> Any:
        """Return a replica's answer. Raises APIError."""
        with self._observed(route, method) as handle:
            for left in reversed(range(TRIES)):
                near = handle.options(session_id=route.image)
                answer = getattr(near, method).remote(*args, **kwargs)
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
        self, route: Route, method: str, *args: Any, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield a replica's pieces; closing the generator cancels the replica's work.

        Raises APIError. There is no retry after the first piece.
        """
        with self._observed(route, method) as handle:
            for left in reversed(range(TRIES)):
                started, piece = False, None
                near = handle.options(stream=True, session_id=route.image)
                pieces = getattr(near, method).remote(*args, **kwargs)
                try:
                    while True:
                        async with asyncio.timeout(self._timeout_s):
                            piece = await anext(pieces)
                        started = True
                        yield piece
                except StopAsyncIteration:
                    return
                except GeneratorExit:  # closed by its reader
                    pieces.cancel()
                    if not isinstance(piece, Answer):  # which is the last piece
                        raise
                    return
                except asyncio.CancelledError:  # the client disconnected
                    pieces.cancel()
                    raise
                except RayActorError as error:
                    if started or not left:
                        raise from_exception(error) from error
                except Exception as error:
                    if isinstance(error, TimeoutError):
                        pieces.cancel()
                    raise from_exception(error) from error

    @contextmanager
    def _observed(self, route: Route, method: str) -> Iterator[DeploymentHandle[Any]]:
        """Give the handle of a call, and report its outcome."""
        handle = self._handles.get(route.id)
        if handle is None:  # replaced since the request was routed
            raise APIError(503, "the model was replaced. Fix: try again", code="model_unavailable")
        started = time.monotonic()
        result: Literal["ok", "error", "cancelled"] = "ok"
        self._running[route.id] += 1
        try:
            yield handle
        except (asyncio.CancelledError, GeneratorExit):
            result = "cancelled"
            raise
        except BaseException:
            result = "error"
            raise
        finally:
            self._running[route.id] -= 1
            self.observe(Outcome(route, method, time.monotonic() - started, result))


def hash_uniform(request_id: str) -> float:
    """Return a number in [0, 1) that depends on the request id alone."""
    return int.from_bytes(hashlib.sha256(request_id.encode()).digest()[:8], "big") / 2**64
