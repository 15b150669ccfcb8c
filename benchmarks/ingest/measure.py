"""One run of one side in a new process: time, CPU and memory of its processes, and the read ids."""

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

WATCH_S = 0.2  # interval of memory samples
PREFIX = "FIGURES "  # of the line with the results, because Ray logs to the same stream


@dataclass(frozen=True)
class Side:
    """A compared loader: ours in process or through Ray, or a library with a torch DataLoader."""

    name: str
    peer: str | None = None
    workers: int = 0  # of the DataLoader; 0 reads in the training process
    own_decoder: bool = False  # Pillow's full decode and resize, as is common; else ours
    ray: bool = False


SIDES = (
    Side("local"),
    Side("ray", ray=True),
    *(Side(f"{peer}-{workers}", peer, workers) for peer in PEERS for workers in (0, 1)),
    *(Side(f"{peer}-0-pillow", peer, own_decoder=True) for peer in PEERS),
)


@dataclass(frozen=True)
class Figures:
    """Results of one run."""

    cpu_ms: float  # per image, user + system, of all processes, after the warm-up
    images_per_s: float  # likewise
    first_s: float  # from building the pipeline to the first batch, without imports and ray.init
    missing: int | None  # ids that were not read in the first epoch; None for mixed sources
    twice: int | None  # repetitions of an id in it
    off: float | None  # largest deviation of a mixed source from its share of an epoch, rows
    rss_mb: float = 0.0  # peak, sum of all processes; shared memory counts for each
    pss_mb: float = 0.0  # peak; shared memory counts once


# --- in the process of the run


def prepare_data(side: Side, case: Case, store: Store) -> list[Path]:
    """Return the folders that a side reads, one per part of the case; creates missing ones."""
    if side.peer is None:
        return [store.dataset(part) for part in case.parts]
    return [store.folder(part, side.peer, PEERS[side.peer].write) for part in case.parts]


def prepare(side: Side, case: Case, store: Store) -> Callable[[], Iterator[Any]]:
    """Return the function that builds the pipeline; prerequisites such as Ray are started here."""
    folders = prepare_data(side, case, store)
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
    """Read `warm` batches, then measure one epoch, which starts and ends at the same position."""
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
    """Return (missing, twice, off) for one epoch of rows."""
    if len(case.parts) == 1:
        return store.rows - len(set(keys)), len(keys) - len(set(keys)), None
    counts = Counter(key.split("/")[0] for key in keys)
    roots = {part: store.size(part) ** 0.5 for part in case.parts}
    total = sum(roots.values())
    return (
        None,
        None,
        max(abs(counts[part] - root / total * len(keys)) for part, root in roots.items()),
    )


def cpu_s() -> float:
    """Return user and system time of this process and its live and finished descendants."""
    total = 0.0
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system + times.children_user + times.children_system
    return total


# --- in the parent process


def run(side: Side, case: Case, store: Store, warm: int) -> Figures:
    """Run one side in a new process. Raises RuntimeError with its output if it fails."""
    arguments = {
        "side": side.name,
        "case": case.name,
        "pictures": store.pictures,
        "rows": store.rows,
        "warm": warm,
    }
    command = [sys.executable, "-m", "benchmarks.ingest", "--one", json.dumps(arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)
        rss, pss = _peak_memory(process)
        out.seek(0)
        output = out.read()
    found = [line.removeprefix(PREFIX) for line in output.splitlines() if line.startswith(PREFIX)]
    if process.returncode or not found:
        raise RuntimeError(f"{arguments} ended with {process.returncode}:\n{output[-3_000:]}")
    return Figures(**json.loads(found[0]) | {"rss_mb": rss, "pss_mb": pss})


def run_one(arguments: str) -> None:
    """Measure in the new process and print the results."""
    words = json.loads(arguments)
    [side] = [each for each in SIDES if each.name == words["side"]]
    case, store = CASES[words["case"]], Store(words["pictures"], words["rows"])
    print(
        PREFIX
        + json.dumps(asdict(measure(prepare(side, case, store), case, store, words["warm"]))),
        flush=True,
    )


def _peak_memory(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Return the peak (RSS, PSS) in MB of a process and its descendants together."""
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
