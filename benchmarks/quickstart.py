"""Figures of the quick start's recipe on all held-out drawings, for several seeds.

python -m benchmarks.quickstart                 three seeds; about 10 minutes each on 2 cores
python -m benchmarks.quickstart --seeds 1       one seed
python -m benchmarks.quickstart --stages warm align instruct        figures after each stage

The stages are trained in this process, with the samples, steps and losses of `make quickstart`. A
share has the 95 % interval of its 300 rows (Wilson); the last line is the mean over the seeds.
Trained stages and evaluated models are kept in --home, so a second run only prints.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from rich.console import Console

from bridgework.config import override
from bridgework.inference.pipeline import Pipeline
from bridgework.inference.preprocess import RememberingInputs
from bridgework.storage import write_atomic
from bridgework.system import EvalSpec, load
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from examples.quickstart import CONCEPT_EVALUATIONS, ROWS, STYLE_EVALUATIONS
from examples.report import percent

SHARES = {
    "likeliest of 20, another style": "ranking.accuracy",
    "new concepts": "concepts_ranking.accuracy",
    "nearest of 300, another style": "retrieval.image_to_text_r1",
    "new concepts ": "concepts_retrieval.image_to_text_r1",
}
NATS = {"loss": "heldout.loss", "gap": "heldout.gap"}  # new concepts


def figures(home: Path, seed: int, stage: str, steps: int | None) -> dict[str, float]:
    """Return the figures of a stage trained with `seed`, and of its evaluations."""
    system = override(load("llava:quickstart"), {"stages.*.seed": seed})
    run = f"quickstart-seed-{seed}"
    if steps is not None:
        system, run = override(system, {"stages.*.budget.steps": steps}), f"{run}-{steps}-steps"
    until = [s.name for s in system.stages]
    results = train(
        system,
        home=home,
        run=run,
        stages=until[: until.index(stage) + 1],
        options=RunOptions(workers=0, checkpoint_every=100),
        console=Console(stderr=True),
    )
    file = home / "runs" / run / stage / "held-out.json"
    if not file.exists():
        pipeline = Pipeline.load(results[stage].artifact)
        pipeline.inputs = RememberingInputs(pipeline.model, pipeline.stage)
        specs: list[EvalSpec] = [*STYLE_EVALUATIONS, *CONCEPT_EVALUATIONS]
        # `warm` trains no language model, so its likelihoods are those of an untrained wiring
        specs = [e for e in specs if stage != "warm" or "retrieval" in e.name]
        found = {k: v for spec in specs for k, v in spec.run(pipeline, home).metrics.items()}
        write_atomic(file, json.dumps(found, indent=1))
    stored: dict[str, float] = json.loads(file.read_text())
    return stored


def row(name: str, found: Sequence[dict[str, float]]) -> str:
    """Return a line of the table: intervals for one seed, means for several."""
    cells = []
    for key in SHARES.values():
        values = [f[key] for f in found if key in f]
        mean = fmean(values) if values else None
        rows = ROWS if len(found) == 1 else None
        cells.append("-" if mean is None else percent(mean, rows))
    for key in NATS.values():
        nats = [f[key] for f in found if key in f]
        cells.append(f"{fmean(nats):.2f}" if nats else "-")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--stages", nargs="+", default=["instruct"], help="stages to evaluate")
    parser.add_argument("--steps", type=int, help="of every stage, to try it")
    parser.add_argument("--home", type=Path, default=Path(".bridgework"), help="folder of the runs")
    args = parser.parse_args()
    args.home.mkdir(parents=True, exist_ok=True)
    heads = ["stage, seed", *SHARES, *NATS]
    print("| " + " | ".join(map(str.strip, heads)) + " |\n|" + "---|" * len(heads))
    for stage in args.stages:
        found = []
        for seed in range(args.seeds):
            found.append(figures(args.home.absolute(), seed, stage, args.steps))
            print(row(f"{stage}, {seed}", found[-1:]), flush=True)
        if len(found) > 1:
            print(row(f"{stage}, mean", found), flush=True)


if __name__ == "__main__":
    main()
