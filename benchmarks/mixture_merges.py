"""Rank agreement of merged and really trained models on held-out mixtures.

Splits the shipped pairs into five sources by their labels, trains the first stage of the quick
start on each, and on random mixtures. Prints Spearman's correlation between the scores of the
merges and of the trained models.

    python -m benchmarks.mixture_merges [--mixtures 12] [--steps 60]
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.stats import spearmanr

from bridgework.config import override
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import Sample
from bridgework.evaluation import Retrieval
from bridgework.mixture import Source
from bridgework.system import System, load
from bridgework.training.options import RunOptions
from bridgework.tuning.mixture_search import MixtureSearch

DATA = Path("examples/data")
METRICS = ("retrieval.image_to_text_r10", "retrieval.text_to_image_r10")


def label(*names: str) -> Callable[[Sample], bool]:
    return lambda sample: bool(sample.labels) and sample.labels[0] in names


PARTS: dict[str, tuple[str, Callable[[Sample], bool]]] = {
    "emoji_nature": ("emoji", label("Animals & Nature", "Food & Drink")),
    "emoji_things": ("emoji", label("Objects", "Activities", "Travel & Places")),
    "emoji_people": ("emoji", label("People & Body", "Smileys & Emotion")),
    "clipart_signs": ("clipart", label("signs_and_symbols")),
    "clipart_rest": ("clipart", lambda sample: not label("signs_and_symbols")(sample)),
}


def sources(home: Path, most: int | None) -> tuple[Source, ...]:
    """Write the five datasets under the home, unless they exist; each of at most `most` rows."""
    found = []
    for name, (dataset, belongs) in PARTS.items():
        place = home / "datasets" / (name if most is None else f"{name}-{most}")
        if not (place / "manifest.json").exists():
            samples = open_dataset(str(DATA / dataset)).samples()
            write(
                islice(filter(belongs, samples), most),
                str(place),
                source=dataset,
                license="see examples/data",
                made_by="benchmarks.mixture_merges",
            )
        found.append(Source(name=name, dataset=place.name))
        print(f"{name}: {len(open_dataset(str(place)))} rows", flush=True)
    return tuple(found)


def system(home: Path, steps: int, rows: int | None) -> System:
    base = load("llava:quickstart")
    warm = base["warm"]
    warm = replace(
        warm,
        data=replace(warm.data, sources=sources(home, rows)),
        evals=(Retrieval(name="retrieval", dataset=str(DATA / "heldout_concepts")),),
    )
    stages = (override(warm, {"budget.steps": steps}), *base.stages[1:])
    return replace(base, stages=stages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixtures", type=int, default=12)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, help="of each source, at most; to try it")
    parser.add_argument("--home", type=Path, help="Keep the runs here, and reuse finished ones.")
    given = parser.parse_args()
    home = given.home or Path(tempfile.mkdtemp(prefix="bw-merges-"))
    options = RunOptions(workers=0, threads=1, features="cached")
    try:
        search = MixtureSearch(
            system(home, given.steps, given.rows),
            "warm",
            home=home,
            run="merges",
            metric=METRICS[0],
            options=options,
            console=Console(stderr=True),
        )
        draw = np.random.default_rng(0)
        weights = draw.dirichlet(np.full(len(PARTS), 0.7), given.mixtures)
        started = time.perf_counter()
        merged = [search.merged(w).metrics for w in weights]
        print(f"{time.perf_counter() - started:.0f} s for 5 runs and {len(weights)} merges")
        started = time.perf_counter()
        trained = [search.trained_on(f"held-{n}", w).metrics for n, w in enumerate(weights)]
        print(f"{time.perf_counter() - started:.0f} s for {len(weights)} runs on mixtures")
        for metric in METRICS:
            pairs = [(m[metric], t[metric]) for m, t in zip(merged, trained, strict=True)]
            print(json.dumps({metric: [[round(x, 4) for x in pair] for pair in pairs]}))
            found = spearmanr(*zip(*pairs, strict=True))
            print(f"{metric}: Spearman {found.statistic:.2f} (p {found.pvalue:.2g})")
    finally:
        if given.home is None:
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
