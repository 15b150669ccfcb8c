"""Models of an app: resolved from the registry, recorded, and as Serve deployments.

The deployment of a model is recorded, so that `bridgework trace` can follow an answer back to it.
"""

import hashlib
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from ray.serve.config import RequestRouterConfig

from bridgework import __version__, artifacts, ray_utils, storage
from bridgework.serving.affinity import ImageAffinity
from bridgework.serving.metrics import ReplicaMetrics
from bridgework.serving.options import Options
from bridgework.serving.replica import Model
from bridgework.serving.router import ServedModel
from bridgework.tracking import registry
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.openlineage_events import Artifact, Event, emit

# Custom resource of the nodes for endpoints. Without it, the autoscaler might start a spot node.
POOL = "serve"
HEALTH_S = 2.0  # with Serve's default of 10 s, a dead replica is noticed later


class Replica(Model):
    """Model with the metrics of its requests."""

    def __init__(self, artifact: str, options: Options, version: str) -> None:
        """version: of bridgework in the command; RunError on a node with another."""
        ray_utils.check_version(version)
        self._metrics = ReplicaMetrics()
        super().__init__(artifact, options, self._metrics.observe)

    async def metrics(self) -> tuple[str, list[Metric]]:
        """Return the id of this replica and its metrics."""
        engine = serve.get_replica_context().replica_id.unique_id
        return engine, self._metrics.collect(self.status())


def deployment(role: str, options: Options) -> serve.Deployment:
    """Return the deployment of a model under the name `role`, with the app's resources."""
    scale: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        bounds = {"min_replicas": options.replicas, "max_replicas": options.max_replicas}
        scale = {
            "autoscaling_config": bounds | {"target_ongoing_requests": max(1, options.ongoing // 2)}
        }
    resources = replica_resources(options)
    router: dict[str, Any] = {
        "request_router_class": ImageAffinity,
        "request_router_kwargs": {"slack": max(1, options.ongoing // 4)},
    }
    return serve.deployment(
        name=role,
        ray_actor_options={
            "num_cpus": resources.pop("CPU"),
            "num_gpus": resources.pop("GPU"),
            "resources": resources,
        },
        max_ongoing_requests=options.ongoing,
        max_queued_requests=options.queued,
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=options.timeout_s,  # running answers are completed
        request_router_config=RequestRouterConfig(**router),
        **scale,
    )(Replica)


def replicas(role: str, served: ServedModel, options: Options) -> serve.Application:
    """Return the deployment of `served` under the name `role`, with its weights."""
    return deployment(role, options).bind(served.artifact, options, __version__)


def replica_resources(options: Options) -> dict[str, float]:
    """Return the resources of a replica: CPU, GPU, and one unit of POOL where nodes offer it.

    Without a cluster to ask, the default is no GPU and no unit of POOL.
    """
    if not ray_utils.is_open():
        return {"CPU": options.cpus, "GPU": options.gpus or 0.0}
    return {
        "CPU": options.cpus,
        "GPU": ray_utils.gpus_each(options.gpus),
        **ray_utils.pool_resource(POOL),
    }


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
        emit(
            home,
            Event(
                "DEPLOYMENT",
                f"deployment/{served.app}/{served.model}",
                "START",
                run=served.id,
                inputs=[Artifact(served.artifact, served.digest)],
                tags={"version": served.version},
            ),
        )
    return file
