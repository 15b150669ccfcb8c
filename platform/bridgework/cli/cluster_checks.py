"""`bridgework doctor --cluster`: checks from every node of a Ray cluster.

Every node answers with facts, and this process judges them: are the versions equal, does every node
read and write the home, are the clocks equal, do the nodes reach each other and the tracking
server, can torch use their GPUs.
"""

import os
import platform
import shutil
import socket
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from typing import Any
from uuid import uuid4

import fsspec

from bridgework.cli.diagnostics import DISK_GIB, Check

PACKAGES = ("bridgework", "ray", "torch", "transformers", "deepspeed")
CLOCK_S = 5.0  # difference that matters: leases and the order of records
TIMEOUT_S = 10.0  # of a connection
ANSWER_S = 300.0  # for which a node is waited for: a store may be slow
STORE_S = 10.0  # time of a read and a write that matters
FOLDER = "doctor"  # in the home, for the files of the check of the store


@dataclass(frozen=True)
class Facts:
    """Answer of one node; an empty text is success."""

    versions: Mapping[str, str]
    clock: float  # Unix seconds
    reads: str  # error of reading the file that this process wrote
    writes: str
    free_gib: float  # of the disk for temporary files
    tracking: str
    unreachable: tuple[str, ...]  # nodes whose port cannot be reached from this one
    gpus: int  # that torch can use
    nccl: bool
    store_s: float = 0.0  # seconds of a read and a write in the home


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its name, the GPUs that it offers, and its answer or error."""

    name: str
    gpus: float
    answer: Facts | Exception
    head: bool = False
    sent: float = 0.0  # Unix seconds on this machine: the request
    received: float = field(default=float("inf"))  # and the answer


def checks(nodes: Sequence[Node], own: Mapping[str, str], tracking: str) -> list[Check]:
    """Judge the answers: a line for each check that passed on all nodes, else for each bad node."""
    found: list[Check] = []
    for name, judge in (
        ("answers", _answers),
        ("versions", partial(_versions, own=own)),
        ("clock", _clock),
        ("store", _store),
        ("ports", _ports),
        ("tracking server", partial(_tracking, uri=tracking)),
        ("free space", _free),
        ("gpu", _gpu),
    ):
        asked = [n for n in nodes if name == "answers" or isinstance(n.answer, Facts)]
        bad = [Check(f"{name} of {n.name}", False, *said) for n in asked for said in judge(n)]
        found += bad or [Check(name, True, f"{len(asked)} nodes")]
    return found


def answer(
    home: str, secret: str, tracking: str, peers: tuple[tuple[str, str, int], ...], gpus: bool
) -> Facts:
    """Collect the facts of the node on which this runs; it must not need bridgework.

    secret: name of the file in the home that holds its own name. peers: name, address and port of
    all nodes. gpus: ask torch for GPUs, which takes seconds.
    """
    reads = writes = lost = ""
    asked = time.monotonic()
    try:
        files, root = fsspec.core.url_to_fs(home)
        with files.open(f"{root}/{FOLDER}/{secret}", "rb") as file:
            reads = "" if file.read().decode() == secret else "it has another content"
    except Exception as error:
        reads = f"{type(error).__name__}: {error}"
    try:
        files, root = fsspec.core.url_to_fs(home)
        with files.open(f"{root}/{FOLDER}/{secret}-{uuid4().hex}", "wb") as file:
            file.write(b"x")
    except Exception as error:
        writes = f"{type(error).__name__}: {error}"
    store_s = time.monotonic() - asked
    if tracking.startswith("http"):
        try:
            urllib.request.urlopen(f"{tracking.rstrip('/')}/health", timeout=TIMEOUT_S).close()
        except Exception as error:
            lost = f"{type(error).__name__}: {error}"
    unreachable = []
    for name, host, port in peers:
        try:
            socket.create_connection((host, port), timeout=TIMEOUT_S).close()
        except OSError as error:
            unreachable.append(f"{name} ({host}:{port}: {error.strerror or error})")
    count, nccl = 0, False
    if gpus:
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides GPUs from a call without any
        with suppress(ImportError):
            import torch
            import torch.distributed as dist

            count, nccl = torch.cuda.device_count(), dist.is_nccl_available()
    free = shutil.disk_usage(tempfile.gettempdir()).free / 2**30
    found = own_versions()
    return Facts(
        found, time.time(), reads, writes, free, lost, tuple(unreachable), count, nccl, store_s
    )


def own_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that all nodes must share."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def ask(home: str, tracking: str) -> list[Node]:
    """Ask every node of the cluster that RAY_ADDRESS names."""
    from bridgework.ray_utils import alive_nodes, on_every_node

    secret = uuid4().hex
    files, root = fsspec.core.url_to_fs(home)
    files.makedirs(f"{root}/{FOLDER}", exist_ok=True)
    with files.open(f"{root}/{FOLDER}/{secret}", "wb") as file:
        file.write(secret.encode())
    try:
        alive = alive_nodes()
        peers = tuple(
            (_name(n), str(n["NodeManagerAddress"]), int(n["ObjectManagerPort"])) for n in alive
        )
        gpus = any(node["Resources"].get("GPU", 0) for node in alive)
        sent = time.time()
        answers = on_every_node(
            partial(answer, home, secret, tracking, peers, gpus), timeout_s=ANSWER_S
        )
        received = time.time()
    finally:
        for path in files.glob(f"{root}/{FOLDER}/{secret}*"):
            files.rm_file(path)
    return [
        Node(
            _name(node),
            float(node["Resources"].get("GPU", 0)),
            found,
            "node:__internal_head__" in node["Resources"],
            sent,
            received,
        )
        for node, found in answers
    ]


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}/{node['NodeID'][:6]}"


Said = Iterator[tuple[str, str]]  # (found, advice) of a node that fails a check


def _answers(node: Node) -> Said:
    if isinstance(node.answer, Exception):
        lines = str(node.answer).strip().splitlines() or [""]
        advice = (
            "check that the node reaches the store of the home and the tracking server"
            if isinstance(node.answer, TimeoutError)
            else "install bridgework there, or restart the node"
        )
        yield f"{type(node.answer).__name__}: {lines[-1][:200]}", advice


def _versions(node: Node, own: Mapping[str, str]) -> Said:
    assert isinstance(node.answer, Facts)
    theirs = node.answer.versions
    different = [
        f"{name} {theirs.get(name)}, here {version}"
        for name, version in own.items()
        if theirs.get(name) != version
    ]
    if different:
        yield "; ".join(different), "install the versions of constraints.txt on all nodes"


def _clock(node: Node) -> Said:
    assert isinstance(node.answer, Facts)
    clock = node.answer.clock
    off = clock - min(max(clock, node.sent), node.received)
    if abs(off) > CLOCK_S:
        yield f"{off:+.0f} s", "start a time service there, e.g. chrony"


def _store(node: Node) -> Said:
    assert isinstance(node.answer, Facts)
    advice = "let BRIDGEWORK_HOME be a shared folder, or a URL that all nodes have credentials for"
    if node.answer.reads:
        yield f"does not see a file of this process: {node.answer.reads}", advice
    if node.answer.writes:
        yield f"cannot write: {node.answer.writes}", advice
    if node.answer.store_s > STORE_S:
        yield (
            f"slow: {node.answer.store_s:.0f} s for a read and a write",
            "use a store in the region of the nodes; a run waits for it at every checkpoint",
        )


def _ports(node: Node) -> Said:
    assert isinstance(node.answer, Facts)
    if node.answer.unreachable:
        advice = "open the ports between the nodes: Ray, NCCL and gloo use any port"
        yield f"does not reach {', '.join(node.answer.unreachable[:3])}", advice


def _tracking(node: Node, uri: str) -> Said:
    assert isinstance(node.answer, Facts)
    if node.answer.tracking:
        yield f"{uri}: {node.answer.tracking}", "check MLFLOW_TRACKING_URI and its token"


def _free(node: Node) -> Said:
    assert isinstance(node.answer, Facts)
    if node.answer.free_gib < DISK_GIB and not node.head:
        yield (
            f"{node.answer.free_gib:.1f} GiB",
            f"give the node {DISK_GIB:g} GiB for temporary files",
        )


def _gpu(node: Node) -> Said:
    assert isinstance(node.answer, Facts)
    if node.answer.gpus < node.gpus:
        found = f"torch can use {node.answer.gpus} of the {node.gpus:g} GPUs that it offers"
        yield found, "check the driver, and install a build of torch with CUDA"
    elif node.gpus and not node.answer.nccl:
        yield "torch has no NCCL", "install a build of torch with CUDA"
