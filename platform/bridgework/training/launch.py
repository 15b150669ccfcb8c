"""What runs in the processes of Ray Train: the work of every worker, and what its controller asks and decides.

They are new at every stage, so nothing here brings torch, which takes seconds to import, before it is needed.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
from ray import cloudpickle

from bridgework.data.ingest import ahead, from_ray
from bridgework.errors import BridgeworkError, ResourceError
from bridgework.training import checkpoint

if TYPE_CHECKING:
    from bridgework.training.loop import Job


def seal(job: "Job", *, threads: int) -> dict[str, Any]:
    """What a worker is given, see `work`."""
    return {"job": cloudpickle.dumps(job), "threads": threads, "cwd": os.getcwd()}


def work(given: dict[str, Any]) -> None:
    """Train one stage on one rank; the readers get ready while this process imports what training takes."""
    os.chdir(given["cwd"])  # Ray Train starts in a folder of its own; paths in a recipe begin where the command ran
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    blocks = ahead(ray.train.get_dataset_shard("train"))

    import torch
    from ray.train.torch import get_device

    from bridgework.training import loop

    if get_device().type == "cpu":
        shared = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
        torch.set_num_threads(given["threads"] or shared)  # Ray's own choice follows num_cpus, not the cores
    loop.run(
        cloudpickle.loads(given["job"]),
        lambda start: from_ray(blocks, rank=rank, world=world, start=start),
        lambda metrics, step: ray.train.report({**metrics, "step": step}),
        rank=rank,
        world=world,
    )


def cursor(folder: Path, fingerprint: str) -> int:
    """The step from which the next worker group goes on: our manifest's, not what Ray remembers."""
    found, _ = checkpoint.newest(folder, fingerprint)
    return found.step if found else 0


class OursEndTheStage(ray.train.UserCallback):
    """An error of ours says what a person must do, and another start would not do it; the machine's own may pass."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """What is raised here is not tried again."""
        for error in worker_exceptions.values():
            found = cause(error)
            if isinstance(found, BridgeworkError) and not isinstance(found, ResourceError):
                raise found


def cause(error: BaseException) -> BaseException:
    """The first of our own errors in a chain of Ray's, else the innermost."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        at = todo.pop(0)
        if at is None or at in seen:
            continue
        if isinstance(at, BridgeworkError):
            return at
        seen.append(at)
        todo += [at.__cause__, at.__context__, getattr(at, "cause", None), getattr(at, "controller_failure", None)]
        todo += list(getattr(at, "worker_failures", {}).values())
    return seen[-1]
