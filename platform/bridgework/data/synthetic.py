"""Synthetic samples of colored shapes with true captions, for tests, `--tiny` and first steps.

They are generated in milliseconds from a seed.
"""

import io
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from PIL import Image, ImageDraw

from bridgework.data.samples import Part, Sample, pair
from bridgework.mixture import SHAPE_COLORS, SHAPE_FORMS, SHAPE_LABELS

ROWS = 256
SIZE = 64  # pixels, both sides

_RGB = (
    (214, 40, 40),
    (247, 127, 0),
    (252, 211, 3),
    (44, 145, 75),
    (29, 78, 216),
    (126, 34, 206),
    (120, 72, 40),
    (20, 20, 20),
)
COLORS = dict(zip(SHAPE_COLORS, _RGB, strict=True))
SHAPES = SHAPE_FORMS
SIZES = {"small": 0.13, "large": 0.22}  # half the shape's width, as a share of the picture's
PLACES = {  # centers of the two shapes, as shares of the image
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "left of": ((0.26, 0.5), (0.74, 0.5)),
}


class Shape(NamedTuple):
    """A shape in an image; as a string, its name in the caption."""

    size: str
    color: str
    form: str

    def __str__(self) -> str:
        return f"a {self.size} {self.color} {self.form}"


def shapes(rows: int = ROWS, size: int = SIZE, seed: int = 0) -> Iterator[Sample]:
    """Yield `rows` pairs of a PNG (size x size) and a caption.

    Example: "a large red circle above a small blue square".

    The labels are the two shapes: "red circle", "blue square".
    A row depends on (seed, its number) only, so fewer rows are a prefix of more.
    """
    for row in range(rows):
        draw = random.Random(f"{seed}/{row}")
        first, second = _shape(draw), _shape(draw)
        place = draw.choice(list(PLACES))
        image = _picture(size, [(first, PLACES[place][0]), (second, PLACES[place][1])])
        labels = tuple(f"{shape.color} {shape.form}" for shape in (first, second))
        yield pair(f"shapes-{row:06d}", image, f"{first} {place} {second}", labels=labels)


def preferences(rows: int = ROWS, size: int = SIZE, seed: int = 0) -> Iterator[Sample]:
    """Yield `shapes` with a rejected caption each: the caption of another image."""
    samples = list(shapes(rows, size, seed))
    for sample, other in zip(samples, [*samples[1:], *samples[:1]], strict=True):
        yield replace(sample, key=sample.key.replace("shapes", "preferences"), rejected=other.text)


def choices(rows: int = ROWS, size: int = SIZE, seed: int = 0) -> Iterator[Sample]:
    """Yield `shapes` as multiple-choice questions. One of four candidates is in the image."""
    for row, sample in enumerate(shapes(rows, size, seed)):
        draw = random.Random(f"{seed}/{row}/choices")
        right = draw.choice(sample.labels)
        wrong = draw.sample(sorted(set(SHAPE_LABELS) - set(sample.labels)), 3)
        question = Part("user", text="\nWhich of these is in the picture?")
        parts = (Part("user", image=0), question, Part("assistant", text=right))
        candidates = tuple(draw.sample([right, *wrong], 4))
        yield replace(
            sample, key=sample.key.replace("shapes", "choices"), parts=parts, candidates=candidates
        )


def yes_no(rows: int = ROWS, size: int = SIZE, seed: int = 0) -> Iterator[Sample]:
    """Yield `shapes` as yes/no questions about a shape, which is in every second image."""
    for row, sample in enumerate(shapes(rows, size, seed)):
        draw = random.Random(f"{seed}/{row}/yes-no")
        absent = sorted(set(SHAPE_LABELS) - set(sample.labels))
        thing, answer = (
            (draw.choice(absent), "no") if row % 2 else (draw.choice(sample.labels), "yes")
        )
        question = Part("user", text=f"\nIs there a {thing} in the picture?")
        parts = (Part("user", image=0), question, Part("assistant", text=answer))
        yield replace(sample, key=sample.key.replace("shapes", "yes-no"), parts=parts)


def _shape(draw: random.Random) -> Shape:
    return Shape(draw.choice(list(SIZES)), draw.choice(list(COLORS)), draw.choice(SHAPES))


def _picture(size: int, things: list[tuple[Shape, tuple[float, float]]]) -> bytes:
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    for shape, (x, y) in things:
        x, y, half = x * size, y * size, SIZES[shape.size] * size
        box = (x - half, y - half, x + half, y + half)
        match shape.form:
            case "circle":
                pen.ellipse(box, fill=COLORS[shape.color])
            case "square":
                pen.rectangle(box, fill=COLORS[shape.color])
            case "triangle":
                pen.polygon(
                    [(x, y - half), (x + half, y + half), (x - half, y + half)],
                    fill=COLORS[shape.color],
                )
            case _:
                corners = [(x, y - half), (x + half, y), (x, y + half), (x - half, y)]
                pen.polygon(corners, fill=COLORS[shape.color])
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
