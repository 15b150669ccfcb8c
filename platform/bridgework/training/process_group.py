"""Process group of the workers under Ray Train: the same kind of device and version on all nodes.

Ray Train would take NCCL for all workers that get GPUs of Ray. On a node whose GPU torch cannot use,
that fails without naming the node.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from ray.train.torch.config import TorchConfig, _TorchBackend

from bridgework import __version__, ray_utils
from bridgework.errors import RunError
from bridgework.training import notices

log = logging.getLogger(__name__)


@dataclass
class DeviceTorchConfig(TorchConfig):
    """NCCL if torch finds a GPU on the nodes of all workers, gloo if it finds one on none.

    folder: the stage's folder, for the warning. gpus: of each worker. needs_gpus: the recipe is
    meant for GPUs, so that a node without one is an error.
    """

    folder: Path = Path()
    gpus: float = 0.0
    needs_gpus: bool = False

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _DeviceBackend


class WorkerFacts(NamedTuple):
    """The node of a worker, True if torch can use its GPU there, and its version of bridgework."""

    node: str
    gpu: bool
    version: str = __version__


class _DeviceBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Create the process group. Raises RunError for a node that cannot take part."""
        found = [WorkerFacts(*facts) for facts in worker_group.execute(_probe())]
        for facts in found:
            ray_utils.check_version(__version__, facts.version, facts.node)
        backend = _backend(found, backend_config) if backend_config.gpus else "gloo"
        super().on_start(worker_group, replace(backend_config, backend=backend))


def _probe() -> Callable[[], tuple[str, bool, str]]:
    """Return the function that finds the facts of a worker.

    It is local, so that it is sent by value: the node may have another version of bridgework.
    """

    def probe() -> tuple[str, bool, str]:
        import platform

        import torch

        try:
            from bridgework import __version__ as version
        except ImportError:
            version = ""
        return (
            platform.node(),
            torch.cuda.is_available() and torch.distributed.is_nccl_available(),
            version,
        )

    return probe


def _backend(found: list[WorkerFacts], config: DeviceTorchConfig) -> str:
    """Return the backend for workers on these nodes."""
    without = sorted({facts.node for facts in found if not facts.gpu})
    if not without:
        return "nccl"
    text = (
        f"{config.folder.name}: workers got {config.gpus:g} GPUs each of Ray, and torch "
        f"{torch.__version__} can use none on the nodes {', '.join(without[:4])}"
    )
    if config.needs_gpus or any(facts.gpu for facts in found):
        raise RunError(
            f"{text}. Fix: check their driver and install a build of torch with CUDA there; or "
            "train on CPUs with --gpus-per-worker 0"
        )
    with notices.to_file(config.folder):
        log.warning("%s: they train on the CPU", text)
    return "gloo"
