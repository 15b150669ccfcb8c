"""Ray Train: the trainer of one stage, the work of its workers, and the handling of their failures.

Ray starts new processes for every stage. Importing torch takes seconds, so this module imports it
only when it is needed.
"""

import json
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.data
import ray.train
from ray import PlacementGroupID, cloudpickle
from ray._private.state import actors
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, UserCallback
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.callback import WorkerGroupCallback as RayWorkerGroupCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.config import ScalingConfig
from ray.train.v2.api.exceptions import PreemptionError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from bridgework import ray_utils, storage
from bridgework.data.ray_ingest import READER_CPUS, PlanIngest, from_ray, prefetch
from bridgework.errors import BridgeworkError, ResourceError, RunError, SpecError
from bridgework.training import checkpoint, notices
from bridgework.training.options import RunOptions
from bridgework.training.run_dir import has_snapshot, is_finished
from bridgework.training.stopping import Preemption, Stop, interrupted, listening

if TYPE_CHECKING:
    from bridgework.training.loop import TrainJob


ELASTIC_CPUS = 0.7  # of a worker of an elastic run without GPUs
CHECKPOINT_S = 900.0  # longest wait for a checkpoint before the number of workers changes
POLL_S = 0.2
GONE_S = 120.0  # longest wait for the controller of a stopped trial to end
PLACEMENT = "placement.json"
RESIZE = "a change of the number of workers"  # reason of a request to stop

log = logging.getLogger(__name__)


def fit(job: "TrainJob", options: RunOptions) -> None:
    """Train one stage on `options.workers` workers.

    Raises the workers' BridgeworkError, RunError after `options.max_failures` restarts, and
    ResourceError if the resources of the workers are missing for `options.resource_timeout_s`.
    """
    from ray.train.torch import TorchTrainer  # imports torch

    from bridgework.training.process_group import DeviceTorchConfig

    # A shorter attempt to place the workers is repeated with what the cluster has by then.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{ray_utils.SAY_EVERY_S:g}")
    resources = _needs(options)
    with listening(job.folder, log.warning) as stop:

        def stopped() -> None:
            if stop.asked:
                raise interrupted(job.stage, stop.asked, None)

        ray_utils.wait_for(
            job.stage,
            [resources] * options.fewest_workers,
            timeout_s=options.resource_timeout_s,
            stopped=stopped,
        )
        fingerprints = (job.system.fingerprint(), *job.fingerprints)
        start = partial(checkpoint.cursor, job.folder, *fingerprints, home=job.home)
        # list[Any], because Ray's annotation has only its older class of callbacks
        steps = job.system[job.stage].budget.steps
        group = WorkerGroupCallback(job.folder, resources, options, steps=steps)
        placement = PlacementCallback(job.folder)
        callbacks: list[Any] = [FailFastCallback(), group, placement, *options.callbacks]
        loop_config = {
            "job": cloudpickle.dumps(job),
            "threads": options.threads,
            "cwd": os.getcwd(),
        }
        trainer = TorchTrainer(
            _work,
            train_loop_config=loop_config,
            torch_config=DeviceTorchConfig(
                folder=job.folder,
                gpus=resources["GPU"],
                needs_gpus=job.system[job.stage].needs_gpus,
            ),
            scaling_config=ScalingConfig(
                num_workers=options.workers,
                elastic_resize_monitor_interval_s=options.resize_every_s,
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
            _in_thread(trainer.fit)
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


def release(folder: Any) -> None:
    """Free the resources of a stage's workers once the controller that Ray Train made is dead.

    Tune kills the process of a trial that it stops, and the controller with it. Ray's own clean-up
    then needs the dashboard, and one Ray on the machine; without it the resources stay taken until
    the command ends. Returns after GONE_S at the latest, or at once if there are no workers.
    """
    file = folder / "ray" / PLACEMENT
    try:
        record = json.loads(file.read_text())
    except FileNotFoundError:  # trained in this process, or finished
        return
    deadline = time.monotonic() + GONE_S
    while actors(record["controller"]).get("State") != "DEAD":
        time.sleep(POLL_S)
        if time.monotonic() > deadline or not ray.is_initialized():  # with Ray, all is freed
            return
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(record["group"]))))
    storage.remove(folder / "ray")


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
    # With all CPUs in use by workers, they would wait for data endlessly. An elastic run takes as
    # many CPUs as it finds, so that its share of one has to leave some on every node.
    others = READER_CPUS * (options.readers + 1)
    if options.evaluate_in_task:
        others += ray_utils.ACTOR_CPUS
    share = (total - others) / options.fewest_workers
    return {"CPU": max(0.1, min(ELASTIC_CPUS if options.elastic else 1.0, share)), "GPU": 0.0}


