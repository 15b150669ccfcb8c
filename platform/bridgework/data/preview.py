"""A few samples, the way they are stored or the way a stage's model reads them; `preview_page` shows them.

A stage's text is decoded back from the token ids, so what stands here is what the model gets: cut where it is cut, with
loss where the labels have it.

# T tokens  S side in pixels

Shows previews: in a terminal, or as one HTML file that needs nothing beside it.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from bridgework.data.catalog import resolve
from bridgework.data.collate import Row
from bridgework.data.dataset import open_dataset
from bridgework.data.images import decode, load_image
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.data.templates import read_as
from bridgework.data.tiling import tile_image
from bridgework.data.tokenization import Encoded, SampleEncoder, load_tokenizer
from bridgework.system import END, IGNORE, IMAGE, Pixels, Source, Stage

Kind = Literal["text", "loss", "image", "role"]
SIDE = 256  # pixels: a picture as it is stored is shown no larger


@dataclass(frozen=True)
class Span:
    """A stretch of the text: read, read with loss, the place of an image, or the name of who speaks."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Counts:
    """Tokens of one row."""

    tokens: int
    images: int  # places that images fill
    loss: int


@dataclass(frozen=True)
class Preview:
    """One sample, ready to show."""

    key: str
    source: str  # its name in the mixture, or the dataset's path
    images: tuple[NDArray[np.uint8], ...]  # (3, height, width); (3, S, S) where a stage reads them
    spans: tuple[Span, ...]
    counts: Counts | None = None  # where a stage reads it
    problem: str | None = None  # why it is, or would be, put aside
    note: str | None = None  # what a run has on record of it


def stored(path: str, n: int = 4, *, seed: int = 0) -> list[Preview]:
    """`n` rows of the dataset at `path`, drawn by `seed`: whole pictures, texts by role, captions and answers as loss.

    Raises DataError for a missing or corrupt dataset.
    """
    return [_stored(sample, path) for _, sample in _draw(path, n, [seed])]


def read(stage: Stage, home: Path, n: int = 4, *, seed: int = 0) -> list[Preview]:
    """`n` rows of each source of `stage`, drawn by `seed`, through its template, tokenizer and transform.

    Raises DataError for a missing or corrupt dataset, WeightsError where the stage's tokenizer is not to be had.
    """
    streams = SampleEncoder.of(stage.model, stage.data)
    return [
        _read(sample, source, choice, streams)
        for number, source in enumerate(stage.data.leaves)
        for choice, sample in _draw(resolve(source.dataset, home), n, [seed, number])
    ]


def trained(rows: Sequence[Row], stage: Stage, notes: Sequence[str]) -> list[Preview]:
    """The rows of a step as the model got them, each with its note.

    Raises WeightsError where the stage's tokenizer is not to be had.
    """
    model, tokenizer = stage.model, load_tokenizer(stage.model.tokenizer)
    names = [source.name for source in stage.data.leaves]
    shown = []
    for row, note in zip(rows, notes, strict=True):
        places = [model.places(layout) for layout in row.layouts] or [
            model.image_tokens
        ] * row.shown
        spans = _spans(Encoded(row.ids, row.labels, list(range(row.shown)), places), tokenizer)
        counts = Counts(
            len(row.ids), row.ids.count(IMAGE), len(row.labels) - row.labels.count(IGNORE)
        )
        shown.append(
            Preview(row.key, names[row.source], tuple(row.images), tuple(spans), counts, note=note)
        )
    return shown


def _draw(path: str, n: int, seed: Sequence[int]) -> Iterator[tuple[int, Sample]]:
    """(a draw for its prompt, the sample) of `n` different rows, or of all if there are fewer."""
    dataset, draw = open_dataset(path), np.random.default_rng(seed)
    rows = np.sort(draw.choice(len(dataset), min(n, len(dataset)), replace=False))
    for row, choice in zip(
        rows.tolist(), draw.integers(2**32, size=len(rows)).tolist(), strict=True
    ):
        shard, group, place = dataset.locate(row)
        yield choice, dataset.read_group(shard, group)[place]


# --- as it is stored -------------------------------------------------------------------------------------------------


def _stored(sample: Sample, path: str) -> Preview:
    spans = tuple(_spoken(sample))
    try:
        images = tuple(_thumbnail(data) for data in sample.images)
    except BadSample as error:
        return Preview(sample.key, path, (), spans, problem=str(error))
    return Preview(sample.key, path, images, spans)


def _spoken(sample: Sample) -> Iterator[Span]:
    for role, parts in groupby(sample.parts, key=lambda part: part.role):
        yield Span(f"{role}: ", "role")
        for part in parts:
            if part.text is None:
                yield _place(f"image {part.image}")
            else:
                yield Span(part.text, "loss" if role in ("caption", "assistant") else "text")
        yield Span("\n", "role")
    if sample.rejected is not None:
        yield Span("rejected: ", "role")
        yield Span(sample.rejected, "text")


def _thumbnail(data: bytes) -> NDArray[np.uint8]:
    image = decode(data, size=SIDE)
    image.thumbnail((SIDE, SIDE))
    return np.asarray(image, np.uint8).transpose(2, 0, 1)


# --- as a stage reads it ---------------------------------------------------------------------------------------------


