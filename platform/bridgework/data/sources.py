"""What importers read: the files of a folder, a JSON document, the rows of a table."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import fsspec

from bridgework.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def files(folder: str) -> list[tuple[str, int]]:
    """(path inside the folder, bytes) of every file below it, sorted. Raises DataError when there is no folder."""
    fs, root = fsspec.core.url_to_fs(folder)
    if not fs.isdir(root):
        raise DataError(f"there is no folder {folder}")
    found = fs.find(root, detail=True)
    return sorted((str(path).removeprefix(root).lstrip("/"), int(info["size"])) for path, info in found.items())


def parent(path: str) -> str:
    """The folder that a file lies in: where its images are looked for when nothing else is said."""
    return path.rpartition("/")[0] or "."


def document(text: str, source: str) -> Any:
    """What a JSON file says. Raises DataError, naming `source`, when it is no JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON: {error}") from None


def listed(whole: Any, name: str, source: str) -> list[Any]:
    """The list `name` of a JSON object. Raises DataError, naming `source`, when there is none."""
    found = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{source} is no JSON object with a list {name!r}")
    return found


def rows(text: str, source: str) -> Iterator[Any]:
    """The rows of a table by its ending: .csv and .tsv as dictionaries, .json a list, else JSON lines.

    A line that is no JSON comes as the text it is, to be put aside as a row. Raises DataError for a file that is broken
    as a whole.
    """
    ending = PurePosixPath(source).suffix
    if ending in DELIMITERS:
        try:
            yield from csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter=DELIMITERS[ending])
        except csv.Error as error:
            raise DataError(f"{source} is no {ending[1:].upper()} file: {error}") from None
    elif ending == ".json":
        whole = document(text, source)
        if not isinstance(whole, list):
            raise DataError(f"{source} holds a {type(whole).__name__}; a list of rows is wanted")
        yield from whole
    else:
        yield from map(_line, filter(str.strip, text.split("\n")))


def _line(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line
