"""Bounds on what Arrow and Parquet files unpack to, asked before anything is read.

A few kilobytes may unpack to gigabytes in two ways: compression, whose sizes the files declare, and
dictionaries, whose values are stored once and repeated by their numbers.
"""

import re
import struct
from collections.abc import Callable, Collection, Iterator

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from bridgework.data.quarantine import BadSample, Reason

FREE_BYTES = 64 << 20  # unpacked: of less nothing is asked
EXPANSION = 200  # times the stored size, at most, beyond that; texts compress by 3 to 20

HEADER_BYTES = 32  # of a page, that hold its sizes
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
    """The columns of a row group that dictionaries may make far larger than the group declares.

    `size` is that of the file in bytes, `read` gives its bytes between two places, `names` are the
    columns that are wanted (None: all). Raises BadSample where the group declares that it unpacks to
    far more than it is stored in.
    """
    stored, unpacked, doubtful = 0, 0, []
    row_group = metadata.row_group(group)
    for number in range(row_group.num_columns):
        column = row_group.column(number)
        if names is not None and column.path_in_schema.partition(".")[0] not in names:
            continue
        stored += min(column.total_compressed_size, size)
        unpacked += column.total_uncompressed_size
        if _repeats(column, read):
            doubtful.append(column.path_in_schema)
    check(unpacked, min(stored, size), f"row group {group}")
    return doubtful


def _repeats(column: pq.ColumnChunkMetaData, read: Callable[[int, int], bytes]) -> bool:
    """True if the values of a column, each as large as its dictionary, are far more than is stored."""
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
    """Bytes of a dictionary, unpacked, by the header of its page (parquet.thrift, in the compact form).

    Of a header of another form, the most that a page may have.
    """
    kind, at = _number(header, 0)  # the kind of the page, and then its size
    size, _ = _number(header, at)
    return MAX_PAGE if kind is None or size is None else size


def _number(header: bytes, at: int) -> tuple[int | None, int]:
    """(a field that is a number of 32 bits, or None; where the next field begins)."""
    found = _FIELD.match(header, at)
    if found is None:
        return None, at
    digits = [byte & 127 for byte in found[1]]
    return sum(
        digit << 7 * place for place, digit in enumerate(digits)
    ) >> 1, found.end()  # the sign is last


def check_dictionaries(file: pq.ParquetFile, group: int, size: int) -> None:
    """`check` of a row group by its values, in a file that keeps doubtful columns as dictionaries."""
    row_group = file.metadata.row_group(group)
    columns = [row_group.column(number) for number in range(row_group.num_columns)]
    stored = sum(min(column.total_compressed_size, size) for column in columns)
    table = file.read_row_group(group)
    unpacked = sum(unpacked_bytes(chunk) for column in table.columns for chunk in column.chunks)
    check(unpacked, min(stored, size), f"row group {group}")


def check(unpacked: int, stored: int, what: str) -> None:
    """Raises BadSample for what unpacks to far more bytes than it is stored in."""
    if unpacked > _allowed(stored):
        raise BadSample(
            Reason.TOO_MANY_BYTES,
            f"{what} has {stored:,} bytes and unpacks to {unpacked:,}: at most {FREE_BYTES:,}, or "
            f"{EXPANSION} times as many, are read. Fix: write it with smaller row groups",
        )


def _allowed(stored: int) -> int:
    return max(FREE_BYTES, EXPANSION * stored)


def unpacked_bytes(array: pa.Array) -> int:
    """Bytes of all texts and binaries in an array, those of dictionaries as often as they occur."""
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
    """Raises BadSample for a batch of an Arrow stream that unpacks to far more than it is stored in."""
    for message in pa.ipc.MessageReader.open_stream(stream):
        if message.type in _BATCHES and message.body is not None:
            check(sum(_buffers(message)), message.body.size, "a batch")


def _buffers(message: pa.ipc.Message) -> Iterator[int]:
    """Bytes that each compressed buffer declares to unpack to (Arrow's Message.fbs)."""
    data = message.metadata.to_pybytes()
    batch = _table(data, 0, 0)
    header = _field(data, batch, 2)
    batch = _table(data, header, header) if header else 0
    if message.type == "dictionary":
        header = _field(data, batch, 1)
        batch = _table(data, header, header) if header else 0
    buffers = _field(data, batch, 2)
    if not (batch and buffers and _field(data, batch, 3)):  # 3: how they are compressed
        return
    start = _table(data, buffers, buffers)
    (count,) = struct.unpack_from("<I", data, start)
    for number in range(count):
        offset, length = struct.unpack_from("<qq", data, start + 4 + 16 * number)
        if length >= 8:
            (size,) = struct.unpack("<q", message.body.slice(offset, 8).to_pybytes())
            yield size if size >= 0 else length  # -1: stored as it is


def _table(data: bytes, at: int, base: int) -> int:
    """The place of the table or vector that a flatbuffer refers to at `at`."""
    return base + int(struct.unpack_from("<I", data, at)[0])


def _field(data: bytes, table: int, number: int) -> int:
    """The place of a field of a flatbuffer's table; 0 for one that is missing."""
    if not table:
        return 0
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    (size,) = struct.unpack_from("<H", data, vtable)
    if 4 + 2 * number >= size:
        return 0
    (offset,) = struct.unpack_from("<H", data, vtable + 4 + 2 * number)
    return table + offset if offset else 0
