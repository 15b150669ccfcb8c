"""Evaluations in Ray tasks: the driver evaluates the snapshots of a stage while it trains.

Neither the workers nor the loop wait for a task. Without free resources, e.g. if the workers have
all GPUs, the snapshots wait, and are evaluated after the last step, when the workers have ended.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError

from bridgework import __version__, artifacts, ray_utils, storage
from bridgework.errors import BridgeworkError, Interrupted, ResourceError, WeightsError
from bridgework.evaluation import results
from bridgework.inference.pipeline import Pipeline
from bridgework.system import EvalSpec
from bridgework.tracking.tracker import JOURNAL, Journal
from bridgework.training import loop, notices, snapshots
from bridgework.training.options import RunOptions
from bridgework.training.snapshots import Snapshot
from bridgework.training.stopping import listening

AT_ONCE = 2  # tasks
RETRIES = 3  # after the loss of a node or a process, or a ResourceError
POLL_S = 0.5
STORE_POLL_S = 5.0  # between listings of a store

log = logging.getLogger(__name__)


class _Abandoned(Exception):
    """The run ends before this evaluation: the same command repeats it."""


class SnapshotEvaluator:
    """Evaluates the snapshots of a stage in tasks, from threads of the driver.

    It must be closed.
    """

    def __init__(self, job: loop.TrainJob, options: RunOptions) -> None:
        self._job, self._stage = job, job.system[job.stage]
        gpus = min(1.0, ray_utils.gpus_each(options.gpus_per_worker))
        self._resources = {"CPU": ray_utils.ACTOR_CPUS, "GPU": gpus}
        # Equal threads give equal bits: not the cores that happen to be free.
        share = (os.cpu_count() or 1) // (1 + options.most_workers)
        self._threads = options.threads or max(1, share)
        self._timeout_s = options.resource_timeout_s
        self._journal = Journal(job.folder / JOURNAL)
        self._known: set[str] = set()  # folders of the snapshots
        self._evaluations: list[tuple[int, Future[None]]] = []  # with their steps
        self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="evaluation")
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._trained: float | None = None  # time of the end of the training, monotonic
        self._said = False  # that an evaluation waits for resources
        self._thread = threading.Thread(target=self._watch, name="snapshots", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the evaluations of all snapshots, after the last step.

        Raises ResourceError if their resources are missing for too long, and Interrupted if a
        signal stops the run: the same command continues with the evaluations that are left.
        """
        self._trained = said = time.monotonic()
        self._submit_new()
        with listening(self._job.folder, lambda text: None) as stop:
            while waiting := [(step, f) for step, f in self._evaluations if not f.done()]:
                wait([f for _, f in waiting], timeout=POLL_S, return_when=FIRST_COMPLETED)
                if stop.asked:
                    raise Interrupted(
                        f"{self._job.stage}: stopped by {stop.asked}; all steps are trained, and "
                        f"{len(waiting)} snapshots are not evaluated. The same command resumes"
                    )
                now = time.monotonic()
                if now - said > ray_utils.SAY_EVERY_S:
                    said = now
                    log.warning(
                        "%s: all steps are trained; waiting for the evaluation of step %s in a "
                        "task; %.0f s",
                        self._job.stage,
                        ", ".join(str(step) for step, _ in waiting),
                        now - self._trained,
                    )
        for _, future in self._evaluations:
            future.result()

    def close(self) -> None:
        """Cancel the evaluations that are left."""
        self._over.set()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._journal.close()

    def _watch(self) -> None:
        every = POLL_S if storage.is_local(self._job.folder) else STORE_POLL_S
        while not self._over.wait(every):
            with suppress(OSError):  # the run itself reports a disk or store that fails
                self._submit_new()

    def _submit_new(self) -> None:
        with self._lock:
            for snapshot in snapshots.listed(self._job.folder):
                if snapshot.folder.name not in self._known and not self._over.is_set():
                    self._known.add(snapshot.folder.name)
                    future = self._pool.submit(self._evaluate, snapshot)
                    self._evaluations.append((snapshot.step, future))

    def _evaluate(self, snapshot: Snapshot) -> None:
        """Evaluate a snapshot unless it was evaluated before, and record the figures."""
        if snapshot.figures() is not None or not snapshot.has_weights():
            return
        try:
            self._evaluate_and_record(snapshot)
        except (WeightsError, OSError):
            if snapshot.has_weights():
                raise
            # Resumed workers removed it, because they take its step again.

    def _evaluate_and_record(self, snapshot: Snapshot) -> None:
        last = snapshot.step == self._stage.budget.steps
        specs = self._stage.evals if last else loop.midway_evaluations(self._job, self._stage)
        failed = self._run(snapshot, specs)
        if not snapshot.has_weights():
            return
        for name, reason in failed.items():
            log.warning(
                "%s: the evaluation %s of step %d failed, and the run continues without it: %s",
                self._job.stage,
                name,
                snapshot.step,
                reason,
            )
        self._record(snapshot, [spec.name for spec in specs])

    def _run(self, snapshot: Snapshot, specs: Sequence[EvalSpec]) -> dict[str, str]:
        """Run the evaluations in a task; returns the reasons of those that failed."""
        what = f"{self._job.stage}: the evaluation of step {snapshot.step}"
        ray_utils.wait_for(
            what, [self._resources], timeout_s=math.inf, say=self._say, stopped=self._check
        )
        remote: Any = ray.remote(_evaluate_snapshot)  # untyped options in Ray
        task = remote.options(
            name=what,
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources["GPU"],
            max_retries=RETRIES,
            retry_exceptions=[ResourceError],
        )
        device = "cuda" if self._resources["GPU"] else "cpu"
        ref = task.remote(
            snapshot, specs, self._job.home, os.getcwd(), device, self._threads, __version__
        )
        while not ray.wait([ref], timeout=POLL_S)[0]:
            if self._over.is_set():
                ray.cancel(ref, force=True)
                raise _Abandoned
        try:
            failed: dict[str, str] = ray.get(ref)
        except RayError as error:
            failed = {spec.name: _one_line(error) for spec in specs}
        return failed

    def _say(self, text: str) -> None:
        """Report a wait for resources once while the stage trains, and always after its end."""
        if self._trained is None:
            if not self._said:
                log.warning("%s; the training continues", text)
            self._said = True
        else:
            log.warning("%s", text)

    def _check(self) -> None:
        """Stop a wait for resources if the run ends, or if it was too long."""
        if self._over.is_set():
            raise _Abandoned
        if self._trained is not None and time.monotonic() - self._trained > self._timeout_s:
            raise ResourceError(
                f"{self._job.stage}: all steps are trained, and the resources for the evaluations "
                f"were missing for {self._timeout_s:g} s. Got "
                f"{ray_utils.missing([self._resources])}. Fix: the same command resumes when the "
                "cluster has them; or leave out --evaluate-in-task"
            )

    def _record(self, snapshot: Snapshot, order: Sequence[str]) -> None:
        """Write the figures to the journal, and remove weights that are no longer needed."""
        records = [record for record in snapshot.records() if record.name in order]
        records.sort(key=lambda record: order.index(record.name))
        figures = [figure for record in records for figure in record.figures]
        with self._lock:
            self._journal.append(results.with_intervals(figures), snapshot.step)
            self._journal.flush()
            snapshot.finish({figure.name: figure.value for figure in figures})
            loop.prune_snapshots(self._job)


