"""Figures: a sheet of images with their best captions, as a complement to the metrics."""

# S side in pixels

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 2
IMAGE, TEXT, PAD = 144, 400, 12  # pixels: side of an image, width of the text, padding
LINE, FONT = 20, 15  # pixels: height of a line, and of the letters
INK, FAINT, RIGHT, PAPER, FRAME = "#1a1a1a", "#6b6b6b", "#0b7a3b", "#ffffff", "#d9d9d9"
LINES = 2  # per caption; a longer caption ends in dots


@dataclass(frozen=True)
class Choice:
    """Caption with its rank and score."""

    rank: int  # 1 is best
    caption: str
    score: float  # nats
    right: bool


@dataclass(frozen=True)
class FigureTile:
    """Image and the captions next to it."""

    square: NDArray[np.uint8]  # (3, S, S)
    choices: Sequence[Choice]


def grid(tiles: Sequence[FigureTile]) -> Image.Image:
    """Draw the tiles in two columns: each image, and next to it its captions, best first.

    The right caption is green, with a bar at its left.
    """
    font = ImageFont.load_default(FONT)
    wrapped = [[list(_wrap(choice.caption, font)) for choice in tile.choices] for tile in tiles]
    heights = [
        max(IMAGE, sum(LINE * (len(lines) + 0.4) for lines in texts)) + 2 * PAD for texts in wrapped
    ]
    rows = [heights[i : i + COLUMNS] for i in range(0, len(tiles), COLUMNS)]
    width = IMAGE + TEXT + 3 * PAD
    sheet = Image.new("RGB", (width * COLUMNS, int(sum(max(row) for row in rows))), PAPER)
    top = 0.0
    for number, row in enumerate(rows):
        for column in range(len(row)):
            index = number * COLUMNS + column
            _draw(sheet, (column * width, int(top)), tiles[index], wrapped[index], font)
        top += max(row)
    return sheet


def _draw(
    sheet: Image.Image,
    corner: tuple[int, int],
    tile: FigureTile,
    texts: list[list[str]],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    pen = ImageDraw.Draw(sheet)
    x, y = corner[0] + PAD, corner[1] + PAD
    image = Image.fromarray(np.ascontiguousarray(tile.square.transpose(1, 2, 0)))
    sheet.paste(image.resize((IMAGE, IMAGE), Image.Resampling.LANCZOS), (x, y))
    pen.rectangle((x - 1, y - 1, x + IMAGE, y + IMAGE), outline=FRAME)
    left = x + IMAGE + PAD
    for choice, lines in zip(tile.choices, texts, strict=True):
        ink = RIGHT if choice.right else INK
        if choice.right:
            pen.rectangle((left, y, left + 4, y + LINE * len(lines) - 3), fill=RIGHT)
        pen.text((left + 12, y), f"{choice.rank}", fill=ink, font=font)
        for i, line in enumerate(lines):
            pen.text((left + 36, y + i * LINE), line, fill=ink, font=font)
        pen.text((left + TEXT - 12, y), f"{choice.score:+.1f}", fill=FAINT, font=font, anchor="ra")
        y += int(LINE * (len(lines) + 0.4))


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> Iterator[str]:
    """Yield at most LINES lines that fit between the rank and the score."""
    room, words = TEXT - 36 - 70, text.split()
    for number in range(LINES):
        line = ""
        while words and font.getlength(f"{line} {words[0]}") <= room:
            line = f"{line} {words.pop(0)}".strip()
        # the rest, or a word that is longer than a line
        if words and (number == LINES - 1 or not line):
            yield _cut(f"{line} {' '.join(words)}".strip(), room, font)
            return
        yield line
        if not words:
            return


def _cut(text: str, room: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."
