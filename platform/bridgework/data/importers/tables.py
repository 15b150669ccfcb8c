"""Readers that importers share: the files of a folder, a JSON document, the rows of a table."""

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from pathlib import PurePosixPath
from typing import Any

from bridgework.data.quarantine import BadSample, Reason
from bridgework.errors import DataError, suggest
from bridgework.storage import find_store

TABLES = (".csv", ".tsv", ".json", ".jsonl")
MAX_DEPTH = 100  # of nested lists and objects in a row: printing deeper ones may overflow the stack
QUOTED_LINES = 100  # of a text in a .tsv
FIELD_CHARS = 2**31 - 1  # of a CSV: the text is in memory already, and rows have their own limit

_SYSTEM = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
_RETURN = re.compile(r'(?<!")\r(?!\n)')
_TSV_FIELD = re.compile(
    r'(?:"([^"]*+(?:""[^"]*+)*+)"|([^\t]*+))\t'
)  # a complete quoted field, or any other text


def files(folder: str) -> list[tuple[str, int]]:
    """Return (path inside the folder, bytes) of every file below it, sorted; linked folders too.

    A link to a folder above it, or to one that another link leads to, is listed as a file. Raises
    DataError if there is no folder.
    """
    fs, root = find_store(folder)
    if not fs.isdir(root):
        raise DataError(f"there is no folder {folder}")
    return sorted(_found(fs, root, "", {os.path.realpath(root)}))


def _found(fs: Any, root: str, inside: str, linked: set[str]) -> Iterator[tuple[str, int]]:
    """Yield the files below `root`, with `inside` before their paths; `linked` were seen."""
    for path, info in sorted(fs.find(root, detail=True).items()):
        name = inside + str(path).removeprefix(root).lstrip("/")
        real = os.path.realpath(path) if info.get("islink") and fs.isdir(path) else None
        if real is None or any(f"{seen}/".startswith(f"{real.rstrip('/')}/") for seen in linked):
            yield name, int(info["size"])
        else:
            linked.add(real)
            yield from _found(fs, str(path), f"{name}/", linked)


def hidden(name: str) -> bool:
    """Return True for hidden paths, and for a system's own files: `._cat.jpg`, `__MACOSX/..`."""
    return any(part.startswith(".") or part in _SYSTEM for part in name.split("/"))


def parent(path: str) -> str:
    """Return the folder of a file, the default place of its images."""
    return path.rpartition("/")[0] or "."


def document(text: str, source: str) -> Any:
    """Parse a JSON file. Raises DataError, naming `source`, if it is not JSON."""
    try:
        found = parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON: {error}") from None
    if isinstance(found, BadSample):
        raise DataError(f"{source}: {found.detail}")
    return found


