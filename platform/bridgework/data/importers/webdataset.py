"""webdataset's tars: neighbours in a tar whose names agree up to the first dot are one sample.

`0001.jpg`, `0001.txt`, `0001.json`, `0001.cls` are its image, its caption, what else is known of it, and its label.
What `bridgework data export webdataset` wrote comes back whole. Members of other endings, pickles (`.pyd`) among them,
are never read; the manifest's parameters count them.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any
from urllib.parse import unquote

from bridgework.data.importers import PLACEHOLDER, Row, Say, caption, ingest, leave_out, plain, texts
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Part, Role, Sample, from_row
from bridgework.data.shards import Manifest
from bridgework.data.sources import parse, shallow
from bridgework.data.tar_samples import IMAGES, Group, Scan, Tar, find, groups, packed
from bridgework.data.transforms import MAX_BYTES
from bridgework.errors import DataError
from bridgework.stores import find_store

TEXTS = ("caption", "text")  # fields of the JSON that hold the caption where there is no .txt
TOGETHER = "the members of a sample stand together, and their names agree up to the first dot"
SHORT = 300  # characters of a JSON field, with its name, that is kept as provenance

_OWN = {"rejected": None, "times_s": (), "labels": (), "boxes": (), "ocr": None, "language": None, "licence": None}


def run(
    source: str,
    dest: str,
    *,
    text: str | None = None,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the tars of `source`: one tar, a folder of them, or a pattern such as `shards/{000..031}.tar` or `*.tar`.

    `text` is the field of the JSON that holds the caption, or a list of them; without it that is the .txt, else
    `caption` or `text` of the JSON. Where two tars share a key, every key gets its tar's name in front: `00001/0004`.
    """
    tars = find(source)
    scan = Scan()
    for tar in tars:
        scan.add(tar)
    if scan.lost is not None and len(tars) == 1 and not scan.samples:
        raise DataError(scan.lost.detail)
    if scan.ignored:
        unread = ", ".join(
            f"{rows} of .{ending}" if ending else f"{rows} others" for ending, rows in scan.ignored.items()
        )
        say(f"{source}: members that are not read: {unread}")
    return ingest(
        partial(_rows, tars, text, scan.prefixed, packed(source)),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"text": text, "ignored": scan.ignored, "prefixed": scan.prefixed, "sha256": scan.sha256},
        max_bad=max_bad,
        workers=workers,
        files=len(tars),
        say=say,
    )


def _rows(tars: Sequence[Tar], text: str | None, prefixed: bool, unread: Sequence[str]) -> Iterator[Row]:
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
        raise BadSample(Reason.BAD_ROW if images else Reason.MISSING_IMAGE, f"{there}; one is wanted")
    name, words = _text(files, entry, text)
    labels = (_decoded("cls", files["cls"]).strip(),) if "cls" in files else ()
    facts = {key: str(value) for key, value in entry.items() if key != name and isinstance(value, str | int | float)}
    provenance = {key: value for key, value in facts.items() if len(key) + len(value) <= SHORT}
    said = [caption(each) for each in texts(words)]
    distinct = list(dict.fromkeys(said))
    if len(distinct) < len(said):
        provenance["dropped.captions"] = str(len(said) - len(distinct))
    parts = (Part("caption", image=0), *(Part("caption", text=each) for each in distinct))
    return Sample(f"{prefix}{group.key}", (files[images[0]],), parts, labels=labels, provenance=provenance)


def _fetch(path: str, wanted: Mapping[str, tuple[int, int]]) -> dict[str, bytes]:
    """The members by their endings."""
    if (total := sum(size for _, size in wanted.values())) > MAX_BYTES:
        raise BadSample(Reason.TOO_MANY_BYTES, f"the sample has {total} bytes; at most {MAX_BYTES} are read")
    fs, root = find_store(path)
    starts, ends = [offset for offset, _ in wanted.values()], [sum(place) for place in wanted.values()]
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
        raise BadSample(Reason.BAD_ROW, f"its .json holds a {type(entry).__name__}, and an object is wanted")
    return entry


def _text(files: Mapping[str, bytes], entry: Mapping[str, Any], field: str | None) -> tuple[str | None, Any]:
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


def _exported(entry: Mapping[str, Any], files: Mapping[str, bytes], prefix: str, member: str) -> Sample:
    """A sample as the exporter writes it: all fields in the JSON, and in place of each image its ending."""
    try:
        images = [files[ending] for ending in entry["images"]]
    except (KeyError, TypeError) as error:
        raise BadSample(Reason.MISSING_IMAGE, f"its .json names an image that is not there: {error}") from None
    try:
        key = f"{prefix}{_key(entry['key'], member)}"
        sample = from_row({**_OWN, "provenance": {}, **entry, "key": key, "images": images})
        _check(sample)
    except BadSample:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadSample(Reason.BAD_ROW, f"its .json is no exported sample: {error}") from None
    return sample


def _key(key: Any, member: str) -> str:
    """The key in a JSON: held to the rule of members' names, unless its member is named for it as the exporter does."""
    if not isinstance(key, str) or not key or not (plain(key) or key == unquote(member.rpartition("/")[2])):
        raise BadSample(Reason.BAD_ROW, f"its .json has the key {str(key)[:80]!r}, which is not a plain path")
    return key


def _check(sample: Sample) -> None:
    """Holds an exported sample's texts to what every other format is held to. Raises BadSample."""
    said = [text for text in (sample.rejected, *(part.text for part in sample.parts)) if text is not None]
    if any(PLACEHOLDER in text for text in said):
        raise BadSample(Reason.PLACEHOLDERS, f"a text of its .json holds {PLACEHOLDER!r}, which stands for an image")
    if not sample.parts or (sample.rejected is not None and not sample.rejected.strip()):
        raise BadSample(Reason.EMPTY_TEXT, "its .json has no parts, or a blank `rejected`")
    for role, turn in groupby(sample.parts, key=lambda part: part.role):
        if _blank(role, list(turn)):
            raise BadSample(Reason.EMPTY_TEXT, f"its .json has no text of the {role}, or a blank one")


def _blank(role: Role, turn: Sequence[Part]) -> bool:
    """Whether a turn lacks a text; an image may go without a caption, and a question may be an image alone."""
    if any((part.text or "").strip() for part in turn):
        return False
    if role == "caption":
        return any(part.text is not None for part in turn)
    return role == "assistant" or (role == "user" and all(part.image is None for part in turn))
