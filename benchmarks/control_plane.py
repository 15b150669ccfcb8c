"""Cost of the control plane over fake nodes of this machine, in three measurements.

    python -m benchmarks.control_plane                    about ten minutes on two cores
    python -m benchmarks.control_plane --quick            two and four workers, a group of eight

steps    The tiny LLaVA on 2, 4 and 8 workers, each on a fake node with one fake GPU, by Ray Train;
         and by as many plain processes, with the same loop, order and threads, without Ray. The
         difference of a step is what Ray adds: the hand-out of rows, reports and health checks.
readers  Images per second through the readers of Ray Data: by this process alone, with readers on
         the node of the consumers, and with readers on another node.
start    A group of 64 workers, by part. Its processes do no training, and start here on two cores
         instead of on 64 machines, so that the parts are upper bounds.

All processes share the cores of this machine. Compare the rows of one table, not the throughput
with another machine's.
"""

import argparse
import json
import logging
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from bridgework.data.reader import ReaderConfig
from bridgework.system import System

STAGE = "align"
WARM = 0.2  # share of the steps before the clock starts
WINDOW = 8  # steps of a window of a rank's lanes
BATCH = 16  # samples of a step: at least one for each worker
FIGURES = "FIGURES "  # prefix of the line with the results of a child: libraries print too


def system(steps: int, lanes: int, batch: int) -> System:
    """Return the tiny LLaVA with one stage to train, without evaluations."""
    from bridgework.config import override
    from bridgework.system import load

    changes = {"stages.*.evals": (), f"stages.{STAGE}.budget.steps": steps}
    changes |= {f"stages.{STAGE}.budget.batch": batch, f"stages.{STAGE}.data.lanes": lanes}
    changes |= {f"stages.{STAGE}.budget.micro": batch, f"stages.{STAGE}.data.window": WINDOW}
    return override(load("llava").tiny(), changes)


def feed(made: System, home: Path) -> ReaderConfig:
    """Return what the readers of the stage read; synthetic data is made first."""
    from bridgework.data.catalog import resolve
    from bridgework.data.dataset import open_dataset

    for source in made[STAGE].data.leaves:
        open_dataset(resolve(source.dataset, home))
    return ReaderConfig.of(made[STAGE], home)


def marker(file: Path) -> Any:
    """Return a callback of Ray Train that appends the times of a group's start to a file."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    def mark(name: str) -> None:
        with file.open("a") as opened:
            opened.write(f"{name} {time.time()}\n")

    class Marker(WorkerGroupCallback):
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            mark("before")

        def after_worker_group_start(self, worker_group: Any) -> None:
            mark("started")

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            mark("training")

    return Marker()


def marks(file: Path) -> dict[str, float]:
    """Return the times that a `marker` wrote."""
    words = [line.split() for line in file.read_text().splitlines()]
    return {name: float(at) for name, at in words}


@contextmanager
def cluster(nodes: list[dict[str, Any]], head_cpus: int = 1) -> Iterator[None]:
    """Connect to a new head and fake nodes with these resources, during the block."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": head_cpus})
    for node in nodes:
        made.add_node(**node)
    ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        made.shutdown()


# --- steps


def train(workers: int, steps: int, home: Path) -> dict[str, Any]:
    """Train by Ray Train on fake nodes; returns the parts of the start and of a step."""
    from bridgework.tracking.tracker import Journal
    from bridgework.training.driver import train
    from bridgework.training.options import RunOptions

    made = system(steps, max(workers, 8), BATCH)
    feed(made, home)
    file, run = home / f"marks-{workers}", f"run-{workers}"
    options = RunOptions(
        workers=workers, threads=1, gpus_per_worker=1, checkpoint_every=10 * steps,
        callbacks=(marker(file),),
    )  # fmt: skip
    with cluster([{"num_cpus": 1, "num_gpus": 1}] * workers):
        began = time.time()
        quiet = Console(quiet=True)
        train(made, home=home, run=run, options=options, stages=[STAGE], console=quiet)
    points = [
        point
        for _, part in Journal(home / "runs" / run / STAGE / "journal").points()
        for point in part
    ]
    found, at = step_times(points), marks(file)
    first = next(point for point in points if point.key == "step_s")
    return found | {
        "checks_s": at["before"] - began,
        "group_s": at["training"] - at["before"],
        "worker_s": first.at / 1e3 - at["training"],
    }


