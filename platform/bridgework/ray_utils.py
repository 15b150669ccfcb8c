"""Ray sessions, resource requests to the autoscaler, and work on a pool of actors.

A command starts its own Ray or joins a cluster. A stage or an actor requests the resources that it
needs, and the autoscaler provides them: the cluster's current resources affect only the message
while waiting. Functions import Ray only when they use it, because a run in one process needs none.
"""

import logging
import math
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

from bridgework import __version__, ray_metrics
from bridgework.errors import BridgeworkError, ResourceError, RunError

T = TypeVar("T")
TIMEOUT_S = 1_800.0  # of a wait for resources: a scarce spot node may take many minutes
RESIZE_S = 60.0  # interval at which an elastic run looks for room for more workers
TOKEN_FIX = (
    "export RAY_AUTH_MODE=token, and put the token of the cluster into ~/.ray/auth_token or "
    "RAY_AUTH_TOKEN"
)
JOIN_S = 5.0  # for which the port of a Ray may be closed, because it starts
SAY_EVERY_S = 10.0  # interval of the messages while waiting
NODE_TYPES_S = 60.0  # for which the node types of an autoscaler are known
HEAD_S = 60.0  # longest wait for the head to read them
HEAD = "node:__internal_head__"  # resource of the head, which Ray adds
FEWER = "ask for fewer (--workers, --gpus-per-worker)"
# CPUs per actor; `workers` sets the parallelism. One CPU each would not fit on a small machine,
# because Ray itself needs some.
ACTOR_CPUS = 0.5

log = logging.getLogger(__name__)


class _Session:
    """State of this process's Ray session."""

    own: ClassVar[bool] = False  # its own Ray on this machine alone: no node will join it
    # address of a cluster, time of the reading on the monotonic clock, maximum of each resource
    node_types: ClassVar[tuple[str, float, dict[str, float]]] = ("", 0.0, {})


