"""Documents cut into windows (Flamingo's M3W, arXiv:2204.14198, appendix A): 256 tokens from anywhere, 5 images.

Texts stay in order and images in their places. An image that the window cuts is dropped with its place, and so is every
image behind the fifth. With a `model`, images first go to the texts that they fit, one to one, as in MMC4
(arXiv:2304.06939) and OpenFlamingo (arXiv:2308.01390): small files and poor matches are dropped. Whether a text belongs
to the image behind it (p_next) is drawn while training: `Source.following`.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from bridgework.config import config_class
from bridgework.curation.rank import near
from bridgework.curation.runner import Annotator, Decision, Fact, Model, Rows, bad
from bridgework.curation.text import is_joined
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import SpecError

UNREAD = -1.0  # the similarity of a text in which there is nothing to read: no cosine is less


@config_class
class Interleave:
    """How long windows are, how many a document gives, and which images stay."""

    tokenizer: str = "bytes"  # as a language model's spec names it
    length: int = 256  # tokens of a window
    images: int = 5  # of a window
    image_tokens: int = 2  # of a window: an image's own, and the one that ends the chunk before it
    windows: int = 1  # drawn from a document; equal ones count once
    seed: int = 0
    model: Model | None = (
        None  # embeds images and texts; without one, every image stays where the document has it
    )
    min_similarity: float = 0.24  # of an image and its text (OpenFlamingo)
    min_bytes: int = 10_000  # of an image's file, with a model: less is an icon (OpenFlamingo)
    move: bool = True  # with a model, an image goes before its text; else it stays in its place

    drawn: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def __post_init__(self) -> None:
        for name in ("length", "images", "windows", "image_tokens"):
            if getattr(self, name) < 1:
                raise SpecError(f"interleave: {name} is at least 1; got {getattr(self, name)}")
        if self.image_tokens >= self.length:
            raise SpecError(
                f"interleave: length {self.length} leaves no room beside an image of {self.image_tokens}"
            )
        if not -1 <= self.min_similarity <= 1 or self.min_bytes < 0:
            given = f"{self.min_similarity:g} and {self.min_bytes}"
            raise SpecError(
                f"interleave: min_similarity lies in [-1, 1] and min_bytes is at least 0; got {given}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        if self.model is None:
            return {}
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> Annotator:
        """Tells where the tokens of every text begin and, with a model, how near every image is to every text."""
        return _Judge(self.tokenizer, self.model)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """The windows that have an image and a text; where they begin depends on (seed, key) alone."""
        for sample, fact in rows():
            order = self._order(sample, fact.get("similarities"))
            shows = any(sample.parts[at].image is not None for at in order)
            without = Decision("no image that fits a text" if sample.images else "no image")
            yield self._windows(sample, order, fact["tokens"]) if shows else without

    def _order(self, sample: Sample, similarities: list[list[float]] | None) -> list[int]:
        """The parts that stay, by their numbers, in the order that they take."""
        if similarities is None:
            return list(range(len(sample.parts)))
        large = [at for at, image in enumerate(sample.images) if len(image) >= self.min_bytes]
        found = assigned([similarities[at] for at in large], self.min_similarity)
        texts = [at for at, part in enumerate(sample.parts) if part.image is None]
        places = {
            part.image: at
            for at, part in reversed(list(enumerate(sample.parts)))
            if part.image is not None
        }
        before = {texts[text]: places[large[image]] for image, text in found.items()}
        if not self.move:
            return sorted([*texts, *before.values()])
        return [at for text in texts for at in (before.get(text), text) if at is not None]

    def _windows(
        self, sample: Sample, order: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> Decision:
        units = [Unit(sample.parts[at], tokens[at], self.image_tokens) for at in order]
        total = sum(unit.size for unit in units)
        made: list[Sample] = []
        for number, begin in enumerate(self._begins(sample.key, total)):
            parts = up_to(window(units, begin, begin + self.length), self.images)
            if any(p.image is not None for p in parts) and any(
                (p.text or "").strip() for p in parts
            ):
                told = f"tokens {begin} to {min(begin + self.length, total)} of {total}"
                made.append(_document(sample, f"window-{number}", parts, told))
        why = "kept" if made else "no window with an image and a text"
        return Decision(
            why, tuple(made), ", ".join(one.provenance["interleave.window"] for one in made)
        )

    def _begins(self, key: str, total: int) -> list[int]:
        """Where windows begin, each number once, in the order of drawing."""
        draws, last = random.Random(f"{self.seed}/{key}"), max(0, total - self.length)
        return list(dict.fromkeys(draws.randint(0, last) for _ in range(self.windows)))


def assigned(similarities: Sequence[Sequence[float]], least: float) -> dict[int, int]:
    """{image: text}, one to one, with the greatest sum of similarities (images by texts); those below `least` go."""
    from scipy.optimize import linear_sum_assignment

    if not similarities or not similarities[0]:
        return {}
    images, texts = linear_sum_assignment(similarities, maximize=True)
    pairs = zip(images.tolist(), texts.tolist(), strict=True)
    return {image: text for image, text in pairs if similarities[image][text] >= least}


@dataclass(frozen=True)
class Unit:
    """A part of a document, and how many tokens it takes."""

    part: Part
    starts: Sequence[int]  # of a text: the character that each token begins with
    image_tokens: int

    @property
    def size(self) -> int:
        return len(self.starts) if self.part.image is None else self.image_tokens

    def between(self, first: int, last: int) -> Part | None:
        """The tokens from `first` up to `last`; None for an image that is not whole and for a text of no character.

        A character of several tokens that the window cuts is left out, and so are letters that are
        drawn as one, such as a joined emoji.
        """
        if self.part.image is not None:
            return self.part if (first, last) == (0, self.size) else None
        text, edges = self.part.text or "", [*self.starts, len(self.part.text or "")]
        if first and edges[first] == edges[first - 1]:
            first = bisect_right(self.starts, edges[first])
        begin, end = edges[first] if first else 0, edges[last]
        while is_joined(text, begin):
            begin += 1
        while is_joined(text, end):
            end -= 1
        text = text[begin:end]
        return Part(self.part.role, text=text) if text else None


def window(units: Sequence[Unit], begin: int, end: int) -> list[Part]:
    """What stands between two places of the document, in tokens."""
    parts: list[Part | None] = []
    at = 0
    for unit in units:
        first, last = max(begin - at, 0), min(end - at, unit.size)
        parts.append(unit.between(first, last) if first < last else None)
        at += unit.size
    return [part for part in parts if part is not None]


def up_to(parts: Sequence[Part], images: int) -> list[Part]:
    """All texts, and the first `images` images."""
    places = [at for at, part in enumerate(parts) if part.image is not None]
    return [part for at, part in enumerate(parts) if at not in places[images:]]


def _document(sample: Sample, name: str, parts: Sequence[Part], told: str) -> Sample:
    """The parts as a sample of their own, with the images that they show."""
    shown = list(dict.fromkeys(part.image for part in parts if part.image is not None))
    return Sample(
        key=f"{sample.key}/{name}",
        images=tuple(sample.images[image] for image in shown),
        parts=tuple(
            part if part.image is None else replace(part, image=shown.index(part.image))
            for part in parts
        ),
        language=sample.language,
        license=sample.license,
        provenance={**sample.provenance, "interleave.window": told},
    )


class _Judge:
    """Holds the tokenizer and the model."""

    def __init__(self, tokenizer: str, model: str | None) -> None:
        from bridgework.data.tokenization import load_tokenizer
        from bridgework.inference.pipeline import Pipeline

        self._tokenizer = load_tokenizer(tokenizer)
        if not self._tokenizer.is_fast:
            raise SpecError(
                f"interleave: {tokenizer!r} does not tell where its tokens begin; take a fast tokenizer"
            )
        self._model = None if model is None else Pipeline.load(model)

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        return [self._fact(sample) for sample in samples]

    def _fact(self, sample: Sample) -> Fact:
        if sample.times_s or any(part.role != "caption" for part in sample.parts):
            return bad(
                BadSample(
                    Reason.BAD_ROW, "interleave reads documents: images and texts of role caption"
                )
            )
        fact: Fact = {"tokens": [self._starts(part.text or "") for part in sample.parts]}
        if self._model is None or not sample.images:
            return fact
        try:
            images_ND = self._model.embed_images(sample.images)
        except BadSample as error:
            return bad(error)
        alike = near(
            self._model, images_ND, [part.text for part in sample.parts if part.text is not None]
        )
        return fact | {
            "similarities": [[UNREAD if one is None else one for one in row] for row in alike]
        }

    def _starts(self, text: str) -> list[int]:
        how = {
            "add_special_tokens": False,
            "split_special_tokens": True,
            "return_offsets_mapping": True,
        }
        return [begin for begin, _ in self._tokenizer(text, **how)["offset_mapping"]]
