"""Captions from OCR text and boxes.

xGen-MM, arXiv:2408.08872: BLIP3-OCR-200M and BLIP3-GROUNDING-50M.

There are three granularities each for texts and objects, with our own templates:

text    alone      The image contains the text "SALE" and "50 %".
        place      The text "SALE" stands in the upper left and "50 %" stands in the centre.
        box        The text "SALE" is at <bbox>0.10,0.05,0.40,0.20</bbox>.
object  place      The image shows the dog on the left and the cat in the centre.
        box        Objects in the image: dog <bbox>0.02,0.40,0.31,0.90</bbox>.
        relative   The image shows the dog to the left of the cat.

A box is a text box if the words of its label occur in the row's `ocr`, ignoring case; all other
boxes are objects. Coordinates are left, top, right and bottom as shares of the image.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from bridgework.config import config_class
from bridgework.curation.runner import Annotation, Annotator, Decision, Rows, bad
from bridgework.curation.text import tokenize_words
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Box, Part, Sample
from bridgework.errors import SpecError

BAND = 0.1  # of the height; boxes whose tops are in the same band are ordered from left to right
PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the centre", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
# per granularity: sentence, and format of a thing: label, place or relation, box or other label
TEMPLATES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "text.alone": (
        ("The image contains the text {}.", '"{0}"'),
        ("It reads {}.", '"{0}"'),
        ("Written in the picture: {}.", '"{0}"'),
    ),
    "text.place": (
        ("The text {}.", '"{0}" stands {1}'),
        ("In the picture one reads {}.", '"{0}" {1}'),
        ("Written {}.", '{1}: "{0}"'),
    ),
    "text.box": (
        ("The text {}.", '"{0}" is at {2}'),
        ("In the picture one reads {}.", '"{0}" {2}'),
        ("Written at {}.", '{2}: "{0}"'),
    ),
    "object.place": (
        ("The image shows {}.", "the {0} {1}"),
        ("One sees {}.", "the {0} {1}"),
        ("{}.", "{1} one finds the {0}"),
    ),
    "object.box": (
        ("The image shows {}.", "the {0} at {2}"),
        ("Objects in the image: {}.", "{0} {2}"),
        ("Boxes in the image: {}.", "{2} {0}"),
    ),
    "object.relative": (
        ("The image shows {}.", "the {0} {1} the {2}"),
        ("One sees {}.", "the {0} {1} the {2}"),
        ("{}.", "{1} the {2} one finds the {0}"),
    ),
}


@config_class
class Grounding:
    """Granularities of the captions, and number of texts or boxes in them."""

    # one sample per possible granularity, or one of them drawn at random
    granularity: Literal["each", "draw"] = "each"
    caption: bool = True  # put the row's own captions before the sentence
    most: int = 12  # largest texts or boxes per image
    seed: int = 0

    drawn: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.granularity not in ("each", "draw"):
            raise SpecError(
                f"grounding: got granularity {self.granularity!r}; expected 'each' or 'draw'"
            )
        if self.most < 1:
            raise SpecError(f"grounding: got most {self.most}; expected at least 1")

    def models(self, home: Path) -> Mapping[str, str]:
        """Return no digests: annotations use no models."""
        return {}

    def judge(self, home: Path) -> Annotator:
        """Build the annotator, which accepts rows of one image."""
        return _annotate

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Write one pair per granularity, or one pair of a granularity drawn by (seed, key)."""
        for sample, _ in rows():
            sentences = self._sentences(sample)
            if self.granularity == "draw" and sentences:
                sentences = [self._random(sample, "granularity").choice(sentences)]
            pairs = tuple(self._pair(sample, name, sentence) for name, sentence in sentences)
            why = "kept" if pairs else "no text and no box that can be told"
            yield Decision(why, pairs, note=", ".join(name for name, _ in sentences))

    def _sentences(self, sample: Sample) -> list[tuple[str, str]]:
        """Return (granularity, sentence) of all granularities that are possible for the row."""
        texts, objects = _split_boxes(sample, self.most)
        lines = [line.strip() for line in (sample.ocr or "").splitlines() if line.strip()]
        things: Mapping[str, list[tuple[str, ...]]] = {
            "text.alone": [(line,) for line in lines[: self.most]],
            "text.place": [(box.label, place(box)) for box in texts],
            "text.box": [(box.label, "", corners(box)) for box in texts],
            "object.place": [(box.label, place(box)) for box in objects],
            "object.box": [(box.label, "", corners(box)) for box in objects],
            "object.relative": [
                (a.label, relation(a, b), b.label)
                for a, b in pairwise(objects)
                if a.label != b.label
            ],
        }
        return [(name, self._sentence(sample, name, some)) for name, some in things.items() if some]

    def _sentence(self, sample: Sample, name: str, things: Sequence[tuple[str, ...]]) -> str:
        template, thing = self._random(sample, name).choice(TEMPLATES[name])
        *first, last = (thing.format(*values) for values in things)
        sentence = template.format(f"{', '.join(first)} and {last}" if first else last)
        return sentence[0].upper() + sentence[1:]

    def _random(self, sample: Sample, purpose: str) -> random.Random:
        return random.Random(f"{self.seed}/{purpose}/{sample.key}")

    def _pair(self, sample: Sample, name: str, sentence: str) -> Sample:
        own = [
            part.text.strip()
            for part in sample.parts
            if part.role == "caption" and part.text is not None
        ]
        text = " ".join([*own, sentence] if self.caption else [sentence])
        return replace(
            sample,
            key=f"{sample.key}/{name}",
            parts=(Part("caption", image=0), Part("caption", text=text)),
            provenance={**sample.provenance, "grounding.granularity": name},
        )


