"""One stage under Ray Train: its trainer, the work of every worker, and what its controller decides.

Ray opens new processes at every stage, so nothing here brings torch, which takes seconds to import, before it is
needed.
"""

import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
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
from bridgework.training.stopping import interrupted, listening

if TYPE_CHECKING:
    from bridgework.training.loop import TrainJob


log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunOptions:
    """How a run is carried out: nothing here changes what is learned."""

    workers: int = 1  # 0 trains in this process, without Ray Train
    readers: int = 1  # Ray Data actors that read and decode
    checkpoint_every: int = 0  # steps; 0 takes a twentieth of the stage, 5 at least
    evaluate_every: int = 0  # steps; 0 evaluates at the end of a stage only
    midway: str | None = None  # the one evaluation that is run before the end; None runs all
    skip: tuple[
        str, ...
    ] = ()  # keys of samples, and `step:N` or `step:N-M`, that the unfinished stage leaves out
    cache_features: bool = True
    threads: int = 0  # of torch in a worker on a CPU; 0 shares out the node's cores
    gpus_per_worker: float | None = (
        None  # None: 1 where the cluster has GPUs or can start nodes that have, else 0
    )
    resource_timeout_s: float = (
        ray_utils.TIMEOUT_S
    )  # how long the workers' resources are waited for
    trust_checkpoints: bool = False  # sign the checkpoints that are there with this home's key
    start_over: bool = False  # where no checkpoint of the stage can be used, begin it again
    max_failures: int = 3  # restarts of the workers before a stage gives up
    report: Callable[[dict[str, float], int], None] | None = None  # of an in-process run
    callbacks: tuple[Any, ...] = ()  # of Ray Train


def fit(job: "TrainJob", how: RunOptions) -> None:
    """Train one stage on `how.workers` workers. Raises what ends it: an error of ours, or RunError."""
    from ray.train.torch import TorchTrainer  # brings torch

    needs = _needs(how)
    with listening(job.folder, log.warning) as stop:

        def stopped() -> None:
            if stop.asked:
                raise interrupted(job.stage, stop.asked, None)

        ray_utils.wait_for(
            job.stage, [needs] * how.workers, timeout_s=how.resource_timeout_s, stopped=stopped
        )
        fingerprints = (job.system.fingerprint(), *job.fingerprints)
        start = partial(checkpoint.cursor, job.folder, *fingerprints, home=job.home)
        callbacks: list[Any] = [
            FailFastCallback(),
            *how.callbacks,
        ]  # Ray's annotation knows its older kind alone
        given = {
            "job": cloudpickle.dumps(job),
            "threads": how.threads,
            "cwd": os.getcwd(),
            "gpus": needs["GPU"],
        }
        trainer = TorchTrainer(
            _work,
            train_loop_config=given,
            scaling_config=ScalingConfig(
                num_workers=how.workers,
                use_gpu=needs["GPU"] > 0,
                resources_per_worker=_asked(needs),
            ),
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
            _run(trainer.fit, partial(_say_missing, job.stage, needs, how.workers))
        except Exception as error:
            found = _cause(error)
            if isinstance(found, BridgeworkError):
                raise found from error
            if storage.disk_full(found):  # Ray's own files
                raise storage.full(job.folder) from error
            failures = how.max_failures + 1
            raise RunError(
                f"{job.stage}: the workers failed {failures} times, last with {found!r}"
            ) from error
    shutil.rmtree(job.folder / "ray", ignore_errors=True)


def _needs(how: RunOptions) -> dict[str, float]:
    """Return what each worker asks Ray for. Raises SpecError for a number of GPUs that Ray cannot give."""
    asked = how.gpus_per_worker
    if asked is not None and not (
        0 <= asked <= 1 or (1 < asked < math.inf and asked == int(asked))
    ):
        raise SpecError(
            f"--gpus-per-worker: Got {asked:g}; expected a share of one GPU or a whole number. Fix: leave it out"
        )
    gpus = ray_utils.gpus_each(asked)
    if gpus or ray_utils.grows("CPU"):
        return {"CPU": 1.0, "GPU": gpus}
    total = ray.cluster_resources().get("CPU", 1.0)
    for_data = READER_CPUS * (
        how.readers + 1
    )  # workers that held every CPU would wait for data without end
    return {"CPU": max(0.1, min(1.0, (total - for_data) / how.workers)), "GPU": 0.0}


def _asked(needs: dict[str, float]) -> dict[str, float]:
    return {name: amount for name, amount in needs.items() if amount}


def _run(fit: Callable[[], object], meanwhile: Callable[[], object]) -> None:
    """Call `fit` in a thread: in the main thread Ray would take the handler of Ctrl-C for itself."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    said = time.monotonic()
    while thread.is_alive():
        thread.join(0.5)
        if time.monotonic() - said > ray_utils.SAY_EVERY_S:
            said = time.monotonic()
            meanwhile()
    if raised:
        raise raised[0]


def _say_missing(stage: str, needs: dict[str, float], workers: int) -> None:
    """Say what the workers wait for where nodes were lost: Ray Train waits without a word."""
    here = ray.cluster_resources()
    for name, amount in needs.items():
        if here.get(name, 0.0) < amount * workers:
            log.warning(
                "%s: waiting for %g x %s: %g of %g in the cluster",
                stage,
                amount * workers,
                name,
                here.get(name, 0.0),
                amount * workers,
            )


def _work(given: dict[str, Any]) -> None:
    """Train one stage on one rank; the readers get ready while this process imports what training takes."""
    os.chdir(
        given["cwd"]
    )  # Ray Train starts in a folder of its own; paths in a recipe begin where the command ran
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    blocks = prefetch(ray.train.get_dataset_shard("train"))

    import torch
    from ray.train.torch import get_device

    from bridgework.training import loop

    if get_device().type == "cpu":
        if given["gpus"]:
            raise RunError(
                f"a worker got {given['gpus']:g} GPUs of Ray, and torch {torch.__version__} finds none on its node. "
                "Fix: install a build of torch with CUDA there, or train on CPUs with --gpus-per-worker 0"
            )
        shared = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
        torch.set_num_threads(
            given["threads"] or shared
        )  # Ray's own choice follows num_cpus, not the cores
    job: TrainJob = cloudpickle.loads(given["job"])
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
        todo += [
            at.__cause__,
            at.__context__,
            getattr(at, "cause", None),
            getattr(at, "controller_failure", None),
        ]
        todo += list(getattr(at, "worker_failures", {}).values())
    return seen[-1]
