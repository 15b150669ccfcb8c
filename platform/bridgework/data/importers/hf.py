"""Hugging Face datasets on disk: files of Arrow (`save_to_disk`) or Parquet (the Hub), by split.

data-00000-of-00002.arrow           one dataset, as `save_to_disk` writes it
train/data-00000-of-00002.arrow     a dataset of splits
data/train-00000-of-00005.parquet   the Hub
default/train/0000.parquet          the Hub's own conversion
0356AFpwqkWuS1bVOfu7Da_000000.parquet   Ray Data; part.0.parquet dask; data_0.parquet DuckDB
year=2024/data_0.parquet            partitions, whose folders hold values of columns

The files are read as tables; no script of a dataset is ever run. An image is a cell of bytes, of
{bytes, path}, or of a path inside the folder. A text is a caption, a list of captions, or a
conversation like LLaVA's.
"""

import os.path
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from bridgework.config import config_class
from bridgework.data.importers import (
    UNKNOWN,
    Importer,
    Listing,
    Row,
    caption,
    fingerprint,
    leave_out,
)
from bridgework.data.importers.arrow_reader import Columns, Cursor, is_list, value_type
from bridgework.data.importers.image_fields import read_cell
from bridgework.data.importers.llava_json import asked, parts
from bridgework.data.importers.tables import files, hidden, parent
from bridgework.data.quarantine import BadSample, Reason, UnreadableFile
from bridgework.data.samples import Sample, pair
from bridgework.errors import DataError, suggest
from bridgework.storage import find_store

EDGE_BYTES = 64 << 10  # at a file's start and end, where the footers are

_ENDINGS = (".arrow", ".parquet")
_UNREAD = ("_temporary", "_delta_log")  # folders of what a writer keeps for itself
_OTHERS = (
    ".csv",
    ".tsv",
    ".jsonl",
    ".feather",
    ".orc",
    ".avro",
    ".pq",
    ".parq",
    ".tar",
    ".zip",
    ".gz",
    ".zst",
)
_PART = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_NO_SPLIT = re.compile(
    r"data|part[-_]?\d+.*|\d+"
)  # names of files that name no split: their folder's does
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}", re.IGNORECASE)
_HASH = re.compile(  # hexadecimal, or of all letters and digits, as Ray Data names what it writes
    r"(?=.*\d)(?:[0-9a-f]{4,}|[0-9A-F]{4,}|(?=.*[a-z])(?=.*[A-Z])[0-9A-Za-z]{16,})"
)
_DIGITS = re.compile(r"\d+$")
_MADE = re.compile(  # words of writers, which name no split
    r"(?:batch|block|chunk|data|export|file|out|output|part|partition|result|shard|tid)s?\d*"
    r"|c\d+|brotli|gz|gzip|lz4|snappy|zstd",
    re.IGNORECASE,
)


class File(NamedTuple):
    """One file: its path or URL, and its name below the source."""

    path: str
    name: str


def find(source: str, split: str | None = None) -> tuple[str, list[File]]:
    """Return the name of the split, empty if the files name none, and its files in order.

    Raises DataError if a file is missing or there is none, and for an unknown or ambiguous split.
    """
    fs, root = find_store(source)
    alone = fs.isfile(root)
    names = [os.path.basename(root)] if alone else _names(source) if fs.isdir(root) else []
    if not names:
        raise DataError(
            f"{source} holds no {' and no '.join(_ENDINGS)} file; give the folder that "
            "save_to_disk wrote"
        )
    splits = _grouped(names, {name: _split_of(name) for name in names})
    if split not in splits and (len(splits) > 1 or len(_folders(names)) > 1):
        splits = _grouped(names, _series(names))
    if split is None and len(splits) > 1:
        raise DataError(
            f"{source} holds the splits {', '.join(sorted(splits))}; choose one, e.g. "
            f"split={min(splits)}"
        )
    chosen = next(iter(splits)) if split is None else split
    if chosen not in splits:
        raise DataError(f"{source} has no split {chosen!r}" + suggest(chosen, splits))
    if not alone:
        _check(source, splits[chosen])
    paths = [str(root) if alone else f"{str(root).rstrip('/')}/{name}" for name in splits[chosen]]
    urls = [str(fs.unstrip_protocol(path)) if "://" in source else path for path in paths]
    return chosen, [File(url, name) for url, name in zip(urls, splits[chosen], strict=True)]


