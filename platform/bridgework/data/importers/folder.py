"""A folder of images with captions: in a table, or in a text file of the same name next to each."""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from unicodedata import normalize

from bridgework.config import config_class
from bridgework.data.importers import (
    UNKNOWN,
    Captions,
    Importer,
    Listing,
    Row,
    caption,
    fingerprint,
    leave_out,
    read_image,
    read_text,
    texts,
)
from bridgework.data.importers.tables import fields, files, hidden
from bridgework.data.importers.tables import table as read_table
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample, pair

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp")

Make = Callable[[str, Any, Any], Sample]  # from a key, the name of a file, and its caption


@config_class
class FolderImporter(Importer):
    """Import the pairs under the folder SOURCE.

    `table` is a .csv, .tsv, .json (a list) or .jsonl file in it, whose columns `image` and `text`
    hold a path and a caption, or a list of captions. The second caption of one image gets the key
    `PATH#2`. Without a table, `cat.txt` describes `cat.jpg`, and all other files are left out and
    counted. A table of another kind, or without such a column, is an error.
    """

    table: str | None = None
    image: str = "image"
    text: str = "caption"
    license: str = UNKNOWN

    def list_rows(self, source: str) -> Listing:
        make = partial(_sample, source)
        if self.table is None:
            names = files(source)
            return Listing(
                partial(described, source, names, IMAGES, make), fingerprint(json.dumps(names))
            )
        content = read_text(f"{source.rstrip('/')}/{self.table}")
        rows = read_table(content, self.table, image=self.image, text=self.text)
        return Listing(partial(listed, rows, self.image, self.text, make), fingerprint(content))


def _sample(source: str, key: str, name: Any, text: Any) -> Sample:
    return pair(key, read_image(source, name), caption(text))


# --- shared with `video` ------------------------------------------------------------------------


def described(
    source: str, names: Sequence[tuple[str, int]], endings: tuple[str, ...], make: Make
) -> Iterator[Row]:
    """Yield the rows of files with these endings, each described by the text file next to it.

    All other files follow, as rows that are left out, by kind.
    """
    known = {name for name, _ in names}
    near = {_stem(name): name for name in sorted(known) if name.lower().endswith(".txt")}
    rest: dict[str | None, None] = dict.fromkeys(name for name, _ in names)
    for name, _ in names:
        if name.lower().endswith(endings) and not hidden(name):
            text = str(PurePosixPath(name).with_suffix(".txt"))
            found = text if text in known else near.get(_stem(name))
            rest.pop(name)
            rest.pop(found, None)
            yield name, partial(_described, source, name, found, make)
    for other in map(str, rest):
        yield other, partial(leave_out, _kind(other))


def _stem(name: str) -> str:
    """Return the path without its ending, in composed Unicode form."""
    return normalize("NFC", str(PurePosixPath(name).with_suffix("")))


def _kind(name: str) -> str:
    if hidden(name):
        return "hidden files"
    ending = PurePosixPath(name).suffix.lower()
    if ending == ".txt":
        return "texts without a file that they describe"
    return f"files of {ending}" if ending else "files without an ending"


def _described(source: str, name: str, text: str | None, make: Make) -> Sample:
    if text is None:
        raise BadSample(
            Reason.EMPTY_TEXT,
            f"there is no {PurePosixPath(name).with_suffix('.txt')} to describe it",
        )
    try:
        caption = read_image(source, text).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(Reason.BAD_ROW, f"{text} is not UTF-8 text: {error}") from None
    return make(name, name, caption)


def listed(table: Sequence[Any], path: str, text: str, make: Make) -> Iterator[Row]:
    """Yield the rows of a table with columns of paths (`path`) and captions (`text`)."""
    captions = Captions()
    for number, row in enumerate(table):
        given = row if isinstance(row, dict) else {}
        name = given.get(path)
        key = name if isinstance(name, str) and name else f"row-{number:08d}"
        for each in texts(given.get(text)):
            yield captions(key, each, partial(_row, row, path, text, each, make))


def _row(row: Any, path: str, text: str, caption: Any, make: Make, key: str) -> Sample:
    return make(key, fields(row, path, text)[path], caption)
