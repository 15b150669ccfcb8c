"""The HTTP side of an app, in a deployment of its own: it parses, checks and refuses.

It holds no weights and imports no torch, so that it starts fast and a model that dies takes no connection with it.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from bridgework.errors import suggest
from bridgework.serving import errors as refusals
from bridgework.serving.admission import Admission
from bridgework.serving.auth import AuthMiddleware, Keys
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options
from bridgework.serving.protocol import model_card
from bridgework.serving.readiness import Readiness
from bridgework.serving.router import Router, ServedModel

Routes = Callable[[Router, Options], APIRouter]
_CODES = {404: "not_found", 405: "method_not_allowed"}


class Gateway:
    """The ingress deployment: `routes` over the models that `handles` call."""

    def __init__(
        self,
        routes: Routes,
        options: Options,
        keys: Keys | None,
        served: Sequence[ServedModel],
        *handles: DeploymentHandle[Any],
    ) -> None:
        self._options, self._keys, self._routes = options, keys, routes
        self._router = Router(
            list(zip(served, handles, strict=True)), options.share, options.timeout_s
        )
        self._readiness = Readiness(
            serve.get_replica_context().app_name, [handle.deployment_name for handle in handles]
        )
        self._admission = Admission(
            places=options.places,
            per_key=options.places_of(0 if keys is None else len(keys)),
            held_bytes=options.held_bytes,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls it in the replica, after `__init__`."""
        return build(
            self._routes(self._router, self._options),
            self._router,
            self._options,
            self._keys,
            self._admission,
            self._readiness.missing,
        )

    async def running(self) -> int:
        """The number of requests that hold a place."""
        return self._admission.running

    async def drain(self, limit_s: float) -> int:
        """Refuse new requests, wait for the running ones, at most `limit_s` seconds; return how many are left."""
        return await self._admission.drain(limit_s)


def build(
    routes: APIRouter,
    router: Router,
    options: Options,
    keys: Keys | None,
    admission: Admission,
    missing: Callable[[], Awaitable[Sequence[str]]],
) -> FastAPI:
    """The ASGI app; every error has OpenAI's form, FastAPI's own included.

    `missing` gives the deployments without a running replica.
    """
    api = FastAPI(
        title="bridgework", docs_url=None, redoc_url=None
    )  # those pages load scripts from elsewhere
    api.include_router(_common(router, admission, missing))
    api.include_router(routes)
    answer_errors(api)
    api.add_middleware(AuthMiddleware, keys=keys, admission=admission, limits=options.limits)
    if (
        options.cors
    ):  # outside the guard: a preflight has no key, and a page may read why it was refused
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
        api.add_exception_handler(kind, _refused)


def _common(
    router: Router, admission: Admission, missing: Callable[[], Awaitable[Sequence[str]]]
) -> APIRouter:
    api = APIRouter()

    @api.get("/health/live")
    async def live() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/health")
    async def ready() -> dict[str, str]:
        if admission.draining:
            raise APIError(503, "the server is shutting down", code="shutting_down")
        if absent := await missing():
            raise APIError(503, f"no replica of {', '.join(absent)} is running", code="not_ready")
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name) for name in router.names()]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in router.names():
            hint = suggest(name[:64], router.names())
            raise APIError(
                404,
                f"there is no model {name[:64]!r} here{hint}",
                code="model_not_found",
                param="model",
            )
        return model_card(name)

    return api


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and isinstance(
        error.__cause__, APIError
    ):  # FastAPI's wrapping of JSONRoute's
        error = error.__cause__
    if isinstance(error, RequestValidationError):
        return refusals.of_validation(error).response()
    if isinstance(error, HTTPException):
        code, where = _CODES.get(error.status_code, "invalid_request"), request.url.path[:200]
        return APIError(
            error.status_code, f"{request.method} {where}: {error.detail}", code=code
        ).response()
    return refusals.of(error).response()
