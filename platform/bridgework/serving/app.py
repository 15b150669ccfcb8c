"""The three Serve applications: a gateway in front of a model, and optionally of a challenger.

`serve run serve_apps.chat:app model=llava@champion`; the arguments are the fields of
`serving.options.Options`.

A model name such as `llava@champion` is resolved to the artifact of a registered version
(models.py).
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ray import serve
from ray.serve import Application

from bridgework import __version__, storage
from bridgework.data import catalog
from bridgework.evaluation.gate import read_gate
from bridgework.serving.auth import Keys
from bridgework.serving.gateway import Gateway, Routes
from bridgework.serving.models import HEALTH_S, record_deployment, replicas, resolve_model
from bridgework.serving.options import Options, parse_options
from bridgework.serving.playground import playground_routes
from bridgework.serving.probes import read_probes
from bridgework.serving.router import ServedModel
from bridgework.serving.routes import caption_routes, embedding_routes
from bridgework.tracking.promotion import resolve_gate

ROLES = ("champion", "challenger")
UNBOUNDED = 100_000  # Serve's queue answers in plain text, so admission.py limits a gateway instead


def chat(args: dict[str, Any]) -> Application:
    """Return the app for OpenAI-compatible chat with images, with a page to try it."""
    return application("chat", args, playground_routes)


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
    options = _located(parse_options(args))
    keys = None if options.dev else Keys.load(options.keys)
    home = storage.locate(options.home) if options.home else catalog.home()
    if options.canary.probes is not None:
        read_probes(app, options.canary.probes, home, rows=1)  # an unsuitable one ends the start
    gate = None if options.canary.gate is None else read_gate(storage.locate(options.canary.gate))
    served = [resolve_model(app, name, options, home) for name in options.models]
    if options.auto_promote:  # a wrong figure would be noticed at the promotion
        resolve_gate(served[1].artifact, gate, options.canary.metric)
    for model in served:
        record_deployment(model, home)
    if options.follow:  # the gateway starts the models, because it also replaces them
        return _gateway(app, options, routes, keys, [])
    models = [replicas(role, model, options) for role, model in zip(ROLES, served, strict=False)]
    return _gateway(app, options, routes, keys, served, *models)


def _located(options: Options) -> Options:
    """Return the options with the paths and MLflow server of this process: a gateway's may differ."""
    home = storage.locate(options.home) if options.home else catalog.home()
    tracking = options.tracking or os.environ.get("MLFLOW_TRACKING_URI")
    gate = options.canary.gate
    if gate is not None:
        gate = str(storage.locate(gate, absolute=True))
    canary = replace(options.canary, gate=gate)
    return replace(options, home=str(home.absolute()), tracking=tracking, canary=canary)


def _gateway(
    app: str,
    options: Options,
    routes: Routes,
    keys: Keys | None,
    served: Sequence[ServedModel],
    *models: Application,
) -> Application:
    gateway = serve.deployment(
        name=app,
        ray_actor_options={"num_cpus": 0},  # it only waits
        max_ongoing_requests=UNBOUNDED,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=options.timeout_s,
    )(serve.ingress()(Gateway))
    return gateway.bind(app, __version__, routes, options, keys, served, *models)
