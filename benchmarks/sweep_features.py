"""CPU time of a sweep over bridges with and without cached features of the frozen tower.

Trains the same trials twice, one after the other in this process with one thread: the tower runs in
every step, or its features are computed once and read by all trials. Prints the CPU-seconds of both,
the share of the tower in a step, and the largest relative difference of a loss. The gain grows with
the steps of a trial until its draws are many times the images, and with the number of trials.

    python -m benchmarks.sweep_features [--trials 8] [--steps 64]
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from rich.console import Console

from bridgework.config import override
from bridgework.system import System, load
from bridgework.tracking.tracker import Journal
from bridgework.training.driver import train
from bridgework.training.options import RunOptions

BRIDGES = ("linear", "mlp", "mlp(depth=3)", "concat(group=4, ln_vision=False)")
STAGE = "warm"  # no language model in its forward pass: the tower is most of a step


def trials(count: int, steps: int) -> list[System]:
    """Return the systems of the trials: each bridge, with different learning rates."""
    base = override(
        load("llava:quickstart"),
        {
            "stages.*.model.vision.grid": 4,  # 16 tokens an image, for the bridge that joins four
            f"stages.{STAGE}.budget.steps": steps,
            f"stages.{STAGE}.budget.batch": 64,
            f"stages.{STAGE}.budget.micro": 64,
        },
    )
    return [
        override(
            base,
            {
                "stages.*.model.bridge": BRIDGES[number % len(BRIDGES)],
                f"stages.{STAGE}.optim.peak_lr": 1e-3 / (1 + number // len(BRIDGES)),
            },
        )
        for number in range(count)
    ]


def losses(folder: Path) -> list[float]:
    return [
        point.value
        for _, points in Journal(folder / STAGE / "journal").points()
        for point in points
        if point.key == "loss"
    ]


def run(systems: list[System], home: Path, features: str) -> tuple[float, list[list[float]]]:
    """Train all trials; returns the CPU-seconds, with those of the cache, and the losses."""
    started = time.process_time()
    for number, system in enumerate(systems):
        train(
            system,
            home=home,
            run=f"{features}-{number}",
            stages=[STAGE],
            options=RunOptions(
                workers=0,
                threads=1,
                features="cached" if features == "cached" else "computed",
            ),
            console=Console(quiet=True),
        )
    seconds = time.process_time() - started
    return seconds, [losses(home / "runs" / f"{features}-{n}") for n in range(len(systems))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--steps", type=int, default=64)
    given = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="bw-features-"))
    try:
        systems = trials(given.trials, given.steps)
        run(trials(1, 2), home / "warm-up", "computed")  # imports and first calls
        computed_s, computed = run(systems, home, "computed")
        cached_s, cached = run(systems, home, "cached")
        started = time.process_time()
        run(systems[:1], home / "again", "cached")  # writes the cache again
        first_s = time.process_time() - started
        each_s = (cached_s - first_s) / max(1, given.trials - 1)  # of a trial that only reads
        share = 1 - each_s * given.trials / computed_s
        gap = max(
            abs(a - b) / abs(a)
            for one, other in zip(computed, cached, strict=True)
            for a, b in zip(one, other, strict=True)
        )
        print(
            f"{given.trials} trials of {given.steps} steps: {computed_s:.1f} CPU-s with the tower"
        )
        print(
            f"in every step, {cached_s:.1f} CPU-s with cached features: {computed_s / cached_s:.1f}x"
        )
        print(f"share of the tower in a trial {share:.0%}; largest difference of a loss {gap:.1e}")
    finally:
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
