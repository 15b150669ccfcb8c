"""Captioning metrics: generated captions against all captions of the same image in the dataset.

CIDEr-D (Vedantam et al. 2015, arXiv:1411.5726) weights n-grams by how few images they describe.
BLEU-4 counts n-grams of up to four words. Both are computed as in the COCO evaluation (Chen et al.
2015, arXiv:1504.00325), except for the tokenizer, which is a Java program there.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

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
    answers_of,
    build_result,
    draw_images,
)
from bridgework.evaluation.few_shot import Shots
from bridgework.evaluation.statistics import EvaluatedRows, cluster_of

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
            digest = cluster_of(sample)
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
        references = [captions[cluster_of(sample)] for sample in samples]
        rows = EvaluatedRows.of(samples)
        values = {
            "cider": rows.values(cider(written, references)),
            "cider_of_others": rows.values(cider([*written[1:], *written[:1]], references)),
            "bleu4": rows.values(bleu4(written, references)),
        }
        answers = answers_of(rows, conversations, references, written)
        return build_result(self, values, answers=answers)


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
            captions.setdefault(cluster_of(sample), []).extend(texts)
    return captions


def cider(written: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return CIDEr-D of each image's caption against its references; the metric is their mean.

    The references of all images define the frequency of each n-gram.
    """
    from pycocoevalcap.cider.cider import Cider

    truth = {i: [_tokens(text) for text in texts] for i, texts in enumerate(references)}
    said = {i: [_tokens(text)] for i, text in enumerate(written)}
    return np.asarray(Cider().compute_score(truth, said)[1], dtype=float)


def bleu4(written: Sequence[str], references: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Return values of the images with BLEU-4 of the complete set, in [0, 1], as their mean.

    BLEU counts n-grams of the complete set, without smoothing, and is not a mean over images. A
    value is therefore the pseudo-value of the jackknife (Tukey 1958): by how much BLEU changes
    without the image. The reference that is closest in length counts for the length penalty.
    """
    from sacrebleu.metrics.bleu import BLEU

    scorer = BLEU(tokenize="none", smooth_method="none", force=True)
    counts = []
    for text, texts in zip(written, references, strict=True):
        one = scorer.corpus_score([_tokens(text)], [[_tokens(reference)] for reference in texts])
        counts.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    counts_RN = np.array(counts)
    total_N, images = counts_RN.sum(0), len(written)

    def score(counts_N: NDArray[np.int64]) -> float:
        orders = (len(counts_N) - 2) // 2
        *both, length, nearest = counts_N.tolist()
        found = BLEU.compute_bleu(both[:orders], both[orders:], length, nearest, "none")
        return float(found.score) / 100

    value = score(total_N)
    changes_R = np.array([value - score(total_N - counts_N) for counts_N in counts_RN])
    return np.asarray(value + (images - 1) * (changes_R - changes_R.mean()))


def _tokens(text: str) -> str:
    """Return lower-case words without punctuation.

    Contractions are split as in the Penn Treebank.
    """
    return " ".join(TOKEN.findall(text.lower().replace("\u2019", "'")))
