"""What importers read: the files of a folder, a JSON document, the rows of a table."""

import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from bridgework.data.quarantine import BadSample, Reason
from bridgework.errors import DataError, suggest
from bridgework.stores import find_store

TABLES = (".csv", ".tsv", ".json", ".jsonl")
MAX_DEPTH = 100  # lists and objects in each other in a row: to print what is deeper may overflow the stack
FIELD_CHARS = 2**31 - 1  # of a CSV: the text lies in memory anyway, and a row is held to a limit of its own

_TSV_FIELD = re.compile(r'(?:"([^"]*+(?:""[^"]*+)*+)"|([^\t]*+))\t')  # a whole quoted field, or whatever stands there


def files(folder: str) -> list[tuple[str, int]]:
    """(path inside the folder, bytes) of every file below it, sorted. Raises DataError when there is no folder."""
    fs, root = find_store(folder)
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
    """The list `name` of a JSON object, its rows as `rows` gives them.

    Raises DataError, naming `source`, when there is none.
    """
    found = whole.get(name) if isinstance(whole, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{source} is no JSON object with a list {name!r}")
    return list(map(shallow, found))


def table(content: str, source: str, /, **columns: str) -> list[Any]:
    """`rows` of a table whose columns options name: `image="file"`.

    Raises DataError for what is no table by its ending, and for a column that no row has.
    """
    if not source.endswith(TABLES):
        raise DataError(f"the table {source} is none of {', '.join(TABLES)}")
    found = list(rows(content, source))
    known = {name for row in found if isinstance(row, dict) for name in row}
    for option, column in columns.items():
        if known and column not in known:
            raise DataError(f"{option}={column!r} names no column of {source}{suggest(column, known)}")
    return found


def rows(text: str, source: str) -> Iterator[Any]:
    """The rows of a table by its ending: .csv and .tsv as dictionaries, .json a list, else JSON lines.

    A row that cannot be read comes as the BadSample that says why: `fields` raises it. Raises DataError for a file that
    is broken as a whole.
    """
    ending = PurePosixPath(source).suffix
    if ending == ".csv":
        yield from _named(_csv(text, source), "a text that holds commas or line breaks stands in quotes")
    elif ending == ".tsv":
        yield from _named(_tsv(text), "a text that holds tabs stands in quotes, and none holds a line break")
    elif ending == ".json":
        yield from entries(text, source)
    else:
        yield from lines(text)


def fields(row: Any, *names: str) -> dict[str, Any]:
    """A row that has all of these fields. Raises BadSample for any other."""
    if isinstance(row, BadSample):
        raise row
    if not isinstance(row, dict):
        raise BadSample(Reason.BAD_ROW, f"the row is {type(row).__name__}, and an object is wanted: {str(row)[:80]}")
    lacking = [name for name in names if name not in row]
    if lacking:
        raise BadSample(Reason.BAD_ROW, f"the row has no {' and no '.join(map(repr, lacking))}: {str(row)[:80]}")
    return row


def entries(text: str, source: str) -> list[Any]:
    """The JSON list that a file holds, its rows as `rows` gives them.

    Raises DataError, naming `source`, for anything else.
    """
    wanted = "a list of rows is wanted, or JSON lines in a file named .jsonl"
    try:
        whole = document(text, source)
    except DataError as error:
        raise DataError(f"{error}; {wanted}") from None
    if not isinstance(whole, list):
        raise DataError(f"{source} holds a {type(whole).__name__}; {wanted}")
    return list(map(shallow, whole))


def lines(text: str) -> Iterator[Any]:
    """What each line of JSON lines says; for one that is no JSON or nested too deep, the BadSample that says why."""
    return map(_line, filter(str.strip, text.split("\n")))  # splitlines would cut JSON's texts at U+2028


def _line(line: str) -> Any:
    try:
        return shallow(json.loads(line))
    except (ValueError, RecursionError) as error:
        return BadSample(Reason.BAD_ROW, f"the line is no JSON: {error}: {line[:80]}")


def shallow(row: Any) -> Any:
    """The row; for one nested deeper than MAX_DEPTH, the BadSample that says so."""
    level, depth = [row], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            why = f"the row is nested deeper than the {MAX_DEPTH} lists and objects that are read"
            return BadSample(Reason.BAD_ROW, why)
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return row


def _named(records: Iterator[list[str]], remedy: str) -> Iterator[dict[str, str] | BadSample]:
    """The records below the first one, which names the columns."""
    names = next(records, [])
    for record in records:
        if len(record) == len(names):
            yield dict(zip(names, record, strict=True))
        else:
            counts = f"the row has {len(record)} fields, and the header names {len(names)} columns"
            yield BadSample(Reason.BAD_ROW, f"{counts}; {remedy}: {str(record)[:80]}")


def _csv(text: str, source: str) -> Iterator[list[str]]:
    """The records of a CSV but for empty lines. Raises DataError for quotes that do not pair."""
    csv.field_size_limit(FIELD_CHARS)
    reader, first = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for record in reader:
            if record:
                yield record
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}: the row that begins in line {first} opens a quote that is not closed where its field ends "
            f'({error}); close it, and write a quote inside a quoted text twice: ""'
        ) from None


def _tsv(text: str) -> Iterator[list[str]]:
    """The lines of a TSV but for empty ones. Quotes that are not those of a whole field stand for themselves."""
    for line in io.StringIO(text, newline=None):
        if line := line.removesuffix("\n"):
            found = _TSV_FIELD.finditer(f"{line}\t")
            yield [field[2] if field[1] is None else field[1].replace('""', '"') for field in found]