def _read(sample: Sample, source: Source, choice: int, streams: SampleEncoder) -> Preview:
    try:
        parts, pictures = (
            read_as(source, sample, choice, video=streams.model.pixels.video),
            streams.pictures(sample),
        )
        layouts = [p.layout for p in pictures if p.layout is not None]
        encoded = streams.read(sample, parts, layouts, choice=choice)
        files = [sample.images[file] for i in encoded.images for file in pictures[i].files]
        images = tuple(tile for file in files for tile in _tiles(file, streams.model.pixels))
    except BadSample as error:
        return Preview(sample.key, source.name, (), tuple(_spoken(sample)), problem=str(error))
    loss = len(encoded.labels) - encoded.labels.count(IGNORE)
    counts = Counts(len(encoded.ids), encoded.ids.count(IMAGE), loss)
    return Preview(
        sample.key, source.name, images, tuple(_spans(encoded, streams.tokenizer)), counts
    )


def _tiles(image: bytes, pixels: Pixels) -> NDArray[np.uint8]:
    return tile_image(decode(image), pixels)[0] if pixels.grids else load_image(image, pixels)[None]


def _spans(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    sizes = iter(encoded.places)
    for special, run in groupby(
        zip(encoded.ids, encoded.labels, strict=True), key=lambda pair: min(pair[0], 0)
    ):
        pairs = list(run)
        if special == END:
            yield from [_place("end")] * len(pairs)
        elif special == IMAGE:
            shown = 0
            while shown < len(pairs):
                size = next(sizes)
                shown += size
                yield _place(f"image: {size} token{'s' * (size > 1)}")
        else:
            yield from _decoded(pairs, tokenizer)


def _decoded(
    pairs: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Span]:
    """Text of a stretch without images; each span is what its tokens add, as some tokenizers join words by context."""
    ids, said = [token for token, _ in pairs], ""
    end = 0
    for loss, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        end += len(list(run))
        text = str(
            tokenizer.decode(
                ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        yield Span(text[len(said) :], "loss" if loss else "text")
        said = text


def _place(what: str) -> Span:
    return Span(f"\u2039{what}\u203a", "image")


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

_PICTURES = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {
    0x7F: 0x2421
}
_PICTURES |= dict.fromkeys(
    (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)  # C1; bidi


def terminal(shown: Sequence[Preview], *, color: bool = True) -> RenderableType:
    """All previews, for rich. Without `color` there are no pictures, and ⟦ ⟧ stand around what has loss."""
    return Group(*(part for preview in shown for part in _entry(preview, color)))


def _entry(shown: Preview, color: bool) -> list[RenderableType]:
    head = Text.assemble((printable(shown.key), "bold"), "  ", (printable(facts(shown)), "dim"))
    body = Text()
    for span in shown.spans:
        text = printable(_visible(span))
        body.append(text if color or span.kind != "loss" else f"⟦{text}⟧", STYLES[span.kind])
    body.rstrip()
    parts: list[RenderableType] = [head]
    if shown.problem is not None:
        parts.append(
            Padding(Text(f"put aside: {printable(shown.problem)}", "bold red"), (0, 0, 0, 2))
        )
    if color:
        parts += [Padding(_blocks(image), (0, 0, 0, 2)) for image in shown.images]
    return [*parts, Padding(body, (0, 0, 1, 2))]


def printable(text: str) -> str:
    """A text that cannot move the cursor, set a title or hide what follows: control codes become their pictures."""
    return text.translate(_PICTURES)


def _visible(span: Span) -> str:
    """A newline that has loss is easy to miss, and it is what ends a caption."""
    return span.text.replace("\n", "↵\n") if span.kind == "loss" else span.text


def _blocks(pixels: NDArray[np.uint8]) -> Text:
    """Two rows of pixels a line: the upper one is the color of a half block, the lower one what lies behind it."""
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.thumbnail((CELLS, CELLS))
    rows = np.asarray(image)
    rows = rows[: len(rows) // 2 * 2]
    text = Text(no_wrap=True)
    for upper, lower in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True):
        for over, under in zip(upper, lower, strict=True):
            text.append(
                "▀", f"rgb({over[0]},{over[1]},{over[2]}) on rgb({under[0]},{under[1]},{under[2]})"
            )
        text.append("\n")
    text.rstrip()
    return text


# --- in a browser ----------------------------------------------------------------------------------------------------


def page(shown: Sequence[Preview], title: str) -> str:
    """One HTML document; pictures are PNG in data: URIs, every text is escaped, no host is asked for anything."""
    template = Template(
        files("bridgework.data").joinpath("preview.html").read_text(encoding="utf-8")
    )
    return template.substitute(title=escape(title), samples="\n".join(map(_article, shown)))


def _article(shown: Preview) -> str:
    images = "".join(
        f'<img src="{_uri(image)}" alt="image {i}">' for i, image in enumerate(shown.images)
    )
    spans = "".join(
        f'<span class="{span.kind}">{escape(_visible(span))}</span>' for span in shown.spans
    )
    problem = (
        ""
        if shown.problem is None
        else f'<p class="problem">put aside: {escape(shown.problem)}</p>'
    )
    return (
        f"<article><div class=images>{images}</div><div><h2>{escape(shown.key)}</h2>"
        f"<p class=facts>{escape(facts(shown))}</p>{problem}<p class=text>{spans}</p></div></article>"
    )


def _uri(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
