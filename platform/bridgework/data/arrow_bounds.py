"""Limits on the unpacked size of Arrow and Parquet data, checked before the data is read.

A few kilobytes can unpack to gigabytes in two ways: by compression, whose sizes the files declare,
and by dictionaries, whose values are stored once and repeated by index.
"""

import re
import struct
from collections.abc import Callable, Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bridgework.data.quarantine import BadSample, Reason

FREE_BYTES = 64 << 20  # unpacked size that is always allowed
EXPANSION = 200  # maximum factor of expansion beyond that; texts compress by 3 to 20

HEADER_BYTES = 32  # first bytes of a page, which contain its sizes
MAX_PAGE = 2**31  # bytes
_FIELD = re.compile(rb"\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)

_BATCHES = ("dictionary", "record batch")  # messages of Arrow's format that have buffers


def check_group(
    metadata: pq.FileMetaData,
    group: int,
    size: int,
    read: Callable[[int, int], bytes],
    names: Collection[str] | None = None,
) -> list[str]:
    """Return the columns of a row group that dictionaries could make far larger than it declares.

    `size` is the size of the file in bytes, `read` returns its bytes between two offsets, `names`
    are the requested columns (None: all). Raises BadSample if the declared unpacked size exceeds
    the limit.
    """
    stored, unpacked, suspects = 0, 0, []
    row_group = metadata.row_group(group)
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        if names is not None and column.path_in_schema.partition(".")[0] not in names:
            continue
        stored += min(column.total_compressed_size, size)
        unpacked += column.total_uncompressed_size
        if _could_expand(column, read):
            suspects.append(column.path_in_schema)
    check(unpacked, min(stored, size), f"row group {group}")
    return suspects


def _could_expand(column: pq.ColumnChunkMetaData, read: Callable[[int, int], bytes]) -> bool:
    """Return True if a column with every value as large as its dictionary exceeds the limit."""
    if (
        column.physical_type not in ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")
        or not column.has_dictionary_page
    ):
        return False
    allowed = _allowed(column.total_compressed_size)
    if column.num_values * column.total_uncompressed_size <= allowed:
        return False
    at = column.dictionary_page_offset
    return bool(column.num_values * _dictionary_bytes(read(at, at + HEADER_BYTES)) > allowed)


def _dictionary_bytes(header: bytes) -> int:
    """Return the unpacked bytes of a dictionary from its page header (parquet.thrift, compact).

    For a header of another form, the maximum of a page.
    """
    kind, at = _number(header, 0)  # type of the page, followed by its size
    size, _ = _number(header, at)
    return MAX_PAGE if kind is None or size is None else size


def _number(header: bytes, at: int) -> tuple[int | None, int]:
    """Return (a 32-bit integer field or None, offset of the next field)."""
    match = _FIELD.match(header, at)
    if match is None:
        return None, at
    digits = [byte & 127 for byte in match[1]]
    value = sum(digit << 7 * place for place, digit in enumerate(digits))
    return value >> 1, match.end()  # zigzag: the sign is the last bit


def check_dictionaries(file: pq.ParquetFile, group: int, size: int) -> None:
    """Check the values of a row group.

    `file` is opened with the suspect columns as dictionaries.
    """
    row_group = file.metadata.row_group(group)
    columns = [row_group.column(number) for number in range(row_group.num_columns)]
    stored = sum(min(column.total_compressed_size, size) for column in columns)
    table = file.read_row_group(group)
    unpacked = sum(unpacked_bytes(chunk) for column in table.columns for chunk in column.chunks)
    check(unpacked, min(stored, size), f"row group {group}")


def check(unpacked: int, stored: int, name: str) -> None:
    """Raise BadSample if `unpacked` bytes are too many for `stored` bytes."""
    if unpacked > _allowed(stored):
        raise BadSample(
            Reason.TOO_MANY_BYTES,
            f"{name} has {stored:,} bytes and unpacks to {unpacked:,}; expected at most "
            f"{FREE_BYTES:,}, or {EXPANSION} times the stored size. "
            "Fix: write it with smaller row groups",
        )


def _allowed(stored: int) -> int:
    return max(FREE_BYTES, EXPANSION * stored)


def unpacked_bytes(array: pa.Array) -> int:
    """Return the bytes of all strings and binaries in an array.

    Dictionary values count per occurrence.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        lengths = pc.fill_null(pc.binary_length(array.dictionary), 0)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(kind):
        return sum(unpacked_bytes(field) for field in array.flatten())
    if pa.types.is_map(kind):
        return unpacked_bytes(array.keys) + unpacked_bytes(array.items)
    if pa.types.is_nested(kind):
        return unpacked_bytes(array.flatten())
    if pa.types.is_binary(kind) or pa.types.is_string(kind):
        return int(pc.sum(pc.binary_length(array)).as_py() or 0)
    return int(array.nbytes)


def check_messages(stream: pa.NativeFile) -> None:
    """Raise BadSample if a batch of an Arrow stream unpacks to more than the limit."""
    for message in pa.ipc.MessageReader.open_stream(stream):
        if message.type in _BATCHES and message.body is not None:
            check(sum(_buffers(message)), message.body.size, "a batch")


def _buffers(message: pa.ipc.Message) -> Iterator[int]:
    """Yield the declared unpacked bytes of each compressed buffer (Arrow's Message.fbs)."""
    data = message.metadata.to_pybytes()
    batch = _table(data, 0, 0)
    header = _field(data, batch, 2)
    batch = _table(data, header, header) if header else 0
    if message.type == "dictionary":
        header = _field(data, batch, 1)
        batch = _table(data, header, header) if header else 0
    buffers = _field(data, batch, 2)
    if not (batch and buffers and _field(data, batch, 3)):  # 3: compression
        return
    start = _table(data, buffers, buffers)
    (count,) = struct.unpack_from("<I", data, start)
    for number in range(count):
        offset, length = struct.unpack_from("<qq", data, start + 4 + 16 * number)
        if length >= 8:
            (size,) = struct.unpack("<q", message.body.slice(offset, 8).to_pybytes())
            yield size if size >= 0 else length  # -1: not compressed


def _table(data: bytes, at: int, base: int) -> int:
    """Return the offset of the table or vector that a flatbuffer refers to at `at`."""
    return base + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """Return the offset of a field of a flatbuffer's table; 0 for a missing one."""
    if not table:
        return 0
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    (size,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else 0