def step_times(points: list[Any]) -> dict[str, Any]:
    """Return the median milliseconds of a step, and of its wait for data, after the warm-up."""
    step_s = [point.value for point in points if point.key == "step_s"]
    share = [point.value for point in points if point.key == "data_wait_share"]
    warm = int(len(step_s) * WARM)
    waits = [part * seconds for part, seconds in zip(share, step_s, strict=True)][warm:]
    return {
        "step_ms": 1e3 * statistics.median(step_s[warm:]),
        "wait_ms": 1e3 * statistics.median(waits),
    }


def train_rank(rank: int, world: int, steps: int, home: Path, port: int) -> None:
    """Train one rank of plain processes without Ray; rank 0 prints its figures."""
    import torch
    import torch.distributed as dist

    from bridgework.data import reader
    from bridgework.tracking.tracker import Journal
    from bridgework.training import loop

    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # read by DeepSpeed
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    made = system(steps, max(world, 8), BATCH)
    read = feed(made, home)
    folder = home / "runs" / f"plain-{world}" / STAGE
    folder.mkdir(parents=True, exist_ok=True)
    job = loop.TrainJob(made, STAGE, read, folder, home)

    def rows(start: int) -> Iterator[list[reader.Row]]:
        return reader.local(read, rank=rank, world=world, start=start)

    loop.run(job, rows, lambda metrics, step: None, rank=rank, world=world)
    if rank == 0:
        points = [p for _, part in Journal(folder / "journal").points() for p in part]
        report(step_times(points))
    dist.destroy_process_group()


def train_plain(workers: int, steps: int, home: Path) -> dict[str, Any]:
    """Train by plain processes; returns the milliseconds of a step."""
    feed(system(steps, max(workers, 8), BATCH), home)
    port = free_port()
    ranks = [
        child("rank", str(rank), str(workers), str(steps), str(port), home=home, wait=False)
        for rank in range(workers)
    ]
    found: dict[str, Any]
    found, *_ = [finished(rank) for rank in ranks]
    return found


# --- readers


def read(place: str, windows: int, home: Path) -> dict[str, Any]:
    """Read with two consumers and two readers; place: here (no Ray), same or other (node)."""
    made = system(windows * WINDOW, 8, 64)
    config = feed(made, home)
    if place == "here":
        return read_here(config)
    import ray

    from bridgework.data.ray_ingest import PlanIngest

    consumers = {"consumers": 2.0}
    nodes: dict[str, list[dict[str, Any]]] = {
        "same": [{"num_cpus": 4, "resources": consumers}],
        "other": [{"num_cpus": 0, "resources": consumers}, {"num_cpus": 4}],
    }
    with cluster(nodes[place], head_cpus=0):
        ray.data.DataContext.get_current().enable_progress_bars = False
        splits = PlanIngest(config, lambda: 0, readers=2).configure({}, 2)
        consume = ray.remote(num_cpus=0, resources={"consumers": 1.0})(consume_split)
        tasks = [consume.remote(split["train"], rank, 2) for rank, split in enumerate(splits)]
        results = ray.get(tasks)
    seconds = max(end for _, end, _, _ in results) - min(begin for begin, _, _, _ in results)
    images, size = (sum(found[n] for found in results) for n in (2, 3))
    return {"images_per_s": images / seconds, "mb_per_s": size / seconds / 1e6}


def consume_split(split: Any, rank: int, world: int) -> tuple[float, float, int, int]:
    """Consume the rows of a rank; returns begin, end, images and bytes after the warm-up."""
    from bridgework.data.ray_ingest import from_ray, prefetch

    return timed(from_ray(prefetch(split), rank=rank, world=world, start=0))


