"""Webdataset tars: adjacent members whose names agree up to the first dot are one sample.

`0001.jpg`, `0001.txt`, `0001.json`, `0001.cls` are its image, its caption, other fields, and its
label. Tars of `bridgework data export webdataset` are read back completely. Members of other
endings, including pickles (`.pyd`), are never read; the manifest's parameters count them.

Samples are located by the headers alone: nothing is extracted, no declared size is trusted, and
memory does not grow. Python's own reader stops silently at an incomplete or broken header; here
that is an error.
"""

import hashlib
import json
import os.path
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from math import prod
from tarfile import TarInfo
from typing import IO, Any, NamedTuple, cast
from unicodedata import normalize
from urllib.parse import unquote

import numpy as np
from braceexpand import braceexpand

from bridgework.config import config_class
from bridgework.data.images import MAX_BYTES
from bridgework.data.importers import (
    PLACEHOLDER,
    UNKNOWN,
    Importer,
    Listing,
    Row,
    caption,
    leave_out,
    plain,
    texts,
)
from bridgework.data.importers.tables import files, hidden, parse, shallow
from bridgework.data.quarantine import BadSample, Reason, UnreadableFile
from bridgework.data.samples import LICENSE, Part, Role, Sample, from_row
from bridgework.errors import DataError
from bridgework.storage import find_store

MAX_HEADER = 1 << 20  # bytes before one member: long names and pax fields are read completely
_BLOCK = tarfile.BLOCKSIZE
_TAIL = 64 << 10  # bytes read after the end mark: a writer pads to 10 KB with zeros
_GZIP = b"\x1f\x8b"
# raised for hostile headers
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError)


