"""What CapFilt's filter finds of planted mismatches: `python -m benchmarks.capfilt`, a minute.

Flags of three stripes and what they are called ("red blue white"). A filter of a laptop's size learns from true pairs
of one half of the flags, as BLIP's does from COCO; of the other half, which it never saw, 30 % of the captions were
moved to another flag. Precision: kept captions that are right; recall: right captions that are kept. Other thresholds
decide over the same scores.
"""

import argparse
import io
import random
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from bridgework.config import override
from bridgework.curation import CapFilt
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import Sample, pair
from bridgework.data.synthetic import COLOURS
from bridgework.system import Source, System, load
from bridgework.training.driver import train
from bridgework.training.ray_train import RunOptions

MISMATCHED = 0.3
STEPS = 1_200
THRESHOLDS = (-2.0, 0.0, 2.0)  # logits of the matching head; 0 is a probability of one half
SPEC = CapFilt(captioner="captioner", filter="filter", sources=("web",), max_tokens=8, min_tokens=2)


def flag(colors: Sequence[str]) -> Sample:
    image, file = Image.new("RGB", (48, 32)), io.BytesIO()
    for place, color in enumerate(colors):
        image.paste(COLOURS[color], (16 * place, 0, 16 * place + 16, 32))
    image.save(file, "PNG")
    return pair("-".join(colors), file.getvalue(), " ".join(colors))


def swapped(samples: Sequence[Sample]) -> tuple[list[Sample], set[str]]:
    """The samples with a share of the captions moved on to the next of them, and the keys of those."""
    wrong = random.Random(0).sample(samples, round(MISMATCHED * len(samples)))
    moved = {
        s.key: pair(s.key, s.images[0], o.text)
        for s, o in zip(wrong, [*wrong[1:], wrong[0]], strict=True)
    }
    return [moved.get(s.key, s) for s in samples], set(moved)


def trained(name: str, dataset: str, home: Path, steps: int) -> Path:
    """The artifact of a stage of blip, of a laptop's size, taught on a dataset."""
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
    return train(system, home=home, run=f"{name}-{steps}", options=RunOptions(workers=0))[name].artifact


class Found(NamedTuple):
    """What the filter kept at one threshold."""

    threshold: float
    kept: int
    precision: float
    recall: float


def found(home: Path, steps: int) -> Iterator[Found]:
    """At every threshold, by a filter of `steps` steps; all files go under `home`."""
    flags = [flag(colors) for colors in permutations(COLOURS, 3)]
    random.Random(1).shuffle(flags)
    half = len(flags) // 2
    web, wrong = swapped(flags[half:])
    right, made = {s.key for s in web} - wrong, str(home / "made")
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
        spec.run(models, made, home=home, say=lambda text: None)
        rows = open_dataset(made).samples()
        kept = {s.provenance["capfilt.key"] for s in rows if s.provenance["capfilt.kept"] == "web"}
        shutil.rmtree(made)  # and not made.judged: the scores stay
        yield Found(
            threshold, len(kept), len(kept & right) / len(kept), len(kept & right) / len(right)
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="that the filter learns")
    steps = parser.parse_args().steps
    print("| threshold | kept | precision | recall |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for each in found(Path(folder), steps):
            print(
                f"| {each.threshold:g} | {each.kept} | {each.precision:.2f} | {each.recall:.2f} |"
            )


if __name__ == "__main__":
    main()
