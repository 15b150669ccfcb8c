"""Cost of the flight recorder: `python -m benchmarks.recorder`, half a minute.

The goal: below 1 % of a step of 1 s. Each step records the micro-batches of a worker and their
per-sample losses; every second step is written to disk, as the recorder does when steps take a
second. Measures CPU and wall time of both, and bytes per sample on disk.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bridgework.data.collate import Batch
from bridgework.system import Stage, load
from bridgework.training.engine import StepResult
from bridgework.training.flight_recorder import FLUSH_S, FOLDER, FlightRecorder
from bridgework.training.metrics import per_sample

SAMPLES = (256, 1_024)
MICRO = 32  # samples of a micro-batch
TOKENS = 512
STEP_S = 1.0  # assumed time of a step
WARM = 4  # steps before the clock starts


def steps(stage: Stage, samples: int, count: int) -> Iterator[tuple[list[Batch], StepResult]]:
    """Yield batches with random lengths, keys and losses, without pixels."""
    draw = np.random.default_rng(samples)
    for _ in range(count):
        lengths = torch.from_numpy(draw.integers(64, TOKENS, samples))
        batches = [
            _batch(draw, lengths[first : first + MICRO]) for first in range(0, samples, MICRO)
        ]
        counts_LR = lengths.float().expand(len(stage.losses), -1)
        losses_LR = torch.from_numpy(draw.gamma(4.0, 0.5, (len(stage.losses), samples))).float()
        none = torch.zeros(len(stage.losses), 4)
        yield (
            batches,
            StepResult(
                none[:, 0],
                none,
                none,
                1.0,
                none[0],
                none[0],
                none[0],
                losses_LR * counts_LR,
                counts_LR,
            ),
        )


def _batch(draw: np.random.Generator, lengths: torch.Tensor) -> Batch:
    attention_BT = torch.arange(TOKENS) < lengths[:, None]
    return Batch(
        ids_BT=attention_BT.long(),
        attention_BT=attention_BT,
        labels_BT=attention_BT.long(),
        pixels_N3HW=None,
        features_NPD=None,
        keys=[
            f"coco/train2017/{number:012d}"
            for number in draw.integers(0, 600_000, len(lengths)).tolist()
        ],
        sources=draw.integers(0, 4, len(lengths)).tolist(),
    )


def measure(stage: Stage, samples: int, count: int) -> dict[str, float]:
    """Return milliseconds per step, including a share of the writes, and bytes per sample."""
    wall, cpu = [], []
    with tempfile.TemporaryDirectory() as folder:
        with FlightRecorder(Path(folder), "attempt0", 0, start=0) as recorder:
            for step, (batches, taken) in enumerate(steps(stage, samples, count + WARM)):
                began, busy = time.perf_counter(), time.process_time()
                losses, counts = per_sample(stage, taken)
                recorder.step(step, batches, losses, counts)
                if step % round(FLUSH_S / STEP_S):
                    recorder.flush()
                wall.append(1e3 * (time.perf_counter() - began))
                cpu.append(1e3 * (time.process_time() - busy))
        size = sum(file.stat().st_size for file in (Path(folder) / FOLDER).iterdir())
    return {
        "samples": samples,
        "wall_ms": statistics.mean(wall[WARM:]),
        "worst_ms": max(wall[WARM:]),
        "cpu_ms": statistics.mean(cpu[WARM:]),
        "bytes_a_sample": size / samples / (count + WARM),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    stage = load("llava").tiny().stages[0]
    table = Table(
        "samples a step",
        "wall ms",
        "worst",
        "CPU ms",
        "of a step of 1 s",
        "bytes a sample",
        box=None,
    )
    runs: list[dict[str, Any]] = []
    for samples in SAMPLES:
        found = measure(stage, samples, given.steps)
        table.add_row(
            f"{samples:,}",
            *(f"{found[name]:.2f}" for name in ("wall_ms", "worst_ms", "cpu_ms")),
            f"{found['wall_ms'] / 1e3 / STEP_S:.2%}",
            f"{found['bytes_a_sample']:.1f}",
        )
        runs.append(found)
    Console().print(table)
    if given.json:
        given.json.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
