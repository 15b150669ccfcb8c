"""Options of a run, which never change the training result."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from bridgework import ray_utils
from bridgework.errors import SpecError


@dataclass(frozen=True)
class RunOptions:
    """Options of a run that do not affect the training result.

    Example:
        >>> import bridgework as bw
        >>> options = bw.RunOptions(workers=4, readers=2, checkpoint_every=500)
    """

    # 0 trains in this process, without Ray Train. (fewest, most) is elastic: as many as the cluster
    # has room for, changed at checkpoints.
    workers: int | tuple[int, int] = 1
    resize_every_s: float = ray_utils.RESIZE_S  # an elastic run looks for room for more workers
    readers: int = 1  # Ray Data actors that read and decode
    checkpoint_every: int = 0  # steps; 0 means a twentieth of the stage, at least 5
    # step of the last stage after which the run stops, with a checkpoint; None: its end
    until: int | None = None
    evaluate_every: int = 0  # steps; 0 evaluates only at the end of a stage
    midway: str | None = None  # the only evaluation before the end; None runs all
    # in a Ray task on a snapshot of the weights, while the training continues
    evaluate_in_task: bool = False
    # metric of an evaluation, e.g. heldout.loss: the best snapshot by it is the result of the
    # stage. None: the last step is
    keep_best: str | None = None
    # keys of samples, and `step:N` or `step:N-M`, that the unfinished stage skips
    skip: tuple[str, ...] = ()
    # of frozen vision towers: read from a cache or computed in training. auto: whichever the recipe
    # makes cheaper, or as the run began; the two differ in the last digits of the losses
    features: Literal["auto", "cached", "computed"] = "auto"
    # of torch in a process on a CPU; 0 divides the node's cores among the workers
    threads: int = 0
    # None: 1 if the cluster has GPUs or can start nodes with GPUs, else 0. With 0, a stage in
    # bfloat16 trains on CPUs too.
    gpus_per_worker: float | None = None
    # of every wait for the workers' resources: at the start, and after the loss of a node
    resource_timeout_s: float = ray_utils.TIMEOUT_S
    trust_checkpoints: bool = False  # sign the existing checkpoints with this home's key
    start_over: bool = False  # begin the stage again if none of its checkpoints can be used
    max_failures: int = 3  # restarts of the workers before a stage fails
    report: Callable[[dict[str, float], int], None] | None = None  # of an in-process run
    callbacks: tuple[Any, ...] = ()  # of Ray Train

    def __post_init__(self) -> None:
        if not 0 <= self.fewest_workers <= self.most_workers or (
            self.fewest_workers == 0 and self.most_workers
        ):
            raise SpecError(
                f"workers: not a number or a range of workers. Got {self.workers}; expected "
                "0 or more, or (fewest, most) with 1 <= fewest <= most"
            )
        if self.until is not None and self.until < 1:
            raise SpecError(f"until: not a number of steps. Got {self.until}; expected at least 1")
        if self.evaluate_every < 0:
            raise SpecError(
                "evaluate_every: not a number of steps. "
                f"Got {self.evaluate_every}; expected 0 or more"
            )
        if self.evaluate_in_task and not self.most_workers:
            raise SpecError(
                "evaluate_in_task: a task needs Ray, which a run in this process does not use. Got "
                "workers=0; expected 1 or more. Fix: give --workers 1, or leave out "
                "--evaluate-in-task"
            )
        if self.keep_best is not None and (not self.evaluate_every or self.midway is not None):
            got = f"midway={self.midway!r}" if self.midway else "evaluate_every=0"
            raise SpecError(
                f"keep_best: all evaluations must run before the end of a stage too. Got {got}. "
                "Fix: give --evaluate-every N, the steps between two of them"
            )

    @property
    def fewest_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def elastic(self) -> bool:
        return self.fewest_workers < self.most_workers
