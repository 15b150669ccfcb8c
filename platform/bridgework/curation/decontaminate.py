"""Drops rows that stand in evaluation datasets: by one of their pictures, or by the words of question and answer.

Pictures are compared as `dedup` compares them. A text stands in another if it holds enough of the runs of `run`
words of one evaluation row (PaLM, arXiv:2204.02311, 8: 70 % of its 8-grams); an evaluation row of fewer words is
found by its picture alone, and runs that stand in many evaluation rows, such as a prompt's, do not count. The reason
of every row that is dropped names the evaluation dataset.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

from bridgework.config import config_class
from bridgework.curation.near_duplicates import By, ImageHasher, Nearest, checked, digest
from bridgework.curation.runner import Decision, Fact, Model, Rows, bad
from bridgework.curation.text import tokenize_words
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.errors import SpecError

Code = bytes | BadSample | None  # what a Signer tells of a picture

COMMON = 20  # rows: a run that stands in more of the evaluation is how the task is worded, and tells of none
DIGITS = 4  # of a cosine and of a share
GROUP = 32  # evaluation rows that are looked at together


@config_class
class Decontaminate:
    """Against which datasets, and what it takes to stand in one."""

    against: tuple[str, ...]  # evaluation datasets: paths, URLs or names
    by: By = "perceptual"
    model: Model | None = None  # embeds images
    distance: int = 4  # bits of 64 in which two perceptual hashes may differ
    similarity: float = 0.95  # cosine of two embeddings from which on they are one picture
    run: int = 8  # words in a run
    overlap: float = 0.7  # share of an evaluation row's runs that a row holds, from which on the text stands in it

    drawn: ClassVar[tuple[str, ...]] = ("by", "run")

    def __post_init__(self) -> None:
        checked(self.by, self.model, self.distance, self.similarity)
        if not self.against:
            raise SpecError(
                "decontaminate needs at least one evaluation dataset: against=vqa-test,coco-test"
            )
        if self.run < 1 or not 0 < self.overlap <= 1:
            raise SpecError(
                f"decontaminate: run is at least 1 and overlap lies in (0, 1]; got {self.run} and {self.overlap:g}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        """The evaluation datasets, and the embedding model's weights."""
        sets = [open_dataset(resolve(name, home)).manifest.digest[:16] for name in self.against]
        if self.model is None:
            return {"against": " ".join(sets)}
        from bridgework import artifacts

        return {"against": " ".join(sets), "model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> "ContaminationIndex":
        """Reads all evaluation datasets once."""
        sets = [open_dataset(resolve(name, home)).samples() for name in self.against]
        return ContaminationIndex(sets, ImageHasher.of(self.by, self.model), self.by, self.run)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """One pass. Of several evaluation rows the nearest is named."""
        for sample, fact in rows():
            image, text = (
                None if fact[kind] is None else Match(*fact[kind]) for kind in ("image", "text")
            )
            if image is not None and self._near(image.how):
                yield Decision(
                    f"picture in {self.against[image.where]}",
                    note=f"{image.key}: {self._told(image)}",
                )
            elif text is not None and (text.how or 0.0) >= self.overlap:
                share = f"{text.how:.0%} of its runs of {self.run} words"
                yield Decision(f"text in {self.against[text.where]}", note=f"{text.key}: {share}")
            else:
                yield Decision("kept", (sample,))

    def _near(self, how: float | None) -> bool:
        if how is None:
            return True
        return how <= self.distance if self.by == "perceptual" else how >= self.similarity

    def _told(self, found: "Match") -> str:
        if found.how is None:
            return "the same file"
        return f"{found.how:.0f} bits off" if self.by == "perceptual" else f"cosine {found.how:.3f}"


class Match(NamedTuple):
    """The evaluation row that a picture or a text is nearest to."""

    where: int  # which of the evaluation datasets
    key: str
    how: float | None  # bits of distance, or a cosine, or a share of runs; None: the same file


class ContaminationIndex:
    """Holds the evaluation datasets' pictures and runs of words; tells of every row what it is nearest to."""

    def __init__(
        self, sets: Sequence[Iterable[Sample]], signer: ImageHasher, by: By, run: int
    ) -> None:
        self._signer, self._nearer = signer, min if by == "perceptual" else max
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
        self._nearest = Nearest(by, near) if near else None
        self._runs = NgramIndex(run, texts)

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        """A fact for each sample; one with an image that cannot be decoded, where it must be, is bad."""
        signed = _signed(self._signer, samples)
        codes = [code for row in signed for code in row if isinstance(code, bytes)]
        near = iter(self._nearest(codes) if self._nearest else ())
        found = [[next(near, None) for code in row if isinstance(code, bytes)] for row in signed]
        return [self._fact(*row) for row in zip(samples, signed, found, strict=True)]

    def _fact(
        self, sample: Sample, codes: Sequence[Code], near: Sequence[tuple[float, int] | None]
    ) -> Fact:
        if wrong := next((code for code in codes if isinstance(code, BadSample)), None):
            return bad(wrong)
        image = next((self._files[d] for d in map(digest, sample.images) if d in self._files), None)
        if image is None and (found := [one for one in near if one is not None]):
            how, which = self._nearer(found, key=itemgetter(0))
            image = self._owners[which]._replace(how=round(how, DIGITS))
        return {"image": image, "text": self._runs(sample.text)}

    def _read(self, sets: Sequence[Iterable[Sample]]) -> Iterator[tuple[int, Sample, list[Code]]]:
        for where, rows in enumerate(sets):
            left = iter(rows)
            while samples := list(islice(left, GROUP)):
                for sample, codes in zip(samples, _signed(self._signer, samples), strict=True):
                    yield where, sample, codes


def _signed(signer: ImageHasher, samples: Sequence[Sample]) -> list[list[Code]]:
    """The signatures of every sample's images."""
    codes = iter(signer([image for sample in samples for image in sample.images]))
    return [[next(codes) for _ in sample.images] for sample in samples]


class NgramIndex:
    """Runs of words of evaluation rows, and which row a text holds most of."""

    def __init__(self, length: int, texts: Iterable[tuple[str, Match]]) -> None:
        self._length = length
        self._owners: list[Match] = []
        self._sizes: list[int] = []  # runs that tell, of each row
        self._holders: defaultdict[str, list[int]] = defaultdict(list)  # run -> rows
        for number, (text, owner) in enumerate(texts):
            runs = self._cut(text)
            for run in runs:
                self._holders[run].append(number)
            self._owners.append(owner)
            self._sizes.append(len(runs))
        for run in [run for run, rows in self._holders.items() if len(rows) > COMMON]:
            for number in self._holders.pop(run):
                self._sizes[number] -= 1

    def __call__(self, text: str) -> Match | None:
        """The row of whose runs the text holds the largest share; None where it holds none."""
        held = Counter(number for run in self._cut(text) for number in self._holders.get(run, ()))
        if not held:
            return None
        number = max(held, key=lambda number: (held[number] / self._sizes[number], -number))
        return self._owners[number]._replace(how=round(held[number] / self._sizes[number], DIGITS))

    def _cut(self, text: str) -> set[str]:
        told = tokenize_words(text)
        return {" ".join(told[i : i + self._length]) for i in range(len(told) - self._length + 1)}
