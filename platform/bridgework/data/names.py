"""Checks of the names of files, runs and datasets: plain paths, URLs, unsafe characters."""

import re
from itertools import filterfalse
from unicodedata import category

from bridgework.errors import DataError

MAX_BYTES = 240  # of a name that we write: file systems allow 255, and suffixes are added

_ADDRESS = re.compile(
    r"\s*(?://|[a-z][a-z0-9+.-]*://|(?:about|blob|cid|data|file|ftp|https?|javascript|mailto):)",
    re.IGNORECASE,
)
_DRIVE = re.compile(r"[A-Za-z]:/")  # of Windows
_BIDI_CONTROLS = frozenset(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def address(name: str) -> bool:
    """Return True if `name` is a URL rather than a path."""
    return _ADDRESS.match(name) is not None


def plain(name: str) -> bool:
    """Return True if `name` is a path that stays inside its folder, without control characters."""
    outside = name.startswith("/") or ".." in name.split("/") or "\\" in name or _DRIVE.match(name)
    return not outside and not has_control(name)


def has_control(name: str) -> bool:
    """Return True if `name` has a control character, e.g. a line break or bidirectional one."""
    return any(map(_is_control, filterfalse(str.isprintable, name)))


def check_place(dest: str) -> None:
    """Raise DataError if `dest` (a path or URL) cannot be the name of a new folder."""
    if has_control(dest):
        raise DataError(
            f"{dest!r} contains a line break or another control character. Fix: remove it"
        )
    if (size := max(len(part.encode(errors="replace")) for part in dest.split("/"))) > MAX_BYTES:
        raise DataError(
            f"{dest[:80]!r}.. contains a name that is too long. Got {size} bytes; "
            f"expected at most {MAX_BYTES}. Fix: use a shorter name"
        )


def _is_control(letter: str) -> bool:
    return category(letter) in ("Cc", "Cs", "Zl", "Zp") or letter in _BIDI_CONTROLS
