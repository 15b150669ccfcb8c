"""Flags of two colours and what they are called; a captioner and a filter that were trained for a moment."""

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from bridgework.data.samples import Sample, pair
from bridgework.data.shards import write
from bridgework.data.synthetic import COLOURS
from bridgework.spec import override
from bridgework.system import Stage, System, load
from tests.training.support import go


def flags() -> Iterator[Sample]:
    """56 pairs: a flag of two colours, left and right, and "red blue"."""
    for left in COLOURS:
        for right in (colour for colour in COLOURS if colour != left):
            image, file = Image.new("RGB", (32, 32), COLOURS[left]), io.BytesIO()
            image.paste(COLOURS[right], (16, 0, 32, 32))
            image.save(file, "PNG")
            yield pair(f"flag-{left}-{right}", file.getvalue(), f"{left} {right}")


def swapped(samples: list[Sample], share: float) -> tuple[list[Sample], set[str]]:
    """The samples with a share of the captions moved on to another image, and the keys of those."""
    wrong = random.Random(0).sample(samples, round(share * len(samples)))
    moved = {s.key: pair(s.key, s.images[0], o.text) for s, o in zip(wrong, [*wrong[1:], wrong[0]], strict=True)}
    return [moved.get(s.key, s) for s in samples], set(moved)


def written(folder: Path, samples: list[Sample]) -> str:
    """A dataset of several shards."""
    place = str(folder)
    write(samples, place, source="flags", licence="CC0-1.0", made_by="tests", group_rows=8, shard_rows=16)
    return place


def trained(name: str, dataset: str, home: Path, steps: int, **changes: Any) -> Path:
    """The artefact of one of blip's stages at a laptop's size, taught on a dataset."""
    tiny: Stage = replace(load("blip")[name].tiny(), starts_from=None, evals=())
    source = replace(tiny.data.sources[0], name="pairs", dataset=dataset)
    stage = replace(tiny, data=replace(tiny.data, sources=(source,)))
    fast = {"budget.steps": steps, "optim.peak_lr": 2e-3, "model.text.dropout": 0.0}
    stage = override(stage, fast | {path.replace("__", "."): new for path, new in changes.items()})
    run = f"{name}-{steps}-for-curation"
    return go(System(name="blip", paper="-", stages=(stage,)), home, run, stages=None)[name].artefact
