"""Preview samples, stored or as a model reads them, in a terminal or a self-contained HTML file.

The text of a stage is decoded from the token ids, so it is exactly the input of the model, with its
truncation and the loss of its labels.

# T tokens  S side in pixels
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["text", "loss", "image", "role"]
SIDE = 256  # pixels: maximum side of the preview of a stored image
CELLS = 24  # maximum side of an image in a terminal, in columns; a line holds two rows of pixels
STYLES = {"text": "", "loss": "bold green", "image": "cyan", "role": "dim"}


@dataclass(frozen=True)
class Span:
    """A piece of the text: without loss, with loss, place of an image, or name of a role."""

    text: str
    kind: Kind


@dataclass(frozen=True)
class Counts:
    """Token counts of one row."""

    tokens: int
    images: int  # tokens of images
    loss: int  # tokens with loss


@dataclass(frozen=True)
class Preview:
    """Preview of one sample."""

    key: str
    source: str  # its name in the mixture, or the dataset's path
    images: tuple[NDArray[np.uint8], ...]  # (3, height, width); (3, S, S) as read by a stage
    spans: tuple[Span, ...]
    counts: Counts | None = None  # only as read by a stage
    problem: str | None = None  # reason why it is, or would be, quarantined
    note: str | None = None  # e.g. its recorded loss in a run


def stored(path: str, n: int = 4, *, seed: int = 0) -> list[Preview]:
    """Return previews of `n` random rows of the dataset at `path`, as stored.

    They have complete images and texts by role; captions and answers are marked as loss.
    Raises DataError for a missing or corrupt dataset.
    """
    return [_stored(sample, path) for _, sample in _draw(path, n, [seed])]


def read(stage: Stage, home: Path, n: int = 4, *, seed: int = 0) -> list[Preview]:
    """Return previews of `n` random rows of each source of `stage`, as its model reads them.

    Raises DataError for a missing or corrupt dataset, WeightsError if the stage's tokenizer cannot
    be loaded.
    """
    encoder = SampleEncoder.of(stage.model, stage.data)
    return [
        _read(sample, source, choice, encoder)
        for number, source in enumerate(stage.data.leaves)
        for choice, sample in _draw(resolve(source.dataset, home), n, [seed, number])
    ]


def trained(rows: Sequence[Row], stage: Stage, notes: Sequence[str]) -> list[Preview]:
    """Return previews of the rows of a step as the model read them, each with its note.

    Raises WeightsError if the stage's tokenizer cannot be loaded.
    """
    model, tokenizer = stage.model, load_tokenizer(stage.model.tokenizer)
    names = [source.name for source in stage.data.leaves]
    previews = []
    for row, note in zip(rows, notes, strict=True):
        places = [model.num_image_tokens(layout) for layout in row.layouts]
        places = places or [model.image_tokens] * row.num_images
        encoded = Encoded(row.ids, row.labels, list(range(row.num_images)), places)
        spans, counts = tuple(_spans(encoded, tokenizer)), _token_counts(encoded)
        previews.append(
            Preview(row.key, names[row.source], tuple(row.images), spans, counts, note=note)
        )
    return previews


def _token_counts(encoded: Encoded) -> Counts:
    loss = len(encoded.labels) - encoded.labels.count(IGNORE)
    return Counts(len(encoded.ids), encoded.ids.count(IMAGE), loss)


def _draw(path: str, n: int, seed: Sequence[int]) -> Iterator[tuple[int, Sample]]:
    """Yield (random integer for its prompt, sample) of `n` different rows, or of all if fewer."""
    dataset, rng = open_dataset(path), np.random.default_rng(seed)
    rows = np.sort(rng.choice(len(dataset), min(n, len(dataset)), replace=False))
    choices = rng.integers(2**32, size=len(rows))
    for row, choice in zip(rows.tolist(), choices.tolist(), strict=True):
        shard, group, place = dataset.locate(row)
        yield choice, dataset.read_group(shard, group)[place]


# --- as stored ------------------------------------------------------------------------------------


def _stored(sample: Sample, path: str) -> Preview:
    spans = tuple(_stored_spans(sample))
    try:
        images = tuple(_thumbnail(data) for data in sample.images)
    except BadSample as error:
        return Preview(sample.key, path, (), spans, problem=str(error))
    return Preview(sample.key, path, images, spans)


def _stored_spans(sample: Sample) -> Iterator[Span]:
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


# --- as read by a stage ---------------------------------------------------------------------------


def _read(sample: Sample, source: Source, choice: int, encoder: SampleEncoder) -> Preview:
    pixels = encoder.model.pixels
    try:
        parts = read_as(source, sample, choice, video=pixels.video)
        pictures = encoder.pictures(sample)
        layouts = [p.layout for p in pictures if p.layout is not None]
        encoded = encoder.read(sample, parts, layouts, choice=choice)
        files = [sample.images[file] for i in encoded.images for file in pictures[i].files]
        images = tuple(tile for file in files for tile in _tiles(file, pixels))
    except BadSample as error:
        spans = tuple(_stored_spans(sample))
        return Preview(sample.key, source.name, (), spans, problem=str(error))
    spans = tuple(_spans(encoded, encoder.tokenizer))
    return Preview(sample.key, source.name, images, spans, _token_counts(encoded))


def _tiles(image: bytes, pixels: Pixels) -> NDArray[np.uint8]:
    """Return the tiles of an image, (n, 3, S, S)."""
    return tile_image(decode(image), pixels)[0] if pixels.grids else load_image(image, pixels)[None]


def _spans(encoded: Encoded, tokenizer: PreTrainedTokenizerBase) -> Iterator[Span]:
    """Yield the text of an encoded row, decoded from its ids, with the places of its images."""
    sizes = iter(encoded.places)
    for special, run in groupby(
        zip(encoded.ids, encoded.labels, strict=True), key=lambda pair: min(pair[0], 0)
    ):
        pairs = list(run)
        if special == END:
            yield from [_place("end")] * len(pairs)
        elif special == IMAGE:
            done = 0
            while done < len(pairs):
                size = next(sizes)
                done += size
                yield _place(f"image: {size} token{'s' * (size > 1)}")
        else:
            yield from _decoded(pairs, tokenizer)


def _decoded(
    pairs: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Span]:
    """Yield the text of ids without images.

    Each span is the text that its tokens add to those before.

    Spans are not decoded separately, because some tokenizers join words by context.
    """
    ids, before = [token for token, _ in pairs], ""
    end = 0
    for loss, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        end += len(list(run))
        text = str(
            tokenizer.decode(
                ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )
        yield Span(text[len(before) :], "loss" if loss else "text")
        before = text


def _place(name: str) -> Span:
    return Span(f"\u2039{name}\u203a", "image")


def _summary(preview: Preview) -> str:
    """Return the source, image size, token counts and note of a preview in one line."""
    items = [preview.source]
    if preview.images:
        _, height, width = preview.images[0].shape
        more = f"{len(preview.images)} images, the first " if len(preview.images) > 1 else ""
        items.append(f"{more}{width} x {height} px")
    if (counts := preview.counts) is not None:
        items.append(f"{counts.tokens} tokens: {counts.images} of images, {counts.loss} with loss")
    if preview.note is not None:
        items.append(preview.note)
    return " · ".join(items)


# --- in a terminal --------------------------------------------------------------------------------

# control code -> Unicode's symbol for it; C1 and bidirectional controls -> replacement character
_SYMBOLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}
_SYMBOLS |= {0x7F: 0x2421}
_SYMBOLS |= dict.fromkeys(
    (*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD
)


def terminal(previews: Sequence[Preview], *, color: bool = True) -> RenderableType:
    """Return all previews, for rich.

    Without `color`, images are omitted and text with loss is in ⟦ ⟧.
    """
    return Group(*(part for preview in previews for part in _entry(preview, color)))


def _entry(preview: Preview, color: bool) -> list[RenderableType]:
    summary = printable(_summary(preview))
    head = Text.assemble((printable(preview.key), "bold"), "  ", (summary, "dim"))
    body = Text()
    for span in preview.spans:
        text = printable(_visible(span))
        body.append(text if color or span.kind != "loss" else f"⟦{text}⟧", STYLES[span.kind])
    body.rstrip()
    parts: list[RenderableType] = [head]
    if preview.problem is not None:
        problem = Text(f"quarantined: {printable(preview.problem)}", "bold red")
        parts.append(Padding(problem, (0, 0, 0, 2)))
    if color:
        parts += [Padding(_blocks(image), (0, 0, 0, 2)) for image in preview.images]
    return [*parts, Padding(body, (0, 0, 1, 2))]


def printable(text: str) -> str:
    """Replace control codes by visible symbols.

    A text then cannot move the cursor, set a title or hide text.
    """
    return text.translate(_SYMBOLS)


def _visible(span: Span) -> str:
    """Mark newlines with loss, because they end a caption and are easy to miss."""
    return span.text.replace("\n", "↵\n") if span.kind == "loss" else span.text


def _blocks(pixels: NDArray[np.uint8]) -> Text:
    """Draw two rows of pixels per line: the color of a half block, and its background."""
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


# --- in a browser ---------------------------------------------------------------------------------


def page(previews: Sequence[Preview], title: str) -> str:
    """Return one HTML document.

    Images are data: URIs (PNG), so it makes no requests; texts are escaped.
    """
    html = files("bridgework.data").joinpath("preview.html").read_text(encoding="utf-8")
    samples = "\n".join(map(_article, previews))
    return Template(html).substitute(title=escape(title), samples=samples)


def _article(preview: Preview) -> str:
    images = "".join(
        f'<img src="{_uri(image)}" alt="image {i}">' for i, image in enumerate(preview.images)
    )
    spans = "".join(
        f'<span class="{span.kind}">{escape(_visible(span))}</span>' for span in preview.spans
    )
    problem = preview.problem
    problem = "" if problem is None else f'<p class="problem">quarantined: {escape(problem)}</p>'
    return (
        f"<article><div class=images>{images}</div><div><h2>{escape(preview.key)}</h2>"
        f"<p class=facts>{escape(_summary(preview))}</p>{problem}<p class=text>{spans}</p>"
        "</div></article>"
    )


def _uri(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
