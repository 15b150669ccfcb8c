"""Small ablations of choices that the papers report: `python -m examples.ablations [NAME ...]`.

Every arm is trained with three seeds on the real data of examples/data, at the size of the quick
start. The table shows the paired difference of each arm to the paper's choice with its 95 %
interval over the seeds, and the sign that the paper reports. At this scale a result says whether
the effect is visible here, and nothing about the paper's scale.
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bridgework.config import override
from bridgework.data.catalog import home as home_folder
from bridgework.evaluation import HeldOutLoss, Retrieval
from bridgework.evaluation.statistics import RowValues, difference, interval
from bridgework.system import EvalSpec, System, load
from bridgework.training.driver import train
from bridgework.training.options import RunOptions

STEPS = {"stages.warm.budget.steps": 120, "stages.align.budget.steps": 12}
RETRIEVAL = Retrieval(name="retrieval", dataset="examples/data/heldout_style")
HELDOUT = HeldOutLoss(name="heldout", dataset="examples/data/heldout_concepts", rows=64)
console = Console()


@dataclass(frozen=True)
class Ablation:
    """Arms of one choice; the first is the paper's, which it reports as better than the others."""

    name: str
    paper: str
    arms: Mapping[str, Mapping[str, Any]]  # name -> overrides
    stages: tuple[str, ...] = ("warm",)
    evaluation: EvalSpec = RETRIEVAL
    metric: str = "retrieval.image_to_text_r10"
    higher: bool = True
    without: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # arm -> its stages


BRIDGE = "stages.*.model.bridge"
ABLATIONS = (
    Ablation(
        "sampling",
        "InstructBLIP (2305.06500): square-root sampling",
        {
            "sqrt": {"stages.*.data.alpha": 0.5},
            "uniform": {"stages.*.data.alpha": 0.0},
            "proportional": {"stages.*.data.alpha": 1.0},
        },
    ),
    Ablation(
        "bridge",
        "LLaVA-1.5 (2310.03744): a two-layer MLP instead of a linear layer",
        {"mlp": {BRIDGE: "mlp(depth=2)"}, "linear": {BRIDGE: "linear"}},
    ),
    Ablation(
        "resampler",
        "BLIP-3 (2408.08872): a resampler instead of an MLP, here at 4 tokens each",
        {
            "resampler": {
                BRIDGE: "resampler(latents=4, depth=1, heads=2, head_width=16, ffn=1)",
            },
            "mlp": {BRIDGE: "mlp(depth=2)"},
        },
    ),
    Ablation(
        "stage1",
        "BLIP-2 (2301.12597): representation learning before the generative stage",
        {"with": {}, "without": {"stages.align.starts_from": None}},
        stages=("warm", "align"),
        evaluation=HELDOUT,
        metric="heldout.loss",
        higher=False,
        without={"without": ("align",)},
    ),
)


def system(ablation: Ablation, arm: str, seed: int) -> System:
    """Return the system of an arm, with the ablation's evaluation in its last stage."""
    base = load("llava:quickstart")
    last = ablation.stages[-1]
    stages = tuple(
        replace(stage, evals=(ablation.evaluation,) if stage.name == last else ())
        for stage in base.stages
    )
    changes = {**STEPS, "stages.*.seed": seed, **ablation.arms[arm]}
    return override(replace(base, stages=stages), changes)


def score(ablation: Ablation, arm: str, seed: int, home: Path) -> float:
    """Train one arm with one seed, unless it is finished."""
    stages = ablation.without.get(arm, ablation.stages)
    result = train(
        system(ablation, arm, seed),
        home=home,
        run=f"ablations/{ablation.name}/{arm}-{seed}",
        stages=stages,
        options=RunOptions(workers=0, threads=1, features="cached"),
        console=Console(quiet=True),
    )
    return result[stages[-1]].metrics[ablation.metric]


def run(ablation: Ablation, seeds: int, home: Path) -> list[dict[str, Any]]:
    """Return one row per arm: its mean, its interval, and its difference to the paper's choice."""
    names = tuple(f"seed {seed}" for seed in range(seeds))
    values = dict[str, RowValues]()
    for arm in ablation.arms:
        scores = np.array([score(ablation, arm, seed, home) for seed in range(seeds)])
        values[arm] = RowValues(names, names, scores, np.ones(seeds))
        console.print(f"{ablation.name}: {arm} {[round(s, 4) for s in scores]}", highlight=False)
    chosen, *others = ablation.arms
    rows: list[dict[str, Any]] = []
    for arm in (chosen, *others):
        own = interval(values[arm])
        row = {
            "ablation": ablation.name,
            "paper": ablation.paper,
            "metric": ablation.metric,
            "arm": arm,
            "mean": own.value,
            "low": own.low,
            "high": own.high,
            "seeds": seeds,
        }
        if arm != chosen:
            found = difference(values[arm], values[chosen])
            gain = found.value if ablation.higher else -found.value
            decided = isfinite(found.low) and (found.low > 0 or found.high < 0)
            row |= {
                "difference": found.value,
                "difference_low": found.low,
                "difference_high": found.high,
                "sign": ("as the paper" if gain > 0 else "opposite") if decided else "not decided",
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=", ".join(a.name for a in ABLATIONS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    home = home_folder()
    rows = [
        row
        for ablation in ABLATIONS
        if not given.names or ablation.name in given.names
        for row in run(ablation, given.seeds, home)
    ]
    table = Table("ablation", "arm", "metric", "mean [95 %]", "paper's choice - arm", "sign")
    for row in rows:
        mean = f"{row['mean']:.4f} [{row['low']:.4f}, {row['high']:.4f}]"
        gap = (
            f"{row['difference']:+.4f} "
            f"[{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
            if "difference" in row
            else "the paper's choice"
        )
        sign = row.get("sign", "")
        table.add_row(row["ablation"], row["arm"], row["metric"], mean, gap, sign)
    console.print(table)
    file = home / "ablations.json"
    file.write_text(json.dumps(rows, indent=1))
    console.print(f"written to {file}", highlight=False)


if __name__ == "__main__":
    main()
