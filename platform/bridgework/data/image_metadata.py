"""Remove large metadata that decoding does not need from PNG, JPEG and GIF files.

Editor histories, color profiles and depth maps can be megabytes, in thousands of pieces or in
texts that unpack to many times their size. Pillow reads and joins them all, or refuses the file.
Metadata with the orientation of an image (Exif, XMP) stays.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence

LARGE_BYTES = 1 << 20  # of metadata, packed or unpacked: a file with less is not changed
# of unpacked texts in a PNG: a file with more is not changed, and later refused
BOMB_BYTES = 64 << 20
MAX_PIECES = 20_000  # a file with more pieces is not changed
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

Span = tuple[int, int]  # first byte, and the one after the last


def without_metadata(data: bytes) -> bytes:
    """Return the file, or a copy with the same pixels if it has much metadata (PNG, JPEG, GIF)."""
    find = next((find for magic, find in _FINDERS if data.startswith(magic)), None)
    try:
        return data if find is None else _cut(data, list(find(data)))
    except _TooManyPieces:
        return data


def _cut(data: bytes, spans: Sequence[Span]) -> bytes:
    """Return the data without `spans`."""
    rest, at = [], 0
    for begin, end in spans:
        rest.append(data[at:begin])
        at = end
    return b"".join([*rest, data[at:]]) if spans else data


class _TooManyPieces(Exception):
    """Raised for a file of more than MAX_PIECES pieces."""


def _png_metadata(data: bytes) -> Iterator[Span]:
    """Yield texts and color profiles that unpack to over LARGE_BYTES.

    Their sum is at most BOMB_BYTES.
    """
    at, left = 8, BOMB_BYTES
    for _ in range(MAX_PIECES + len(data) // 1024):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if len(kind) < 4 or kind == b"IEND":
            return
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            size = _unpacked(kind, data[at + 8 : end - 4])
            left -= size
            if size > LARGE_BYTES and left >= 0:
                yield at, end
        at = end
    raise _TooManyPieces


def _unpacked(kind: bytes, body: bytes) -> int:
    """Return the unpacked bytes of a text chunk of a PNG, or a number above BOMB_BYTES."""
    _, _, rest = body.partition(b"\0")
    packed = b""
    if kind in (b"zTXt", b"iCCP"):
        packed = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        packed = rest[2:].partition(b"\0")[2].partition(b"\0")[2]
    if not packed:
        return len(body)
    unpacker, size = zlib.decompressobj(), 0
    try:
        while packed and size <= BOMB_BYTES:
            size += len(unpacker.decompress(packed, LARGE_BYTES))
            packed = unpacker.unconsumed_tail
    except zlib.error:
        return len(body)
    return size


def _jpeg_metadata(data: bytes) -> Iterator[Span]:
    """Yield all application segments and comments, except those with colors and orientation."""
    spans, total, seen, at = list[Span](), 0, set[bytes](), 2
    for _ in range(MAX_PIECES):
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        marker, size = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4])
        if data[at : at + 1] != b"\xff" or size < 2 or marker in (b"\xda", b"\xd9"):
            yield from spans if total > LARGE_BYTES else ()
            return
        end = at + 2 + size
        if b"\xe0" <= marker <= b"\xef" or marker == b"\xfe":
            total += size
            head = next((h for h in (_EXIF, _XMP) if data.startswith(h, at + 4)), b"")
            first = marker == b"\xe1" and head and head not in seen
            seen.add(head)
            if marker not in (b"\xe0", b"\xee") and not first:
                spans.append((at, end))
        at = end
    raise _TooManyPieces


def _gif_metadata(data: bytes) -> Iterator[Span]:
    """Yield comments and application extensions before the first frame."""
    at = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    spans, total, left = list[Span](), 0, 16 * MAX_PIECES
    while data[at : at + 1] == b"!":
        begin, label = at, data[at + 1 : at + 2]
        at += 2
        while at < len(data) and data[at]:
            at += 1 + data[at]
            left -= 1
            if left < 0:
                raise _TooManyPieces
        at += 1
        if label in (b"\xfe", b"\xff"):
            spans.append((begin, at))
            total += at - begin
    yield from spans if total > LARGE_BYTES else ()


_FINDERS: tuple[tuple[bytes, Callable[[bytes], Iterator[Span]]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _png_metadata),
    (b"\xff\xd8\xff", _jpeg_metadata),
    (b"GIF8", _gif_metadata),
)
