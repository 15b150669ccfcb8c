"""Windows of interleaved documents (Flamingo's M3W, arXiv:2204.14198, appendix A).

A window has 256 tokens from a random position and at most 5 images. Texts keep their order and
images their positions. An image that crosses the edge of the window is dropped, and so is every
image after the fifth. With a `model`, images are first assigned to their most similar texts, one to
one, as in MMC4 (arXiv:2304.06939) and OpenFlamingo (arXiv:2308.01390); small files and poor matches
are dropped. Whether a text belongs to the image after it (p_next) is drawn during training:
`Source.following`.
"""

import random
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from bridgework.config import config_class
from bridgework.curation.rank import cosines
from bridgework.curation.runner import Annotation, Annotator, Decision, Model, Rows, bad
from bridgework.curation.text import is_joined
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import SpecError

UNREAD = -1.0  # similarity of a text without tokens: the smallest cosine


@config_class
class Interleave:
    """Length and number of windows, and conditions for images."""

    tokenizer: str = "bytes"  # name, as in the config of a language model
    length: int = 256  # tokens per window
    images: int = 5  # per window, at most
    image_tokens: int = 2  # tokens per image: its own, and the end of the chunk before it
    windows: int = 1  # drawn per document; equal ones count once
    seed: int = 0
    model: Model | None = None  # embeds images and texts; None: all images keep their positions
    min_similarity: float = 0.24  # of an image and its text (OpenFlamingo)
    min_bytes: int = 10_000  # of a file, with a model; smaller ones are icons (OpenFlamingo)
    move: bool = True  # with a model, move an image before its text

    drawn: ClassVar[tuple[str, ...]] = ("tokenizer",)

    def __post_init__(self) -> None:
        for name in ("length", "images", "windows", "image_tokens"):
            if getattr(self, name) < 1:
                raise SpecError(f"interleave: {name} is at least 1; got {getattr(self, name)}")
        if self.image_tokens >= self.length:
            raise SpecError(
                f"interleave: length {self.length} leaves no room for text next to an image. "
                f"Expected more than image_tokens ({self.image_tokens})"
            )
        if not -1 <= self.min_similarity <= 1 or self.min_bytes < 0:
            raise SpecError(
                "interleave: min_similarity is in [-1, 1] and min_bytes at least 0. "
                f"Got {self.min_similarity:g} and {self.min_bytes}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digest of the embedding model.

        Raises WeightsError if it is not an artifact.
        """
        if self.model is None:
            return {}
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> Annotator:
        """Build the annotator: first characters of all tokens, and image-text similarities."""
        return _InterleaveAnnotator(self.tokenizer, self.model)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Write the windows with an image and a text.

        Their positions depend on (seed, key) only.
        """
        for sample, annotation in rows():
            order = self._order(sample, annotation.get("similarities"))
            if any(sample.parts[at].image is not None for at in order):
                yield self._windows(sample, order, annotation["tokens"])
            else:
                yield Decision("no image that fits a text" if sample.images else "no image")

    def _order(self, sample: Sample, similarities: list[list[float]] | None) -> list[int]:
        """Return the numbers of the kept parts, in their new order."""
        if similarities is None:
            return list(range(len(sample.parts)))
        large = [at for at, image in enumerate(sample.images) if len(image) >= self.min_bytes]
        text_of = assign_images([similarities[at] for at in large], self.min_similarity)
        texts = [at for at, part in enumerate(sample.parts) if part.image is None]
        places = {
            part.image: at
            for at, part in reversed(list(enumerate(sample.parts)))
            if part.image is not None
        }
        before = {texts[text]: places[large[image]] for image, text in text_of.items()}
        if not self.move:
            return sorted([*texts, *before.values()])
        return [at for text in texts for at in (before.get(text), text) if at is not None]

    def _windows(
        self, sample: Sample, order: Sequence[int], tokens: Sequence[Sequence[int]]
    ) -> Decision:
        units = [Unit(sample.parts[at], tokens[at], self.image_tokens) for at in order]
        total = sum(unit.size for unit in units)
        windows: list[Sample] = []
        for number, begin in enumerate(self._begins(sample.key, total)):
            parts = truncate_images(cut_window(units, begin, begin + self.length), self.images)
            has_image = any(part.image is not None for part in parts)
            if has_image and any((part.text or "").strip() for part in parts):
                span = f"tokens {begin} to {min(begin + self.length, total)} of {total}"
                windows.append(_document(sample, f"window-{number}", parts, span))
        why = "kept" if windows else "no window with an image and a text"
        note = ", ".join(window.provenance["interleave.window"] for window in windows)
        return Decision(why, tuple(windows), note)

    def _begins(self, key: str, total: int) -> list[int]:
        """Draw the first tokens of the windows, without repetitions."""
        draws, last = random.Random(f"{self.seed}/{key}"), max(0, total - self.length)
        return list(dict.fromkeys(draws.randint(0, last) for _ in range(self.windows)))


def assign_images(similarities: Sequence[Sequence[float]], least: float) -> dict[int, int]:
    """Return {image: text}, one to one, with the maximum sum of similarities (images by texts).

    Pairs below `least` are left out.
    """
    from scipy.optimize import linear_sum_assignment

    if not similarities or not similarities[0]:
        return {}
    images, texts = linear_sum_assignment(similarities, maximize=True)
    pairs = zip(images.tolist(), texts.tolist(), strict=True)
    return {image: text for image, text in pairs if similarities[image][text] >= least}


@dataclass(frozen=True)
class Unit:
    """Part of a document, with its tokens."""

    part: Part
    starts: Sequence[int]  # of a text: index of the first character of each token
    image_tokens: int

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.starts) if self.part.image is None else self.image_tokens

    def between(self, first: int, last: int) -> Part | None:
        """Return the part from token `first` up to `last`.

        None for a partial image or an empty text. A character of several tokens that crosses an
        edge is left out, and so are characters that are displayed as one, e.g. a joined emoji.
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


def cut_window(units: Sequence[Unit], begin: int, end: int) -> list[Part]:
    """Return the parts between two positions of the document, in tokens."""
    parts: list[Part | None] = []
    at = 0
    for unit in units:
        first, last = max(begin - at, 0), min(end - at, unit.size)
        parts.append(unit.between(first, last) if first < last else None)
        at += unit.size
    return [part for part in parts if part is not None]


def truncate_images(parts: Sequence[Part], images: int) -> list[Part]:
    """Return all texts and the first `images` images."""
    places = [at for at, part in enumerate(parts) if part.image is not None]
    return [part for at, part in enumerate(parts) if at not in places[images:]]


def _document(sample: Sample, name: str, parts: Sequence[Part], span: str) -> Sample:
    """Return the parts as a new sample, with the images that they contain."""
    images = list(dict.fromkeys(part.image for part in parts if part.image is not None))
    return Sample(
        key=f"{sample.key}/{name}",
        images=tuple(sample.images[image] for image in images),
        parts=tuple(
            part if part.image is None else replace(part, image=images.index(part.image))
            for part in parts
        ),
        language=sample.language,
        license=sample.license,
        provenance={**sample.provenance, "interleave.window": span},
    )


class _InterleaveAnnotator:
    """Tokenizes the texts and compares images and texts."""

    def __init__(self, tokenizer: str, model: str | None) -> None:
        from bridgework.data.tokenization import load_tokenizer
        from bridgework.inference.pipeline import Pipeline

        self._tokenizer = load_tokenizer(tokenizer)
        if not self._tokenizer.is_fast:
            raise SpecError(
                f"interleave: {tokenizer!r} has no character offsets. Fix: use a fast tokenizer"
            )
        self._model = None if model is None else Pipeline.load(model)

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        return [self._annotation(sample) for sample in samples]

    def _annotation(self, sample: Sample) -> Annotation:
        if sample.times_s or any(part.role != "caption" for part in sample.parts):
            return bad(
                BadSample(
                    Reason.BAD_ROW, "interleave reads documents: images and texts of role caption"
                )
            )
        tokens = [self._starts(part.text or "") for part in sample.parts]
        if self._model is None or not sample.images:
            return {"tokens": tokens}
        try:
            images_ND = self._model.embed_images(sample.images)
        except BadSample as error:
            return bad(error)
        texts = [part.text for part in sample.parts if part.text is not None]
        similarities = [
            [UNREAD if one is None else one for one in row]
            for row in cosines(self._model, images_ND, texts)
        ]
        return {"tokens": tokens, "similarities": similarities}

    def _starts(self, text: str) -> list[int]:
        """Return the index of the first character of each token."""
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
        )
        return [begin for begin, _ in encoded["offset_mapping"]]