def parse(text: str | bytes) -> Any:
    """Parse JSON; an object with a duplicate name becomes a BadSample.

    Raises ValueError and RecursionError as `json.loads` does.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadSample:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    name = _twice([name for name, _ in pairs])[0]
    return BadSample(Reason.BAD_ROW, f"an object has two fields {name!r}: {str(pairs)[:80]}")


def _twice(names: Sequence[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def listed(content: Any, name: str, source: str) -> list[Any]:
    """Return the list `name` of a JSON object, its rows as by `rows`.

    Raises DataError, naming `source`, if there is none.
    """
    found = content.get(name) if isinstance(content, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{source} is not a JSON object with a list {name!r}")
    return list(map(shallow, found))


def table(content: str, source: str, /, **columns: str) -> list[Any]:
    """Return the `rows` of a table whose columns are given by option: `image="file"`.

    Raises DataError for another ending than that of a table, and for a column that no row has.
    """
    if not source.endswith(TABLES):
        raise DataError(f"the table {source} is none of {', '.join(TABLES)}")
    found = list(rows(content, source, used=columns.values()))
    known = {name for row in found if isinstance(row, dict) for name in row}
    for option, column in columns.items():
        if known and column not in known:
            raise DataError(
                f"{option}={column!r} names no column of {source}{suggest(column, known)}"
            )
    return found


def rows(text: str, source: str, *, used: Collection[str] | None = None) -> Iterator[Any]:
    """Yield the rows of a table by its ending: .csv, .tsv, .json (a list), otherwise JSON lines.

    Rows of .csv and .tsv are dictionaries. A row that cannot be read is a BadSample, which `fields`
    raises. Raises DataError for a file that cannot be read, and for two columns of one name, if it
    is one of those that are `used` (None: all).
    """
    ending = PurePosixPath(source).suffix
    if ending == ".csv":
        remedy = "a text that holds commas or line breaks needs quotes"
        text, mark = _marked(text)
        yield from _named(_csv(text, source), mark, remedy, source, used)
    elif ending == ".tsv":
        remedy = "a text that holds tabs or line breaks needs quotes"
        text, mark = _marked(text)
        yield from _named(_tsv(text), mark, remedy, source, used)
    elif ending == ".json":
        yield from entries(text, source)
    else:
        yield from lines(text)


def fields(row: Any, *names: str) -> dict[str, Any]:
    """Return a row that has all of these fields. Raises BadSample for any other."""
    if isinstance(row, BadSample):
        raise row
    if not isinstance(row, dict):
        raise BadSample(
            Reason.BAD_ROW,
            f"the row is {type(row).__name__}, and an object is wanted: {str(row)[:80]}",
        )
    lacking = [name for name in names if name not in row]
    if lacking:
        raise BadSample(
            Reason.BAD_ROW, f"the row has no {' and no '.join(map(repr, lacking))}: {str(row)[:80]}"
        )
    return row


def entries(text: str, source: str) -> list[Any]:
    """Return the JSON list in a file, its rows as by `rows`.

    Raises DataError, naming `source`, for anything else.
    """
    wanted = "a list of rows is wanted, or JSON lines in a file named .jsonl"
    try:
        content = document(text, source)
    except DataError as error:
        raise DataError(f"{error}; {wanted}") from None
    if not isinstance(content, list):
        raise DataError(f"{source} holds a {type(content).__name__}; {wanted}")
    return list(map(shallow, content))


def lines(text: str) -> Iterator[Any]:
    """Yield the value of each line; a BadSample for one that is not JSON, or nested too deep."""
    # splitlines would cut JSON's texts at U+2028; they hold no carriage return as it is
    return map(_line, filter(str.strip, text.replace("\r", "\n").split("\n")))


def _line(line: str) -> Any:
    try:
        return shallow(parse(line))
    except (ValueError, RecursionError) as error:
        return BadSample(Reason.BAD_ROW, f"the line is not JSON: {error}: {line[:80]}")


def shallow(row: Any) -> Any:
    """Return the row, or a BadSample if it is nested deeper than MAX_DEPTH."""
    level, depth = [row], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            why = f"the row is nested deeper than the {MAX_DEPTH} lists and objects that are read"
            return BadSample(Reason.BAD_ROW, why)
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return row


def _marked(text: str) -> tuple[str, str]:
    """Return the text of a table with a mark for carriage returns that end no line, and the mark.

    The number of fields decides if one ends a row or is part of a text: see `_named`.
    """
    if "\n" not in text or _RETURN.search(text) is None:
        return text, ""
    mark = next(mark for mark in map(chr, range(0xE000, 0xF900)) if mark not in text)
    return _RETURN.sub(mark, text), mark


def _named(
    records: Iterator[list[str] | BadSample],
    mark: str,
    remedy: str,
    source: str,
    used: Collection[str] | None,
) -> Iterator[dict[str, str] | BadSample]:
    """Yield the records after the header. Raises DataError for two columns of one name."""
    head = next(records, [])
    names, *first = [[""]] if isinstance(head, BadSample) else _split(head, mark)
    if twice := [name for name in _twice(names) if name and (used is None or name in used)]:
        raise DataError(f"{source} has two columns named {twice[0]!r}. Fix: rename one of them")
    for record in chain(first, records):
        if isinstance(record, BadSample):
            yield record
            continue
        parts = [record]
        if mark and len(record) != len(names):
            rows = _split(record, mark)
            parts = rows if all(len(row) == len(names) for row in rows) else parts
        for part in parts:
            if len(part) == len(names):
                texts = (text.replace(mark, "\r") if mark else text for text in part)
                yield dict(zip(names, texts, strict=True))
            else:
                counts = (
                    f"the row has {len(part)} fields, and the header names {len(names)} columns"
                )
                yield BadSample(Reason.BAD_ROW, f"{counts}; {remedy}: {str(part)[:80]}")


def _split(record: list[str], mark: str) -> list[list[str]]:
    """Split a record at the marks."""
    if not mark:
        return [record]
    found: list[list[str]] = [[]]
    for text in record:
        head, *rest = text.split(mark)
        found[-1].append(head)
        found += [[piece] for piece in rest]
    return found


def _csv(text: str, source: str) -> Iterator[list[str]]:
    """Yield the records of a CSV without empty lines. Raises DataError for unpaired quotes."""
    csv.field_size_limit(FIELD_CHARS)
    reader, first = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for record in reader:
            if record:
                yield record
            first = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}: the row that begins in line {first} opens a quote that is not closed "
            "where its "
            f'field ends ({error}); close it, and write a quote inside a quoted text twice: ""'
        ) from None


def _tsv(text: str) -> Iterator[list[str] | BadSample]:
    """Yield the records of a TSV without empty lines.

    A field that begins and ends with a quote, also over several lines, is read without the quotes.
    Other quotes are text: a quote never extends into a line that is a record of its own.
    """
    rest = text.split("\n") if "\n" in text else text.split("\r")
    width, at = 0, 0
    while at < len(rest):
        line, at = rest[at].removesuffix("\r"), at + 1
        if not line:
            continue
        record = _tsv_fields(line)
        width = width or len(record)
        if any(field.startswith('"') for field in record):
            quoted, at = _tsv_quoted(line, record, rest, at, width)
            yield quoted
        else:
            yield record


def _tsv_fields(line: str) -> list[str]:
    found = _TSV_FIELD.finditer(f"{line}\t")
    return [field[2] if field[1] is None else field[1].replace('""', '"') for field in found]


def _tsv_quoted(
    line: str, record: list[str], rest: Sequence[str], at: int, width: int
) -> tuple[list[str] | BadSample, int]:
    """Return a record whose quoted text continues in the lines from `at` on, and the next line."""
    complete = len(record) == width
    for end in range(at, min(at + QUOTED_LINES, len(rest))):
        following = rest[end].removesuffix("\r")
        line = f"{line}\n{following}"
        unclear = complete and len(_tsv_fields(following)) == width
        if '"' in following:
            found = [(field[1], field[2]) for field in _TSV_FIELD.finditer(f"{line}\t")]
            quoted = all(plain is None or "\n" not in plain for _, plain in found)
            if quoted and len(found) == width:
                why = "two lines may be a row each, or one row with a line break in quotes"
                bad = BadSample(Reason.BAD_ROW, f"{why}: {line[:80]!r}")
                return bad if unclear else _tsv_fields(line), end + 1
        if unclear:
            break
    return record, at
