"""Options of a run, which never change the training result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridgework import ray_utils


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not affect the training result.

    Example:
        >>> import bridgework as bw
        >>> options = bw.RunOptions(workers=4, readers=2, checkpoint_every=500)
    """

    workers: int = 1  # 0 trains in this process, without Ray Train
    readers: int = 1  # Ray Data actors that read and decode
    checkpoint_every: int = 0  # steps; 0 means a twentieth of the stage, at least 5
    evaluate_every: int = 0  # steps; 0 evaluates only at the end of a stage
    midway: str | None = None  # the only evaluation before the end; None runs all
    # keys of samples, and `step:N` or `step:N-M`, that the unfinished stage skips
    skip: tuple[str, ...] = ()
    cache_features: bool = True
    threads: int = 0  # of torch in a worker on a CPU; 0 divides the node's cores among the workers
    # None: 1 if the cluster has GPUs or can start nodes with GPUs, else 0
    gpus_per_worker: float | None = None
    resource_timeout_s: float = ray_utils.TIMEOUT_S  # of the wait for the workers' resources
    trust_checkpoints: bool = False  # sign the existing checkpoints with this home's key
    start_over: bool = False  # begin the stage again if none of its checkpoints can be used
    max_failures: int = 3  # restarts of the workers before a stage fails
    report: Callable[[dict[str, float], int], None] | None = None  # of an in-process run
    callbacks: tuple[Any, ...] = ()  # of Ray Train
