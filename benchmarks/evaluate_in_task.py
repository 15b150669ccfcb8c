"""Seconds for which the training stops for an evaluation: in the loop, and in a task of Ray.

.venv/bin/python -m benchmarks.evaluate_in_task            both in one run; about two minutes
.venv/bin/python -m benchmarks.evaluate_in_task --rows 256 --every 20

A small LLaVA is trained twice on one worker, with the same evaluations. In the loop, the training
stops until an evaluation has ended; with a task, while the weights are copied. The share is that of
all stops in the time of steps and stops. On a machine without free cores, the task slows the steps:
their median is printed too.
"""

import argparse
import json
import os
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

import bridgework as bw
from benchmarks.train_step import system as small_system
from bridgework.config import override
from bridgework.evaluation import HeldOutLoss
from bridgework.system import System
from bridgework.tracking.tracker import Journal
from bridgework.training.options import RunOptions

WARM = 5  # first steps, which are not counted


def judged(steps: int, rows: int) -> System:
    """Return the system of benchmarks.train_step with an evaluation of `rows` rows."""
    (stage,) = override(small_system(), {"stages.*.budget.steps": steps}).stages
    held_out = HeldOutLoss(dataset="synthetic:shapes", rows=rows)
    return replace(small_system(), stages=(replace(stage, evals=(held_out,)),))


def measure(system: System, home: Path, every: int, *, in_task: bool) -> dict[str, float]:
    """Train once; returns seconds of stop per evaluation, of a step, and the share of the stops."""
    run = "task" if in_task else "loop"
    bw.train(
        system,
        home=home,
        run=run,
        workers=1,
        options=RunOptions(threads=1, evaluate_every=every, evaluate_in_task=in_task),
        track=False,
        console=Console(quiet=True),
    )
    journal = Journal(home / "runs" / run / system.stages[0].name / "journal")
    points = [p for _, points in journal.points() for p in points]
    steps = [p.value for p in points if p.key == "step_s"][WARM:]
    stops = [p.value for p in points if p.key == "evaluation_stop_s"]
    return {
        "evaluations": float(len(stops)),
        "stop_s": statistics.median(stops),
        "longest_stop_s": max(stops),
        "step_s": statistics.median(steps),
        "share": sum(stops) / (sum(stops) + sum(steps)),
    }


def main() -> None:
    """Measure both ways and print them next to each other."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two evaluations")
    parser.add_argument("--rows", type=int, default=64, help="of an evaluation")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["BRIDGEWORK_HOME"] = folder
        system = judged(given.steps, given.rows)
        found: dict[str, dict[str, Any]] = {
            name: measure(system, Path(folder), given.every, in_task=name == "task")
            for name in ("loop", "task")
        }
    if given.json:
        print(json.dumps(vars(given) | found))
        return
    print(f"{given.rows} rows, every {given.every} of {given.steps} steps")
    print("                     in the loop    in a task")
    for label, key, form in (
        ("stop, median", "stop_s", "{:8.3f} s"),
        ("stop, longest", "longest_stop_s", "{:8.3f} s"),
        ("step, median", "step_s", "{:8.3f} s"),
        ("share of the stops", "share", "{:8.2%}  "),
    ):
        print(f"{label:20s} {form.format(found['loop'][key]):>12s} "
              f"{form.format(found['task'][key]):>12s}")  # fmt: skip


if __name__ == "__main__":
    main()
