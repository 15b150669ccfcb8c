"""Captioning metrics: generated captions against all captions of the same image in the dataset.

CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) weights n-grams by how few images they describe.
BLEU-4 counts n-grams of up to four words. Both are computed as in the COCO evaluation (Chen et al.
2015, arXiv:1504.00325), except for the tokenizer, which is a Java program there.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bridgework.config import added, config_class
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import (
    Better,
    Result,
    Writing,
    about_image,
    draw_images,
    prefix_metrics,
)
from bridgework.evaluation.few_shot import Shots

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

TOKEN = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:[-.]\w+)*")


@config_class
class Captions:
    """`cider` (1.33 is printed as 133 in papers) and `bleu4` in [0, 1], over `rows` images.

    The captions of an image are those of all rows of the dataset with exactly its bytes.
    `cider_of_others` is the score if each generated caption is compared with the next image. The
    defaults are BLIP's.
    """

    better: ClassVar[Better] = {"cider": "higher", "cider_of_others": None, "bleu4": "higher"}
    name: str = "captions"
    dataset: str
    rows: int = 1_000  # images
    writing: Writing = Writing(beams=3, least=5, most=20)
    prompts: tuple[str, ...] = ()  # questions about an image; empty: the stage's own
    seed: int = 0
    shots: Shots | None = added(default=None)  # examples before every image, as in Flamingo

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(
                f"{self.name}.rows: CIDEr compares images. Got {self.rows}; expected at least 2"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that the evaluation reads."""
        return (self.dataset,) if self.shots is None else (self.dataset, *self.shots.datasets)

    def tiny(self) -> "Captions":
        """Return a copy with at most 4 synthetic rows."""
        return replace(
            self,
            dataset="synthetic:shapes",
            rows=min(self.rows, 4),
            writing=self.writing.tiny(),
            shots=None if self.shots is None else self.shots.tiny(),
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Caption the images and score them. Reads the complete dataset once.

        Raises DataError for a dataset without two images that have a caption.
        """
        captions = captions_by_image(open_dataset(resolve(self.dataset, home)).samples())
        seen: set[str] = set()

        def is_new(sample: Sample) -> bool:
            digest = _digest(sample)
            new = digest in captions and digest not in seen
            seen.add(digest)
            return new

        samples = [example.sample for example in draw_images(self, pipeline, home, is_new)]
        if len(samples) < 2:
            raise DataError(
                f"{self.name}: CIDEr compares images. Got one image with a caption in "
                f"{self.dataset}; expected at least 2. Fix: give a dataset with more images"
            )
        if self.shots is None:
            conversations = [about_image(pipeline, self.prompts or None)] * len(samples)
            images: Sequence[Any] = [sample.images for sample in samples]
        else:
            conversations, images = self.shots.ask(pipeline, home, self, samples)
        written = self.writing.run(pipeline, conversations, images, self.seed)
        references = [captions[_digest(sample)] for sample in samples]
        values = {
            "cider": cider(written, references),
            "cider_of_others": cider([*written[1:], *written[:1]], references),
            "bleu4": bleu4(written, references),
        }
        return Result(prefix_metrics(self, values))


def captions_by_image(samples: Iterable[Sample]) -> dict[str, list[str]]:
    """Return all captions of each image by the sha256 of its file, in order."""
    captions: dict[str, list[str]] = {}
    for sample in samples:
        texts = [
            part.text
            for part in sample.parts
            if part.text and part.role in ("caption", "assistant")
        ]
        if len(sample.images) == 1 and texts:
            captions.setdefault(_digest(sample), []).extend(texts)
    return captions


def cider(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return CIDEr-D of one caption per image against its references.

    The references of all images define the frequency of each n-gram.
    """
    from pycocoevalcap.cider.cider import Cider

    truth = {i: [_tokens(text) for text in texts] for i, texts in enumerate(references)}
    score, _ = Cider().compute_score(truth, {i: [_tokens(text)] for i, text in enumerate(written)})
    return float(score)


def bleu4(written: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return BLEU-4 of the complete set, in [0, 1], without smoothing.

    The reference of an image that is closest in length counts for the length penalty.
    """
    from sacrebleu.metrics.bleu import BLEU

    columns = zip_longest(*([_tokens(text) for text in texts] for texts in references))
    truth = [list(column) for column in columns]  # None where an image has fewer references
    scorer = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(scorer.corpus_score([_tokens(text) for text in written], truth).score) / 100


def _tokens(text: str) -> str:
    """Return lower-case words without punctuation.

    Contractions are split as in the Penn Treebank.
    """
    return " ".join(TOKEN.findall(text.lower().replace("\u2019", "'")))


def _digest(sample: Sample) -> str:
    return hashlib.sha256(sample.images[0]).hexdigest()
