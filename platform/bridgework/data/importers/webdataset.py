"""The members of a tar, header by header: nothing is extracted, no declared size is believed, memory does not grow.

Python's own reader stops without a word at a header that is not whole, or that is no header. Here that is an error.

Tars as webdataset reads them: neighbors whose names agree up to the first dot are one sample.

Samples are found by the headers alone; who wants their bytes knows where they lie.

webdataset's tars: neighbors in a tar whose names agree up to the first dot are one sample.

`0001.jpg`, `0001.txt`, `0001.json`, `0001.cls` are its image, its caption, what else is known of it, and its label.
What `bridgework data export webdataset` wrote comes back whole. Members of other endings, pickles (`.pyd`) among them,
are never read; the manifest's parameters count them.
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

MAX_HEADER = (
    1 << 20
)  # bytes of all that may stand before one member: long names and pax fields are read whole
_BLOCK = tarfile.BLOCKSIZE
_TAIL = (
    64 << 10
)  # bytes behind the end mark that are looked at: a writer fills up to 10 KB with zeros
_GZIP = b"\x1f\x8b"
_BROKEN = (
    tarfile.TarError,
    ValueError,
    OverflowError,
    RecursionError,
)  # what headers made to harm raise


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
        raise BadSample(
            Reason.CORRUPT,
            f"more stands behind the end mark at byte {headers.at}: two tars in one file?",
        )


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
        return BadSample(
            Reason.TOO_MANY_BYTES, f"{name!r} has {member.size} bytes; at most {MAX_BYTES} are read"
        )
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
        return BadSample(
            Reason.CORRUPT,
            "the tar is compressed by gzip, so its members cannot be found; unpack it",
        )
    return BadSample(
        Reason.CORRUPT, f"no tar from byte {at} on, where {begin[:12]!r} stands: {error}"
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
TOLD = 20  # endings of unread members that are counted by name


class Tar(NamedTuple):
    """One archive; `name` tells it from the others."""

    path: str
    name: str


@dataclass
class Group:
    """One sample: where its members lie, ending -> (offset, bytes).

    A tar that is not whole ends with one of key "".
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    flaw: BadSample | None = None

    def ended_by(self, error: BadSample) -> bool:
        """Whether what ended the tar took members of this sample; it can be a pair without what it lacks otherwise."""
        if self.flaw is not None:
            return self.flaw.reason is error.reason
        return self.members.keys().isdisjoint(IMAGES) or self.members.keys().isdisjoint(
            ("txt", "json")
        )


def find(source: str) -> list[Tar]:
    """The tars that `source` names, in its order.

    Raises DataError where one is missing, or none is named.
    """
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
    return (
        [name for name, _ in files(source) if name.endswith(PACKED) and not hidden(name)]
        if fs.isdir(root)
        else []
    )


def _patterns(source: str) -> list[str]:
    """What the braces of `source` stand for."""
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
    return [
        (name if "://" not in pattern else str(fs.unstrip_protocol(name)), name) for name in names
    ]


class Scan:
    """What one pass over the headers of all tars tells."""

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
        group.flaw = UnreadableFile(error.reason, f"{tar.path}: {(group.flaw or error).detail}")
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
    meta = (
        len(head) > 3 and head.startswith("__") and head.endswith("__")
    )  # `__meta__` is webdataset's own
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


TEXTS = ("caption", "text")  # fields of the JSON that hold the caption where there is no .txt
TOGETHER = "the members of a sample stand together, and their names agree up to the first dot"
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
    """Import the tars of SOURCE: one tar, a folder of them, or a pattern such as `shards/{000..031}.tar` or `*.tar`.

    `text` is the field of the JSON that holds the caption, or a list of them; without it that is the .txt, else
    `caption` or `text` of the JSON. Where two tars share a key, every key gets its tar's name in front: `00001/0004`.
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


def _sample(path: str, group: Group, prefix: str, text: str | None) -> Sample:
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
            Reason.BAD_ROW if images else Reason.MISSING_IMAGE, f"{there}; one is wanted"
        )
    name, words = _text(files, entry, text)
    labels = (_decoded("cls", files["cls"]).strip(),) if "cls" in files else ()
    facts = {
        key: str(value)
        for key, value in entry.items()
        if key != name and isinstance(value, str | int | float)
    }
    provenance = {key: value for key, value in facts.items() if len(key) + len(value) <= SHORT}
    said = [caption(each) for each in texts(words)]
    distinct = list(dict.fromkeys(said))
    if len(distinct) < len(said):
        provenance["dropped.captions"] = str(len(said) - len(distinct))
    parts = (Part("caption", image=0), *(Part("caption", text=each) for each in distinct))
    return Sample(
        f"{prefix}{group.key}", (files[images[0]],), parts, labels=labels, provenance=provenance
    )


def _fetch(path: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The members by their endings."""
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
    """(the field of the JSON that it is from, the caption)."""
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
    """A sample as the exporter writes it: all fields in the JSON, and in place of each image its ending."""
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
        raise BadSample(Reason.BAD_ROW, f"its .json is no exported sample: {error}") from None
    return sample


def _key(key: Any, member: str) -> str:
    """The key in a JSON: held to the rule of members' names, unless its member is named for it as the exporter does."""
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
    """Holds an exported sample's texts to what every other format is held to. Raises BadSample."""
    said = [
        text
        for text in (sample.rejected, *(part.text for part in sample.parts))
        if text is not None
    ]
    if any(PLACEHOLDER in text for text in said):
        raise BadSample(
            Reason.PLACEHOLDERS,
            f"a text of its .json holds {PLACEHOLDER!r}, which stands for an image",
        )
    if not sample.parts or (sample.rejected is not None and not sample.rejected.strip()):
        raise BadSample(Reason.EMPTY_TEXT, "its .json has no parts, or a blank `rejected`")
    for role, turn in groupby(sample.parts, key=lambda part: part.role):
        if _blank(role, list(turn)):
            raise BadSample(
                Reason.EMPTY_TEXT, f"its .json has no text of the {role}, or a blank one"
            )


def _blank(role: Role, turn: Sequence[Part]) -> bool:
    """Whether a turn lacks a text; an image may go without a caption, and a question may be an image alone."""
    if any((part.text or "").strip() for part in turn):
        return False
    if role == "caption":
        return any(part.text is not None for part in turn)
    return role == "assistant" or (role == "user" and all(part.image is None for part in turn))
