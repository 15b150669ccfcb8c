"""Hugging Face datasets on disk: what `save_to_disk` wrote (Arrow), or Parquet as it lies on the Hub.

The files are read as tables; no script of a dataset is ever run. An image is a cell of bytes, of {bytes, path}, or of a
path inside the folder; a text is a caption, a list of captions, or a conversation like LLaVA's.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from bridgework.data.columns import Columns, Cursor, is_list, value_type
from bridgework.data.importers import Row, Say, caption, fingerprint, ingest, leave_out
from bridgework.data.importers.llava_json import asked, parts
from bridgework.data.pictures import read_cell
from bridgework.data.quarantine import SHARE, BadSample, LostFile, Reason
from bridgework.data.samples import Sample, pair
from bridgework.data.shards import Manifest
from bridgework.data.splits import File, edges, find, others
from bridgework.errors import DataError, suggest
from bridgework.stores import find_store

TEXTS = ("caption", "text", "conversations")  # what the text column may be called where it is not named


@dataclass(frozen=True)
class Table:
    """One file of the split that is read, and the columns that are read of it."""

    path: str
    name: str
    image: str
    text: str


def run(
    source: str,
    dest: str,
    *,
    image: str = "image",
    text: str | None = None,
    split: str | None = None,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the .arrow or .parquet files of `source`, a folder or one file.

    `image` and `text` name columns; without `text` it is `caption`, `text` or `conversations`. `split` is needed where
    there are several. Row 12 of the split train gets the key `train-00000012`, its second caption `train-00000012#2`.
    """
    chosen, files = find(source, split)
    text = _choose(source, files, image, text)
    tables = [Table(file.path, file.name, image, text) for file in files]
    content = fingerprint(*(edge for file in files for edge in (file.name, *edges(file.path))))
    fs, root = find_store(source)
    folder = source if fs.isdir(root) else source.rpartition("/")[0] or "."
    return ingest(
        partial(_rows, tables, folder, chosen or "row", content, others(source)),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"image": image, "text": text, "split": chosen, "sha256": content},
        max_bad=max_bad,
        workers=workers,
        files=len(tables),
        say=say,
    )


# --- which files, which columns --------------------------------------------------------------------------------------


def _choose(source: str, files: Sequence[File], image: str, text: str | None) -> str:
    """The column of text. Raises DataError for columns that are not there, or hold something else."""
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
            f"column {image!r} holds {schema.field(image).type}; an image is bytes, {{bytes, path}} or a path"
        )
    if not (_is_text(schema.field(name).type) or _is_talk(schema.field(name).type)):
        raise DataError(
            f"column {name!r} holds {schema.field(name).type}; a text, a list of texts, or a list of {{from, value}} "
            "is wanted"
        )
    return name


def _text_of(schema: pa.Schema) -> str:
    return next((name for name in TEXTS if name in schema.names), TEXTS[0])


def _schema(files: Sequence[File], image: str, text: str | None) -> pa.Schema:
    """Of the first file that can be read, and whose columns are not all null.

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
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _has(kind: pa.DataType, *names: str) -> bool:
    return bool(pa.types.is_struct(kind)) and {field.name for field in kind} >= set(names)


def _is_image(kind: pa.DataType) -> bool:
    if is_list(kind) or pa.types.is_dictionary(kind):
        return _is_image(value_type(kind))
    bytes_ = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return bool(bytes_) or _is_string(kind) or _has(kind, "bytes") or _has(kind, "path")


def _is_text(kind: pa.DataType) -> bool:
    return _is_string(value_type(kind) if is_list(kind) else kind)


def _is_talk(kind: pa.DataType) -> bool:
    return _has(value_type(kind) if is_list(kind) else kind, "from", "value")


# --- rows ------------------------------------------------------------------------------------------------------------


def _rows(tables: Sequence[Table], folder: str, split: str, content: str, unread: Sequence[str]) -> Iterator[Row]:
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
            yield table.name, partial(_lost, LostFile(error.reason, error.detail))
    for name in unread:
        yield name, partial(leave_out, f"files of .{name.lower().rpartition('.')[2]}")


def _counts(table: Table) -> Iterator[tuple[int, int]]:
    """(row number, captions) of each row of a file."""
    columns = Columns(table.path)
    missing = {table.image, table.text} - set(columns.schema.names)
    if missing:
        raise BadSample(Reason.BAD_ROW, f"{table.path} has no column {min(missing)!r}, which the first file has")
    kind = columns.schema.field(table.text).type
    lists, rows = _is_text(kind) and is_list(kind), columns.rows()
    if rows is not None and not lists:
        yield from ((place, 1) for place in range(rows))
        return
    for start, batch in columns.batches([table.text]):
        lengths = pc.fill_null(pc.list_value_length(batch.column(0)), 0).to_pylist() if lists else [1] * len(batch)
        yield from enumerate(lengths, start)


def _lost(error: BadSample) -> Sample:
    raise error


@lru_cache(1)  # chunks are read in order, so the next row lies behind the last; `content` tells a changed file
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
    talk = _turns(text)
    if talk is not None:
        turns, dropped = asked(talk)
        shown = tuple(parts(turns))
        files = tuple(read_cell(folder, cell) for cell in cells)
        return Sample(key, files, shown, provenance=dropped)
    if len(cells) != 1:
        raise BadSample(Reason.BAD_ROW if cells else Reason.MISSING_IMAGE, f"{len(cells)} images; one is wanted")
    words = (text[which] if text else "") if isinstance(text, list) else text
    return pair(key, read_cell(folder, cells[0]), caption(words or ""))


def _turns(text: Any) -> list[Any] | None:
    """The turns of a conversation: a list of {from, value}, or {from: [..], value: [..]} as older releases write it."""
    if isinstance(text, dict):
        speakers, values = text.get("from"), text.get("value")
        if isinstance(speakers, list) and isinstance(values, list) and len(speakers) == len(values):
            return [{"from": who, "value": said} for who, said in zip(speakers, values, strict=True)]
        return [text]
    return text if isinstance(text, list) and any(isinstance(turn, dict) for turn in text) else None
