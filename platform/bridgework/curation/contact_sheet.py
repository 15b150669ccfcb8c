"""Contact sheet: kept and dropped rows of a curation, to check before training."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bridgework.curation.runner import Curation, CurationRun, Decision, SourceRow
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

ROWS = 12  # rows on a sheet, divided among the reasons
MIN_ROWS = 2  # per reason
DROPPED = "#a3341f"
PIXELS = Pixels(size=IMAGE, fit="pad", mean=(1.0, 1.0, 1.0))
LINES = {"why": 1, "note": 2, "text": 4}  # maximum; longer texts end in dots

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class SheetRow:
    """One row of the source, and its decision."""

    picture: Image.Image | None  # IMAGE x IMAGE pixels; None for a row without images
    kept: bool
    why: str
    note: str
    text: str


def sheet(
    curation: Curation, sources: Sequence[str], dest: str, home: Path, counts: Mapping[str, int]
) -> Image.Image:
    """Draw kept rows at the left and dropped rows at the right.

    `dest` must exist and have these counts of rows by reason.
    """
    rows = list(examples(CurationRun.of(curation, sources, dest, home), counts))
    kept, dropped = ([row for row in rows if row.kept is kept] for kept in (True, False))
    return draw(kept, dropped)


def examples(run: CurationRun, counts: Mapping[str, int]) -> Iterator[SheetRow]:
    """Yield the first rows of every reason; reads only as many rows as necessary."""
    each = max(MIN_ROWS, ROWS // max(1, len(counts)))
    left = Counter({why: min(rows, each) for why, rows in counts.items()})
    for row, decision in run.decisions():
        if left[decision.why] > 0:
            left[decision.why] -= 1
            yield _sheet_row(row, decision)
        if not left.total():
            return


def _sheet_row(row: SourceRow, decision: Decision) -> SheetRow:
    source = row.sample()
    samples = decision.samples or (source,)
    images = (*samples[0].images, *source.images)
    picture = None
    if images:
        square_3SS = load_image(images[0], PIXELS)
        picture = Image.fromarray(np.ascontiguousarray(square_3SS.transpose(1, 2, 0)))
    text = "\n".join(sample.text for sample in samples)
    return SheetRow(picture, bool(decision.samples), decision.why, decision.note, text)


# --- drawing -----------------------------------------------------------------------------------


def draw(kept: Sequence[SheetRow], dropped: Sequence[SheetRow]) -> Image.Image:
    """Draw two columns of images, each with its reason, note and text next to it."""
    width, height = IMAGE + TEXT + 3 * PAD, IMAGE + 2 * PAD
    page = Image.new(
        "RGB", (2 * width, LINE + 2 * PAD + height * max(len(kept), len(dropped), 1)), PAPER
    )
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(FONT)
    for column, (title, ink) in enumerate((("kept", RIGHT), ("dropped", DROPPED))):
        pen.text((column * width + PAD, PAD), title, fill=ink, font=font)
    for number, pair in enumerate(zip_longest(kept, dropped)):
        for column, row in enumerate(pair):
            if row is not None:
                corner = (column * width + PAD, LINE + 2 * PAD + number * height)
                _draw_row(page, pen, font, corner, row)
    return page


def _draw_row(
    page: Image.Image,
    pen: ImageDraw.ImageDraw,
    font: Font,
    corner: tuple[int, int],
    row: SheetRow,
) -> None:
    x, y = corner
    if row.picture is not None:
        page.paste(row.picture, (x, y))
    pen.rectangle((x - 1, y - 1, x + IMAGE, y + IMAGE), outline=FRAME)
    ink = {"why": RIGHT if row.kept else DROPPED, "note": FAINT, "text": INK}
    for name, most in LINES.items():
        for line in wrap_text(getattr(row, name), font, most):
            pen.text((x + IMAGE + PAD, y), line, fill=ink[name], font=font)
            y += LINE


def wrap_text(text: str, font: Font, most: int) -> list[str]:
    """Wrap text into at most `most` lines of the width TEXT; a word longer than a line is cut."""
    lines = list(islice(_lines(text, font), most + 1))
    result = lines[:most]
    if len(lines) > most:
        result[-1] += " .."
    return [_cut(line, font) for line in result]


def _lines(text: str, font: Font) -> Iterator[str]:
    for paragraph in text.splitlines():
        line = ""
        for long_word in paragraph.split():
            word = long_word[:TEXT]  # a line has at most one character per pixel
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
        range(len(line)), True, key=lambda end: font.getlength(line[:end] + "..") > TEXT
    )
    return line[: max(0, too_long - 1)] + ".."
