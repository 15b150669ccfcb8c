"""Pictures of an example's results: drawings and their texts, as a PNG and as an HTML page."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

COLUMNS, SIDE, TEXT, PAD, LINE = 3, 128, 270, 14, 22  # pixels, but for the columns
HEAD = 44  # pixels above the cards
INK, FAINT, PAPER, FRAME, RIGHT, WRONG = (
    "#1b1b1f", "#6b6b76", "#ffffff", "#dcdce2", "#0b7a3b", "#b3261e",
)  # fmt: skip
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem;
  color: #1b1b1f; background: #fff }
h1 { font-size: 1.5rem } p { max-width: 46rem }
table { border-collapse: collapse; margin: 1rem 0 } th, td { text-align: left; padding: .3rem .9rem
  .3rem 0; border-bottom: 1px solid #dcdce2 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(21rem, 1fr)); gap: 1rem }
article { display: flex; gap: .9rem; border: 1px solid #dcdce2; border-radius: .5rem;
  padding: .8rem }
article img { width: 128px; height: 128px; object-fit: contain; flex: none }
article h2 { font-size: 1rem; margin: 0 0 .3rem } div { overflow-wrap: anywhere }
.right { color: #0b7a3b } .wrong { color: #b3261e } .faint { color: #6b6b76;
  white-space: nowrap }
@media (prefers-color-scheme: dark) { body { color: #e6e6ea; background: #17171a }
  th, td, article { border-color: #3a3a42 } .right { color: #5fd38d } .wrong { color: #ff8a80 }
  .faint { color: #a0a0aa } article img { background: #fff; border-radius: .3rem } }
"""


@dataclass(frozen=True)
class Line:
    """A text next to a drawing; `right` None: neither right nor wrong."""

    text: str
    note: str = ""  # at the end of the line, e.g. a likelihood
    right: bool | None = None

    @property
    def mark(self) -> str:
        return {True: "right", False: "wrong", None: ""}[self.right]


@dataclass(frozen=True)
class Card:
    """A drawing, its true caption as the title, and lines about it."""

    image: bytes
    title: str
    lines: Sequence[Line]


def sheet(title: str, cards: Sequence[Card]) -> Image.Image:
    """Draw the cards in three columns under a title."""
    font, bold, large = (ImageFont.load_default(size) for size in (14, 15, 20))
    width, height = SIDE + TEXT + 3 * PAD, max(SIDE, LINE * (1 + most_lines(cards))) + 2 * PAD
    rows = -(-len(cards) // COLUMNS)
    image = Image.new("RGB", (COLUMNS * width, HEAD + rows * height), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((PAD, 12), title, INK, large)
    for number, card in enumerate(cards):
        x, y = number % COLUMNS * width + PAD, HEAD + number // COLUMNS * height + PAD
        pen.line((x, y - PAD, x + width - PAD, y - PAD), FRAME)
        drawing = Image.open(io.BytesIO(card.image)).convert("RGBA")
        drawing = ImageOps.contain(drawing, (SIDE, SIDE), Image.Resampling.LANCZOS)
        image.paste(drawing, (x, y), drawing)
        left, end = x + SIDE + PAD, x + width - PAD - 4
        pen.text((left, y), _fitted(card.title, end - left, bold), INK, bold)
        for place, line in enumerate(card.lines, 1):
            top = y + place * LINE
            ink = {True: RIGHT, False: WRONG, None: INK}[line.right]
            _mark(pen, (left, top + 4), line.right)
            note = pen.textlength(line.note, font)
            room = end - left - 20 - note - 8
            pen.text((left + 20, top), _fitted(line.text, room, font), ink, font)
            pen.text((end - note, top), line.note, FAINT, font)
    return image


def most_lines(cards: Sequence[Card]) -> int:
    return max((len(card.lines) for card in cards), default=0)


def _mark(pen: ImageDraw.ImageDraw, corner: tuple[float, float], right: bool | None) -> None:
    """Draw a check or a cross, which a reader tells apart without colors."""
    x, y = corner
    if right:
        pen.line([(x, y + 5), (x + 4, y + 9), (x + 11, y)], RIGHT, 2)
    elif right is False:
        pen.line([(x + 1, y), (x + 10, y + 9)], WRONG, 2)
        pen.line([(x + 1, y + 9), (x + 10, y)], WRONG, 2)


def _fitted(text: str, room: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= room:
        return text
    while text and font.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


def page(
    title: str,
    text: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    cards: Sequence[Card],
) -> str:
    """Return a self-contained HTML page: a text, a table of figures, and the cards."""
    table = "".join(
        "<tr>" + "".join(f"<{cell}>{html.escape(value)}</{cell}>" for value in row) + "</tr>"
        for cell, row in [("th", heads), *(("td", row) for row in rows)]
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p><table>{table}</table>"
        f"<main>{''.join(map(_article, cards))}</main></html>\n"
    )


def _article(card: Card) -> str:
    lines = "".join(
        f'<div class="{line.mark}">{MARKS[line.right]} {html.escape(line.text)} '
        f'<span class="faint">{html.escape(line.note)}</span></div>'
        for line in card.lines
    )
    title = html.escape(card.title)
    return (
        f'<article><img alt="{title}" src="{data_url(card.image)}">'
        f"<div><h2>{title}</h2>{lines}</div></article>"
    )


MARKS = {True: "&#10003;", False: "&#10007;", None: "&#160;"}


def data_url(image: bytes) -> str:
    """Return an image file as a data: URL."""
    kind = (Image.open(io.BytesIO(image)).format or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