def _in_thread(fit: Callable[[], object]) -> None:
    """Call `fit` in a thread, because in the main thread Ray would replace the Ctrl-C handler."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)  # signals are handled between two of these
    if raised:
        raise raised[0]


def _work(config: dict[str, Any]) -> None:
    """Train one stage on one rank; the readers start while this process imports torch."""
    ray_utils.enter_folder(config["cwd"])  # Ray Train starts in another one
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    blocks = prefetch(ray.train.get_dataset_shard("train"))

    import torch
    from ray.train.torch import get_device

    from bridgework.training import loop

    job: TrainJob = cloudpickle.loads(config["job"])
    last = job.system[job.stage].budget.steps
    if is_finished(job.folder) or (job.evaluate_in_task and has_snapshot(job.folder, last)):
        return  # while the number of workers was about to change
    if get_device().type == "cpu":
        share = max(1, (os.cpu_count() or 1) // context.get_local_world_size())
        torch.set_num_threads(config["threads"] or share)  # Ray's default follows num_cpus
    with notices.to_file(job.folder):
        loop.run(
            job,
            lambda start: from_ray(blocks, rank=rank, world=world, start=start),
            lambda metrics, step: ray.train.report({**metrics, "step": step}),
            rank=rank,
            world=world,
            fixed_start=True,
            preemption=Preemption(_end_of_node),
        )


def _end_of_node() -> float | None:
    """Return the time, in Unix seconds, at which a node of the run is taken away; None if none is.

    `ray.train.get_preemption_info` is a barrier of all workers, which costs milliseconds. The loop
    agrees on its own, with the sums of every step, so only this worker's state is read.
    """
    info = get_train_context().preemption_context.preemption_info
    if info is None:
        return None
    return info.deadline_ms / 1000 if info.deadline_ms else math.inf


class WorkerGroupCallback(ControllerCallback):
    """Reports every change of the workers of a stage, in the process of Ray Train's controller.

    Before the number of workers changes, it has them save a checkpoint. While the resources of the
    workers are missing, e.g. after the loss of a node, it reports which, and ends the run after a
    time or if the run is asked to stop.
    """

    def __init__(
        self, folder: Path, resources: dict[str, float], options: RunOptions, *, steps: int
    ) -> None:
        """steps: of the stage."""
        self._folder, self._stage, self._steps = folder, folder.name, steps
        self._resources = resources
        self._fewest, self._most = options.fewest_workers, options.most_workers
        self._timeout_s = options.resource_timeout_s
        self._workers = 0  # that run now
        self._next = 0  # that Ray Train starts next
        self._before = 0  # that ran before
        self._waits_since: float | None = None  # on the monotonic clock
        self._said = 0.0

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        """Save a checkpoint if workers are running, because Ray Train ends them after this."""
        if self._workers:
            self._say(
                f"room for {resize_decision.num_workers} workers instead of {self._workers}: they "
                "start again after a checkpoint"
            )
            self._save()
            self._before, self._workers = self._workers, 0
        self._next = resize_decision.num_workers

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Report a failure, a wait and a start. Raises ResourceError after a long wait."""
        name, now = type(current_state).__name__, time.monotonic()
        if name == "RunningState" and not self._workers:
            self._workers, self._waits_since = self._next, None
            if self._before and self._before != self._workers:
                self._say(f"{self._workers} workers instead of {self._before} train from now on")
        elif name in ("RestartingState", "ReschedulingState"):
            if type(previous_state) is not type(current_state) and self._workers:
                reason = _reason(current_state.training_failed_error)
                self._say(f"the workers start again from the newest checkpoint, because {reason}")
                self._before, self._workers = self._workers, 0
            self._wait(now)
        elif name == "InitializingState":
            self._wait(now)

    def _save(self) -> None:
        """Ask the workers for a checkpoint, after which they stop, and wait for it."""
        stop, before = Stop(self._folder), self._newest()
        started = said = time.monotonic()
        stop.ask(RESIZE)
        while self._newest() == before and not self._trained():
            now = time.monotonic()
            if now - started > CHECKPOINT_S:
                self._say(f"no checkpoint within {CHECKPOINT_S:g} s: they start again without it")
                break
            if now - said > ray_utils.SAY_EVERY_S:
                said = now
                self._say(f"waiting for the checkpoint: {now - started:.0f} of {CHECKPOINT_S:g} s")
            time.sleep(POLL_S)
        stop.withdraw(RESIZE)

    def _trained(self) -> bool:
        return is_finished(self._folder) or has_snapshot(self._folder, self._steps)

    def _newest(self) -> str:
        return next((c.folder.name for c in checkpoint.checkpoints(self._folder)), "")

    def _wait(self, now: float) -> None:
        """Report the missing resources; ends the run after a time, and if it is asked to stop."""
        if self._waits_since is None:
            self._waits_since = self._said = now
        if asked := Stop(self._folder).asked:
            raise interrupted(self._stage, asked, None)
        waited = now - self._waits_since
        missing = ray_utils.missing([self._resources] * self._fewest)
        if waited >= self._timeout_s:
            raise ResourceError(
                f"{self._stage}: the cluster did not have the resources within {self._timeout_s:g} "
                f"s. Got {missing}. Fix: the same command resumes when it has them; or "
                f"{ray_utils.FEWER}, or wait longer (--resource-timeout)"
            )
        if now - self._said >= ray_utils.SAY_EVERY_S:
            self._said = now
            self._say(f"waiting for {missing}; {waited:.0f} of {self._timeout_s:g} s")
        time.sleep(POLL_S)  # Ray Train asks again at once

    def _say(self, text: str) -> None:
        with notices.to_file(self._folder):
            log.warning("%s: %s", self._stage, text)


class PlacementCallback(RayWorkerGroupCallback):
    """Writes the placement group of the workers into the folder of the stage, for `release`."""

    def __init__(self, folder: Any) -> None:
        self._file = folder / "ray" / PLACEMENT

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Write it in the process of the controller."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        controller = ray.get_runtime_context().get_actor_id()
        record = {"controller": controller, "group": group.id.hex()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(self._file, json.dumps(record))


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


def _reason(error: BaseException) -> str:
    """Return one line about a failure of the workers; the lost ones are its cause."""
    failures = getattr(error, "worker_failures", {})
    gone = RayActorError | WorkerHealthCheckFailedError
    lost = [rank for rank, each in failures.items() if isinstance(each, gone)]
    if isinstance(error, PreemptionError):
        return "a node was taken away, after a notice"
    if lost:
        return f"the process or the node of rank {', '.join(map(str, sorted(lost)))} is gone"
    cause = _cause(error)
    lines = str(cause).strip().splitlines()
    return f"of {type(cause).__name__}: {lines[0].strip()[:300] if lines else ''}"


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
