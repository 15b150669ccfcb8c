"""Rows of JSON, JSON lines, CSV, TSV, Parquet and Arrow files, one at a time and by one form."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from bridgework.data.importers import fingerprint, read_text
from bridgework.data.importers.arrow_reader import Columns, Cursor
from bridgework.data.importers.hf import File, edges, find
from bridgework.data.importers.tables import parent, rows
from bridgework.data.quarantine import BadSample, UnreadableFile
from bridgework.errors import DataError
from bridgework.storage import find_store

TABLES = (".parquet", ".arrow")

Read = Callable[[], Any]  # what a row holds, or raises BadSample


@dataclass(frozen=True)
class Records:
    """The rows of a source."""

    sha256: str
    split: str | None  # that was chosen, of a table
    files: int
    folder: str  # where the paths in its rows begin
    _rows: Callable[[Sequence[str]], Iterator[tuple[Any, Read]]]

    def rows(self, *names: str) -> Iterator[tuple[Any, Read]]:
        """(the row or those of its fields `names` that it has, what reads it), in order."""
        return self._rows(names)


def open_records(source: str, split: str | None = None) -> Records:
    """The records of a file, or of the .parquet and .arrow files of a folder.

    Raises DataError for what cannot be read, and for a `split` that is not there or left open.
    """
    fs, root = find_store(source)
    if not source.endswith(TABLES) and not fs.isdir(root):
        if split is not None:
            raise DataError(
                f"split={split} goes with .parquet and .arrow files; {source} is neither"
            )
        text = read_text(source)
        return Records(fingerprint(text), None, 1, parent(source), partial(_texts, text, source))
    chosen, found = find(source, split)
    content = fingerprint(*(edge for file in found for edge in (file.name, *edges(file.path))))
    for file in found:  # a file alone that is none is an error, not a bad row
        if len(found) == 1:
            _open(file)
    folder = source if fs.isdir(root) else parent(source)
    return Records(content, chosen, len(found), folder, partial(_tables, found, content))


def _open(file: File) -> Columns:
    try:
        return Columns(file.path)
    except BadSample as error:
        raise DataError(error.detail) from None


def _texts(text: str, source: str, names: Sequence[str]) -> Iterator[tuple[Any, Read]]:
    first, _, rest = text.strip().partition("\n")
    lines = first.startswith("{") and first.rstrip().endswith("}") and rest.lstrip().startswith("{")
    named = f"{source}l" if lines and source.endswith(".json") else source
    return ((row, partial(_given, row)) for row in rows(text, named))


def _given(row: Any) -> Any:
    return row


def _tables(
    files: Sequence[File], content: str, names: Sequence[str]
) -> Iterator[tuple[Any, Read]]:
    for file in files:
        try:
            columns = Columns(file.path)
            wanted = [name for name in columns.schema.names if name in names]
            for start, batch in columns.batches(wanted or columns.schema.names[:1]):
                for place, row in enumerate(batch.select(wanted).to_pylist(), start):
                    yield row, partial(_stored, file.path, content, place)
        except BadSample as error:
            yield {}, partial(_lost, UnreadableFile(error.reason, error.detail))


def _lost(error: BadSample) -> Any:
    raise error


@lru_cache(1)  # chunks are read in order; `content` differs for a changed file
def _cursor(path: str, content: str) -> Cursor:
    return Cursor(path, Columns(path).schema.names)


def _stored(path: str, content: str, place: int) -> dict[str, Any]:
    try:
        return _cursor(path, content).row(place)
    except BadSample:
        _cursor.cache_clear()
        raise
