"""A sheet of what was kept and of what was dropped, to look at before anything is trained on it."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bridgework.curation.runner import Curation, CurationRun, Decision, Row
from bridgework.data.images import load_image
from bridgework.evaluation.figures import (
    FAINT,
    FONT,
    FRAME,
    IMAGE,
    INK,
    LINE,
    PAD,
    PAPER,
    RIGHT,
    TEXT,
)
from bridgework.system import Pixels

SHOWN = 12  # rows on a sheet, shared by all reasons ..
LEAST = 2  # .. of which each gets so many
DROPPED = "#a3341f"
PIXELS = Pixels(size=IMAGE, fit="pad", mean=(1.0, 1.0, 1.0))
LINES = {"why": 1, "note": 2, "text": 4}  # at most; what is longer ends in dots

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Example:
    """One row of the source, and what became of it."""

    picture: Image.Image | None  # IMAGE x IMAGE; None for a row without images
    kept: bool
    why: str
    note: str
    text: str


def sheet(
    curation: Curation, sources: Sequence[str], dest: str, home: Path, counts: Mapping[str, int]
) -> Image.Image:
    """Rows that went on at the left, rows that were dropped at the right; `dest` was made before, with these counts."""
    found = list(examples(CurationRun.of(curation, sources, dest, home), counts))
    kept, dropped = ([one for one in found if one.kept is kept] for kept in (True, False))
    return draw(kept, dropped)


def examples(making: CurationRun, counts: Mapping[str, int]) -> Iterator[Example]:
    """The first rows of every reason; reads no further than it must."""
    each = max(LEAST, SHOWN // max(1, len(counts)))
    wanted = Counter({why: min(rows, each) for why, rows in counts.items()})
    for row, verdict in making.verdicts():
        if wanted[verdict.why] > 0:
            wanted[verdict.why] -= 1
            yield _example(row, verdict)
        if not wanted.total():
            return


def _example(row: Row, verdict: Decision) -> Example:
    source = row.sample()
    shown = verdict.samples or (source,)
    images = (*shown[0].images, *source.images)
    picture = (
        Image.fromarray(np.ascontiguousarray(load_image(images[0], PIXELS).transpose(1, 2, 0)))
        if images
        else None
    )
    return Example(
        picture, bool(verdict.samples), verdict.why, verdict.note, "\n".join(s.text for s in shown)
    )


# --- the drawing -----------------------------------------------------------------------------------------------------


def draw(kept: Sequence[Example], dropped: Sequence[Example]) -> Image.Image:
    """Two columns of pictures, each with the reason, the note and the text beside it."""
    width, height = IMAGE + TEXT + 3 * PAD, IMAGE + 2 * PAD
    page = Image.new(
        "RGB", (2 * width, LINE + 2 * PAD + height * max(len(kept), len(dropped), 1)), PAPER
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for column, (title, ink) in enumerate((("kept", RIGHT), ("dropped", DROPPED))):
        pen.text((column * width + PAD, PAD), title, fill=ink, font=font)
    for number, pair in enumerate(zip_longest(kept, dropped)):
        for column, example in enumerate(pair):
            if example is not None:
                _tile(
                    page,
                    pen,
                    font,
                    (column * width + PAD, LINE + 2 * PAD + number * height),
                    example,
                )
    return page


def _tile(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: Font,
    corner: tuple[int, int],
    example: Example,
) -> None:
    x, y = corner
    if example.picture is not None:
        page.paste(example.picture, (x, y))
    pen.rectangle((x - 1, y - 1, x + IMAGE, y + IMAGE), outline=FRAME)
    ink = {"why": RIGHT if example.kept else DROPPED, "note": FAINT, "text": INK}
    for name, most in LINES.items():
        for line in fitted(getattr(example, name), font, most):
            pen.text((x + IMAGE + PAD, y), line, fill=ink[name], font=font)
            y += LINE


def fitted(text: str, font: Font, most: int) -> list[str]:
    """`text` in at most `most` lines of the width TEXT; a word that is longer than a line is cut."""
    lines = list(islice(_lines(text, font), most + 1))
    shown = lines[:most]
    if len(lines) > most:
        shown[-1] += " .."
    return [_cut(line, font) for line in shown]


def _lines(text: str, font: Font) -> Iterator[str]:
    for paragraph in text.splitlines():
        line = ""
        for whole in paragraph.split():
            word = whole[:TEXT]  # of more signs than a line has pixels it shows none
            if line and font.getlength(f"{line} {word}") > TEXT:
                yield line
                line = word
            else:
                line = f"{line} {word}".strip()
        yield line


def _cut(line: str, font: Font) -> str:
    if font.getlength(line) <= TEXT:
        return line
    too_long = bisect_left(
        range(len(line)), True, key=lambda signs: font.getlength(line[:signs] + "..") > TEXT
    )
    return line[: max(0, too_long - 1)] + ".."
