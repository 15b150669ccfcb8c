"""Cost of the control plane: `python -m benchmarks.control_plane`, several minutes on two cores.

Trains the tiny LLaVA on 2, 4 and 8 fake nodes of this machine, with one worker and one fake GPU
each, and in one process without Ray. Prints the time from the call to the first step by part, and
the time of a step by part. All processes share the cores of this machine: a start and a step take
longer with more workers here, although each worker computes less. The figures are bounds for real
nodes, and not a scaling of throughput.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

WORKERS = (2, 4, 8)
STEPS = 60
WARM = 10  # steps before the clock of the steps starts
STAGE = "align"
PARTS = {
    "checks_s": "checks, wait for resources",
    "group_s": "processes, process group",
    "worker_s": "imports, model, first batch",
    "first_step_s": "first step",
}


def measure(workers: int, home: Path) -> dict[str, Any]:
    """Train once; returns seconds of the parts of the start, and milliseconds of a step."""
    from bridgework.config import override
    from bridgework.data.catalog import resolve
    from bridgework.system import load
    from bridgework.tracking.tracker import Journal
    from bridgework.training.driver import train
    from bridgework.training.options import RunOptions

    changes = {"stages.*.evals": (), f"stages.{STAGE}.budget.steps": STEPS}
    changes |= {f"stages.{STAGE}.budget.batch": 16, f"stages.{STAGE}.data.lanes": max(WORKERS)}
    system = override(load("llava").tiny(), changes)
    marks, run = home / f"marks-{workers}", f"run-{workers}"
    for source in system[STAGE].data.leaves:
        resolve(source.dataset, home)  # makes synthetic data
    options = RunOptions(
        workers=workers,
        threads=1,
        gpus_per_worker=1 if workers else None,
        callbacks=(_marker(marks),) if workers else (),
    )
    began = time.time()
    train(system, home=home, run=run, options=options, stages=[STAGE], console=Console(quiet=True))
    points = [
        p for _, part in Journal(home / "runs" / run / STAGE / "journal").points() for p in part
    ]
    ends = {p.step: p.at / 1e3 for p in points if p.key == "step_s"}
    step_s = [p.value for p in points if p.key == "step_s"]
    wait = [p.value * s for p, s in zip(_of(points, "data_wait_share"), step_s, strict=True)]
    found: dict[str, Any] = {"workers": workers}
    if workers:
        group, training = (float(line) for line in marks.read_text().split())
        found |= {
            "checks_s": group - began,
            "group_s": training - group,
            "worker_s": ends[0] - step_s[0] - training + wait[0],
        }
    found["first_step_s"] = step_s[0] - wait[0]
    found["total_s"] = ends[0] - began
    found["step_ms"] = 1e3 * statistics.median(step_s[WARM:])
    found["wait_ms"] = 1e3 * statistics.median(wait[WARM:])
    return found


def _of(points: list[Any], key: str) -> list[Any]:
    return [point for point in points if point.key == key]


def _marker(file: Path) -> Any:
    """Return a callback that writes the times of a group's start and of its training's start."""
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback

    class Marker(WorkerGroupCallback):
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            file.write_text(f"{time.time()}\n")

        def after_worker_group_training_start(self, worker_group: Any) -> None:
            file.write_text(file.read_text() + f"{time.time()}\n")

    return Marker()


def one(workers: int, home: Path) -> None:
    """Measure in this process and print the figures as JSON."""
    if not workers:
        print(json.dumps(measure(0, home)))
        return
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    for _ in range(workers):
        cluster.add_node(num_cpus=1, num_gpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    print(json.dumps(measure(workers, home)))
    ray.shutdown()
    cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0, *WORKERS])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.one is not None:
        one(given.one, Path(os.environ["BRIDGEWORK_HOME"]))
        return
    runs = []
    table = Table("workers", *PARTS.values(), "to the first step, s", box=None)
    steps = Table("workers", "step, ms", "of it waiting for data", box=None)
    with tempfile.TemporaryDirectory(prefix="bw-") as folder:
        env = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        env |= {"RAY_TMPDIR": folder, "BRIDGEWORK_HOME": f"{folder}/home"}
        for workers in given.workers:
            command = [sys.executable, "-m", "benchmarks.control_plane", "--one", str(workers)]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr[-3_000:])
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    for run in runs:
        parts = [f"{run[part]:.1f}" if part in run else "-" for part in PARTS]
        table.add_row(str(run["workers"]), *parts, f"{run['total_s']:.1f}")
        steps.add_row(str(run["workers"]), f"{run['step_ms']:.1f}", f"{run['wait_ms']:.1f}")
    console = Console()
    console.print(f"load of the last minute: {os.getloadavg()[0]:.1f}, cores: {os.cpu_count()}")
    console.print(table)
    console.print(steps)
    if given.json:
        given.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
