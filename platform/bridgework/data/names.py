"""Names of files, runs and datasets: which are plain paths, which are addresses, which harm."""

import re
from itertools import filterfalse
from unicodedata import category

from bridgework.errors import DataError

MAX_BYTES = 240  # of a name of our own making: file systems allow 255, and endings are added to it

_ADDRESS = re.compile(
    r"\s*(?://|[a-z][a-z0-9+.-]*://|(?:about|blob|cid|data|file|ftp|https?|javascript|mailto):)",
    re.IGNORECASE,
)
_DRIVE = re.compile(r"[A-Za-z]:/")  # of Windows
_TURNED = frozenset(
    map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A)))
)  # of bidirectional text


def address(name: str) -> bool:
    """True if `name` is a URL rather than a path."""
    return _ADDRESS.match(name) is not None


def plain(name: str) -> bool:
    """True if `name` is a path that stays inside its folder, without control characters."""
    outside = name.startswith("/") or ".." in name.split("/") or "\\" in name or _DRIVE.match(name)
    return not outside and not has_control(name)


def has_control(name: str) -> bool:
    """True if a letter of `name` moves what follows it or is not printed: line breaks, NUL, turned text."""
    return any(map(_is_control, filterfalse(str.isprintable, name)))


def check_place(dest: str) -> None:
    """Raises DataError for a path or URL that no folder of ours can be made at."""
    if has_control(dest):
        raise DataError(
            f"{dest!r} holds a line break or another control character. Fix: leave it out"
        )
    if (size := max(len(part.encode(errors="replace")) for part in dest.split("/"))) > MAX_BYTES:
        raise DataError(
            f"{dest[:80]!r}.. holds a name of {size} bytes. At most {MAX_BYTES} are allowed. Fix: give a shorter one"
        )


def _is_control(letter: str) -> bool:
    return category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _TURNED
