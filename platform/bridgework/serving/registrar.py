"""Registrar: an actor of a gateway for MLflow, artifacts and deployments of models.

It is a process of its own because importing MLflow and torch takes seconds, in which a gateway
could answer no request.
"""

import logging
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus

from bridgework import storage
from bridgework.errors import ResourceError, TrackingError
from bridgework.serving.options import Options
from bridgework.serving.probes import Probe, read_probes
from bridgework.serving.router import ServedModel

PROJECT = "serving"  # MLflow experiment of the decisions
SAY_EVERY_S = 10.0
Node = dict[str, Any]  # of a lineage tree: {"text", "children"}

log = logging.getLogger(__name__)


class Registrar:
    """Work of one app on the registry and on Serve. Every method may raise TrackingError."""

    def __init__(self, app: str, name: str, options: Options) -> None:
        from bridgework.tracking.mlflow_store import MLflowTracker

        self._app, self._name, self._options = app, name, options
        self._home = storage.locate(str(options.home))
        self._tracker = MLflowTracker(options.tracking, self._home, PROJECT)
        self._known: dict[tuple[str, str, str], ServedModel] = {}

    def resolve(self) -> list[ServedModel]:
        """Return the champion and, if it is another version, the challenger, as aliases are now.

        A challenger whose alias was removed is left out.
        """
        champion = self._resolve(self._options.model)
        if self._options.challenger is None:
            return [champion]
        try:
            challenger = self._resolve(self._options.challenger)
        except TrackingError as error:
            log.warning("no challenger: %s", error)
            return [champion]
        return [champion] if challenger.id == champion.id else [champion, challenger]

    def deploy(self, served: ServedModel) -> None:
        """Load a model in a Serve app of its own, next to the running ones.

        Returns when its replicas run. Raises ResourceError if they do not in `load_s` seconds.
        """
        from bridgework.serving.models import record_deployment, replicas

        app = model_app(self._name, served)
        record_deployment(served, self._home)
        if _status(app) != ApplicationStatus.RUNNING:
            target = replicas("model", served, self._options)
            serve.run_many(
                [serve.RunTarget(target, name=app, route_prefix=None)],
                wait_for_ingress_deployment_creation=False,
                wait_for_applications_running=False,
            )
        started = said = time.monotonic()
        while (status := _status(app)) != ApplicationStatus.RUNNING:
            now = time.monotonic()
            failed = status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
            if failed or now - started > self._options.load_s:
                message = serve.status().applications[app].message.strip().splitlines()[-1:]
                serve.delete(app)
                raise ResourceError(
                    f"{served.pinned}: not loaded in {now - started:.0f} s ({' '.join(message)}). "
                    "Fix: its replicas need their own CPUs and GPUs next to the running model"
                )
            if now - said > SAY_EVERY_S:
                said = now
                log.warning("loading %s for %.0f s", served.pinned, now - started)
            time.sleep(0.2)

    def delete(self, served: ServedModel) -> None:
        """Delete the Serve app of a model; its running requests are completed."""
        serve.delete(model_app(self._name, served))

    def probes(self) -> list[Probe]:
        """Read the probes. Raises DataError and SpecError."""
        canary = self._options.canary
        if canary.probes is None:
            return []
        return read_probes(self._app, canary.probes, self._home, canary.probe_rows)

    def record(
        self,
        decision: str,
        models: Sequence[ServedModel],
        reason: str,
        figures: Mapping[str, float],
        share: float,
    ) -> str:
        """Record a decision about (champion, challenger) as an MLflow run; returns its id."""
        from bridgework.config import flat
        from bridgework.tracking.tracker import Point

        champion, challenger = models
        tags = {
            "decision": decision,
            "reason": reason,
            "app": self._name,
            "champion": champion.pinned,
            "champion_deployment": champion.id,
            "challenger": challenger.pinned,
            "challenger_deployment": challenger.id,
        }
        run = self._tracker.start(f"canary {challenger.pinned}", tags=tags)
        margins = {f"canary.{key}": value for key, value in flat(self._options.canary).items()}
        self._tracker.params(run, {"share": share, **margins})
        now = int(time.time() * 1000)
        self._tracker.points(run, [Point(key, value, 0, now) for key, value in figures.items()])
        self._tracker.finish(run)
        return run

    def promote(self, served: ServedModel) -> None:
        """Make a version the champion, through the gate of `bridgework promote`.

        Raises TrackingError if the gate refuses it, and SpecError for a gate file with an error.
        """
        from bridgework.evaluation.gate import read_gate
        from bridgework.tracking import promotion

        model, canary = f"{served.model}:{served.version}", self._options.canary
        gate = read_gate(storage.locate(canary.gate)) if canary.gate else None
        promotion.promote(self._tracker, model, home=self._home, gate=gate, metric=canary.metric)

    def trace(self, response: str) -> Node:
        """Return the upstream lineage of an answer. Raises TrackingError for any other id."""
        from rich.text import Text
        from rich.tree import Tree

        from bridgework.tracking import lineage, lineage_views

        def node(tree: Tree) -> Node:
            label = tree.label
            text = label.plain if isinstance(label, Text) else str(label)
            return {"text": text, "children": [node(child) for child in tree.children]}

        if not lineage.RESPONSE.fullmatch(response):
            raise TrackingError(f"trace: not the id of an answer. Got {response[:64]!r}")
        graph = lineage.trace(response, self._tracker, self._home)
        return node(lineage_views.tree(graph).children[0])

    def _resolve(self, model: str) -> ServedModel:
        from bridgework.serving.models import resolve_model
        from bridgework.tracking import registry

        if registry.is_folder(model):
            key = (model, "", "")
        else:  # a quick query, because the gateway asks every few seconds
            version = self._tracker.version(*registry.split(model))
            key = (version.name, version.version, version.artifact)
        if key not in self._known:
            self._known[key] = resolve_model(self._app, model, self._options, self._home)
        return self._known[key]


def model_app(app: str, served: ServedModel) -> str:
    """Return the name of the Serve app of a model that follows an alias."""
    return f"{app}.model-{served.id}"


def model_apps(app: str) -> list[str]:
    """Return the names of the Serve apps of the models of an app."""
    pattern = re.compile(rf"{re.escape(app)}\.model-[0-9a-f]{{12}}")
    return [name for name in serve.status().applications if pattern.fullmatch(name)]


def _status(app: str) -> ApplicationStatus | None:
    try:
        found = serve.status().applications.get(app)
    except RayServeException:
        return None
    return None if found is None else found.status
