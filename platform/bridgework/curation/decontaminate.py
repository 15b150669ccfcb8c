"""Decontamination: drop rows whose image or text occurs in an evaluation dataset.

Images are compared as in `dedup`. A text is contaminated if it contains enough n-grams of `run`
words of one evaluation row (PaLM, arXiv:2204.02311, 8: 70 % of its 8-grams). An evaluation row with
fewer words is matched by its image only. N-grams that occur in many evaluation rows, e.g. those of
a prompt, do not count. The reason of a dropped row contains the name of the evaluation dataset.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

from bridgework.config import config_class
from bridgework.curation.near_duplicates import By, ImageHasher, NearestIndex, check_fields, digest
from bridgework.curation.runner import Annotation, Decision, Model, Rows, bad
from bridgework.curation.text import tokenize_words
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.errors import SpecError

Code = bytes | BadSample | None  # result of `ImageHasher` for one image

COMMON = 20  # evaluation rows; an n-gram in more of them is part of the task's prompt
DIGITS = 4  # of a cosine and of a share
GROUP = 32  # evaluation rows hashed together


@config_class
class Decontaminate:
    """Evaluation datasets and criteria for a match."""

    against: tuple[str, ...]  # evaluation datasets: paths, URLs or names
    by: By = "perceptual"
    model: Model | None = None  # embeds images
    distance: int = 4  # of 64 bits, maximum difference of two perceptual hashes
    similarity: float = 0.95  # minimum cosine of two embeddings
    run: int = 8  # words of an n-gram
    overlap: float = 0.7  # minimum share of an evaluation row's n-grams in the text

    drawn: ClassVar[tuple[str, ...]] = ("by", "run")

    def __post_init__(self) -> None:
        check_fields(self.by, self.model, self.distance, self.similarity)
        if not self.against:
            raise SpecError(
                "decontaminate needs at least one evaluation dataset: against=vqa-test,coco-test"
            )
        if self.run < 1 or not 0 < self.overlap <= 1:
            raise SpecError(
                "decontaminate: run is at least 1 and overlap in (0, 1]. "
                f"Got {self.run} and {self.overlap:g}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digests of the evaluation datasets and of the embedding model."""
        sets = [open_dataset(resolve(name, home)).manifest.digest[:16] for name in self.against]
        if self.model is None:
            return {"against": " ".join(sets)}
        from bridgework import artifacts

        return {"against": " ".join(sets), "model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> "ContaminationIndex":
        """Build the annotator; reads all evaluation datasets once."""
        sets = [open_dataset(resolve(name, home)).samples() for name in self.against]
        return ContaminationIndex(sets, ImageHasher.of(self.by, self.model), self.by, self.run)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep rows without a match. One pass; the note names the nearest evaluation row."""
        for sample, annotation in rows():
            image, text = (
                None if annotation[kind] is None else Match(*annotation[kind])
                for kind in ("image", "text")
            )
            if image is not None and self._is_near(image.how):
                yield Decision(
                    f"picture in {self.against[image.where]}",
                    note=f"{image.key}: {self._describe(image)}",
                )
            elif text is not None and (text.how or 0.0) >= self.overlap:
                share = f"{text.how:.0%} of its runs of {self.run} words"
                yield Decision(f"text in {self.against[text.where]}", note=f"{text.key}: {share}")
            else:
                yield Decision("kept", (sample,))

    def _is_near(self, how: float | None) -> bool:
        if how is None:
            return True
        return how <= self.distance if self.by == "perceptual" else how >= self.similarity

    def _describe(self, match: "Match") -> str:
        if match.how is None:
            return "the same file"
        return f"{match.how:.0f} bits off" if self.by == "perceptual" else f"cosine {match.how:.3f}"


class Match(NamedTuple):
    """Evaluation row that is nearest to an image or a text."""

    where: int  # position of the evaluation dataset in `against`
    key: str
    how: float | None  # bits of distance, cosine, or share of n-grams; None: the same file


class ContaminationIndex:
    """Annotator that finds the nearest evaluation row, by images and by n-grams."""

    def __init__(
        self, sets: Sequence[Iterable[Sample]], hasher: ImageHasher, by: By, run: int
    ) -> None:
        self._hasher, self._nearer = hasher, min if by == "perceptual" else max
        self._files: dict[str, Match] = {}
        self._owners: list[Match] = []
        texts: list[tuple[str, Match]] = []
        near: list[bytes] = []
        for where, sample, codes in self._read(sets):
            owner = Match(where, sample.key, None)
            texts.append((sample.text, owner))
            for image, code in zip(sample.images, codes, strict=True):
                self._files.setdefault(digest(image), owner)
                if isinstance(code, bytes):
                    near.append(code)
                    self._owners.append(owner)
        self._nearest = NearestIndex(by, near) if near else None
        self._ngrams = NgramIndex(run, texts)

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        """Annotate every sample; a row with an image that must be decoded and cannot be is bad."""
        codes = _image_codes(self._hasher, samples)
        searched = [code for row in codes for code in row if isinstance(code, bytes)]
        near = iter(self._nearest(searched) if self._nearest else ())
        found = [[next(near, None) for code in row if isinstance(code, bytes)] for row in codes]
        return [self._annotation(*row) for row in zip(samples, codes, found, strict=True)]

    def _annotation(
        self, sample: Sample, codes: Sequence[Code], near: Sequence[tuple[float, int] | None]
    ) -> Annotation:
        if error := next((code for code in codes if isinstance(code, BadSample)), None):
            return bad(error)
        image = next((self._files[d] for d in map(digest, sample.images) if d in self._files), None)
        if image is None and (found := [one for one in near if one is not None]):
            how, place = self._nearer(found, key=itemgetter(0))
            image = self._owners[place]._replace(how=round(how, DIGITS))
        return {"image": image, "text": self._ngrams(sample.text)}

    def _read(self, sets: Sequence[Iterable[Sample]]) -> Iterator[tuple[int, Sample, list[Code]]]:
        for where, rows in enumerate(sets):
            left = iter(rows)
            while samples := list(islice(left, GROUP)):
                codes = _image_codes(self._hasher, samples)
                for sample, of_sample in zip(samples, codes, strict=True):
                    yield where, sample, of_sample


def _image_codes(hasher: ImageHasher, samples: Sequence[Sample]) -> list[list[Code]]:
    """Return the codes of every sample's images."""
    codes = iter(hasher([image for sample in samples for image in sample.images]))
    return [[next(codes) for _ in sample.images] for sample in samples]


class NgramIndex:
    """Index of the n-grams of evaluation rows; finds the row with the largest overlap."""

    def __init__(self, length: int, texts: Iterable[tuple[str, Match]]) -> None:
        """Index texts by n-grams of `length` words."""
        self._length = length
        self._owners: list[Match] = []
        self._sizes: list[int] = []  # n-grams of each row, without common ones
        self._rows: defaultdict[str, list[int]] = defaultdict(list)  # n-gram -> rows
        for number, (text, owner) in enumerate(texts):
            ngrams = self._split(text)
            for ngram in ngrams:
                self._rows[ngram].append(number)
            self._owners.append(owner)
            self._sizes.append(len(ngrams))
        for ngram in [ngram for ngram, rows in self._rows.items() if len(rows) > COMMON]:
            for number in self._rows.pop(ngram):
                self._sizes[number] -= 1

    def __call__(self, text: str) -> Match | None:
        """Return the row of whose n-grams the text contains the largest share; None if none."""
        ngrams = self._split(text)
        counts = Counter(number for ngram in ngrams for number in self._rows.get(ngram, ()))
        if not counts:
            return None
        number = max(counts, key=lambda number: (counts[number] / self._sizes[number], -number))
        share = counts[number] / self._sizes[number]
        return self._owners[number]._replace(how=round(share, DIGITS))

    def _split(self, text: str) -> set[str]:
        words = tokenize_words(text)
        return {" ".join(words[i : i + self._length]) for i in range(len(words) - self._length + 1)}
