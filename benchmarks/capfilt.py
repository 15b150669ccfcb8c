"""Precision and recall of CapFilt's filter on planted mismatches.

python -m benchmarks.capfilt       a minute

Flags of three stripes with captions such as "red blue white". A tiny filter is trained on true
pairs of one half of the flags, as BLIP's is on COCO. In the other half, which it never saw, 30 % of
the captions are moved to another flag. Precision: correct share of the kept captions; recall: kept
share of the correct captions. All thresholds use the same scores.
"""

import argparse
import io
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from math import nan
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bridgework.config import override
from bridgework.curation import CapFilt
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import Sample, pair
from bridgework.data.synthetic import COLORS
from bridgework.errors import DataError
from bridgework.system import Source, System, load
from bridgework.training.driver import train
from bridgework.training.options import RunOptions

MISMATCHED = 0.3
STEPS = 1_200
THRESHOLDS = (-2.0, 0.0, 2.0)  # logits of the matching head; 0 is a probability of one half
SPEC = CapFilt(captioner="captioner", filter="filter", sources=("web",), max_tokens=8, min_tokens=2)


def flag(colors: Sequence[str]) -> Sample:
    image, file = Image.new("RGB", (48, 32)), io.BytesIO()
    for place, color in enumerate(colors):
        image.paste(COLORS[color], (16 * place, 0, 16 * place + 16, 32))
    image.save(file, "PNG")
    return pair("-".join(colors), file.getvalue(), " ".join(colors))


def swapped(samples: Sequence[Sample]) -> tuple[list[Sample], set[str]]:
    """Return the samples with some captions swapped, and the keys of these samples."""
    wrong = random.Random(0).sample(samples, round(MISMATCHED * len(samples)))
    moved = {
        s.key: pair(s.key, s.images[0], o.text)
        for s, o in zip(wrong, [*wrong[1:], wrong[0]], strict=True)
    }
    return [moved.get(s.key, s) for s in samples], set(moved)


def trained(name: str, dataset: str, home: Path, steps: int) -> Path:
    """Return the artifact of a tiny stage of blip, trained on a dataset."""
    tiny = replace(load("blip")[name].tiny(), starts_from=None, evals=())
    pairs = replace(tiny, data=replace(tiny.data, sources=(Source(name="pairs", dataset=dataset),)))
    fast = {
        "budget.steps": steps,
        "budget.batch": 16,
        "budget.micro": 16,
        "optim.peak_lr": 2e-3,
        "model.text.dropout": 0,
    }
    system = System(name="blip", paper="-", stages=(override(pairs, fast),))
    return train(system, home=home, run=f"{name}-{steps}", options=RunOptions(workers=0))[
        name
    ].artifact


class Found(NamedTuple):
    """Result of the filter at one threshold."""

    threshold: float
    kept: int
    precision: float  # nan if nothing is kept
    recall: float


def found(home: Path, steps: int) -> Iterator[Found]:
    """Yield the results of all thresholds, for a filter trained for `steps` steps."""
    flags = [flag(colors) for colors in permutations(COLORS, 3)]
    random.Random(1).shuffle(flags)
    half = len(flags) // 2
    web, wrong = swapped(flags[half:])
    right, dest = {s.key for s in web} - wrong, str(home / "made")
    for name, samples in (("true", flags[:half]), ("web", web)):
        write(
            samples,
            str(home / name),
            source="flags",
            license="CC0-1.0",
            made_by="benchmarks.capfilt",
        )
    models = {
        name: trained(name, str(home / "true"), home, n)
        for name, n in (("captioner", 2), ("filter", steps))
    }
    for threshold in THRESHOLDS:
        spec = replace(SPEC, sources=(str(home / "web"),), threshold=threshold)
        try:
            spec.run(models, dest, home=home, say=lambda text: None)
        except DataError as error:
            if "keeps nothing" not in str(error):
                raise
            yield Found(threshold, 0, nan, 0.0)
            continue
        rows = open_dataset(dest).samples()
        kept = {s.provenance["capfilt.key"] for s in rows if s.provenance["capfilt.kept"] == "web"}
        shutil.rmtree(dest)  # the scores, in a folder next to it, are reused
        yield Found(
            threshold, len(kept), len(kept & right) / len(kept), len(kept & right) / len(right)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of the filter")
    steps = parser.parse_args().steps
    print("| threshold | kept | precision | recall |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for each in found(Path(folder), steps):
            print(
                f"| {each.threshold:g} | {each.kept} | {each.precision:.2f} | {each.recall:.2f} |"
            )


if __name__ == "__main__":
    main()
