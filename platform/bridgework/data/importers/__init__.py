"""Importers: one module a format, with one function `run(source, dest, ...) -> Manifest`, found by import path.

`bridgework data import llava-json SOURCE DEST` calls `llava_json.run`; a module of your own is `my_lab.importers.coco`.
What they share stands here: rows in = rows out + rows put aside with a reason, in the table `DEST.quarantine`.
"""

import hashlib
import io
import json
import os
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from bridgework.data.quarantine import BadSample, Quarantine, Reason, clear
from bridgework.data.samples import Sample
from bridgework.data.shards import Manifest, read_manifest, write
from bridgework.data.transforms import MAX_BYTES, decode
from bridgework.errors import DataError, suggest

PLACEHOLDER = "<image>"  # where an image stands in a text; a caption has no business to hold one

Say = Callable[[str], object]
Row = tuple[str, Callable[[], Sample]]  # a key, and what makes the sample or raises BadSample


def formats() -> list[str]:
    """The formats that ship, as the command line writes them."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def load(name: str) -> Callable[..., Manifest]:
    """The importer of a format: `llava-json`, or the import path of a module with a function `run`."""
    path = name if "." in name else f"{__name__}.{name.replace('-', '_')}"
    try:
        run: Callable[..., Manifest] = import_module(path).run
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise  # the importer exists; something that it imports does not
        raise DataError(f"there is no format {name!r}" + suggest(name, formats())) from None
    except AttributeError:
        raise DataError(f"{path} is no importer: it has no function run(source, dest, ...)") from None
    return run


def ingest(
    rows: Callable[[], Iterable[Row]],
    source: str,
    dest: str,
    *,
    licence: str,
    made_by: str,
    parameters: Mapping[str, Any],
    max_bad: float,
    say: Say,
) -> Manifest:
    """Write the good rows to `dest`, the bad ones to the table `DEST.quarantine`.

    A `dest` that was made from the same source with the same parameters is left as it is. Raises DataError when it
    holds something else, and when more than the share `max_bad` of the rows is bad.
    """
    done = _made_before(source, dest, made_by, parameters)
    if done is not None:
        say(f"{dest}: nothing to do, it holds these {done.rows} rows already")
        return done
    folder = dest.rstrip("/") + ".quarantine"
    clear(folder)
    quarantine = Quarantine(folder, limit=max_bad)
    manifest = write(
        _sound(rows(), source, quarantine),
        dest,
        source=source,
        licence=licence,
        made_by=made_by,
        parameters=parameters,
        quarantine=quarantine,
    )
    aside = f"; {len(quarantine)} put aside, see {folder}" if len(quarantine) else ""
    say(f"{dest}: {manifest.rows} rows in {len(manifest.shards)} shards{aside}")
    return manifest


def _made_before(source: str, dest: str, made_by: str, parameters: Mapping[str, Any]) -> Manifest | None:
    fs, root = fsspec.core.url_to_fs(dest)
    if not fs.exists(f"{root}/manifest.json"):
        return None
    old = read_manifest(dest)
    wanted = json.loads(json.dumps({"source": source, "made_by": made_by, **parameters}))
    found = {"source": old.source, "made_by": old.made_by, **old.parameters}
    if found == wanted:
        return old
    name = next(k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k))
    raise DataError(
        f"{dest} holds another dataset: its {name} is {found.get(name)!r}, and {wanted.get(name)!r} is wanted; "
        "delete it or choose another place"
    )


def _sound(rows: Iterable[Row], source: str, quarantine: Quarantine) -> Iterator[Sample]:
    keys: set[str] = set()
    for number, (key, read) in enumerate(rows):
        try:
            sample = read()
            if sample.key in keys:
                raise BadSample(Reason.DUPLICATE_KEY, f"{sample.key!r} stood before")
            for image in sample.images:
                decode(image)
        except BadSample as error:
            quarantine.add(source, key, number, error)
        else:
            keys.add(sample.key)
            yield sample


class Keys:
    """Tells rows apart that share a key: the second content of `cat.jpg` is `cat.jpg#2`, a repetition is not."""

    def __init__(self) -> None:
        self._contents: defaultdict[str, list[bytes]] = defaultdict(list)

    def __call__(self, key: str, content: Any) -> str:
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()[:8]
        known = self._contents[key]
        if digest not in known:
            known.append(digest)
        place = known.index(digest)
        return f"{key}#{place + 1}" if place else key


def caption(text: Any) -> str:
    """A caption as it may be trained on: a text, not blank, without placeholders. Raises BadSample otherwise."""
    if not isinstance(text, str):
        raise BadSample(Reason.BAD_ROW, f"the caption is {type(text).__name__}, and text is wanted")
    if PLACEHOLDER in text:
        raise BadSample(Reason.PLACEHOLDERS, f"the caption holds {PLACEHOLDER!r}, which stands for an image")
    if not text.strip():
        raise BadSample(Reason.EMPTY_TEXT, "the caption is empty")
    return text.strip()


def read_image(folder: str, name: Any) -> bytes:
    """The file `name` inside `folder`. Raises BadSample for a path that leaves it, for no file and for a huge one."""
    if not isinstance(name, str) or not name:
        raise BadSample(Reason.BAD_ROW, f"{name!r} is no path of an image")
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or not name.isprintable():
        raise BadSample(Reason.OUTSIDE, f"{name!r} is not a plain path inside the image folder")
    fs, root = fsspec.core.url_to_fs(folder)
    path = f"{root}/{name}"
    if not fs.isfile(path):
        raise BadSample(Reason.MISSING_IMAGE, f"there is no file {name!r} in {folder}")
    if isinstance(fs, LocalFileSystem) and not os.path.realpath(path).startswith(os.path.realpath(root) + os.sep):
        raise BadSample(Reason.OUTSIDE, f"{name!r} is a link out of the image folder")
    if fs.size(path) > MAX_BYTES:
        raise BadSample(Reason.TOO_MANY_BYTES, f"{name!r} has {fs.size(path)} bytes; at most {MAX_BYTES} are read")
    return bytes(fs.cat_file(path))


def read_text(path: str) -> str:
    """A source's table. Raises DataError when it is missing or not UTF-8."""
    fs, root = fsspec.core.url_to_fs(path)
    try:
        return bytes(fs.cat_file(root)).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def fingerprint(*content: str | bytes) -> str:
    """sha256 (hex) of what an import depends on: a source that changed is not the same source."""
    digest = hashlib.sha256()
    for item in content:
        digest.update(item.encode() if isinstance(item, str) else item)
        digest.update(b"\0")
    return digest.hexdigest()


def shrink(data: bytes, side: int, *, max_pixels: int) -> bytes:
    """The picture within side x side, RGB on white, as PNG or WebP (quality 90), whichever is smaller."""
    image = decode(data, max_pixels=max_pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    png, webp = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(webp, "WEBP", quality=90, method=6)
    return min(png.getvalue(), webp.getvalue(), key=len)