def read_here(config: ReaderConfig) -> dict[str, Any]:
    """Read all rows in this process."""
    from bridgework.data.reader import local

    begin, end, images, size = timed(local(config, rank=0, world=1, start=0))
    return {"images_per_s": images / (end - begin), "mb_per_s": size / (end - begin) / 1e6}


def timed(steps: Iterator[list[Any]]) -> tuple[float, float, int, int]:
    """Consume steps; returns the times of the first and the last, and images and bytes.

    Those of the first window are left out, because it is read before the first time.
    """
    images, size, begin = 0, 0, 0.0
    for number, rows in enumerate(steps):
        begin = begin or time.time()
        if number >= WINDOW:
            images += sum(row.num_images for row in rows)
            size += sum(row.images.nbytes for row in rows)
    return begin, time.time(), images, size


# --- start


def start_group(workers: int, home: Path) -> dict[str, Any]:
    """Start a group of Ray Train whose workers take their first rows; returns seconds by part."""
    import ray
    import ray.data
    from ray.train import RunConfig
    from ray.train.v2.api.config import ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from bridgework.data.ray_ingest import PlanIngest

    made = system(8, workers, workers)
    config = feed(made, home)
    each = 8  # workers of a fake node
    file, peak = home / "marks-group", Peak()
    with cluster([{"num_cpus": each}] * (-(-workers // each))):
        ray.data.DataContext.get_current().enable_progress_bars = False
        trainer = DataParallelTrainer(
            first_rows,
            scaling_config=ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 0.5}),
            run_config=RunConfig(
                name="group", storage_path=str(home / "ray"), callbacks=[marker(file)]
            ),
            datasets={"train": ray.data.range(1)},
            dataset_config=PlanIngest(config, lambda: 0, readers=2),
        )
        began = time.time()
        with peak:
            trainer.fit()
        ended, at = time.time(), marks(file)
    return {
        "controller_s": at["before"] - began,
        "processes_s": at["started"] - at["before"],
        "function_s": at["training"] - at["started"],
        "rows_s": ended - at["training"],
        "memory_gb": peak.gb,
    }


def first_rows() -> None:
    """Wait for the first rows of this rank."""
    import ray.train

    from bridgework.data.ray_ingest import prefetch

    next(prefetch(ray.train.get_dataset_shard("train")))


class Peak:
    """Peak of the memory of all descendants of this process; shared memory counts once."""

    def __init__(self) -> None:
        self.gb = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(2.0):
            total = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            self.gb = max(self.gb, total / 1e9)


def rendezvous(workers: int) -> float:
    """Create a process group of gloo in forks of this process; returns the seconds of the slowest.

    A fork shares the imported torch, so that as many processes as workers fit into the memory.
    """
    import torch
    import torch.distributed as dist

    port, begin = free_port(), time.monotonic()
    torch.set_num_threads(1)
    children = []
    for rank in range(workers):
        process = os.fork()
        if process == 0:
            dist.init_process_group(
                "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=workers
            )
            dist.all_reduce(torch.ones(1))
            os._exit(0)
        children.append(process)
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children]
    assert not any(codes), codes
    return time.monotonic() - begin


# --- the command


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def child(*words: str, home: Path, wait: bool = True) -> Any:
    """Run a measurement in a new process; returns the process, or its figures after its end."""
    env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    env |= {"RAY_TMPDIR": str(home.parent), "BRIDGEWORK_HOME": str(home)}
    # a start is slow on a busy machine, and not a failure
    env |= {"RAY_raylet_start_wait_time_s": "300", "RAY_health_check_timeout_ms": "60000"}
    command = [sys.executable, "-m", "benchmarks.control_plane", "--child", *words]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return finished(process) if wait else process


def report(figures: object) -> None:
    """Print the figures of this child."""
    print(f"{FIGURES}{json.dumps(figures)}", flush=True)


