"""What importers read: the files of a folder, a JSON document, the rows of a table."""

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
MAX_DEPTH = (
    100  # lists and objects in each other in a row: to print what is deeper may overflow the stack
)
QUOTED_LINES = 100  # of a text in a .tsv
FIELD_CHARS = (
    2**31 - 1
)  # of a CSV: the text lies in memory anyway, and a row is held to a limit of its own

_SYSTEM = frozenset(
    ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
)
_RETURN = re.compile(r'(?<!")\r(?!\n)')
_TSV_FIELD = re.compile(
    r'(?:"([^"]*+(?:""[^"]*+)*+)"|([^\t]*+))\t'
)  # a whole quoted field, or whatever stands there


def files(folder: str) -> list[tuple[str, int]]:
    """(path inside the folder, bytes) of every file below it, sorted; those in linked folders too.

    A link to a folder above it, or to one that another link leads to, is listed as a file. Raises
    DataError when there is no folder.
    """
    fs, root = find_store(folder)
    if not fs.isdir(root):
        raise DataError(f"there is no folder {folder}")
    return sorted(_found(fs, root, "", {os.path.realpath(root)}))


def _found(fs: Any, root: str, inside: str, linked: set[str]) -> Iterator[tuple[str, int]]:
    """The files below `root`, with `inside` before their paths; `linked` are folders seen so far."""
    for path, info in sorted(fs.find(root, detail=True).items()):
        name = inside + str(path).removeprefix(root).lstrip("/")
        real = os.path.realpath(path) if info.get("islink") and fs.isdir(path) else None
        if real is None or any(f"{seen}/".startswith(f"{real.rstrip('/')}/") for seen in linked):
            yield name, int(info["size"])
        else:
            linked.add(real)
            yield from _found(fs, str(path), f"{name}/", linked)


def hidden(name: str) -> bool:
    """True if a path is hidden, or is what a system keeps of others: `._cat.jpg`, `__MACOSX/..`."""
    return any(part.startswith(".") or part in _SYSTEM for part in name.split("/"))


def parent(path: str) -> str:
    """The folder that a file lies in: where its images are looked for when nothing else is said."""
    return path.rpartition("/")[0] or "."


def document(text: str, source: str) -> Any:
    """What a JSON file says. Raises DataError, naming `source`, when it is no JSON."""
    try:
        found = parse(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source} is not JSON: {error}") from None
    if isinstance(found, BadSample):
        raise DataError(f"{source}: {found.detail}")
    return found


def parse(text: str | bytes) -> Any:
    """Parse JSON; an object that holds a name twice becomes the BadSample that says so.

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
    found = list(rows(content, source, used=columns.values()))
    known = {name for row in found if isinstance(row, dict) for name in row}
    for option, column in columns.items():
        if known and column not in known:
            raise DataError(
                f"{option}={column!r} names no column of {source}{suggest(column, known)}"
            )
    return found


def rows(text: str, source: str, *, used: Collection[str] | None = None) -> Iterator[Any]:
    """The rows of a table by its ending: .csv and .tsv as dictionaries, .json a list, else JSON lines.

    A row that cannot be read comes as the BadSample that says why: `fields` raises it. Raises DataError for a file that
    cannot be read, and for two columns of one name, if it is one of those that are `used` (None: all).
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
    """A row that has all of these fields. Raises BadSample for any other."""
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
    # splitlines would cut JSON's texts at U+2028; they hold no carriage return as it is
    return map(_line, filter(str.strip, text.replace("\r", "\n").split("\n")))


def _line(line: str) -> Any:
    try:
        return shallow(parse(line))
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
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return row


def _marked(text: str) -> tuple[str, str]:
    """The text of a table with a mark in place of carriage returns that end no line, and that mark.

    Whether such a one ends a row or is part of a text, the number of fields says: see `_named`.
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
    """The records below the first one, which names the columns.

    Raises DataError where two are one.
    """
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
    """A record as several, each of which ends at a mark."""
    if not mark:
        return [record]
    found: list[list[str]] = [[]]
    for text in record:
        head, *rest = text.split(mark)
        found[-1].append(head)
        found += [[piece] for piece in rest]
    return found


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


def _tsv(text: str) -> Iterator[list[str] | BadSample]:
    """The records of a TSV but for empty lines.

    A field that begins and ends with a quote, over several lines too, is read without the quotes.
    Other quotes are text: a quote never runs into a line that is a record of its own.
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
    """A record whose quoted text continues in the lines from `at` on, and the line after it."""
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
