"""What the apps have in common: the HTTP side in one deployment, the model (and a challenger) in others.

`Gateway` parses, checks and refuses; it holds no weights, so a replica of it is cheap and a model that dies takes no
connection with it.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from bridgework.data import catalog
from bridgework.serving import options as options_of
from bridgework.serving import refusals
from bridgework.serving.auth import Keys
from bridgework.serving.guard import Guard
from bridgework.serving.options import Options
from bridgework.serving.refusals import Refusal
from bridgework.serving.replica import Model
from bridgework.serving.resolve import Served, record, resolve
from bridgework.serving.router import Router

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


def application(app: str, args: dict[str, Any], routes: Routes) -> Application:
    """The Serve application `app` for the words in `args` (see Options): resolves models, records deployments."""
    options = options_of.read(args)
    keys = None if options.dev else Keys.load(options.keys)
    home = Path(options.home) if options.home else catalog.home()
    names = [options.model] if options.challenger is None else [options.model, options.challenger]
    served = [resolve(app, name, options, home) for name in names]
    for model in served:
        record(model, home)
    roles = ("champion", "challenger")
    models = [_model(role, options).bind(m.artefact, options) for role, m in zip(roles, served, strict=False)]
    return _gateway(app, options).bind(routes, options, keys, served, *models)


def _model(role: str, options: Options) -> serve.Deployment:
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        bounds = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        scale = {"autoscaling_config": bounds | {"target_ongoing_requests": max(1, options.ongoing // 2)}}
    return serve.deployment(Model).options(
        name=role,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.queued,
        **scale,
    )


def _gateway(app: str, options: Options) -> serve.Deployment:
    """Its own queue is the last resort, answered by Serve in plain text: Guard refuses at half of it."""
    return serve.deployment(serve.ingress()(Gateway)).options(
        name=app,
        ray_actor_options={"num_cpus": 0},  # it only waits
        max_ongoing_requests=2 * options.places,
        max_queued_requests=2 * options.places,
        backpressure_config={"status_code": 429, "retry_after_s": refusals.RETRY_AFTER_S},
    )


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
