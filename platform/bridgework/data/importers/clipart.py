"""Open Clip Art: Debian's openclipart-png next to openclipart-svg, in the public domain.

SOURCE is the folder that holds `png/` and `svg/`. Titles are those of the SVGs' metadata; if a
title names a series, the name of the file is used instead.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from html import unescape
from typing import ClassVar, NamedTuple
from xml.etree import ElementTree

import fsspec

from bridgework.config import config_class
from bridgework.data.importers import (
    Importer,
    Listing,
    Row,
    caption,
    fingerprint,
    read_image,
    shrink,
)
from bridgework.data.importers.tables import hidden
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample, pair
from bridgework.errors import DataError
from bridgework.storage import find_store

LICENSE = "public domain"
MAX_PIXELS = 41_000_000  # a handful have 100 to 600 million pixels, for a drawing
MAX_SIDE = 16_383  # a WebP has no more pixels a side
SERIES_ROWS = 7  # a title of so many images names their series

_NO_TITLE = re.compile(
    r"clip ?art|icon ?set|icons|collection|symbol_signs|s[iu]bmission|@|architetto|openclipart|theme"
    r"|illustration$|^.{0,2}$",
    re.IGNORECASE,
)


class Card(NamedTuple):
    """Metadata of an SVG."""

    title: str
    creator: str
    license: str
    complete: bool  # False if the drawing shows an image file that was never packaged


@config_class
class ClipartImporter(Importer):
    """Import the images under SOURCE/png as pairs, shrunk to `side` x `side` pixels, on white.

    `skip` are globs of paths that are not listed, e.g. `computer/icons/*`. An image whose SVG does
    not declare the public domain is quarantined.
    """

    side: int = 128
    skip: tuple[str, ...] = ()

    parallel: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.side <= MAX_SIDE:
            raise DataError(
                f"side={self.side}: images are shrunk to 1 to {MAX_SIDE} pixels a side. "
                "Fix: give such a number"
            )

    def list_rows(self, source: str) -> Listing:
        fs, root = find_store(source)
        found = {
            str(path).removeprefix(f"{root}/png/"): int(info["size"])
            for path, info in _find(fs, f"{root}/png")
        }
        pictures = (name for name in found if name.endswith(".png") and not hidden(name))
        names = sorted(n for n in pictures if not any(fnmatchcase(n, glob) for glob in self.skip))
        if not names:
            raise DataError(
                f"{source}/png holds no images. Fix: give the folder with png/ and svg/, both of "
                "one "
                "release"
            )
        return Listing(
            partial(_rows, source, names, self.side),
            fingerprint(json.dumps([(name, found[name]) for name in names])),
            replace(self, skip=tuple(sorted(self.skip))),
            license=LICENSE,
        )


def _find(fs: fsspec.AbstractFileSystem, root: str) -> list[tuple[str, dict[str, int]]]:
    return list(fs.find(root, detail=True).items()) if fs.isdir(root) else []


def _rows(source: str, names: list[str], side: int) -> Iterator[Row]:
    cards = {name: _card(source, name) for name in names}
    counts = Counter(card.title.lower() for card in cards.values() if card is not None)
    for name, card in cards.items():
        series = card is not None and (
            counts[card.title.lower()] >= SERIES_ROWS or _NO_TITLE.search(card.title)
        )
        yield name, partial(_sample, source, name, card, bool(series), side)


def _card(source: str, name: str) -> Card | None:
    """Return the metadata of an image, or None without a readable SVG."""
    try:
        tree = ElementTree.fromstring(
            read_image(f"{source}/svg", name.removesuffix(".png") + ".svg")
        )
    except (
        BadSample,
        ElementTree.ParseError,
        LookupError,
        ValueError,
    ):  # the last two: an encoding it cannot read
        return None
    work = tree.find(".//{*}Work")
    if work is None:
        return None
    license = work.find("{*}license")
    resource = (
        ""
        if license is None
        else next((v for k, v in license.attrib.items() if k.endswith("resource")), "")
    )
    title, creator = (
        work.findtext("{*}title") or "",
        work.findtext("{*}creator/{*}Agent/{*}title") or "",
    )
    references = [
        value
        for image in tree.iter()
        if _is(image, "image")
        for k, value in image.items()
        if k.endswith("href")
    ]
    complete = all(value.startswith("data:") for value in references)
    return Card(" ".join(unescape(unescape(title)).split()), creator.strip(), resource, complete)


def _is(element: ElementTree.Element, name: str) -> bool:
    return isinstance(element.tag, str) and element.tag.rpartition("}")[2] == name


def _sample(source: str, name: str, card: Card | None, series: bool, side: int) -> Sample:
    if card is None or "publicdomain" not in card.license.lower():
        raise BadSample(
            Reason.LICENSE,
            f"its SVG gives {card.license if card else None!r}, not the public domain",
        )
    if not card.complete:
        raise BadSample(Reason.MISSING_IMAGE, "the drawing shows an image that was never packaged")
    title = name.rpartition("/")[2].removesuffix(".png") if series else card.title
    image = shrink(read_image(f"{source}/png", name), side, max_pixels=MAX_PIXELS)
    origin = {"file": name} | ({"creator": card.creator} if card.creator else {})
    return pair(
        name,
        image,
        caption(plain(title)),
        license=LICENSE,
        labels=(name.split("/")[0],),
        provenance=origin,
    )


def plain(title: str) -> str:
    """Return a title or file name in lower case, without numbers, color marks and punctuation."""
    text = re.sub(r"[_-]", " ", title.lower())
    text = re.sub(r"\(b and w\)|\bb w\b|^contour |[0-9]+", " ", text)
    return " ".join(text.split()).strip(" .,!#?()")