def members(file: IO[bytes], size: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of the tar in `file`, of `size` bytes and seekable; contents are skipped.

    Members are validated by `flaw`. Raises BadSample after the last complete header: TRUNCATED if
    the file ends without an end mark, CORRUPT if it is not a tar from there on, EMPTY_FILE.
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
        raise BadSample(
            Reason.CORRUPT,
            f"there is more data after the end mark at byte {headers.at}: two tars in one file?",
        )


def flaw(member: tarfile.TarInfo, size: int) -> BadSample | None:
    """Return the defect of a member of a tar of `size` bytes; None for a complete, plain file."""
    name = member.name
    if not member.isreg():
        return BadSample(Reason.OUTSIDE, f"{name!r} is a link or a device, not a file")
    if member.sparse is not None or any(key.startswith("GNU.sparse") for key in member.pax_headers):
        return BadSample(Reason.BAD_ROW, f"{name!r} is a sparse file")
    if member.offset_data + member.size > size:
        return BadSample(Reason.TRUNCATED, f"the tar has {size} bytes and ends inside {name!r}")
    if member.size > MAX_BYTES:
        return BadSample(
            Reason.TOO_MANY_BYTES, f"{name!r} has {member.size} bytes; at most {MAX_BYTES} are read"
        )
    return None


def _next(archive: Any, headers: "_Headers") -> tarfile.TarInfo | None:
    before = archive.offset
    headers.left = MAX_HEADER
    member: tarfile.TarInfo | None = archive.next()
    archive.members.clear()
    archive.pax_headers.clear()  # fields for all later members: unused, and they only grow
    if member is not None and (member.size < 0 or archive.offset < before):
        raise tarfile.ReadError(f"{member.name!r} declares {member.size} bytes")
    headers.at = archive.offset
    return member


class _Headers:
    """A file of which tarfile may read at most `left` more bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.left = MAX_HEADER
        self.at = 0  # after the last complete member

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
        return BadSample(
            Reason.CORRUPT,
            "the tar is compressed by gzip, so its members cannot be found; unpack it",
        )
    return BadSample(
        Reason.CORRUPT, f"not a tar from byte {at} on, which begins {begin[:12]!r}: {error}"
    )


IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp")
PACKED = (
    ".tar.gz",
    ".tgz",
    ".tar.bz2",
    ".tbz2",
    ".tar.xz",
    ".txz",
    ".tar.zst",
    ".tzst",
    ".tar.lz4",
)
READ = (*IMAGES, "txt", "json", "cls")
MAX_MEMBERS = 1000  # of one sample
MAX_TARS = 1_000_000  # of one import
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)[}.]")
COUNTED = 20  # endings of unread members that are counted by name


class Tar(NamedTuple):
    """One archive; `name` distinguishes it from the others."""

    path: str
    name: str


@dataclass
class TarSample:
    """One sample: its members, ending -> (offset, bytes). A broken tar ends with one of key ""."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    flaw: BadSample | None = None

    def ended_by(self, error: BadSample) -> bool:
        """Return True if the end of a broken tar cut this sample: it lacks an image or a text."""
        if self.flaw is not None:
            return self.flaw.reason is error.reason
        return self.members.keys().isdisjoint(IMAGES) or self.members.keys().isdisjoint(
            ("txt", "json")
        )


def find(source: str) -> list[Tar]:
    """Return the tars that `source` names, in order.

    Raises DataError if one is missing, or for none.
    """
    patterns = _patterns(source)
    found = list(dict.fromkeys(chain.from_iterable(map(_expand, patterns))))
    if not found:
        count = len(packed(source))
        there = f"; there are {count} compressed tars, which must be unpacked" if count else ""
        raise DataError(
            f"{source} names no .tar; give a tar, a folder of tars, or a pattern such as "
            f"shards/*.tar{there}"
        )
    common = os.path.commonpath([os.path.dirname(name) for _, name in found])
    return [Tar(path, os.path.relpath(name, common).removesuffix(".tar")) for path, name in found]


def packed(source: str) -> list[str]:
    """Return the compressed tars of a folder, which are not read: they have no random access."""
    fs, root = find_store(source)
    return (
        [name for name, _ in files(source) if name.endswith(PACKED) and not hidden(name)]
        if fs.isdir(root)
        else []
    )


def _patterns(source: str) -> list[str]:
    """Expand the braces of `source`."""
    spans = [
        abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(source)
    ]  # braceexpand holds each
    try:
        found = (
            list(islice(braceexpand(source, escape=False), MAX_TARS + 1))
            if prod(spans) <= MAX_TARS
            else []
        )
    except ValueError as error:
        raise DataError(f"{source}: {error}; write e.g. shards/{{000..031}}.tar") from None
    if prod(spans) > MAX_TARS or len(found) > MAX_TARS:
        raise DataError(f"{source} names more than {MAX_TARS:,} tars; import them in parts")
    return found


def _expand(pattern: str) -> list[tuple[str, str]]:
    """Return (path or URL, path) of each tar."""
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
    return [
        (name if "://" not in pattern else str(fs.unstrip_protocol(name)), name) for name in names
    ]


class Scan:
    """Counts, keys and digest of one pass over the headers of all tars."""

    def __init__(self) -> None:
        self.samples = 0
        self.lost: BadSample | None = None
        self._endings: Counter[str] = Counter()
        self._digest = hashlib.sha256()
        self._keys: list[
            np.ndarray[Any, np.dtype[np.uint64]]
        ] = []  # of each tar, once each, hashed

    def add(self, tar: Tar) -> None:
        """Read the headers of one more tar."""
        self._digest.update(f"{tar.name}\0".encode())
        keys = []
        for group in groups(tar, self._note):
            if group.key:
                keys.append(
                    int.from_bytes(hashlib.sha256(group.key.encode(errors="replace")).digest()[:8])
                )
            else:
                self.lost = group.flaw
        self.samples += len(keys)
        self._keys.append(np.unique(np.array(keys, dtype=np.uint64)))

    def _note(self, member: TarInfo) -> None:
        kind = member.type.decode("latin-1")
        identity = json.dumps([member.name, member.size, member.mtime, kind])
        self._digest.update(identity.encode())
        key, ending = _split(member.name)
        if member.isreg() and not (key and _is_read(ending)):
            ending = ending.rpartition(".")[2]
            self._endings[ending if key and ending.isalnum() and len(ending) <= 8 else ""] += 1

    @property
    def sha256(self) -> str:
        """Return the sha256 (hex) of the names, sizes and times of all members."""
        return self._digest.hexdigest()

    @property
    def ignored(self) -> dict[str, int]:
        """Return the counts of unread members, by ending."""
        return dict(sorted(self._endings.most_common(COUNTED)))

    @property
    def prefixed(self) -> bool:
        """Return True if a key occurs in two tars."""
        keys = np.concatenate(self._keys)
        return len(np.unique(keys)) < len(keys)


def groups(
    tar: Tar, note: Callable[[TarInfo], object] = lambda member: None
) -> Iterator[TarSample]:
    """Yield the samples of a tar, in order, by its headers; `note` is called with every member.

    The last sample of a broken tar has the flaw; if it is complete, one more of key "" follows.
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
                    group = TarSample(key)
                if _is_read(ending):
                    _add(group, member, ending, size)
    except BadSample as error:
        if group is not None and not group.ended_by(error):
            yield group
            group = None
        group = group or TarSample("")
        group.flaw = UnreadableFile(error.reason, f"{tar.path}: {(group.flaw or error).detail}")
    if group is not None:
        yield group


def _same(key: str, other: str) -> bool:
    """True if two keys are one, in whatever form their letters are composed."""
    return key == other or (not key.isascii() and normalize("NFC", key) == normalize("NFC", other))


def _split(name: str) -> tuple[str, str]:
    """Return (key, ending); the key, up to the first dot, is empty for members of no sample."""
    name = name.removeprefix("./")
    head = name.partition("/")[0]
    folder, slash, base = name.rpartition("/")
    stem, dot, ending = base.partition(".")
    meta = (
        len(head) > 3 and head.startswith("__") and head.endswith("__")
    )  # `__meta__` is webdataset's own
    return f"{folder}{slash}{stem}" if stem and dot and not meta else "", ending.lower()


def _is_read(ending: str) -> bool:
    return ending.rpartition(".")[2] in READ


def _add(group: TarSample, member: TarInfo, ending: str, size: int) -> None:
    if not plain(member.name):
        group.flaw = BadSample(Reason.OUTSIDE, f"{member.name!r} is not a plain path")
    elif ending in group.members:
        group.flaw = BadSample(Reason.DUPLICATE_KEY, f"{member.name!r} occurs twice")
    elif len(group.members) == MAX_MEMBERS:
        group.flaw = BadSample(Reason.BAD_ROW, f"the sample has more than {MAX_MEMBERS} members")
    else:
        group.members[ending] = (member.offset_data, member.size)
        group.flaw = group.flaw or flaw(member, size)


TEXTS = ("caption", "text")  # fields of the JSON that hold the caption if there is no .txt
TOGETHER = "the members of a sample are neighbors, and their names agree up to the first dot"
SHORT = 300  # characters of a JSON field, with its name, that is kept as provenance

_OWN = {
    "rejected": None,
    "times_s": (),
    "labels": (),
    "boxes": (),
    "ocr": None,
    "language": None,
    LICENSE: None,
}


@config_class
class WebDatasetImporter(Importer):
    """Import the tars of SOURCE: a tar, a folder, or a pattern.

    Patterns are like `shards/{000..031}.tar` or `*.tar`. `text` is the field of the JSON that holds
    the caption, or a list of them. By default it is the .txt, otherwise `caption` or `text` of the
    JSON. If two tars share a key, all keys are prefixed with the name of their tar: `00001/0004`.
    """

    text: str | None = None
    license: str = UNKNOWN

    def list_rows(self, source: str) -> Listing:
        tars = find(source)
        scan = Scan()
        for tar in tars:
            scan.add(tar)
        if scan.lost is not None and len(tars) == 1 and not scan.samples:
            raise DataError(scan.lost.detail)
        unread = ", ".join(
            f"{rows} of .{ending}" if ending else f"{rows} others"
            for ending, rows in scan.ignored.items()
        )
        return Listing(
            partial(_rows, tars, self.text, scan.prefixed, packed(source)),
            scan.sha256,
            facts={"ignored": scan.ignored, "prefixed": scan.prefixed},
            files=len(tars),
            notes=(f"{source}: members that are not read: {unread}",) if unread else (),
        )


def _rows(
    tars: Sequence[Tar], text: str | None, prefixed: bool, unread: Sequence[str]
) -> Iterator[Row]:
    for tar in tars:
        prefix = f"{tar.name}/" if prefixed else ""
        for group in groups(tar):
            key = f"{prefix}{group.key}" if group.key else tar.name
            yield key, partial(_sample, tar.path, group, prefix, text)
    for name in unread:
        yield name, partial(leave_out, "compressed tars, which must be unpacked")


def _sample(path: str, group: TarSample, prefix: str, text: str | None) -> Sample:
    if group.flaw is not None:
        raise group.flaw
    files = _fetch(path, group.members)
    entry = _entry(files)
    if isinstance(entry.get("parts"), list) and isinstance(entry.get("images"), list):
        return _exported(entry, files, prefix, group.key)
    images = [ending for ending in files if ending in IMAGES]
    if len(images) != 1:
        there = f"images: {', '.join(images)}" if images else f"no image; {TOGETHER}"
        raise BadSample(
            Reason.BAD_ROW if images else Reason.MISSING_IMAGE, f"{there}; expected one"
        )
    name, value = _text(files, entry, text)
    labels = (_decoded("cls", files["cls"]).strip(),) if "cls" in files else ()
    facts = {
        key: str(value)
        for key, value in entry.items()
        if key != name and isinstance(value, str | int | float)
    }
    provenance = {key: value for key, value in facts.items() if len(key) + len(value) <= SHORT}
    captions = [caption(each) for each in texts(value)]
    distinct = list(dict.fromkeys(captions))
    if len(distinct) < len(captions):
        provenance["dropped.captions"] = str(len(captions) - len(distinct))
    parts = (Part("caption", image=0), *(Part("caption", text=each) for each in distinct))
    return Sample(
        f"{prefix}{group.key}", (files[images[0]],), parts, labels=labels, provenance=provenance
    )


def _fetch(path: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """Read the members of a sample, by their endings."""
    if (total := sum(size for _, size in wanted.values())) > MAX_BYTES:
        raise BadSample(
            Reason.TOO_MANY_BYTES, f"the sample has {total} bytes; at most {MAX_BYTES} are read"
        )
    fs, root = find_store(path)
    starts, ends = (
        [offset for offset, _ in wanted.values()],
        [sum(place) for place in wanted.values()],
    )
    found = fs.cat_ranges([root] * len(wanted), starts, ends, on_error="raise") if wanted else []
    return {ending: bytes(data) for ending, data in zip(wanted, found, strict=True)}


def _entry(files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        entry = shallow(parse(files.get("json", b"{}")))
    except (ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_ROW, f"its .json is not JSON: {error}") from None
    if isinstance(entry, BadSample):
        raise entry
    if not isinstance(entry, dict):
        raise BadSample(
            Reason.BAD_ROW, f"its .json holds a {type(entry).__name__}, and an object is wanted"
        )
    return entry


def _text(
    files: Mapping[str, bytes], entry: Mapping[str, Any], field: str | None
) -> tuple[str | None, Any]:
    """Return the caption, and the field of the JSON that holds it (None for the .txt)."""
    if field is None and "txt" in files:
        return None, _decoded("txt", files["txt"])
    names = TEXTS if field is None else (field,)
    name = next((name for name in names if name in entry), None)
    if name is None:
        wanted = " or ".join(repr(name) for name in names)
        txt = "" if field else "no .txt, and "
        raise BadSample(Reason.EMPTY_TEXT, f"{txt}no {wanted} in a .json; {TOGETHER}")
    return name, entry[name]


def _decoded(ending: str, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSample(Reason.BAD_ROW, f"its .{ending} is not UTF-8 text: {error}") from None


def _exported(
    entry: Mapping[str, Any], files: Mapping[str, bytes], prefix: str, member: str
) -> Sample:
    """Return a sample that the exporter wrote: the JSON has all fields, and the images' endings."""
    try:
        images = [files[ending] for ending in entry["images"]]
    except (KeyError, TypeError) as error:
        raise BadSample(
            Reason.MISSING_IMAGE, f"its .json names an image that is not there: {error}"
        ) from None
    try:
        key = f"{prefix}{_key(entry['key'], member)}"
        entry = {LICENSE if name == "license" else name: value for name, value in entry.items()}
        sample = from_row({**_OWN, "provenance": {}, **entry, "key": key, "images": images})
        _check(sample)
    except BadSample:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadSample(Reason.BAD_ROW, f"its .json is not an exported sample: {error}") from None
    return sample


def _key(key: Any, member: str) -> str:
    """Return the key in a JSON: a plain path, or the key for which its member is named."""
    if (
        not isinstance(key, str)
        or not key
        or not (plain(key) or key == unquote(member.rpartition("/")[2]))
    ):
        raise BadSample(
            Reason.BAD_ROW, f"its .json has the key {str(key)[:80]!r}, which is not a plain path"
        )
    return key


def _check(sample: Sample) -> None:
    """Validate the texts of an exported sample as for every other format. Raises BadSample."""
    values = [
        text
        for text in (sample.rejected, *(part.text for part in sample.parts))
        if text is not None
    ]
    if any(PLACEHOLDER in text for text in values):
        raise BadSample(
            Reason.PLACEHOLDERS,
            f"a text of its .json holds {PLACEHOLDER!r}, the place of an image",
        )
    if not sample.parts or (sample.rejected is not None and not sample.rejected.strip()):
        raise BadSample(Reason.EMPTY_TEXT, "its .json has no parts, or a blank `rejected`")
    for role, turn in groupby(sample.parts, key=lambda part: part.role):
        if _blank(role, list(turn)):
            raise BadSample(
                Reason.EMPTY_TEXT, f"its .json has no text of the {role}, or a blank one"
            )


def _blank(role: Role, turn: Sequence[Part]) -> bool:
    """Return True if a turn lacks a text.

    An image needs no caption; a question may be an image alone.
    """
    if any((part.text or "").strip() for part in turn):
        return False
    if role == "caption":
        return any(part.text is not None for part in turn)
    return role == "assistant" or (role == "user" and all(part.image is None for part in turn))
