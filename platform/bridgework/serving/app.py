"""The three apps as Serve builds them: a gateway in front of a model, and perhaps of a challenger too.

`serve run serve_apps.chat:app model=llava@champion`; the arguments are the fields of `serving.options.Options`.

From the words `llava@champion` to a folder of weights, and the record that lets an answer be traced back to it.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from ray import serve
from ray.serve import Application

from bridgework import artifacts
from bridgework.data import catalog
from bridgework.serving import options as options_of
from bridgework.serving import routes as caption_app
from bridgework.serving import routes as chat_app
from bridgework.serving import routes as embed_app
from bridgework.serving.auth import Keys
from bridgework.serving.gateway import Gateway, Routes
from bridgework.serving.options import Options
from bridgework.serving.replica import Model
from bridgework.serving.router import ServedModel
from bridgework.tracking import registry
from bridgework.tracking.mlflow_store import MLflowTracker


def chat(args: dict[str, Any]) -> Application:
    """OpenAI-compatible chat with images, and a page to try it."""
    return application("chat", args, chat_app.chat_routes)


def embed(args: dict[str, Any]) -> Application:
    """Embeddings of texts and images, zero-shot classes, ranks of candidates."""
    return application("embed", args, embed_app.embedding_routes)


def caption(args: dict[str, Any]) -> Application:
    """Captions of images."""
    return application("caption", args, caption_app.caption_routes)


HEALTH_S = 2.0  # Serve's own 10 s would be the time that a dead replica is missed
UNBOUNDED = (
    100_000  # Serve's own queue answers in plain text; admission.py bounds a gateway instead
)
APPS = {"chat": chat, "embed": embed, "caption": caption}


def application(app: str, args: dict[str, Any], routes: Routes) -> Application:
    """The Serve application `app` for `args` (see Options): resolves models, records deployments."""
    options = options_of.read(args)
    keys = None if options.dev else Keys.load(options.keys)
    home = Path(options.home) if options.home else catalog.home()
    names = [options.model] if options.challenger is None else [options.model, options.challenger]
    served = [resolve(app, name, options, home) for name in names]
    for model in served:
        record(model, home)
    roles = ("champion", "challenger")
    models = [
        _model(role, options).bind(m.artifact, options)
        for role, m in zip(roles, served, strict=False)
    ]
    return _gateway(app, options).bind(routes, options, keys, served, *models)


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
        graceful_shutdown_timeout_s=options.timeout_s,  # an answer that has begun is finished
        **scale,
    )(Model)


def _gateway(app: str, options: Options) -> serve.Deployment:
    return serve.deployment(
        name=app,
        ray_actor_options={"num_cpus": 0},  # it only waits
        max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=options.timeout_s,
    )(serve.ingress()(Gateway))


def resolve(app: str, model: str, options: Options, home: Path) -> ServedModel:
    """Raises TrackingError for an unknown model, version or alias, WeightsError for a folder without an artifact."""
    if registry.is_folder(model):
        name, version, folder = Path(model).resolve().name, "", str(Path(model).resolve())
    else:
        name, which = registry.split(model)
        found = MLflowTracker(options.tracking, home, "Default").version(
            name, which
        )  # MLflow's own: none is made
        version, folder = found.version, found.artifact
    info = artifacts.describe(folder)
    pixels = artifacts.recipe(folder)[info.stage].model.pixels
    # By content: the same app over the same weights is the same deployment, however often Serve builds it anew.
    words = "\n".join((app, name, version, folder, info.digest))
    deployment = hashlib.sha256(words.encode()).hexdigest()[:12]
    return ServedModel(
        deployment, app, name, version, folder, info.digest, tiled=bool(pixels.grids)
    )


def record(served: ServedModel, home: Path) -> Path:
    """home/deployments/ID.json, whole or not at all; the time of the first start stays."""
    file = home / "deployments" / f"{served.id}.json"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        temporary = file.with_name(f".{served.id}.{uuid4().hex[:8]}")
        identity = {name: value for name, value in asdict(served).items() if name != "tiled"}
        temporary.write_text(json.dumps(identity | {"started": started}, indent=1))
        temporary.rename(file)
    return file