def is_open() -> bool:
    """True if this process is connected to a Ray."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())


@contextmanager
def ray_session() -> Iterator[None]:
    """Run the block with a quiet Ray: a run reports by its bar, its journal and its errors.

    Inside `ray job submit`, RAY_ADDRESS is set. Otherwise a Ray of this process's own is started:
    it listens on loopback, has no dashboard, and ends with the block.
    """
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    connect(log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        _Session.own = False
        ray.shutdown()


def connect(**logs: Any) -> bool:
    """Connect this process to the Ray at `address`, or start its own; returns True for its own.

    `logs` are the arguments of `ray.init` about logs. Raises ResourceError if it cannot be joined.
    """
    import ray

    named = address()
    _Session.own = named is None
    with _own_sigterm():
        if named is None:
            # Only this process can reach its Ray, and nothing preempts the machine.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            cpus = max(2, os.cpu_count() or 1)  # one for the workers, one for Ray Data
            ray.init("local", num_cpus=cpus, include_dashboard=False, **logs)
            return True
        join(named, **logs)
    return False


def join(address: str, **logs: Any) -> None:
    """Join the Ray at `address`; `logs` are the arguments of `ray.init` about logs.

    Raises ResourceError if it cannot be joined. Ray itself would try a closed port for minutes, so
    the port must open within JOIN_S.
    """
    import ray
    from ray.exceptions import RayError

    deadline = time.monotonic() + JOIN_S
    while re.fullmatch(r"(ray://)?[^/]+:\d+", address) and not _answers(address):
        if time.monotonic() > deadline:
            raise not_joined(address, ConnectionError("nothing listens at this address"))
        time.sleep(0.5)
    try:
        ray.init(address=address, **logs)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise not_joined(address, error) from error


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's handler of SIGTERM in the block, because Ray sets one that says nothing."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def alive_nodes() -> list[dict[str, Any]]:
    """Return Ray's records of the nodes that are alive."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def on_every_node(
    work: Callable[[], T], *, timeout_s: float = 120.0, say: Callable[[str], object] = log.warning
) -> list[tuple[dict[str, Any], T | Exception]]:
    """Run `work` once on every node of the cluster, without requesting resources.

    Returns Ray's record of each node with the result or the error of its call. A call that takes
    longer than `timeout_s` is a TimeoutError. `work` is sent by value, so that it runs with another
    version of bridgework too.
    """
    import ray
    from ray import cloudpickle
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0, max_retries=0)
    def call(pickled: bytes) -> Any:
        return cloudpickle.loads(pickled)()

    module = sys.modules[getattr(work, "func", work).__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        pickled = cloudpickle.dumps(work)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    nodes = alive_nodes()
    calls = [
        call.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(pickled)
        for node in nodes
    ]
    waiting, started = list(calls), time.monotonic()
    while waiting and (elapsed := time.monotonic() - started) < timeout_s:
        _, waiting = ray.wait(
            waiting, num_returns=len(waiting), timeout=min(SAY_EVERY_S, timeout_s - elapsed)
        )
        if waiting:
            say(
                f"waiting for {len(waiting)} of {len(nodes)} nodes; {elapsed:.0f} of {timeout_s:g} s"
            )
    found: list[tuple[dict[str, Any], T | Exception]] = []
    for node, each in zip(nodes, calls, strict=True):
        try:
            if each in waiting:
                raise TimeoutError(f"no answer within {timeout_s:g} s")
            found.append((node, ray.get(each)))
        except Exception as error:
            found.append((node, error))
    return found


def enter_folder(folder: str) -> None:
    """Change to the working folder of the command, so that relative paths are valid.

    A node of another machine may not have it; URLs and absolute paths do not need it.
    """
    if os.path.isdir(folder):
        os.chdir(folder)


def check_version(expected: str, found: str = __version__, node: str = platform.node()) -> None:
    """Raise RunError if a node has another version of bridgework than the command.

    expected: of the command. found: of the node, by default of this process.
    """
    if found != expected:
        raise RunError(
            f"{node}: the node has another version of bridgework than the command. Got "
            f"{found or 'none'}; expected {expected}. Fix: install {expected} there, or submit the "
            "folder of the package; `bridgework doctor --cluster` lists all such nodes"
        )


def jobs(address: str) -> list[tuple[str, str]]:
    """Return (submission id, state) of the jobs of a cluster.

    Raises ResourceError if its job server does not answer or refuses the token.
    """
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        found = JobSubmissionClient(address).list_jobs()
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise not_joined(address, error) from error
    return [(job.submission_id or "", str(job.status.value)) for job in found]


def not_joined(address: str, error: Exception) -> ResourceError:
    """Return the error of a cluster that cannot be joined: a wrong token, address or version.

    Ray's error for a refused token is often that of a cluster that is down, so its port is tried.
    """
    text = str(error).strip().partition(chr(10))[0][:300]
    said = f"{text} {error}".lower()
    if re.search(r"token|unauthenticated|unauthorized|\b401\b|\b403\b", said):
        reason, fix = "", TOKEN_FIX
    elif "version" in said:
        reason, fix = "", "install the version of Ray and Python that the cluster has"
    elif "failed to connect" in said and _answers(address):
        reason, fix = ", and its port answers: the token is missing or wrong", TOKEN_FIX
    else:
        reason, fix = (
            "",
            "check that the cluster runs and that its port is forwarded (`ray dashboard`)",
        )
    return ResourceError(
        f"{address}: the cluster cannot be joined. Got {type(error).__name__}: {text}{reason}. "
        f"Fix: {fix}"
    )


def _answers(address: str) -> bool:
    """Return whether a process listens at host:port, with or without a protocol."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=3):
            return True
    except (OSError, ValueError):
        return False


def address() -> str | None:
    """Return the address in RAY_ADDRESS; None if this process starts its own Ray."""
    named = os.environ.get("RAY_ADDRESS", "")
    return None if named in ("", "local") else named


def potential() -> dict[str, float]:
    """Return the maximum of each resource, in the cluster now or by its node types."""
    import ray

    here, most = dict(ray.cluster_resources()), _node_types()
    return {
        name: max(here.get(name, 0.0), float(most.get(name, 0)))
        for name in here.keys() | most.keys()
    }


def _node_types() -> dict[str, float]:
    """Return the maximum of each resource by the node types of the autoscaler; {} without one."""
    from ray._private.state import state

    # Managed clusters report their node types. Ray's own autoscaler does not, so they are read from
    # its file on the head.
    reported = state.get_max_resources_from_cluster_config()
    if reported or _Session.own:
        return {name: float(amount) for name, amount in (reported or {}).items()}
    return _head_node_types()


def _head_node_types() -> dict[str, float]:
    """Return the maximum of each resource by the file of the head's autoscaler; {} without one."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    context, now = ray.get_runtime_context(), time.monotonic()
    gcs = context.gcs_address
    known, read_at, types = _Session.node_types
    if known == gcs and now - read_at < NODE_TYPES_S:
        return types
    head = next((node["NodeID"] for node in alive_nodes() if HEAD in node["Resources"]), None)
    if head == context.get_node_id():
        types = read_node_types(gcs)
    elif head is not None:
        only = NodeAffinitySchedulingStrategy(head, soft=False)
        read = ray.remote(num_cpus=0)(read_node_types).options(scheduling_strategy=only)
        try:
            types = ray.get(read.remote(gcs), timeout=HEAD_S)
        except RayError as error:
            log.warning("the node types of the autoscaler cannot be read on the head: %s", error)
            types = {}
    _Session.node_types = (gcs, now, types)
    return types


def read_node_types(gcs: str) -> dict[str, float]:
    """Return the maximum of each resource that the autoscaler of this machine's head may start.

    The head's autoscaler has the address `gcs` and the path of its file in its command line.
    Returns {} if no autoscaler with a file runs here.
    """
    import psutil
    import yaml

    port = gcs.rpartition(":")[2]
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
        file = flags.get("--autoscaling-config")
        if file and flags.get("--gcs-address", "").rpartition(":")[2] == port:
            try:
                return _most(yaml.safe_load(Path(file).expanduser().read_text(encoding="utf-8")))
            except (OSError, yaml.YAMLError) as error:
                log.warning("%s: the node types of the autoscaler cannot be read: %s", file, error)
    return {}


def _most(config: Mapping[str, Any]) -> dict[str, float]:
    """Return the maximum of each resource by a launcher's file, in all its nodes but the head."""
    types = config["available_node_types"]
    workers = [types[name] for name in types if name != config.get("head_node_type")]
    limit = config.get("max_workers", math.inf)
    most: dict[str, float] = {}
    for name in {name for each in workers for name in each.get("resources", {})}:
        left, most[name] = limit, 0.0
        for each in sorted(workers, key=lambda w: -w.get("resources", {}).get(name, 0)):
            nodes = min(left, each.get("max_workers", limit))
            most[name] += float(nodes * each.get("resources", {}).get(name, 0))
            left -= nodes
    return most


def grows(name: str) -> bool:
    """Return True if the autoscaler may add more of a resource than the cluster has."""
    import ray

    return bool(potential().get(name, 0.0) > ray.cluster_resources().get(name, 0.0))


def gpus_each(requested: float | None = None) -> float:
    """Return the GPUs of one worker.

    By default 1 if the cluster has GPUs or can start nodes with GPUs, else 0.
    """
    if requested is not None:
        return requested
    return 1.0 if potential().get("GPU", 0.0) >= 1 else 0.0


def pool_resource(name: str) -> dict[str, float]:
    """Return one unit of a custom resource that marks a pool of nodes, e.g. {"serve": 1.0}.

    Returns {} if the cluster has no such nodes and can start none.
    """
    return {name: 1.0} if potential().get(name, 0.0) >= 1 else {}


def wait_for(
    what: str,
    bundles: Sequence[Mapping[str, float]],
    *,
    timeout_s: float = TIMEOUT_S,
    say: Callable[[str], object] = log.warning,
    stopped: Callable[[], object] = lambda: None,
    fix: str = FEWER,
) -> None:
    """Request `bundles` from the autoscaler and return as soon as all are free at the same time.

    Every SAY_EVERY_S seconds `say` is called with the missing resources. `stopped` is polled and
    may raise. Raises ResourceError, with the advice `fix`, after `timeout_s`, and at once if the
    cluster never has the resources.
    """
    from ray.util import placement_group, remove_placement_group

    most = potential()
    too_much = any(most.get(name, 0.0) < amount for name, amount in _sum(bundles).items())
    if too_much and _Session.own:
        raise ResourceError(
            f"{what}: this machine cannot run it. Got {missing(bundles)}. Fix: {fix}"
        )
    if too_much and _node_types():
        raise ResourceError(
            f"{what}: the cluster cannot run it, with all nodes that its autoscaler may start. Got "
            f"{missing(bundles)}. Fix: {fix}, or raise max_workers of a node type"
        )
    started = time.monotonic()
    deadline = started + timeout_s
    group = placement_group([dict(bundle) for bundle in bundles])  # visible to the autoscaler
    try:
        while True:
            for _ in range(int(SAY_EVERY_S)):
                if group.wait(min(1.0, max(0.1, deadline - time.monotonic()))):
                    return
                stopped()
                if time.monotonic() >= deadline:
                    raise ResourceError(
                        f"{what}: the cluster did not have the resources within {timeout_s:g} s. "
                        f"Got {missing(bundles)}. Fix: {fix}, free some, let the cluster start "
                        "more nodes, or wait longer (--resource-timeout)"
                    )
            elapsed = time.monotonic() - started
            limit = f" of {timeout_s:g}" if math.isfinite(timeout_s) else ""
            say(f"{what}: waiting for {missing(bundles)}; {elapsed:.0f}{limit} s")
    finally:
        remove_placement_group(group)


def _sum(bundles: Sequence[Mapping[str, float]]) -> Counter[str]:
    """Return the amount of each resource in all bundles together."""
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update({name: amount for name, amount in bundle.items() if amount})
    return total


def missing(bundles: Sequence[Mapping[str, float]]) -> str:
    """Return e.g. `8 x GPU: 2 of 8 in the cluster, 0 free; the autoscaler may start nodes ..`."""
    import ray

    wanted = _sum(bundles)
    here, free, most = ray.cluster_resources(), ray.available_resources(), potential()
    parts = []
    for name, amount in sorted(wanted.items(), key=lambda item: item[0] != "GPU"):
        if here.get(name, 0.0) >= amount and free.get(name, 0.0) >= amount:
            continue
        own = here.get(name, 0.0)
        grow = (
            f"the autoscaler may start nodes for up to {most[name]:g}"
            if most.get(name, 0.0) > own
            else "no known autoscaler starts more"
        )
        parts.append(
            f"{amount:g} x {name}: {own:g} of {amount:g} in the cluster, "
            f"{free.get(name, 0.0):g} free; {grow}"
        )
    return " and ".join(parts) or (
        f"a place for {len(bundles)} workers, because the free resources of single nodes may be too few"
    )


def map_on_actors(
    make: Callable[[], Callable[[T], object]],
    items: Sequence[T],
    workers: int,
    *,
    gpus: bool = False,
    what: str = "the actors",
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Call the function that `make` returns on every item, on at most `workers` Ray actors.

    With 0 workers the calls run in this process. `make` runs once per actor and may load expensive
    objects; it and the items must be picklable. With `gpus`, every actor has one GPU if the cluster
    has GPUs or can start nodes with GPUs, and the number of actors is at most that of the GPUs. The
    call waits for the first actor. Raises a BridgeworkError that a call raises, and ResourceError.
    """
    if not items:
        return
    if not workers:
        work = make()
        for item in items:
            work(item)
        return
    import ray.data

    actors, gpu = min(workers, len(items)), gpus_each() if gpus else 0.0
    if gpu:
        most = int(potential()["GPU"] // gpu)
        if most < actors:
            log.warning(
                "%s: %d of %d, because the cluster has or can start no more GPUs",
                what,
                most,
                actors,
            )
        actors = min(actors, most)
    # Ray Data begins with the first actor.
    wait_for(what, [{"CPU": ACTOR_CPUS, "GPU": gpu}], timeout_s=timeout_s)
    results = ray.data.from_items(
        [{"item": item} for item in items], override_num_blocks=len(items)
    ).map(
        cast(Any, _Actor),
        fn_constructor_args=(
            make,
            os.getcwd(),
            max(1, (os.cpu_count() or 1) // actors),
            what,
            __version__,
        ),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=ACTOR_CPUS,
        num_gpus=gpu,
    )
    for row in results.iter_rows():
        if row["error"]:
            module, _, name = row["error"].partition(":")
            raise getattr(import_module(module), name)(row["message"])


class _Actor:
    """Runs calls in the working folder of the calling process, so that relative paths are valid."""

    def __init__(
        self,
        make: Callable[[], Callable[[Any], object]],
        folder: str,
        threads: int,
        what: str,
        version: str,
    ) -> None:
        """version: of bridgework in the calling process; every call fails on a node with another."""
        enter_folder(folder)
        self._what = what
        self._work: Callable[[Any], object]
        try:
            check_version(version)
        except RunError as error:
            self._work = partial(_fail, str(error))
            return
        self._work = make()
        if "torch" in sys.modules:
            # Ray's default follows num_cpus, not the cores.
            sys.modules["torch"].set_num_threads(threads)

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        """Return class and message of a BridgeworkError, since Ray would wrap it without its cause.

        Both are empty after success.
        """
        started = time.perf_counter()
        try:
            self._work(row["item"])
        except BridgeworkError as error:
            ray_metrics.add("bridgework_actor_errors", work=self._what)
            own = next(
                cls
                for cls in type(error).__mro__
                if "__init__" not in vars(cls) or cls is BridgeworkError
            )
            return {"error": f"{own.__module__}:{own.__qualname__}", "message": str(error)}
        ray_metrics.add("bridgework_actor_seconds", time.perf_counter() - started, work=self._what)
        ray_metrics.add("bridgework_actor_items", work=self._what)
        return {"error": "", "message": ""}


def _fail(message: str, item: Any) -> None:
    raise RunError(message)