def finished(process: Any) -> Any:
    """Return the figures of a child, None if it has none. Exits with its errors after a failure."""
    output, errors = process.communicate()
    if process.returncode:
        sys.exit(errors[-3_000:])
    lines = [line for line in output.splitlines() if line.startswith(FIGURES)]
    return json.loads(lines[-1].removeprefix(FIGURES)) if lines else None


def measure(words: list[str]) -> object:
    """Run the measurement that `words` name, in a child."""
    home = Path(os.environ["BRIDGEWORK_HOME"])
    what, *rest = words
    if what == "rank":
        rank, world, steps, port = map(int, rest)
        train_rank(rank, world, steps, home, port)
        return None
    if what == "read":
        return read(rest[0], int(rest[1]), home)
    if what == "rendezvous":
        return rendezvous(int(rest[0]))
    measures: dict[str, Callable[..., object]] = {"train": train, "plain": train_plain}
    if what in measures:
        return measures[what](int(rest[0]), int(rest[1]), home)
    return start_group(int(rest[0]), home)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=("steps", "readers", "start"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--group", type=int, help="workers of the group; about 0.3 GB of memory each"
    )
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        result = measure(given.child)
        if result is not None:
            report(result)
        return
    chosen = given.only or ("steps", "readers", "start")
    workers, steps = ((2, 4), 40) if given.quick else ((2, 4, 8), 200)
    windows, group = (40, 8) if given.quick else (100, 64)
    group = given.group or group
    console, found = Console(), dict[str, Any]()
    console.print(f"load of the last minute: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}")
    with tempfile.TemporaryDirectory(prefix="bw-", ignore_cleanup_errors=True) as folder:
        home = Path(folder, "home")
        home.mkdir()

        def run(*words: str) -> Any:
            began = time.monotonic()
            result = child(*words, home=home)
            found[" ".join(words)] = result
            console.print(f"[dim]{' '.join(words)}: {time.monotonic() - began:.0f} s[/]")
            return result

        if "steps" in chosen:
            _print_steps(console, run, workers, steps)
        if "readers" in chosen:
            table = Table("readers", "images/s", "MB/s", box=None)
            for place, name in (
                ("here", "this process, without Ray"),
                ("same", "two, on the node of the two consumers"),
                ("other", "two, on another node"),
            ):
                figures = run("read", place, str(windows))
                table.add_row(name, f"{figures['images_per_s']:,.0f}", f"{figures['mb_per_s']:.1f}")
            console.print(table)
        if "start" in chosen:
            figures = run("group", str(group))
            table = Table(f"start of {group} workers", "s", box=None)
            table.add_row("controller", f"{figures['controller_s']:.1f}")
            table.add_row("placement and processes", f"{figures['processes_s']:.1f}")
            table.add_row("process group of gloo", f"{run('rendezvous', str(group)):.1f}")
            table.add_row("function to all workers", f"{figures['function_s']:.1f}")
            table.add_row("first rows at all workers", f"{figures['rows_s']:.1f}")
            console.print(table)
            console.print(f"peak memory of the group {figures['memory_gb']:.1f} GB")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def _print_steps(
    console: Console, run: Callable[..., Any], workers: tuple[int, ...], steps: int
) -> None:
    """Measure and print the steps and the starts of the tiny system."""
    table = Table(
        "workers", "plain, ms", "Ray, ms", "difference, ms", "wait for data, ms", box=None
    )
    start = Table("workers", "checks, s", "group, s", "imports, model, first step, s", box=None)
    for number in workers:
        plain, ray = (run(what, str(number), str(steps)) for what in ("plain", "train"))
        table.add_row(
            str(number),
            f"{plain['step_ms']:.1f}",
            f"{ray['step_ms']:.1f}",
            f"{ray['step_ms'] - plain['step_ms']:+.1f}",
            f"{ray['wait_ms']:.1f}",
        )
        parts = (f"{ray[part]:.1f}" for part in ("checks_s", "group_s", "worker_s"))
        start.add_row(str(number), *parts)
    console.print(table)
    console.print(start)


if __name__ == "__main__":
    main()
