"""Pictures without the metadata that no decoder of ours needs, where there is much of it.

Histories of editors, color profiles and depth maps may be megabytes, in thousands of pieces or in
texts that unpack to many times their size. Pillow reads and joins them all, or refuses the file.
What turns a picture upright (Exif, XMP) stays.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence

LARGE_BYTES = 1 << 20  # of metadata, packed or not: less stays as it is
BOMB_BYTES = 64 << 20  # of texts of a PNG, unpacked: a file with more is left as it is, and refused
MAX_PIECES = 20_000  # that are looked at: of a file in more, nothing is taken out
_EXIF, _XMP = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0"

Span = tuple[int, int]  # where bytes begin and end


def without_metadata(data: bytes) -> bytes:
    """The file, or where it has much metadata a copy with the same picture. PNG, JPEG and GIF."""
    find = next((find for magic, find in _FINDERS if data.startswith(magic)), None)
    try:
        return data if find is None else _without(data, list(find(data)))
    except _TooManyPieces:
        return data


def _without(data: bytes, spans: Sequence[Span]) -> bytes:
    kept, at = [], 0
    for begin, end in spans:
        kept.append(data[at:begin])
        at = end
    return b"".join([*kept, data[at:]]) if spans else data


class _TooManyPieces(Exception):
    """A file that is made of more pieces than are looked at."""


def _of_png(data: bytes) -> Iterator[Span]:
    """Texts and color profiles that unpack to more than LARGE_BYTES, but for what is a bomb."""
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
    """Bytes of a text of a PNG once it is unpacked, or more than BOMB_BYTES."""
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


def _of_jpeg(data: bytes) -> Iterator[Span]:
    """All segments of applications and comments, but for those of colors and orientation."""
    found, total, seen, at = list[Span](), 0, set[bytes](), 2
    for _ in range(MAX_PIECES):
        while data[at : at + 2] == b"\xff\xff":
            at += 1
        marker, size = data[at + 1 : at + 2], int.from_bytes(data[at + 2 : at + 4])
        if data[at : at + 1] != b"\xff" or size < 2 or marker in (b"\xda", b"\xd9"):
            yield from found if total > LARGE_BYTES else ()
            return
        end = at + 2 + size
        if b"\xe0" <= marker <= b"\xef" or marker == b"\xfe":
            total += size
            head = next((h for h in (_EXIF, _XMP) if data.startswith(h, at + 4)), b"")
            first = marker == b"\xe1" and head and head not in seen
            seen.add(head)
            if marker not in (b"\xe0", b"\xee") and not first:
                found.append((at, end))
        at = end
    raise _TooManyPieces


def _of_gif(data: bytes) -> Iterator[Span]:
    """Comments and what applications put before the first picture."""
    at = 13 + (3 << ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    found, total, left = list[Span](), 0, 16 * MAX_PIECES
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
            found.append((begin, at))
            total += at - begin
    yield from found if total > LARGE_BYTES else ()


_FINDERS: tuple[tuple[bytes, Callable[[bytes], Iterator[Span]]], ...] = (
    (b"\x89PNG\r\n\x1a\n", _of_png),
    (b"\xff\xd8\xff", _of_jpeg),
    (b"GIF8", _of_gif),
)
