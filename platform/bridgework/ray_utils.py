"""The Ray that a command runs on, its own or the cluster's; what is asked of it; and work spread over actors there.

What a stage or an actor needs is asked for, and the autoscaler brings it: what the cluster shows at the
moment decides nothing but the message while waiting. Ray is imported by what needs it: a machine that
works in one process has none.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any, ClassVar, TypeVar, cast

from bridgework.errors import BridgeworkError, ResourceError

T = TypeVar("T")
TIMEOUT_S = 1_800.0  # how long resources are waited for: a scarce spot node may take many minutes
SAY_EVERY_S = 10.0
FEWER = "ask for fewer (--workers, --gpus-per-worker)"
ACTOR_CPUS = 0.5  # `workers` is the knob: on a small machine a whole CPU each would not fit beside Ray itself


log = logging.getLogger(__name__)


def potential() -> dict[str, float]:
    """The most of each resource that the cluster has or, by its node types, the autoscaler may bring."""
    import ray
    from ray._private.state import (
        state,
    )  # the only way to the node types: `ray status` reads them there, too

    here, most = dict(ray.cluster_resources()), state.get_max_resources_from_cluster_config() or {}
    return {
        name: max(here.get(name, 0.0), float(most.get(name, 0)))
        for name in here.keys() | most.keys()
    }


def grows(name: str) -> bool:
    """Return whether the autoscaler may bring more of a resource than there is."""
    import ray

    return bool(potential().get(name, 0.0) > ray.cluster_resources().get(name, 0.0))


def gpus_each(asked: float | None = None) -> float:
    """GPUs for one worker: what is asked for, else 1 where the cluster has some or can start nodes that have."""
    if asked is not None:
        return asked
    return 1.0 if potential().get("GPU", 0.0) >= 1 else 0.0


def wait_for(
    what: str,
    bundles: Sequence[Mapping[str, float]],
    *,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], object] = log.warning,
    stopped: Callable[[], object] = lambda: None,
) -> None:
    """Return as soon as the cluster has all `bundles` free at once, and ask the autoscaler for them until then.

    Every SAY_EVERY_S `say` hears what is missing, and `stopped` may raise. Raises ResourceError after `timeout_s`.
    """
    from ray.util import placement_group, remove_placement_group

    wanted = Counter[str]()
    for bundle in bundles:
        wanted.update({name: amount for name, amount in bundle.items() if amount})
    most = potential()
    if _Own.ray and any(most.get(name, 0.0) < amount for name, amount in wanted.items()):
        raise ResourceError(
            f"{what}: this machine cannot run it. Got {_missing(wanted)}. Fix: {FEWER}"
        )
    started = time.monotonic()
    deadline = started + timeout_s
    group = placement_group(
        [dict(bundle) for bundle in bundles]
    )  # a demand, which the autoscaler sees
    try:
        while True:
            for _ in range(int(SAY_EVERY_S)):
                if group.wait(min(1.0, max(0.1, deadline - time.monotonic()))):
                    return
                stopped()
                if time.monotonic() >= deadline:
                    raise ResourceError(
                        f"{what}: the cluster did not have the resources within {timeout_s:g} s. "
                        f"Got {_missing(wanted)}. Fix: {FEWER}, free some, let the cluster start more nodes, or wait "
                        "longer (--resource-timeout)"
                    )
            say(
                f"{what}: waiting for {_missing(wanted)}; {time.monotonic() - started:.0f} of {timeout_s:g} s"
            )
    finally:
        remove_placement_group(group)


def _missing(wanted: Mapping[str, float]) -> str:
    """`8 x GPU: 2 of 8 in the cluster, 0 free; the autoscaler may start nodes with up to 16`."""
    import ray

    here, free, most = ray.cluster_resources(), ray.available_resources(), potential()
    parts = []
    for name, amount in sorted(wanted.items(), key=lambda item: item[0] != "GPU"):
        if name != "GPU" and here.get(name, 0.0) >= amount and free.get(name, 0.0) >= amount:
            continue
        own = here.get(name, 0.0)
        grow = (
            f"the autoscaler may start nodes for up to {most[name]:g}"
            if most.get(name, 0.0) > own
            else "no autoscaler is known that starts more"
        )
        parts.append(
            f"{amount:g} x {name}: {own:g} of {amount:g} in the cluster, {free.get(name, 0.0):g} free; {grow}"
        )
    return " and ".join(parts) or "room on the nodes: what is free is spread over too many of them"


def map_on_actors(
    made: Callable[[], Callable[[T], object]],
    items: Sequence[T],
    workers: int,
    *,
    gpus: bool = False,
    what: str = "the actors",
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Call what `made` makes on every item: by at most `workers` actors of Ray, or with 0 in this process.

    `made` is called once in each actor, and holds what is expensive to load; it and the items are picklable. With
    `gpus`, every actor has one where the cluster has some or can start nodes that have, and there are at most as many
    actors; the first is waited for. Raises what a call raises, if it is an error of ours, and ResourceError.
    """
    if not items:
        return
    if not workers:
        work = made()
        for item in items:
            work(item)
        return
    import ray.data

    actors, gpu = min(workers, len(items)), gpus_each() if gpus else 0.0
    if gpu:
        most = int(potential()["GPU"] // gpu)
        if most < actors:
            log.warning(
                "%s: %d of %d, since the cluster has or can start no more GPUs", what, most, actors
            )
        actors = min(actors, most)
    wait_for(
        what, [{"CPU": ACTOR_CPUS, "GPU": gpu}], timeout_s=timeout_s
    )  # Ray Data begins with the first actor
    done = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=len(items)
    ).map(
        cast(Any, _Actor),
        fn_constructor_args=(made, os.getcwd(), max(1, (os.cpu_count() or 1) // actors)),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=gpu,
    )
    for row in done.iter_rows():
        if row["error"]:
            module, _, name = row["error"].partition(":")
            raise getattr(import_module(module), name)(row["message"])


class _Own:
    """Remembers that the Ray of this process is its own, on this machine alone: no node will join it."""

    ray: ClassVar[bool] = False


class _Actor:
    """Works in the folder of the process that asked: relative paths mean what they say."""

    def __init__(
        self, made: Callable[[], Callable[[Any], object]], folder: str, threads: int
    ) -> None:
        with suppress(OSError):  # another machine may have no such folder, and URLs need none
            os.chdir(folder)
        self._work = made()
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(
                threads
            )  # Ray's own choice follows num_cpus, not the cores

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """The class and the message of an error of ours: Ray would wrap what is raised, and drop its cause."""
        try:
            self._work(row["item"])
        except BridgeworkError as error:
            own = next(
                cls
                for cls in type(error).__mro__
                if "__init__" not in vars(cls) or cls is BridgeworkError
            )
            return {"error": f"{own.__module__}:{own.__qualname__}", "message": str(error)}
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
        os.environ.setdefault(
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0"
        )  # nor does anybody take the machine away
        cpus = max(2, os.cpu_count() or 1)  # one for the workers, one for Ray Data
        ray.init("local", num_cpus=cpus, include_dashboard=False, **logs)
        return True
    ray.init(address=named, **logs)
    return False


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray for the length of the block, quiet: what a run has to say stands in its bar, its journal and its errors.

    Inside `ray job submit`, RAY_ADDRESS is set. A Ray of our own listens on loopback, has no dashboard, and ends here.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    _Own.ray = connect(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        _Own.ray = False
        ray.shutdown()
