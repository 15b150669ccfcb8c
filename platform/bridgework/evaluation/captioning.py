"""Does the model write what people write? Its captions against all that the dataset has of the same image.

CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) weighs words by how few images they are said of; BLEU-4 counts runs of
up to four. As in the COCO evaluation (Chen et al. 2015, arXiv:1504.00325), but for the tokenizer, which is Java there.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import added, config_class
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, Result, Writing, about_image, draw_images, named
from bridgework.evaluation.few_shot import Shots

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:[-.]\w+)*")


@config_class
class Captions:
    """`cider` (1.33 is what papers print as 133) and `bleu4` in [0, 1], over `rows` images.

    The captions of an image are those of all rows of the dataset that show it, byte for byte. Beside them stands
    `cider_of_others`: what the same captions score when each goes to the next image. The defaults are BLIP's.
    """

    better: ClassVar[Better] = {"cider": "higher", "cider_of_others": None, "bleu4": "higher"}
    name: str = "captions"
    dataset: str
    rows: int = 1_000  # images
    writing: Writing = Writing(beams=3, least=5, most=20)
    prompts: tuple[str, ...] = ()  # what an image is asked with; empty: the stage's own
    seed: int = 0
    shots: Shots | None = added(default=None)  # examples before every image, as Flamingo is asked

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(
                f"{self.name}.rows must be at least 2, got {self.rows}: CIDEr compares images"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,) if self.shots is None else (self.dataset, *self.shots.datasets)

    def tiny(self) -> "Captions":
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 4), writing=self.writing.tiny(),
                       shots=None if self.shots is None else self.shots.tiny())  # fmt: skip

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset without two images that have a caption. Reads all of the dataset once."""
        told = references(open_dataset(resolve(self.dataset, home)).samples())
        seen: set[str] = set()

        def is_new(sample: Sample) -> bool:
            digest = _digest(sample)
            new = digest in told and digest not in seen
            seen.add(digest)
            return new

        items = draw_images(self, pipeline, home, is_new)
        if len(items) < 2:
            raise DataError(
                f"{self.name}: {self.dataset} has one image with a caption; CIDEr needs two to compare"
            )
        samples = [item.sample for item in items]
        if self.shots is None:
            asked = about_image(pipeline, self.prompts or None)
            said = self.writing.run(
                pipeline, [asked] * len(items), [s.images for s in samples], self.seed
            )
        else:
            said = self.writing.run(
                pipeline, *self.shots.ask(pipeline, home, self, samples), self.seed
            )
        of_people = [told[_digest(item.sample)] for item in items]
        values = {
            "cider": cider(said, of_people),
            "cider_of_others": cider([*said[1:], *said[:1]], of_people),
            "bleu4": bleu4(said, of_people),
        }
        return Result(named(self, values))


def references(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """All captions of each image, by the sha256 of its file, in order."""
    told: dict[str, list[str]] = {}
    for sample in samples:
        texts = [
            part.text
            for part in sample.parts
            if part.text and part.role in ("caption", "assistant")
        ]
        if len(sample.images) == 1 and texts:
            told.setdefault(_digest(sample), []).extend(texts)
    return told


def cider(said: Sequence[str], of_people: Sequence[Sequence[str]]) -> float:
    """CIDEr-D of a caption of each image against those of people, who also say how common a word is."""
    from pycocoevalcap.cider.cider import Cider

    told = {i: [_tokens(text) for text in texts] for i, texts in enumerate(of_people)}
    score, _ = Cider().compute_score(told, {i: [_tokens(text)] for i, text in enumerate(said)})
    return float(score)


def bleu4(said: Sequence[str], of_people: Sequence[Sequence[str]]) -> float:
    """Of the whole set, in [0, 1], without smoothing; the closest of an image's captions gives the length."""
    from sacrebleu.metrics.bleu import BLEU

    told = zip_longest(
        *([_tokens(text) for text in texts] for texts in of_people)
    )  # None: an image has fewer
    scorer = BLEU(tokenize="none", smooth_method="none", force=True)
    return (
        float(
            scorer.corpus_score(
                [_tokens(text) for text in said], [list(column) for column in told]
            ).score
        )
        / 100
    )


def _tokens(text: str) -> str:
    """Words in lower case, with what is drawn together apart as in the Penn Treebank, and without punctuation."""
    return " ".join(TOKEN.findall(text.lower().replace("\u2019", "'")))


def _digest(sample: Sample) -> str:
    return hashlib.sha256(sample.images[0]).hexdigest()