def others(source: str) -> list[str]:
    """Return the files of a folder that may hold rows, but are neither Arrow nor Parquet."""
    fs, root = find_store(source)
    names = (name for name, _ in files(source)) if fs.isdir(root) else ()
    return [name for name in names if name.lower().endswith(_OTHERS) and not hidden(name)]


def _names(source: str) -> list[str]:
    found = (name for name, _ in files(source) if name.endswith(_ENDINGS) and not hidden(name))
    return [
        n
        for n in found
        if not os.path.basename(n).startswith("cache-") and not {*_UNREAD} & {*n.split("/")}
    ]


def _grouped(names: Sequence[str], splits: Mapping[str, str]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        found[splits[name]].append(name)
    return dict(found)


def _split_of(name: str) -> str:
    """Return the split in a file's own name, or in its folder's."""
    stem = os.path.basename(name).rpartition(".")[0]
    numbered = _PART.match(stem)
    split = numbered["split"] if numbered else stem
    return _folder_of(name) if _NO_SPLIT.fullmatch(split) else split


def _folder_of(name: str) -> str:
    """Return the name of a file's folder, except folders that hold a column's value."""
    return next((part for part in reversed(name.split("/")[:-1]) if "=" not in part), "")


def _series(names: Sequence[str]) -> dict[str, str]:
    """Return the split of each file; files that one writer numbered or named at random are one."""
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        alike[os.path.dirname(name), _words(name)].append(name)
    found = {}
    for (_, words), group in alike.items():
        for name in group:
            found[name] = (
                words
                if words and _numbered(group)
                else _split_of(name)
                if words
                else _folder_of(name)
            )
    return found


def _words(name: str) -> str:
    """Return a file's name without numbers, hashes and the words of writers."""
    stem = os.path.basename(name).rpartition(".")[0]
    stem = numbered["split"] if (numbered := _PART.match(stem)) else _UUID.sub("", stem)
    kept = [word for word in re.split(r"([._-]+)", stem) if not _is_made(word)]
    return "".join(kept).strip("._-")


def _is_made(word: str) -> bool:
    return (
        word.isdecimal() or _HASH.fullmatch(word) is not None or _MADE.fullmatch(word) is not None
    )


def _numbered(names: Iterable[str]) -> bool:
    """Return True if numbers distinguish files: with leading zeros, or counted from 0 or 1."""
    stems = [os.path.basename(name).rpartition(".")[0] for name in names]
    words = [[word for word in re.split(r"[._-]", stem) if _is_made(word)] for stem in stems]
    found = [[n for word in of_one for n in _DIGITS.findall(word)] for of_one in words]
    if any(number.startswith("0") and len(number) > 1 for numbers in found for number in numbers):
        return True
    last = sorted(int(numbers[-1]) for numbers in found if numbers)
    return (
        len(last) == len(stems)
        and last[0] in (0, 1)
        and last == [*range(last[0], last[0] + len(last))]
    )


def _folders(names: Iterable[str]) -> list[str]:
    """Return the folders of files, except those that hold a column's value."""
    parts = (name.split("/")[:-1] for name in names)
    return sorted({"/".join(part for part in of_one if "=" not in part) for of_one in parts})


def _check(source: str, names: Sequence[str]) -> None:
    """Raise DataError for the files of two datasets, and for a missing file of a numbered set."""
    if len(folders := _folders(names)) > 1:
        raise DataError(
            f"{source} holds one split in the folders {', '.join(folders)}; give one of them as "
            "SOURCE"
        )
    parts = [part for name in names if (part := _PART.match(os.path.basename(name)))]
    count = max((int(part["count"]) for part in parts), default=0)
    if missing := sorted(set(range(count)) - {int(part["number"]) for part in parts}):
        raise DataError(
            f"{source} is not complete: file {missing[0]} of {count}, counted from 0, is missing. "
            "Fix: fetch it"
        )


def edges(path: str) -> tuple[bytes, bytes, str]:
    """Return start, end and size of a file, which identify it without reading it all."""
    fs, root = find_store(path)
    size = int(fs.size(root))
    return (
        fs.cat_file(root, 0, EDGE_BYTES),
        fs.cat_file(root, max(0, size - EDGE_BYTES), size),
        str(size),
    )


TEXTS = ("caption", "text", "conversations")  # names of the text column where none is given


@dataclass(frozen=True)
class Table:
    """One file of the split, and the columns that are read."""

    path: str
    name: str
    image: str
    text: str


@config_class
class HFImporter(Importer):
    """Import the .arrow or .parquet files of SOURCE, a folder or one file.

    `image` and `text` name columns; without `text` it is `caption`, `text` or `conversations`.
    `split` is required if there are several. Row 12 of the split train gets the key
    `train-00000012`, its second caption `train-00000012#2`.
    """

    image: str = "image"
    text: str | None = None
    split: str | None = None
    license: str = UNKNOWN

    def list_rows(self, source: str) -> Listing:
        split, files = find(source, self.split)
        text = _choose(source, files, self.image, self.text)
        tables = [Table(file.path, file.name, self.image, text) for file in files]
        content = fingerprint(*(edge for file in files for edge in (file.name, *edges(file.path))))
        fs, root = find_store(source)
        folder = source if fs.isdir(root) else parent(source)
        return Listing(
            partial(_rows, tables, folder, split or "row", content, others(source)),
            content,
            replace(self, text=text, split=split),
            files=len(tables),
        )


# --- columns --------------------------------------------------------------------------------------


def _choose(source: str, files: Sequence[File], image: str, text: str | None) -> str:
    """Return the column of text. Raises DataError for missing columns, and for other types."""
    schema = _schema(files, image, text)
    name = text or _text_of(schema)
    for option, column in (("image", image), ("text", name)):
        if column not in schema.names:
            near = suggest(column, schema.names)
            raise DataError(
                f"{source} has no column {column!r}; its columns are {', '.join(schema.names)}"
                f"{near if near.endswith('?') else ''}; name one with {option}=COLUMN"
            )
    if not _is_image(schema.field(image).type):
        raise DataError(
            f"column {image!r} holds {schema.field(image).type}; an image is bytes, "
            f"{{bytes, path}} or a path"
        )
    if not (_is_text(schema.field(name).type) or _is_conversation(schema.field(name).type)):
        raise DataError(
            f"column {name!r} holds {schema.field(name).type}; a text, a list of texts, or a list "
            f"of {{from, value}} "
            "is wanted"
        )
    return name


def _text_of(schema: pa.Schema) -> str:
    return next((name for name in TEXTS if name in schema.names), TEXTS[0])


def _schema(files: Sequence[File], image: str, text: str | None) -> pa.Schema:
    """Return the schema of the first readable file whose columns are not all null.

    Raises DataError where no file can be read.
    """
    flaws, first = [], None
    for file in files:
        try:
            schema = Columns(file.path).schema
        except BadSample as error:
            flaws.append(error.detail)
            continue
        names = [name for name in (image, text or _text_of(schema)) if name in schema.names]
        if not any(_is_null(schema.field(name).type) for name in names):
            return schema
        first = schema if first is None else first
    if first is None:
        raise DataError(flaws[0])
    return first


def _is_null(kind: pa.DataType) -> bool:
    """True if there were only nulls or empty lists, which show no type."""
    return bool(pa.types.is_null(kind)) or (is_list(kind) and _is_null(value_type(kind)))


def _is_string(kind: pa.DataType) -> bool:
    kind = value_type(kind) if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _has(kind: pa.DataType, *names: str) -> bool:
    return bool(pa.types.is_struct(kind)) and {field.name for field in kind} >= set(names)


def _is_image(kind: pa.DataType) -> bool:
    if is_list(kind) or pa.types.is_dictionary(kind):
        return _is_image(value_type(kind))
    bytes_ = (
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )
    return bool(bytes_) or _is_string(kind) or _has(kind, "bytes") or _has(kind, "path")


def _is_text(kind: pa.DataType) -> bool:
    return _is_string(value_type(kind) if is_list(kind) else kind)


def _is_conversation(kind: pa.DataType) -> bool:
    return _has(value_type(kind) if is_list(kind) else kind, "from", "value")


# --- rows -----------------------------------------------------------------------------------------


def _rows(
    tables: Sequence[Table], folder: str, split: str, content: str, unread: Sequence[str]
) -> Iterator[Row]:
    number = 0
    for table in tables:
        try:
            for place, captions in _counts(table):
                key = f"{split}-{number:08d}"
                number += 1
                for which in range(max(captions, 1)):
                    name = f"{key}#{which + 1}" if which else key
                    yield name, partial(_sample, name, table, content, place, which, folder)
        except BadSample as error:
            yield table.name, partial(_lost, UnreadableFile(error.reason, error.detail))
    for name in unread:
        yield name, partial(leave_out, f"files of .{name.lower().rpartition('.')[2]}")


def _counts(table: Table) -> Iterator[tuple[int, int]]:
    """Yield (row number, number of captions) of each row of a file."""
    columns = Columns(table.path)
    missing = {table.image, table.text} - set(columns.schema.names)
    if missing:
        raise BadSample(
            Reason.BAD_ROW, f"{table.path} has no column {min(missing)!r}, which the first file has"
        )
    kind = columns.schema.field(table.text).type
    lists, rows = _is_text(kind) and is_list(kind), columns.rows()
    if rows is not None and not lists:
        yield from ((place, 1) for place in range(rows))
        return
    for start, batch in columns.batches([table.text]):
        lengths = (
            pc.fill_null(pc.list_value_length(batch.column(0)), 0).to_pylist()
            if lists
            else [1] * len(batch)
        )
        yield from enumerate(lengths, start)


def _lost(error: BadSample) -> Sample:
    raise error


@lru_cache(1)  # chunks are read in order; `content` differs for a changed file
def _cursor(table: Table, content: str) -> Cursor:
    return Cursor(table.path, [table.image, table.text])


def _sample(key: str, table: Table, content: str, place: int, which: int, folder: str) -> Sample:
    try:
        row: Any = _cursor(table, content).row(place)
    except BadSample:
        _cursor.cache_clear()
        raise
    cell, text = row[table.image], row[table.text]
    cells = cell if isinstance(cell, list) else [] if cell is None else [cell]
    conversation = _turns(text)
    if conversation is not None:
        turns, dropped = asked(conversation)
        content_parts = tuple(parts(turns))
        files = tuple(read_cell(folder, cell) for cell in cells)
        return Sample(key, files, content_parts, provenance=dropped)
    if len(cells) != 1:
        raise BadSample(
            Reason.BAD_ROW if cells else Reason.MISSING_IMAGE, f"{len(cells)} images; one is wanted"
        )
    words = (text[which] if text else "") if isinstance(text, list) else text
    return pair(key, read_cell(folder, cells[0]), caption(words or ""))


def _turns(text: Any) -> list[Any] | None:
    """Return the turns of a conversation: [{from, value}], or an object of lists (older ones)."""
    if isinstance(text, dict):
        speakers, values = text.get("from"), text.get("value")
        if isinstance(speakers, list) and isinstance(values, list) and len(speakers) == len(values):
            return [
                {"from": who, "value": said} for who, said in zip(speakers, values, strict=True)
            ]
        return [text]
    return text if isinstance(text, list) and any(isinstance(turn, dict) for turn in text) else None
