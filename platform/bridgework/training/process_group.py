"""Process group of the workers under Ray Train, which needs the same kind of device on all nodes.

Ray Train would take NCCL for all workers that get GPUs of Ray. On a node whose GPU torch cannot use,
that fails without naming the node.
"""

import logging
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ray.train.torch.config import TorchConfig, _TorchBackend

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


class _DeviceBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Create the process group. Raises RunError for nodes without a usable GPU."""
        backend = "gloo"
        if backend_config.gpus:
            backend = _backend(worker_group.execute(_find_gpu), backend_config)
        super().on_start(worker_group, replace(backend_config, backend=backend))


def _find_gpu() -> tuple[str, bool]:
    """Return the node of this worker, and True if torch can use its GPU."""
    return platform.node(), torch.cuda.is_available() and dist.is_nccl_available()


def _backend(found: list[tuple[str, bool]], config: DeviceTorchConfig) -> str:
    """Return the backend for workers on these nodes, each with True if torch finds its GPU."""
    without = sorted({node for node, usable in found if not usable})
    if not without:
        return "nccl"
    text = (
        f"{config.folder.name}: workers got {config.gpus:g} GPUs each of Ray, and torch "
        f"{torch.__version__} can use none on the nodes {', '.join(without[:4])}"
    )
    if config.needs_gpus or any(usable for _, usable in found):
        raise RunError(
            f"{text}. Fix: check their driver and install a build of torch with CUDA there; or "
            "train on CPUs with --gpus-per-worker 0"
        )
    with notices.to_file(config.folder):
        log.warning("%s: they train on the CPU", text)
    return "gloo"
