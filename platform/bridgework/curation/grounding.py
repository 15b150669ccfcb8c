"""Texts and boxes put into words (xGen-MM, arXiv:2408.08872: BLIP3-OCR-200M and BLIP3-GROUNDING-50M).

Three granularities of each, in templates of our own:

text    alone      The image contains the text "SALE" and "50 %".
        place      The text "SALE" stands in the upper left and "50 %" stands in the centre.
        box        The text "SALE" is at <bbox>0.10,0.05,0.40,0.20</bbox>.
object  place      The image shows the dog on the left and the cat in the centre.
        box        Objects in the image: dog <bbox>0.02,0.40,0.31,0.90</bbox>.
        relative   The image shows the dog to the left of the cat.

A box belongs to a text if the words of its label stand in the row's `ocr`, in any case; every other box is an
object's. Coordinates are left, top, right and bottom as shares of the picture.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal

from bridgework.config import config_class
from bridgework.curation.runner import Annotator, Decision, Fact, Rows, bad
from bridgework.curation.text import tokenize_words
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Box, Part, Sample
from bridgework.errors import SpecError

BAND = 0.1  # of the height: boxes whose tops lie in one band are read from left to right
PLACES = (
    ("in the upper left", "at the top", "in the upper right"),
    ("on the left", "in the centre", "on the right"),
    ("in the lower left", "at the bottom", "in the lower right"),
)
# of each granularity: sentences, and how a thing is told in it of (label, place or relation, box or other label)
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
    """Which granularities a row becomes, and how much of it is told."""

    granularity: Literal["each", "draw"] = (
        "each"  # a sample of each that the row allows, or of one that is drawn
    )
    caption: bool = True  # the row's own captions stand before
    most: int = 12  # texts, or boxes, that are told of one picture: the largest
    seed: int = 0

    drawn: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.granularity not in ("each", "draw"):
            raise SpecError(f"grounding: granularity is 'each' or 'draw'; got {self.granularity!r}")
        if self.most < 1:
            raise SpecError(
                f"grounding: most counts texts and boxes and is at least 1; got {self.most}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        return {}

    def judge(self, home: Path) -> Annotator:
        return _one_picture

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """A pair for each granularity, or for the one that (seed, key) draws."""
        for sample, _ in rows():
            told = self._told(sample)
            if self.granularity == "draw" and told:
                told = [self._random(sample, "granularity").choice(told)]
            made = tuple(self._pair(sample, name, sentence) for name, sentence in told)
            why = "kept" if made else "no text and no box that can be told"
            yield Decision(why, made, note=", ".join(name for name, _ in told))

    def _told(self, sample: Sample) -> list[tuple[str, str]]:
        """(granularity, sentence), of all that the row allows."""
        texts, objects = _parted(sample, self.most)
        lines = [line.strip() for line in (sample.ocr or "").splitlines() if line.strip()][
            : self.most
        ]
        things: Mapping[str, list[tuple[str, ...]]] = {
            "text.alone": [(line,) for line in lines],
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
        return [(name, self._sentence(sample, name, told)) for name, told in things.items() if told]

    def _sentence(self, sample: Sample, name: str, things: Sequence[tuple[str, ...]]) -> str:
        sentence, thing = self._random(sample, name).choice(TEMPLATES[name])
        *first, last = (thing.format(*told) for told in things)
        written = sentence.format(f"{', '.join(first)} and {last}" if first else last)
        return written[0].upper() + written[1:]

    def _random(self, sample: Sample, what: str) -> random.Random:
        return random.Random(f"{self.seed}/{what}/{sample.key}")

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
    """Where the middle of a box lies, in words: thirds of the height and of the width."""
    left, top, right, bottom = box.corners
    down, across = (min(2, int(3 * middle)) for middle in ((top + bottom) / 2, (left + right) / 2))
    return PLACES[down][across]


def corners(box: Box) -> str:
    """`<bbox>left,top,right,bottom</bbox>`, shares with two decimals."""
    return f"<bbox>{','.join(f'{max(0.0, share):.2f}' for share in box.corners)}</bbox>"


def relation(box: Box, other: Box) -> str:
    """How a box lies to another one: inside it, around it, or on the side where their middles are further apart."""
    if _holds(other, box):
        return "inside"
    if _holds(box, other):
        return "around"
    across, down = (
        box.corners[i] + box.corners[i + 2] - other.corners[i] - other.corners[i + 2]
        for i in (0, 1)
    )  # twice the way between the middles
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"


def _holds(outer: Box, inner: Box) -> bool:
    return all(o <= i for o, i in zip(outer.corners[:2], inner.corners[:2], strict=True)) and all(
        o >= i for o, i in zip(outer.corners[2:], inner.corners[2:], strict=True)
    )


def _parted(sample: Sample, most: int) -> tuple[list[Box], list[Box]]:
    """The boxes of texts and those of objects, the largest `most` of either, in reading order."""
    labeled = [replace(box, label=" ".join(box.label.split())) for box in sample.boxes]
    sound = [box for box in labeled if box.label and _area(box) > 0]
    written = {cut: _apart(cut(sample.ocr or "")) for cut in (tokenize_words, str.split)}
    texts: list[Box] = []
    objects: list[Box] = []
    for box in sound:
        cut = (
            tokenize_words if tokenize_words(box.label) else str.split
        )  # a label without words, such as %, stands there as it is
        (texts if _apart(cut(box.label)) in written[cut] else objects).append(box)
    return _in_order(texts, most), _in_order(objects, most)


def _apart(told: Sequence[str]) -> str:
    return f" {' '.join(told)} "


def _in_order(boxes: Sequence[Box], most: int) -> list[Box]:
    largest = sorted(boxes, key=_area, reverse=True)[:most]
    return sorted(largest, key=lambda box: (int(box.corners[1] / BAND), box.corners[0]))


def _area(box: Box) -> float:
    """Of what lies inside the picture, with corners of two decimals: 0 where they cannot tell a box from a line."""
    left, top, right, bottom = (round(share, 2) for share in box.corners)
    inside = 0 <= left < right <= 1 and 0 <= top < bottom <= 1
    return (right - left) * (bottom - top) if inside else 0.0


def _one_picture(samples: Sequence[Sample]) -> list[Fact]:
    wrong = bad(BadSample(Reason.BAD_ROW, "grounding reads rows of one image"))
    return [{} if len(sample.images) == 1 and not sample.times_s else wrong for sample in samples]
