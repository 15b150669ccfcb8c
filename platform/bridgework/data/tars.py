"""The members of a tar, header by header: nothing is extracted, no declared size is believed, memory does not grow.

Python's own reader stops without a word at a header that is not whole, or that is no header. Here that is an error.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Any, cast

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.transforms import MAX_BYTES

MAX_HEADER = 1 << 20  # bytes of all that may stand before one member: long names and pax fields are read whole
_BLOCK = tarfile.BLOCKSIZE
_TAIL = 64 << 10  # bytes behind the end mark that are looked at: a writer fills up to 10 KB with zeros
_GZIP = b"\x1f\x8b"
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # what headers made to harm raise


def members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """Every member of the tar in `file`, which has `size` bytes and can seek; the contents are passed over.

    A member is believed by `flaw` alone. Raises BadSample behind the last header that is whole: TRUNCATED where the
    file ends without an end mark, CORRUPT for what is no tar from there on, EMPTY_FILE.
    """
    headers = _Headers(file)
    try:
        with tarfile.open(fileobj=cast(Any, headers), mode="r:") as archive:
            while (member := _next(archive, headers)) is not None:
                yield member
                if archive.offset > size:  # some file systems refuse to seek there
                    raise tarfile.ReadError("truncated")
    except _BROKEN as error:
        raise _broken(file, size, headers.at, str(error)) from None
    file.seek(headers.at)
    end = file.read(_TAIL)
    if len(end) < _BLOCK or end[:_BLOCK].strip(b"\0"):
        raise _broken(file, size, headers.at, "no header of a member")
    if end.strip(b"\0"):
        raise BadSample(Reason.CORRUPT, f"more stands behind the end mark at byte {headers.at}: two tars in one file?")


def flaw(member: tarfile.TarInfo, size: int) -> BadSample | None:
    """What is wrong with a member of a tar of `size` bytes, if it is not a plain file that lies in it as a whole."""
    name = member.name
    if not member.isreg():
        return BadSample(Reason.OUTSIDE, f"{name!r} is a link or a device, and no file")
    if member.sparse is not None or any(key.startswith("GNU.sparse") for key in member.pax_headers):
        return BadSample(Reason.BAD_ROW, f"{name!r} is a sparse file")
    if member.offset_data + member.size > size:
        return BadSample(Reason.TRUNCATED, f"the tar has {size} bytes and ends inside {name!r}")
    if member.size > MAX_BYTES:
        return BadSample(Reason.TOO_MANY_BYTES, f"{name!r} has {member.size} bytes; at most {MAX_BYTES} are read")
    return None


def _next(archive: Any, headers: "_Headers") -> tarfile.TarInfo | None:
    before = archive.offset
    headers.left = MAX_HEADER
    member: tarfile.TarInfo | None = archive.next()
    archive.members.clear()
    archive.pax_headers.clear()  # fields for all members that follow: nobody needs them, and they only grow
    if member is not None and (member.size < 0 or archive.offset < before):
        raise tarfile.ReadError(f"{member.name!r} declares {member.size} bytes")
    headers.at = archive.offset
    return member


class _Headers:
    """A file as tarfile may read it: at most `left` bytes more."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = MAX_HEADER
        self.at = 0  # behind the last member that was whole

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"the header of a member has more than {MAX_HEADER} bytes")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def tell(self) -> int:
        return self._file.tell()


def _broken(file: IO[bytes], size: int, at: int, error: str) -> BadSample:
    if not size:
        return BadSample(Reason.EMPTY_FILE, "the tar has 0 bytes")
    if at and (at + _BLOCK > size or "truncated" in error or "empty" in error):
        return BadSample(Reason.TRUNCATED, f"the tar ends after {size} bytes without its end mark")
    file.seek(at)
    begin = file.read(_BLOCK)
    if begin.startswith(_GZIP):
        return BadSample(Reason.CORRUPT, "the tar is compressed by gzip, so its members cannot be found; unpack it")
    return BadSample(Reason.CORRUPT, f"no tar from byte {at} on, where {begin[:12]!r} stands: {error}")