def _evaluate_snapshot(
    snapshot: Snapshot,
    specs: Sequence[EvalSpec],
    home: Path,
    cwd: str,
    device: str,
    threads: int,
    version: str,
) -> dict[str, str]:
    """Evaluate a snapshot in this process of Ray, unless an earlier attempt did.

    Returns the reasons of the evaluations that failed. Raises RunError on a node with another
    version of bridgework than that of the run.
    """
    ray_utils.check_version(version)
    ray_utils.enter_folder(cwd)
    if device == "cpu":
        torch.set_num_threads(threads)
    failed: dict[str, str] = {}
    with notices.to_file(snapshot.folder.parent.parent):
        weights = artifacts.describe(snapshot.artifact).digest
        done = {record.evaluation for record in snapshot.records()}
        # with adapters, so that the figures have the bits of an evaluation in the loop
        pipeline = Pipeline.load(snapshot.artifact, device, adapters=True)
        for spec in specs:
            try:
                if results.identity(spec, home) not in done:
                    result, record = results.evaluate(spec, pipeline, home, weights)
                    results.save(result, record, snapshot.folder / results.FOLDER)
            except ResourceError:
                raise
            except Exception as error:
                failed[spec.name] = _one_line(error)
    return failed


def _one_line(error: BaseException) -> str:
    """Return an error of a task in one line: a BridgeworkError's own text, else with its class."""
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())
    return text if isinstance(cause, BridgeworkError) else f"{type(cause).__name__}: {text}"
