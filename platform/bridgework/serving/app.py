"""The three Serve applications: a gateway in front of a model, and optionally of a challenger.

`serve run serve_apps.chat:app model=llava@champion`; the arguments are the fields of
`serving.options.Options`.

A model name such as `llava@champion` is resolved to the artifact of a registered version. The
deployment is recorded, so that `bridgework trace` can follow an answer back to it.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from bridgework import artifacts, storage
from bridgework.data import catalog
from bridgework.serving.auth import Keys
from bridgework.serving.gateway import Gateway, Routes
from bridgework.serving.options import Options, parse_options
from bridgework.serving.replica import Model
from bridgework.serving.router import ServedModel
from bridgework.serving.routes import caption_routes, chat_routes, embedding_routes
from bridgework.tracking import registry
from bridgework.tracking.mlflow_store import MLflowTracker

HEALTH_S = 2.0  # with Serve's default of 10 s, a dead replica is noticed later
UNBOUNDED = 100_000  # Serve's queue answers in plain text, so admission.py limits a gateway instead


def chat(args: dict[str, Any]) -> Application:
    """Return the app for OpenAI-compatible chat with images, with a page to try it."""
    return application("chat", args, chat_routes)


def embed(args: dict[str, Any]) -> Application:
    """Return the app for embeddings, zero-shot classification and ranking of candidates."""
    return application("embed", args, embedding_routes)


def caption(args: dict[str, Any]) -> Application:
    """Return the app for captions of images."""
    return application("caption", args, caption_routes)


APPS = {"chat": chat, "embed": embed, "caption": caption}


def application(app: str, args: dict[str, Any], routes: Routes) -> Application:
    """Return the Serve application `app` for `args` (see Options).

    Resolves the models and records their deployments. Raises SpecError, TrackingError and
    WeightsError.
    """
    options = parse_options(args)
    keys = None if options.dev else Keys.load(options.keys)
    home = storage.locate(options.home) if options.home else catalog.home()
    names = [options.model] if options.challenger is None else [options.model, options.challenger]
    served = [resolve_model(app, name, options, home) for name in names]
    for model in served:
        record_deployment(model, home)
    roles = ("champion", "challenger")
    models = [
        _model(role, options).bind(m.artifact, options)
        for role, m in zip(roles, served, strict=False)
    ]
    return _gateway(app, options).bind(routes, options, keys, served, *models)


def _gateway(app: str, options: Options) -> serve.Deployment:
    return serve.deployment(
        name=app,
        ray_actor_options={"num_cpus": 0},  # it only waits
        max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=options.timeout_s,
    )(serve.ingress()(Gateway))


def _model(role: str, options: Options) -> serve.Deployment:
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        bounds = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        scale = {
            "autoscaling_config": bounds | {"target_ongoing_requests": max(1, options.ongoing // 2)}
        }
    return serve.deployment(
        name=role,
        ray_actor_options={"num_cpus": options.cpus, "num_gpus": options.gpus},
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.queued,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=options.timeout_s,  # running answers are completed
        **scale,
    )(Model)


def resolve_model(app: str, model: str, options: Options, home: Path) -> ServedModel:
    """Return the model that `app` serves under the name NAME, NAME@alias, NAME:version or a folder.

    Raises TrackingError for an unknown model, version or alias, WeightsError for a folder without
    an artifact.
    """
    if registry.is_folder(model):
        place = storage.locate(model).resolve()
        name, version, folder = place.name, "", str(place)
    else:
        name, which = registry.split(model)
        # "Default" is the experiment that MLflow always has, so none is created
        registered = MLflowTracker(options.tracking, home, "Default").version(name, which)
        version, folder = registered.version, registered.artifact
    info = artifacts.describe(folder)
    pixels = artifacts.recipe(folder)[info.stage].model.pixels
    # A hash of the content, because Serve may build the app again: same weights, same deployment.
    content = "\n".join((app, name, version, folder, info.digest))
    deployment = hashlib.sha256(content.encode()).hexdigest()[:12]
    return ServedModel(
        deployment, app, name, version, folder, info.digest, tiled=bool(pixels.grids)
    )


def record_deployment(served: ServedModel, home: Path) -> Path:
    """Write home/deployments/ID.json atomically and return its path; an existing file is kept."""
    file = home / "deployments" / f"{served.id}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        identity = {name: value for name, value in asdict(served).items() if name != "tiled"}
        storage.write_atomic(file, json.dumps(identity | {"started": started}, indent=1))
    return file
