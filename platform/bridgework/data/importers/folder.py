"""A folder of images with captions: in a table, or in a text file of the same name beside each image."""

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from bridgework.data.importers import Keys, Row, Say, caption, fingerprint, ingest, read_image, read_text
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Sample, pair
from bridgework.data.shards import Manifest
from bridgework.data.sources import fields, files
from bridgework.data.sources import table as read_table

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")


def run(
    source: str,
    dest: str,
    *,
    table: str | None = None,
    image: str = "image",
    text: str = "caption",
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the pairs under the folder `source`.

    `table` is a .csv, .tsv, .json (a list) or .jsonl file in it, whose columns `image` and `text` hold a path and a
    caption; the second caption of one image gets the key `PATH#2`. Without a table, `cat.txt` describes `cat.jpg`.
    Raises DataError for a table that is none of these, or has no such column.
    """
    if table is None:
        names = files(source)
        content, listing = json.dumps(names), partial(_beside, source, names)
    else:
        content = read_text(f"{source.rstrip('/')}/{table}")
        listing = partial(_listed, source, read_table(content, table, image=image, text=text), image, text)
    return ingest(
        listing,
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"table": table, "image": image, "text": text, "sha256": fingerprint(content)},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _beside(source: str, names: list[tuple[str, int]]) -> Iterator[Row]:
    known = {name for name, _ in names}
    for name in sorted(known):
        if name.lower().endswith(IMAGES):
            description = str(PurePosixPath(name).with_suffix(".txt"))
            yield name, partial(_described, source, name, description, description in known)


def _described(source: str, name: str, description: str, there: bool) -> Sample:
    if not there:
        raise BadSample(Reason.EMPTY_TEXT, f"there is no {description} to describe it")
    try:
        text = read_image(source, description).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(Reason.BAD_ROW, f"{description} is not UTF-8 text: {error}") from None
    return pair(name, read_image(source, name), caption(text))


def _listed(source: str, table: Sequence[Any], image: str, text: str) -> Iterator[Row]:
    return ((key, partial(_row, source, key, row, image, text)) for key, row in keyed(table, image, text))


def keyed(table: Sequence[Any], path: str, text: str) -> Iterator[tuple[str, Any]]:
    """(key, row) of a table whose columns `path` and `text` hold a file's path and its caption."""
    keys = Keys()
    for number, row in enumerate(table):
        name = row.get(path) if isinstance(row, dict) else None
        yield keys(name, row.get(text)) if isinstance(name, str) and name else f"row-{number:08d}", row


def _row(source: str, key: str, row: Any, image: str, text: str) -> Sample:
    told = fields(row, image, text)
    return pair(key, read_image(source, told[image]), caption(told[text]))