def place(box: Box) -> str:
    """Return the position of a box's center in words, by thirds of the height and width."""
    left, top, right, bottom = box.corners
    down, across = (min(2, int(3 * middle)) for middle in ((top + bottom) / 2, (left + right) / 2))
    return PLACES[down][across]


def corners(box: Box) -> str:
    """Format a box as `<bbox>left,top,right,bottom</bbox>`, shares with two decimals."""
    return f"<bbox>{','.join(f'{max(0.0, share):.2f}' for share in box.corners)}</bbox>"


def relation(box: Box, other: Box) -> str:
    """Return the relation of a box to another one in words.

    It is inside or around it, or on the side in whose direction the centers are further apart.
    """
    if _contains(other, box):
        return "inside"
    if _contains(box, other):
        return "around"
    # twice the distance of the centers
    across, down = (
        box.corners[i] + box.corners[i + 2] - other.corners[i] - other.corners[i + 2]
        for i in (0, 1)
    )
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"


def _contains(outer: Box, inner: Box) -> bool:
    left, top, right, bottom = inner.corners
    return (
        outer.corners[0] <= left
        and outer.corners[1] <= top
        and outer.corners[2] >= right
        and outer.corners[3] >= bottom
    )


def _split_boxes(sample: Sample, most: int) -> tuple[list[Box], list[Box]]:
    """Return the boxes of texts and of objects, the largest `most` of each, in reading order."""
    boxes = [replace(box, label=" ".join(box.label.split())) for box in sample.boxes]
    ocr = {split: _join(split(sample.ocr or "")) for split in (tokenize_words, str.split)}
    texts: list[Box] = []
    objects: list[Box] = []
    for box in boxes:
        if not box.label or _area(box) == 0:
            continue
        # a label without words, e.g. %, is compared as it is
        split = tokenize_words if tokenize_words(box.label) else str.split
        (texts if _join(split(box.label)) in ocr[split] else objects).append(box)
    return _in_reading_order(texts, most), _in_reading_order(objects, most)


def _join(words: Sequence[str]) -> str:
    return f" {' '.join(words)} "


def _in_reading_order(boxes: Sequence[Box], most: int) -> list[Box]:
    largest = sorted(boxes, key=_area, reverse=True)[:most]
    return sorted(largest, key=lambda box: (int(box.corners[1] / BAND), box.corners[0]))


def _area(box: Box) -> float:
    """Return the area with corners of two decimals; 0 for a box outside the image, or a line."""
    left, top, right, bottom = (round(share, 2) for share in box.corners)
    inside = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    return (right - left) * (bottom - top) if inside else 0.0


def _annotate(samples: Sequence[Sample]) -> list[Annotation]:
    error = bad(BadSample(Reason.BAD_ROW, "grounding reads rows of one image"))
    return [{} if len(sample.images) == 1 and not sample.times_s else error for sample in samples]
