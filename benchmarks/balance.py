"""Load balance of the ranks, with and without balancing: `python -m benchmarks.balance`, seconds.

A skewed mixture in the order of the plan: captions of about 30 tokens, conversations of about 400,
documents of about 1,500 (at most 2,048), each with images of 64 tokens. A value is max / mean of
the cost over the ranks of a step.
"""

import argparse
from collections.abc import Sequence
from statistics import mean

import numpy as np

from bridgework.data.packing import balance
from bridgework.data.plan.plan import Plan, SourceRows
from bridgework.system import Mixture, Source

LANES, BATCH, WINDOWS = 64, 256, 6
KINDS = {"captions": 200_000, "conversations": 60_000, "documents": 12_000}


def costs(seed: int = 0) -> dict[str, "np.ndarray"]:
    """Return the number of tokens of every row, by source."""
    draw = np.random.default_rng(seed)
    captions, conversations, documents = KINDS.values()
    return {
        "captions": draw.integers(20, 40, captions) + 64,
        "conversations": draw.lognormal(6.0, 0.6, conversations).astype(int).clip(max=2048) + 64,
        "documents": draw.lognormal(7.3, 0.5, documents).astype(int).clip(max=2048) + 3 * 64,
    }


def ratios(world: int, window: int) -> tuple[list[float], list[float]]:
    """Return max / mean over the ranks of every step, as (balanced, unbalanced)."""
    mixture = Mixture(
        sources=tuple(Source(name=n, dataset=n) for n in KINDS), lanes=LANES, window=window
    )
    sources = [SourceRows(name, name, rows, 32) for name, rows in KINDS.items()]
    plan, cost = Plan(sources, mixture, batch=BATCH, steps=10_000, seed=1), list(costs().values())
    balanced: list[float] = []
    plain: list[float] = []
    for t in range(WINDOWS):
        lanes = []
        for lane in range(LANES):
            rows = plan.window(lane, t)
            lanes.append(
                [int(cost[source][row]) for source, row in zip(rows.source, rows.row, strict=True)]
            )
        balanced_lanes = [balance(lane, window) for lane in lanes]
        each = plan.step_rows
        for step in range(window):
            balanced.append(
                _ratio(
                    [
                        sum(lane[i] for i in of[step])
                        for lane, of in zip(lanes, balanced_lanes, strict=True)
                    ],
                    world,
                )
            )
            plain.append(
                _ratio([sum(lane[step * each : (step + 1) * each]) for lane in lanes], world)
            )
    return balanced, plain


def _ratio(lanes: Sequence[int], world: int) -> float:
    ranks = [sum(lanes[rank::world]) for rank in range(world)]
    return max(ranks) / mean(ranks)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print(
        f"{LANES} lanes, batches of {BATCH}; max / mean over ranks, mean and worst of all steps\n"
    )
    print("| workers | window | balanced | worst | unbalanced | worst |\n|---|---|---|---|---|---|")
    for world in (2, 4, 8):
        for window in (16, 64):
            values = " | ".join(
                f"{mean(each):.3f} | {max(each):.3f}" for each in ratios(world, window)
            )
            print(f"| {world} | {window} steps | {values} |")


if __name__ == "__main__":
    main()
