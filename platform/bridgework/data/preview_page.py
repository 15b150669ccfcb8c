"""Shows previews: in a terminal, or as one HTML file that needs nothing beside it."""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from bridgework.data.preview import Preview, Span

CELLS = 24  # side of a picture in a terminal, in columns; a line holds two rows of pixels
STYLES = {"text": "", "loss": "bold green", "image": "cyan", "role": "dim"}


def facts(shown: Preview) -> str:
    """Where it is from and what it holds, in one line."""
    said = [shown.source]
    if shown.images:
        _, height, width = shown.images[0].shape
        more = f"{len(shown.images)} images, the first " if len(shown.images) > 1 else ""
        said.append(f"{more}{width} x {height} px")
    if shown.counts is not None:
        counts = shown.counts
        said.append(f"{counts.tokens} tokens: {counts.images} of images, {counts.loss} with loss")
    if shown.note is not None:
        said.append(shown.note)
    return " · ".join(said)


# --- in a terminal ---------------------------------------------------------------------------------------------------

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
_PICTURES |= dict.fromkeys((*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)  # C1; bidi


def terminal(shown: Sequence[Preview], *, colour: bool = True) -> RenderableType:
    """All previews, for rich. Without `colour` there are no pictures, and ⟦ ⟧ stand around what has loss."""
    return Group(*(part for preview in shown for part in _entry(preview, colour)))


def _entry(shown: Preview, colour: bool) -> list[RenderableType]:
    head = Text.assemble((printable(shown.key), "bold"), "  ", (printable(facts(shown)), "dim"))
    body = Text()
    for span in shown.spans:
        text = printable(_visible(span))
        body.append(text if colour or span.kind != "loss" else f"⟦{text}⟧", STYLES[span.kind])
    body.rstrip()
    parts: list[RenderableType] = [head]
    if shown.problem is not None:
        parts.append(Padding(Text(f"put aside: {printable(shown.problem)}", "bold red"), (0, 0, 0, 2)))
    if colour:
        parts += [Padding(_blocks(image), (0, 0, 0, 2)) for image in shown.images]
    return [*parts, Padding(body, (0, 0, 1, 2))]


def printable(text: str) -> str:
    """A text that cannot move the cursor, set a title or hide what follows: control codes become their pictures."""
    return text.translate(_PICTURES)


def _visible(span: Span) -> str:
    """A newline that has loss is easy to miss, and it is what ends a caption."""
    return span.text.replace("\n", "↵\n") if span.kind == "loss" else span.text


def _blocks(pixels: NDArray[np.uint8]) -> Text:
    """Two rows of pixels a line: the upper one is the colour of a half block, the lower one what lies behind it."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.thumbnail((CELLS, CELLS))
    rows = np.asarray(image)
    rows = rows[: len(rows) // 2 * 2]
    text = Text(no_wrap=True)
    for upper, lower in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True):
        for over, under in zip(upper, lower, strict=True):
            text.append("▀", f"rgb({over[0]},{over[1]},{over[2]}) on rgb({under[0]},{under[1]},{under[2]})")
        text.append("\n")
    text.rstrip()
    return text


# --- in a browser ----------------------------------------------------------------------------------------------------


def page(shown: Sequence[Preview], title: str) -> str:
    """One HTML document; pictures are PNG in data: URIs, every text is escaped, no host is asked for anything."""
    template = Template(files("bridgework.data").joinpath("preview.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), samples="\n".join(map(_article, shown)))


def _article(shown: Preview) -> str:
    images = "".join(f'<img src="{_uri(image)}" alt="image {i}">' for i, image in enumerate(shown.images))
    spans = "".join(f'<span class="{span.kind}">{escape(_visible(span))}</span>' for span in shown.spans)
    problem = "" if shown.problem is None else f'<p class="problem">put aside: {escape(shown.problem)}</p>'
    return (
        f"<article><div class=images>{images}</div><div><h2>{escape(shown.key)}</h2>"
        f"<p class=facts>{escape(facts(shown))}</p>{problem}<p class=text>{spans}</p></div></article>"
    )


def _uri(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
