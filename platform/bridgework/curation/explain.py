"""A sheet of what was kept and of what was dropped, to look at before anything is trained on it."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from bridgework.curation.making import Making
from bridgework.curation.verdicts import Verdict, decide
from bridgework.data.samples import Sample
from bridgework.data.transforms import read_square
from bridgework.evaluation.picture import IMAGE, Choice, Tile, grid
from bridgework.system import Pixels

if TYPE_CHECKING:
    from bridgework.curation.capfilt import CapFilt

SHOWN = 6  # images of either kind
PIXELS = Pixels(size=IMAGE, fit="pad", mean=(1.0, 1.0, 1.0))


def sheet(spec: "CapFilt", artefacts: dict[str, Path], dest: str, home: Path) -> Image.Image:
    """The first images that kept a text at the left, those that were dropped at the right; what is green was kept.

    1 is the web's text and 2 the written one, each with the filter's logit. `dest` was made before.
    """
    making = Making.of(spec, artefacts, dest, home)

    def first(kept: bool) -> list[Tile]:
        judged = (
            (sample, verdict, [text.origin for text in decide(verdict, spec.threshold)])
            for _, _, sample, verdict in making.rows()
            if verdict.bad is None
        )
        wanted = (_tile(sample, verdict, texts) for sample, verdict, texts in judged if bool(texts) is kept)
        return list(islice(wanted, SHOWN))

    left, right = first(kept=True), first(kept=False)
    return grid([tile for row in zip(left, right, strict=False) for tile in row] or [*left, *right])


def _tile(sample: Sample, verdict: Verdict, kept: Sequence[str]) -> Tile:
    texts = (("web", verdict.web, verdict.web_score), ("written", verdict.written, verdict.written_score))
    choices = [
        Choice(rank, text, float("nan") if score is None else score, origin in kept)
        for rank, (origin, text, score) in enumerate(texts, 1)
    ]
    return Tile(read_square(sample.images[0], PIXELS), choices)
