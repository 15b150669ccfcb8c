"""One stage under Ray Train: its trainer, the work of every worker, and what its controller decides.

Ray opens new processes at every stage, so nothing here brings torch, which takes seconds to import, before it is
needed.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback

from bridgework.data.ingest import READER_CPUS, PlanIngest, ahead, from_ray
from bridgework.errors import BridgeworkError, ResourceError, RunError
from bridgework.training import checkpoint

if TYPE_CHECKING:
    from bridgework.training.loop import Job


@dataclass(frozen=True)
class How:
    """How a run is carried out: nothing here changes what is learned."""

    workers: int = 1  # 0 trains in this process, without Ray Train
    readers: int = 1  # Ray Data actors that read and decode
    checkpoint_every: int = 0  # steps; 0 takes a twentieth of the stage, 5 at least
    evaluate_every: int = 0  # steps; 0 evaluates at the end of a stage only
    midway: str | None = None  # the one evaluation that is run before the end; None runs all
    skip: tuple[str, ...] = ()  # keys of samples, and `step:N` or `step:N-M`, that the unfinished stage leaves out
    cache_features: bool = True
    threads: int = 0  # of torch in a worker on a CPU; 0 shares out the node's cores
    max_failures: int = 3  # restarts of the workers before a stage gives up
    report: Callable[[dict[str, float], int], None] | None = None  # of an in-process run
    callbacks: tuple[Any, ...] = ()  # of Ray Train


def fit(job: "Job", how: How) -> None:
    """Train one stage on `how.workers` workers. Raises what ends it for good: an error of ours, or RunError."""
    from ray.train.torch import TorchTrainer  # brings torch

    resources = ray.cluster_resources()
    gpus = resources.get("GPU", 0.0) >= how.workers
    for_data = READER_CPUS * (how.readers + 1)  # workers that held every CPU would wait for data for ever
    cpu = 1.0 if gpus else max(0.1, min(1.0, (resources.get("CPU", 1.0) - for_data) / how.workers))
    start = partial(checkpoint.cursor, job.folder, job.system.fingerprint())
    callbacks: list[Any] = [OursEndTheStage(), *how.callbacks]  # Ray's annotation knows its older kind alone
    trainer = TorchTrainer(
        _work,
        train_loop_config={"job": cloudpickle.dumps(job), "threads": how.threads, "cwd": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=how.workers, use_gpu=gpus, resources_per_worker={"CPU": cpu}),
        run_config=RunConfig(
            # new every time: Ray must not resume by its own memory, the checkpoints are ours
            name=f"{job.stage}-{os.getpid()}-{os.urandom(3).hex()}",
            storage_path=str(job.folder / "ray"),
            failure_config=FailureConfig(max_failures=how.max_failures),
            callbacks=callbacks,
        ),
        datasets={"train": ray.data.range(1)},
        dataset_config=PlanIngest(job.feed, start, readers=how.readers),
    )
    try:
        trainer.fit()
    except Exception as error:
        found = _cause(error)
        if isinstance(found, BridgeworkError):
            raise found from error
        raise RunError(f"{job.stage}: the workers failed {how.max_failures + 1} times, last with {found!r}") from error
    shutil.rmtree(job.folder / "ray", ignore_errors=True)


def _work(given: dict[str, Any]) -> None:
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


class OursEndTheStage(UserCallback):
    """An error of ours says what a person must do, and another start would not do it; the machine's own may pass."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """What is raised here is not tried again."""
        for error in worker_exceptions.values():
            found = _cause(error)
            if isinstance(found, BridgeworkError) and not isinstance(found, ResourceError):
                raise found


def _cause(error: BaseException) -> BaseException:
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
