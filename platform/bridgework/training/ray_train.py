"""Ray Train: the trainer of one stage, the work of its workers, and the handling of their failures.

Ray starts new processes for every stage. Importing torch takes seconds, so this module imports it
only when it is needed.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback

from bridgework import ray_utils, storage
from bridgework.data.ray_ingest import READER_CPUS, PlanIngest, from_ray, prefetch
from bridgework.errors import BridgeworkError, ResourceError, RunError, SpecError
from bridgework.training import checkpoint, notices
from bridgework.training.options import RunOptions
from bridgework.training.stopping import interrupted, listening

if TYPE_CHECKING:
    from bridgework.training.loop import TrainJob


log = logging.getLogger(__name__)


def fit(job: "TrainJob", options: RunOptions) -> None:
    """Train one stage on `options.workers` workers.

    Raises the workers' BridgeworkError, or RunError after `options.max_failures` restarts.
    """
    from ray.train.torch import TorchTrainer  # imports torch

    resources = _needs(options)
    with listening(job.folder, log.warning) as stop:

        def stopped() -> None:
            if stop.asked:
                raise interrupted(job.stage, stop.asked, None)

        ray_utils.wait_for(
            job.stage,
            [resources] * options.workers,
            timeout_s=options.resource_timeout_s,
            stopped=stopped,
        )
        fingerprints = (job.system.fingerprint(), *job.fingerprints)
        start = partial(checkpoint.cursor, job.folder, *fingerprints, home=job.home)
        # list[Any], because Ray's annotation has only its older class of callbacks
        callbacks: list[Any] = [FailFastCallback(), *options.callbacks]
        loop_config = {
            "job": cloudpickle.dumps(job),
            "threads": options.threads,
            "cwd": os.getcwd(),
            "gpus": resources["GPU"],
        }
        trainer = TorchTrainer(
            _work,
            train_loop_config=loop_config,
            scaling_config=ScalingConfig(
                num_workers=options.workers,
                use_gpu=resources["GPU"] > 0,
                resources_per_worker={n: amount for n, amount in resources.items() if amount},
            ),
            run_config=RunConfig(
                # A new name, because Ray must not resume from its own state instead of checkpoints.
                name=f"{job.stage}-{os.getpid()}-{os.urandom(3).hex()}",
                **storage.for_ray(job.folder / "ray"),
                failure_config=FailureConfig(max_failures=options.max_failures),
                callbacks=callbacks,
            ),
            datasets={"train": ray.data.range(1)},
            dataset_config=PlanIngest(job.feed, start, readers=options.readers),
        )
        try:
            _run(trainer.fit, partial(_say_missing, job.stage, resources, options.workers))
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, BridgeworkError):
                raise cause from error
            if storage.disk_full(cause):  # of Ray's own files
                raise storage.full(job.folder) from error
            attempts = options.max_failures + 1
            raise RunError(
                f"stage {job.stage!r} failed after {attempts} attempts. Last error: {cause!r}"
            ) from error
    storage.remove(job.folder / "ray")


def _needs(options: RunOptions) -> dict[str, float]:
    """Return the resources of each worker.

    Raises SpecError for a number of GPUs that Ray cannot allocate.
    """
    gpus = options.gpus_per_worker
    if gpus is not None and not (0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus))):
        raise SpecError(
            f"--gpus-per-worker: Ray cannot allocate that. Got {gpus:g}; "
            "expected a share of one GPU or an integer. Fix: leave it out"
        )
    gpus = ray_utils.gpus_each(gpus)
    if gpus or ray_utils.grows("CPU"):
        return {"CPU": 1.0, "GPU": gpus}
    total = ray.cluster_resources().get("CPU", 1.0)
    # With all CPUs in use by workers, they would wait for data endlessly.
    for_data = READER_CPUS * (options.readers + 1)
    return {"CPU": max(0.1, min(1.0, (total - for_data) / options.workers)), "GPU": 0.0}


def _run(fit: Callable[[], object], meanwhile: Callable[[], object]) -> None:
    """Call `fit` in a thread, because in the main thread Ray would replace the Ctrl-C handler.

    `meanwhile` is called every SAY_EVERY_S seconds.
    """
    raised: list[BaseException] = []

    def work() -> None:
        try:
            fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    last = time.monotonic()
    while thread.is_alive():
        thread.join(0.5)
        if time.monotonic() - last > ray_utils.SAY_EVERY_S:
            last = time.monotonic()
            meanwhile()
    if raised:
        raise raised[0]


def _say_missing(stage: str, resources: dict[str, float], workers: int) -> None:
    """Log the missing resources after a loss of nodes, because Ray Train waits silently."""
    here = ray.cluster_resources()
    for name, amount in resources.items():
        if here.get(name, 0.0) < amount * workers:
            log.warning(
                "%s: waiting for %g x %s: %g of %g in the cluster",
                stage,
                amount * workers,
                name,
                here.get(name, 0.0),
                amount * workers,
            )


def _work(config: dict[str, Any]) -> None:
    """Train one stage on one rank; the readers start while this process imports torch."""
    # Ray Train starts in another folder, but a recipe's paths are relative to that of the command.
    os.chdir(config["cwd"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    blocks = prefetch(ray.train.get_dataset_shard("train"))

    import torch
    from ray.train.torch import get_device

    from bridgework.training import loop

    if get_device().type == "cpu":
        if config["gpus"]:
            raise RunError(
                f"a worker got {config['gpus']:g} GPUs of Ray, and torch {torch.__version__} finds "
                "none on its node. Fix: install a build of torch with CUDA there, or train on CPUs "
                "with --gpus-per-worker 0"
            )
        share = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
        torch.set_num_threads(config["threads"] or share)  # Ray's default follows num_cpus
    job: TrainJob = cloudpickle.loads(config["job"])
    with notices.to_file(job.folder):
        loop.run(
            job,
            lambda start: from_ray(blocks, rank=rank, world=world, start=start),
            lambda metrics, step: ray.train.report({**metrics, "step": step}),
            rank=rank,
            world=world,
            fixed_start=True,
        )


class FailFastCallback(UserCallback):
    """Stops the retries after a BridgeworkError, which needs a user's action.

    A ResourceError is retried, because it may be temporary.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the error; Ray Train does not retry after an exception in a callback."""
        for error in worker_exceptions.values():
            cause = _cause(error)
            if isinstance(cause, BridgeworkError) and not isinstance(cause, ResourceError):
                raise cause


def _cause(error: BaseException) -> BaseException:
    """Return the first BridgeworkError in a chain of Ray's errors, else the innermost error."""
    seen: list[BaseException] = []
    todo: list[BaseException | None] = [error]
    while todo:
        at = todo.pop(0)
        if at is None or at in seen:
            continue
        if isinstance(at, BridgeworkError):
            return at
        seen.append(at)
        todo += [
            at.__cause__,
            at.__context__,
            getattr(at, "cause", None),
            getattr(at, "controller_failure", None),
        ]
        todo += list(getattr(at, "worker_failures", {}).values())
    return seen[-1]
