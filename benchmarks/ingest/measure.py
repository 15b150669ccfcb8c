"""One run of one side in a process of its own: time, CPU and memory of all its processes, and which ids came."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.ingest import work
from benchmarks.ingest.feeding import in_process, start_ray, through_ray
from benchmarks.ingest.peers import PEERS
from benchmarks.ingest.store import Store
from benchmarks.ingest.work import BATCH, CASES, Case, Work

WATCH_S = 0.2  # between two looks at the memory
SAID = "FIGURES "  # what the line with the figures begins with; Ray has its say on the same stream


@dataclass(frozen=True)
class Side:
    """Who feeds: ours in process or through Ray, or a library under a torch DataLoader."""

    name: str
    peer: str | None = None
    workers: int = 0  # of the DataLoader; 0 reads in the process that trains
    own_decoder: bool = (
        False  # Pillow's whole decode and resize, as users of the library write it; else ours
    )
    ray: bool = False


SIDES = (
    Side("local"),
    Side("ray", ray=True),
    *(Side(f"{peer}-{workers}", peer, workers) for peer in PEERS for workers in (0, 1)),
    *(Side(f"{peer}-0-pillow", peer, own_decoder=True) for peer in PEERS),
)


@dataclass(frozen=True)
class Figures:
    """One run."""

    cpu_ms: float  # per image, user + system, of all processes, from the warm-up on
    images_per_s: float  # likewise
    first_s: float  # from the call that builds the pipeline to the first batch; imports and ray.init lie before it
    missing: int | None  # ids of the first epoch that did not come; None where sources are mixed
    twice: int | None  # times that one came again in it
    off: (
        float | None
    )  # rows: the furthest that a mixed source is from its share of the first epoch's length
    rss_mb: float = 0.0  # the most, all processes added up; what they share counts for each
    pss_mb: float = 0.0  # the most, what they share counted once


# --- in the process of the run ---------------------------------------------------------------------------------------


def stored(side: Side, case: Case, store: Store) -> list[Path]:
    """The folders that a side reads, one a part of the case; made where they are missing."""
    if side.peer is None:
        return [store.dataset(part) for part in case.parts]
    return [store.folder(part, side.peer, PEERS[side.peer].write) for part in case.parts]


def prepared(side: Side, case: Case, store: Store) -> Callable[[], Iterator[Any]]:
    """What builds the pipeline; what it may take for granted, such as Ray, runs when this returns."""
    folders = stored(side, case, store)
    if side.peer is None:
        if side.ray:
            start_ray()
        feeding = through_ray if side.ray else in_process
        return lambda: feeding(case, store)
    peer = PEERS[side.peer]
    peer.load()
    sizes = [store.size(part) for part in case.parts]
    decode = work.pillow if side.own_decoder else work.ours
    return lambda: peer.stream(folders, sizes, Work(case, decode), side.workers)


def measure(build: Callable[[], Iterator[Any]], case: Case, store: Store, warm: int) -> Figures:
    """`warm` batches, then as many as an epoch has, so that the clock starts and stops at one place of an epoch."""
    torch.set_num_threads(1)
    steps = store.rows // BATCH
    began = time.perf_counter()
    batches = build()
    keys = work.keys(next(batches))
    first_s = time.perf_counter() - began
    keys += _keys(batches, warm - 1)
    wall, cpu = time.perf_counter(), cpu_s()
    keys += _keys(batches, steps)
    wall, cpu = time.perf_counter() - wall, cpu_s() - cpu
    images = steps * BATCH
    return Figures(1e3 * cpu / images, images / wall, first_s, *_epoch(keys[:images], case, store))


def _keys(batches: Iterator[Any], count: int) -> list[str]:
    return [key for batch in islice(batches, count) for key in work.keys(batch)]


def _epoch(
    keys: Sequence[str], case: Case, store: Store
) -> tuple[int | None, int | None, float | None]:
    """(missing, twice, off) of as many rows as there are."""
    if len(case.parts) == 1:
        return store.rows - len(set(keys)), len(keys) - len(set(keys)), None
    came = Counter(key.split("/")[0] for key in keys)
    roots = {part: store.size(part) ** 0.5 for part in case.parts}
    total = sum(roots.values())
    return (
        None,
        None,
        max(abs(came[part] - root / total * len(keys)) for part, root in roots.items()),
    )


def cpu_s() -> float:
    """User and system time of this process, its descendants that live, and those that were waited for."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


# --- from outside ----------------------------------------------------------------------------------------------------


def run(side: Side, case: Case, store: Store, warm: int) -> Figures:
    """One run in a fresh process. Raises RuntimeError with what it said where it fails."""
    told = {
        "side": side.name,
        "case": case.name,
        "pictures": store.pictures,
        "rows": store.rows,
        "warm": warm,
    }
    command = [sys.executable, "-m", "benchmarks.ingest", "--one", json.dumps(told)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        rss, pss = _watched(process)
        out.seek(0)
        said = out.read()
    found = [line.removeprefix(SAID) for line in said.splitlines() if line.startswith(SAID)]
    if process.returncode or not found:
        raise RuntimeError(f"{told} ended with {process.returncode}:\n{said[-3_000:]}")
    return Figures(**json.loads(found[0]) | {"rss_mb": rss, "pss_mb": pss})


def one(told: str) -> None:
    """What the fresh process does."""
    words = json.loads(told)
    [side] = [each for each in SIDES if each.name == words["side"]]
    case, store = CASES[words["case"]], Store(words["pictures"], words["rows"])
    print(
        SAID + json.dumps(asdict(measure(prepared(side, case, store), case, store, words["warm"]))),
        flush=True,
    )


def _watched(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """The most megabytes (RSS, PSS) that a process and its descendants had together until it ended."""
    most = (0.0, 0.0)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        rss = pss = 0.0
        for each in _alive(root):
            try:
                memory = each.memory_full_info()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            rss, pss = rss + memory.rss / 1e6, pss + memory.pss / 1e6
        most = max(most[0], rss), max(most[1], pss)
        time.sleep(WATCH_S)
    return most


def _alive(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
