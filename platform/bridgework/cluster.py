"""The Ray that a command runs on, its own or the cluster's, and work that is spread over actors there.

Ray is imported by what needs it: a machine that works in one process has none.
"""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar, cast

from bridgework import errors
from bridgework.errors import BridgeworkError

T = TypeVar("T")
ACTOR_CPUS = 0.5  # `workers` is the knob: on a small machine a whole CPU each would not fit beside Ray itself


def each(made: Callable[[], Callable[[T], object]], items: Sequence[T], workers: int, *, gpus: bool = False) -> None:
    """Call what `made` makes on every item: by at most `workers` actors of Ray, or with 0 in this process.

    `made` is called once in each actor, and holds what is dear to load; it and the items are picklable. With `gpus`,
    every actor has one where the cluster has enough. Raises what a call raises, if it is an error of ours.
    """
    if not items:
        return
    if not workers:
        work = made()
        for item in items:
            work(item)
        return
    import ray.data

    actors = min(workers, len(items))
    done = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items)).map(
        cast(Any, _Actor),
        fn_constructor_args=(made, os.getcwd(), max(1, (os.cpu_count() or 1) // actors)),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=1 if gpus and ray.cluster_resources().get("GPU", 0.0) >= actors else 0,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise getattr(errors, row["error"])(row["message"])


class _Actor:
    """Works in the folder of the process that asked: relative paths mean what they say."""

    def __init__(self, made: Callable[[], Callable[[Any], object]], folder: str, threads: int) -> None:
        with suppress(OSError):  # another machine may have no such folder, and URLs need none
            os.chdir(folder)
        self._work = made()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(threads)  # Ray's own choice follows num_cpus, not the cores

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """The name and the message of an error of ours: Ray would wrap what is raised, and leave the cause behind."""
        try:
            self._work(row["item"])
        except BridgeworkError as error:
            leaf = next(cls.__name__ for cls in type(error).__mro__ if vars(errors).get(cls.__name__) is cls)
            return {"error": leaf, "message": str(error)}
        return {"error": "", "message": ""}


def address() -> str | None:
    """The Ray that RAY_ADDRESS names, None for one of this process's own."""
    named = os.environ.get("RAY_ADDRESS", "")
    return None if named in ("", "local") else named


def connect(**logs: Any) -> bool:
    """Connect this process to the Ray at `address`, or start one of its own; True for one of its own.

    `logs` are the arguments of `ray.init` about logs. Raises ResourceError where the Ray cannot be joined.
    """
    import ray

    named = address()
    if named is None:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # nobody else can reach it
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nor does anybody take the machine away
        cpus = max(2, os.cpu_count() or 1)  # one for the workers, one for Ray Data
        ray.init("local", num_cpus=cpus, include_dashboard=False, **logs)
        return True
    ray.init(address=named, **logs)
    return False


@contextmanager
def attached() -> Iterator[None]:
    """Ray for the length of the block, quiet: what a run has to say stands in its bar, its journal and its errors.

    Inside `ray job submit`, RAY_ADDRESS is set. A Ray of our own listens on loopback, has no dashboard, and ends here.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    connect(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
