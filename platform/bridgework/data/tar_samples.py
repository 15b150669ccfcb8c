"""Tars as webdataset reads them: neighbours whose names agree up to the first dot are one sample.

Samples are found by the headers alone; who wants their bytes knows where they lie.
"""

import hashlib
import json
import os.path
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from math import prod
from tarfile import TarInfo
from typing import Any, NamedTuple
from unicodedata import normalize

import numpy as np
from braceexpand import braceexpand

from bridgework.data.importers import plain
from bridgework.data.quarantine import BadSample, LostFile, Reason
from bridgework.data.sources import files, hidden
from bridgework.data.tars import flaw, members
from bridgework.errors import DataError
from bridgework.stores import find_store

IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
READ = (*IMAGES, "txt", "json", "cls")
MAX_MEMBERS = 1000  # of one sample
MAX_TARS = 1_000_000  # of one import
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)[}.]")
TOLD = 20  # endings of unread members that are counted by name


class Tar(NamedTuple):
    """One archive; `name` tells it from the others."""

    path: str
    name: str


@dataclass
class Group:
    """One sample: where its members lie, ending -> (offset, bytes). A tar that is not whole ends with one of key ""."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    flaw: BadSample | None = None

    def ended_by(self, error: BadSample) -> bool:
        """Whether what ended the tar took members of this sample; it can be a pair without what it lacks otherwise."""
        if self.flaw is not None:
            return self.flaw.reason is error.reason
        return self.members.keys().isdisjoint(IMAGES) or self.members.keys().isdisjoint(("txt", "json"))


def find(source: str) -> list[Tar]:
    """The tars that `source` names, in its order. Raises DataError where one is missing, or none is named."""
    patterns = _patterns(source)
    found = list(dict.fromkeys(chain.from_iterable(map(_expand, patterns))))
    if not found:
        count = len(packed(source))
        there = f"; there are {count} compressed tars, which must be unpacked" if count else ""
        raise DataError(
            f"{source} names no .tar; give a tar, a folder of tars, or a pattern such as shards/*.tar{there}"
        )
    common = os.path.commonpath([os.path.dirname(name) for _, name in found])
    return [Tar(path, os.path.relpath(name, common).removesuffix(".tar")) for path, name in found]


def packed(source: str) -> list[str]:
    """The compressed tars of a folder, which are not read: no member of them is found without unpacking."""
    fs, root = find_store(source)
    return [name for name, _ in files(source) if name.endswith(PACKED) and not hidden(name)] if fs.isdir(root) else []


def _patterns(source: str) -> list[str]:
    """What the braces of `source` stand for."""
    spans = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(source)]  # braceexpand holds each
    try:
        found = list(islice(braceexpand(source, escape=False), MAX_TARS + 1)) if prod(spans) <= MAX_TARS else []
    except ValueError as error:
        raise DataError(f"{source}: {error}; write e.g. shards/{{000..031}}.tar") from None
    if prod(spans) > MAX_TARS or len(found) > MAX_TARS:
        raise DataError(f"{source} names more than {MAX_TARS:,} tars; import them in parts")
    return found


def _expand(pattern: str) -> list[tuple[str, str]]:
    """(path or URL, the path alone) of each tar."""
    fs, root = find_store(pattern)
    if any(mark in root for mark in "*?["):
        names = sorted(map(str, fs.glob(root)))
    elif fs.isdir(root):
        found = (name for name, _ in files(pattern) if name.endswith(".tar") and not hidden(name))
        names = [f"{str(root).rstrip('/')}/{name}" for name in found]
    elif fs.exists(root):
        names = [str(root)]
    else:
        raise DataError(f"there is no tar {pattern}")
    return [(name if "://" not in pattern else str(fs.unstrip_protocol(name)), name) for name in names]


class Scan:
    """What one pass over the headers of all tars tells."""

    def __init__(self) -> None:
        self.samples = 0
        self.lost: BadSample | None = None
        self._endings: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._keys: list[np.ndarray[Any, np.dtype[np.uint64]]] = []  # of each tar, once each, hashed

    def add(self, tar: Tar) -> None:
        """Read the headers of one more tar."""
        self._digest.update(f"{tar.name}\0".encode())
        keys = []
        for group in groups(tar, self._note):
            if group.key:
                keys.append(int.from_bytes(hashlib.sha256(group.key.encode(errors="replace")).digest()[:8]))
            else:
                self.lost = group.flaw
        self.samples += len(keys)
        self._keys.append(np.unique(np.array(keys, dtype=np.uint64)))

    def _note(self, member: TarInfo) -> None:
        told = json.dumps([member.name, member.size, member.mtime, member.type.decode("latin-1")])
        self._digest.update(told.encode())
        key, ending = _split(member.name)
        if member.isreg() and not (key and _is_read(ending)):
            ending = ending.rpartition(".")[2]
            self._endings[ending if key and ending.isalnum() and len(ending) <= 8 else ""] += 1

    @property
    def sha256(self) -> str:
        """Of the names, sizes and times of all members."""
        return self._digest.hexdigest()

    @property
    def ignored(self) -> dict[str, int]:
        """How many members are not read, by ending."""
        return dict(sorted(self._endings.most_common(TOLD)))

    @property
    def prefixed(self) -> bool:
        """Whether a key stands in two tars."""
        keys = np.concatenate(self._keys)
        return len(np.unique(keys)) < len(keys)


def groups(tar: Tar, note: Callable[[TarInfo], object] = lambda member: None) -> Iterator[Group]:
    """The samples of a tar, in order, by its headers alone; `note` is told of every member.

    Where the tar is not whole, its last sample says so, or if that is complete, one more of key "".
    """
    fs, path = find_store(tar.path)
    size = int(fs.size(path))
    group = None
    try:
        with fs.open(path, "rb") as file:
            for member in members(file, size):
                note(member)
                key, ending = _split(member.name)
                if not key or member.isdir():
                    continue
                if group is None or not _same(group.key, key):
                    if group is not None:
                        yield group
                    group = Group(key)
                if _is_read(ending):
                    _add(group, member, ending, size)
    except BadSample as error:
        if group is not None and not group.ended_by(error):
            yield group
            group = None
        group = group or Group("")
        group.flaw = LostFile(error.reason, f"{tar.path}: {(group.flaw or error).detail}")
    if group is not None:
        yield group


def _same(key: str, other: str) -> bool:
    """True if two keys are one, in whatever form their letters are composed."""
    return key == other or (not key.isascii() and normalize("NFC", key) == normalize("NFC", other))


def _split(name: str) -> tuple[str, str]:
    """(key, ending), the key up to the first dot of the base name; it is empty for what is in no sample."""
    name = name.removeprefix("./")
    head = name.partition("/")[0]
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    meta = len(head) > 3 and head.startswith("__") and head.endswith("__")  # `__meta__` is webdataset's own
    return f"{folder}{slash}{stem}" if stem and dot and not meta else "", ending.lower()


def _is_read(ending: str) -> bool:
    return ending.rpartition(".")[2] in READ


def _add(group: Group, member: TarInfo, ending: str, size: int) -> None:
    if not plain(member.name):
        group.flaw = BadSample(Reason.OUTSIDE, f"{member.name!r} is not a plain path")
    elif ending in group.members:
        group.flaw = BadSample(Reason.DUPLICATE_KEY, f"{member.name!r} stands twice")
    elif len(group.members) == MAX_MEMBERS:
        group.flaw = BadSample(Reason.BAD_ROW, f"the sample has more than {MAX_MEMBERS} members")
    else:
        group.members[ending] = (member.offset_data, member.size)
        group.flaw = group.flaw or flaw(member, size)
