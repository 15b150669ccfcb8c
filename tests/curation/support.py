"""Flags of two colors and what they are called; a captioner and a filter that were trained for a moment."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bridgework.config import override
from bridgework.data.dataset import write
from bridgework.data.samples import Sample, pair
from bridgework.data.synthetic import COLORS
from bridgework.system import Source, Stage, System, load
from tests.training.support import go


def flags() -> Iterator[Sample]:
    """56 pairs: a flag of two colors, left and right, and "red blue"."""
    for left in COLORS:
        for right in (color for color in COLORS if color != left):
            image, file = Image.new("RGB", (32, 32), COLORS[left]), io.BytesIO()
            image.paste(COLORS[right], (16, 0, 32, 32))
            image.save(file, "PNG")
            yield pair(f"flag-{left}-{right}", file.getvalue(), f"{left} {right}")


def written(folder: Path, samples: list[Sample], group_rows: int = 8, shard_rows: int = 16) -> str:
    """A dataset, of several shards unless it is smaller."""
    place = str(folder)
    write(samples, place, source="flags", license="CC0-1.0", made_by="tests", group_rows=group_rows,
          shard_rows=shard_rows)  # fmt: skip
    return place


def trained(name: str, dataset: str, home: Path, steps: int, **changes: Any) -> Path:
    """The artifact of one of blip's stages at a laptop's size, taught on a dataset."""
    tiny: Stage = replace(load("blip")[name].tiny(), starts_from=None, evals=())
    first = tiny.data.sources[0]
    assert isinstance(first, Source)
    source = replace(first, name="pairs", dataset=dataset)
    stage = replace(tiny, data=replace(tiny.data, sources=(source,)))
    fast = {"budget.steps": steps, "optim.peak_lr": 2e-3, "model.text.dropout": 0.0}
    stage = override(stage, fast | {path.replace("__", "."): new for path, new in changes.items()})
    run = f"{name}-{steps}-for-curation"
    return go(System(name="blip", paper="-", stages=(stage,)), home, run, stages=None)[
        name
    ].artifact


def scenes(count: int, seed: int = 0) -> list[Image.Image]:
    """Pictures of 96 x 72 that differ as photographs do: smooth light and dark, and some grain."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((96, 72), Image.Resampling.BICUBIC), np.int16)
        made.append(
            Image.fromarray(
                np.clip(smooth + rng.integers(-6, 7, smooth.shape), 0, 255).astype(np.uint8)
            )
        )
    return made


def file(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    """The picture as a file of some kind."""
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def embedder(home: Path) -> Path:
    """The artifact of a CLIP at a laptop's size, taught for a moment."""
    tiny = replace(load("clip").tiny().stages[0], evals=())
    stage = override(tiny, {"budget.steps": 2})
    system = System(name="clip", paper="-", stages=(stage,))
    return go(system, home, "embedder-for-curation", stages=None)[stage.name].artifact
