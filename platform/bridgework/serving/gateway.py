"""The HTTP side of an app, in a deployment of its own: it parses, checks and refuses.

It holds no weights and imports no torch, so that it starts fast and a model that dies takes no connection with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from bridgework.serving import refusals
from bridgework.serving.auth import Keys
from bridgework.serving.guard import Guard
from bridgework.serving.options import Options
from bridgework.serving.refusals import Refusal
from bridgework.serving.router import Router, Served

Routes = Callable[[Router, Options], APIRouter]


class Gateway:
    """The ingress deployment: `routes` over the models behind `handles`."""

    def __init__(
        self,
        routes: Routes,
        options: Options,
        keys: Keys | None,
        served: Sequence[Served],
        *handles: DeploymentHandle[Any],
    ) -> None:
        self._options, self._keys, self._routes = options, keys, routes
        self._router = Router(list(zip(served, handles, strict=True)), options.share, options.timeout_s)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Serve calls it in the replica, after `__init__`."""
        return build(self._router, self._options, self._keys, self._routes)


def build(router: Router, options: Options, keys: Keys | None, routes: Routes) -> FastAPI:
    """The ASGI app: every answer that is an error has OpenAI's shape, FastAPI's own included."""
    api = FastAPI(title="bridgework", docs_url=None, redoc_url=None)  # those pages load scripts from elsewhere
    api.include_router(_common(router))
    api.include_router(routes(router, options))
    api.add_exception_handler(Refusal, _refused)
    api.add_exception_handler(RequestValidationError, _refused)
    api.add_exception_handler(HTTPException, _refused)
    api.add_exception_handler(Exception, _refused)
    api.add_middleware(Guard, keys=keys, body_bytes=options.limits.body_bytes, places=options.places)
    return api


def _common(router: Router) -> APIRouter:
    api = APIRouter()

    @api.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        rows = [{"id": name, "object": "model", "created": 0, "owned_by": "bridgework"} for name in router.names()]
        return {"object": "list", "data": rows}

    return api


async def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, RequestValidationError):
        return refusals.of_validation(error).response()
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
        return Refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code).response()
    return refusals.of(error).response()
