"""Gateway of an app: the ingress deployment, with HTTP, authentication and validation.

It holds no weights and imports no torch, so it starts fast, and a model that dies closes no
connection.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bridgework import ray_utils
from bridgework.errors import TrackingError
from bridgework.serving.admission import Admission
from bridgework.serving.auth import AuthMiddleware, Keys
from bridgework.serving.errors import APIError, from_exception, from_validation_error
from bridgework.serving.metrics import CONTENT_TYPE, Exposition, GatewayMetrics
from bridgework.serving.options import Options
from bridgework.serving.protocol import model_card
from bridgework.serving.readiness import Readiness
from bridgework.serving.rollout import Rollout
from bridgework.serving.router import Router, ServedModel
from bridgework.serving.webhook import webhook_routes

Routes = Callable[[Router, Options], APIRouter]
_CODES = {404: "not_found", 405: "method_not_allowed"}


class Gateway:
    """Ingress deployment: `routes` over the models `served`, called by their `handles`."""

    def __init__(
        self,
        app: str,
        version: str,
        routes: Routes,
        options: Options,
        keys: Keys | None,
        served: Sequence[ServedModel],
        *handles: DeploymentHandle[Any],
    ) -> None:
        """version: of bridgework in the command; RunError on a node with another."""
        ray_utils.check_version(version)
        self._options, self._keys, self._routes = options, keys, routes
        self._router = Router(
            list(zip(served, handles, strict=True)), options.share, options.timeout_s
        )
        self._metrics = GatewayMetrics()
        name = serve.get_replica_context().app_name
        self._rollout = Rollout(app, name, options, self._router, self._metrics)
        self._admission = Admission(
            slots=options.slots,
            per_key=options.slots_per_key(0 if keys is None else len(keys)),
            held_bytes=options.held_bytes,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the ASGI app; Serve calls this in the replica, after `__init__`."""
        return build(
            self._routes(self._router, self._options),
            self._router,
            self._options,
            self._keys,
            self._admission,
            Readiness(self._router).missing,
            Exposition(self._router, self._metrics).text,
            partial(self._rollout.ask, "trace"),
            self._rollout.look,
            self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Load models that follow an alias, and do the background work while the app runs."""
        await self._rollout.start()
        work = asyncio.create_task(self._rollout.run())
        yield
        work.cancel()
        await asyncio.wait((work,))
        await self._rollout.stop()

    async def traffic(self, share: float | None = None) -> dict[str, Any]:
        """Return the models and their shares, after setting the challenger's if it is given.

        Raises SpecError.
        """
        if share is not None:
            self._rollout.set_share(share)
        return self._rollout.state()

    async def running(self) -> int:
        """Return the number of requests that hold a slot."""
        return self._admission.running

    async def drain(self, limit_s: float) -> int:
        """Refuse new requests and wait for the running ones, as `Admission.drain`."""
        return await self._admission.drain(limit_s)


def build(
    routes: APIRouter,
    router: Router,
    options: Options,
    keys: Keys | None,
    admission: Admission,
    missing: Callable[[], Awaitable[Sequence[str]]],
    metrics: Callable[[], Awaitable[bytes]],
    trace: Callable[[str], Awaitable[dict[str, Any]]],
    moved: Callable[[], bool],
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """Return the ASGI app. Every error has OpenAI's form, including FastAPI's own.

    `missing` returns the models without a running replica, `metrics` the text of GET /metrics,
    `trace` the lineage of an answer. `moved` starts a look at the aliases (webhook.py).
    """
    # FastAPI's documentation pages are off, because they load scripts from other hosts.
    api = FastAPI(title="bridgework", docs_url=None, redoc_url=None, lifespan=lifespan)
    api.include_router(_common(router, admission, missing, metrics, trace))
    api.include_router(webhook_routes(moved))
    api.include_router(routes)
    answer_errors(api)
    api.add_middleware(AuthMiddleware, keys=keys, admission=admission, limits=options.limits)
    # CORS is outside of authentication: a preflight has no key, and a page may read its error.
    if options.cors:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=options.cors,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )
    return api


def answer_errors(api: FastAPI) -> None:
    """Answer every exception in OpenAI's form."""
    for kind in (APIError, RequestValidationError, HTTPException, Exception):
        api.add_exception_handler(kind, _answer)


def _common(
    router: Router,
    admission: Admission,
    missing: Callable[[], Awaitable[Sequence[str]]],
    metrics: Callable[[], Awaitable[bytes]],
    trace: Callable[[str], Awaitable[dict[str, Any]]],
) -> APIRouter:
    """Return the routes that all apps share: health checks, metrics, models and lineage."""
    api = APIRouter()

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/health")
    @api.get("/health/ready")
    async def ready() -> dict[str, str]:
        if admission.draining:
            message = "the server is shutting down. Fix: try again"
            raise APIError(503, message, code="shutting_down")
        if absent := await missing():
            message = f"no replica of {', '.join(absent)} is running. Fix: try again"
            raise APIError(503, message, code="not_ready")
        return {"status": "ok"}

    @api.get("/metrics")
    async def scrape() -> Response:
        return Response(await metrics(), media_type=CONTENT_TYPE)

    @api.get("/v1/trace/{response}")
    async def lineage(response: str) -> dict[str, Any]:
        try:
            return await trace(response)
        except TrackingError as error:
            raise APIError(404, str(error), code="not_found") from None

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name) for name in router.names()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in router.names():
            raise router.unknown_model(name[:64])
        return model_card(name)

    return api


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """Return the answer for an exception of a route."""
    if isinstance(error, HTTPException) and isinstance(error.__cause__, APIError):
        error = error.__cause__  # FastAPI wraps the errors of JSONRoute
    if isinstance(error, RequestValidationError):
        return from_validation_error(error).response()
    if isinstance(error, HTTPException):
        code, where = _CODES.get(error.status_code, "invalid_request"), request.url.path[:200]
        message = f"{request.method} {where}: {error.detail}"
        return APIError(error.status_code, message, code=code).response()
    return from_exception(error).response()
