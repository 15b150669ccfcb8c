"""Reader of columns of an Arrow or Parquet file: forward, from any store, one batch in memory."""

import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from bridgework.data.arrow_bounds import check_group, check_messages, unpacked_bytes
from bridgework.data.images import MAX_BYTES
from bridgework.data.quarantine import BadSample, Reason
from bridgework.storage import find_store

BATCH_ROWS = 64  # of Parquet; Arrow's batches are as they were written
BUFFER_BYTES = 1 << 20

_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"
_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"  # after the last batch of a stream, by every writer


def is_list(kind: pa.DataType) -> bool:
    """True if a cell of this type is a list, in any layout."""
    return any(
        is_kind(kind)
        for is_kind in (
            pa.types.is_list,
            pa.types.is_large_list,
            pa.types.is_fixed_size_list,
            pa.types.is_list_view,
            pa.types.is_large_list_view,
        )
    )


def value_type(kind: pa.DataType) -> pa.DataType:
    """The type of the values of a list or a dictionary; of a dictionary in a list, its values'."""
    found = kind.value_type
    return value_type(found) if pa.types.is_dictionary(found) else found


class Columns:
    """One file. Opening and reading raise BadSample for bytes that violate the format."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._fs, self._root = find_store(path)
        self._parquet = path.endswith(".parquet")
        self.size = int(self._fs.size(self._root))
        if not self.size:
            raise BadSample(Reason.EMPTY_FILE, f"{path} has 0 bytes")
        try:
            self.schema: pa.Schema = (
                self._open_parquet().schema_arrow if self._parquet else self._open_arrow().schema
            )
            _decode_names(self.schema)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._broken(error) from None
        if len(set(self.schema.names)) < len(self.schema.names):
            raise BadSample(
                Reason.CORRUPT,
                f"{path} has two columns of one name: {', '.join(self.schema.names)}",
            )

    def rows(self) -> int | None:
        """Return the number of rows, or None if the footer does not hold it."""
        return int(self._open_parquet().metadata.num_rows) if self._parquet else None

    def batches(self, names: Sequence[str], first: int = 0) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield (number of its first row, batch) of the columns `names`, from row `first` on."""
        start = 0
        try:
            for start, batch in (
                self._parquet_batches(names, first) if self._parquet else self._arrow_batches(names)
            ):
                if start + len(batch) > first:
                    yield start, batch
        except (pa.ArrowException, OSError) as error:
            raise self._broken(error) from None
        if not self._parquet and self._tail() != _ARROW_END and not self._is_arrow_file():
            raise BadSample(
                Reason.TRUNCATED,
                f"{self.path} ends without the mark that follows the last batch",
            )

    def _parquet_batches(
        self, names: Sequence[str], first: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        file, start = self._open_parquet(), 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if start + rows > first:
                doubtful = check_group(file.metadata, group, self.size, self._read, names)
                reader, at = self._open_parquet(doubtful) if doubtful else file, start
                how = {"row_groups": [group], "columns": list(names), "use_threads": False}
                for batch in reader.iter_batches(BATCH_ROWS, **how):
                    yield at, batch
                    at += len(batch)
            start += rows

    def _arrow_batches(self, names: Sequence[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        self._check_messages()
        reader, start = self._open_arrow(), 0
        if isinstance(reader, pa.RecordBatchFileReader):
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            batches = iter(reader)
        for batch in batches:
            chosen = batch.select(list(names))
            chosen.validate(
                full=True
            )  # Arrow believes the lengths and offsets that a file declares
            yield start, chosen
            start += len(batch)

    def _check_messages(self) -> None:
        """Refuse messages that unpack to too much.

        What cannot be read here fails later, with an error.
        """
        with suppress(pa.ArrowException, OSError, struct.error), self._open() as file:
            file.seek(len(_ARROW_FILE) + 2 if self._is_arrow_file() else 0)
            check_messages(file)

    def _open_parquet(self, doubtful: Sequence[str] = ()) -> pq.ParquetFile:
        how = {"buffer_size": BUFFER_BYTES, "pre_buffer": False, "read_dictionary": list(doubtful)}
        return pq.ParquetFile(self._open(), **how)

    def _open_arrow(self) -> pa.RecordBatchStreamReader | pa.RecordBatchFileReader:
        return (
            pa.ipc.open_file(self._open())
            if self._is_arrow_file()
            else pa.ipc.open_stream(self._open())
        )

    def _open(self) -> pa.NativeFile:
        if not isinstance(self._fs, LocalFileSystem):
            return pa.PythonFile(self._fs.open(self._root, "rb"), mode="r")
        return (
            pa.OSFile(self._root) if self._parquet else pa.memory_map(self._root)
        )  # a batch is passed over for free

    def _is_arrow_file(self) -> bool:
        return bool(self._fs.cat_file(self._root, 0, len(_ARROW_FILE)) == _ARROW_FILE)

    def _read(self, begin: int, end: int) -> bytes:
        return bytes(self._fs.cat_file(self._root, begin, min(end, self.size)))

    def _tail(self) -> bytes:
        return bytes(self._fs.cat_file(self._root, max(0, self.size - len(_ARROW_END)), self.size))

    def _broken(self, error: Exception) -> Exception:
        """Return `error` as a flaw of this file; a file system's own error is unchanged."""
        if isinstance(error, OSError) and type(error) is not OSError:
            return error
        begin = bytes(self._fs.cat_file(self._root, 0, 12))
        first, last = (_PARQUET, _PARQUET) if self._parquet else (_ARROW_END[:4], _ARROW_END)
        cut = begin.startswith(first) and not self._tail().endswith(last)
        return BadSample(
            Reason.TRUNCATED if cut else Reason.CORRUPT,
            f"{self.path}, which begins {begin!r}: {' '.join(str(error).split())}",
        )


def _decode_names(fields: Iterable[pa.Field]) -> None:
    """Raise UnicodeDecodeError for a field name, at any depth, that is not UTF-8."""
    for field in fields:
        str(field.name)
        if pa.types.is_struct(field.type):
            _decode_names(field.type)
        elif is_list(field.type):
            _decode_names([field.type.value_field])


class Cursor:
    """Rows of a file by number; cheap in ascending order."""

    def __init__(self, path: str, names: Sequence[str]) -> None:
        self._columns, self._names = Columns(path), names
        self._batches: Iterator[tuple[int, pa.RecordBatch]] = iter(())
        self._start = 0
        self._batch: Any = None

    def row(self, number: int) -> dict[str, object]:
        """One row as Python's values. Raises BadSample for what cannot be read."""
        if self._batch is None or number < self._start:
            self._batches = self._columns.batches(self._names, number)
            self._next()
        while number >= self._start + len(self._batch):
            self._next()
        one = self._batch.slice(number - self._start, 1)
        if (size := sum(map(unpacked_bytes, one.columns))) > MAX_BYTES:
            raise BadSample(
                Reason.TOO_MANY_BYTES, f"the row has {size} bytes; at most {MAX_BYTES} are read"
            )
        try:
            row: dict[str, object] = one.to_pylist()[0]
        except UnicodeDecodeError as error:
            raise BadSample(Reason.BAD_ROW, f"a text of it is not UTF-8: {error}") from None
        return row

    def _next(self) -> None:
        try:
            self._start, self._batch = next(self._batches)
        except StopIteration:
            raise BadSample(
                Reason.CORRUPT, f"{self._columns.path} has fewer rows than it says"
            ) from None
