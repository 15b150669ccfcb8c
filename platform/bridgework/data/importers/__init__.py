"""Importers: each module holds one config class, whose fields are the options of a format.

`bridgework data import llava-json SOURCE DEST` runs `llava_json.LlavaJsonImporter`; one of your own
is given by the import path of its module, e.g. `my_lab.photos`. For every importer, rows in = rows
out + rows in the table `DEST.quarantine`, each with a reason, + skipped rows, which are counted. An
interrupted import resumes when the same command is given again.
"""

import hashlib
import io
import json
import os
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, count, islice
from typing import Any, ClassVar
from unicodedata import normalize

from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from bridgework.config import config_class, to_dict
from bridgework.data.dataset import Manifest, read_manifest
from bridgework.data.images import MAX_BYTES, decode
from bridgework.data.importers.engine import (
    CHUNK_ROWS,
    Chunk,
    ChunkStore,
    ImportJob,
    chunks,
    remove_stale,
)
from bridgework.data.importers.engine import Row as Row
from bridgework.data.names import address as address
from bridgework.data.names import plain as plain
from bridgework.data.quarantine import SHARE, BadSample, Quarantine, Reason, SkippedRow
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.mixture import check_max_bad
from bridgework.plugins import Plugins
from bridgework.ray_utils import map_on_actors
from bridgework.storage import find_store

PLACEHOLDER = "<image>"  # the place of an image in a text; a caption must not contain it
UNKNOWN = "unknown"  # the license of a dataset that was given none

WAVE = 256  # chunks per call of Ray: its start takes seconds, and a million rows are hours of work

Say = Callable[[str], object]

FORMATS = Plugins(
    kind="format",
    package=__name__,
    methods=("run",),
    example="my_lab.photos",
    hint="docs/data-formats.md",
    separator="-",
    error=DataError,
)


@dataclass(frozen=True)
class Listing:
    """The rows of a source, and the identity of everything that they depend on."""

    rows: Callable[[], Iterable[Row]]  # always in the same order; a row is read when it is called
    sha256: str  # of the listing, and of the tables that were read for it
    options: "Importer | None" = None  # with the values that took effect; default: as they are
    facts: Mapping[str, Any] = field(default_factory=dict)  # recorded next to the options
    license: str = UNKNOWN  # of an importer without the option `license`
    files: int = 1  # that hold the rows
    notes: tuple[str, ...] = ()  # reported before the import


@config_class
class Importer(ABC):
    """Base class of importers. The fields of a subclass are its options.

    All options but `license` and `max_bad` are recorded in the manifest: an import with others is
    another dataset.
    """

    max_bad: float = SHARE  # share of the rows, and of the files, that may be bad

    parallel: ClassVar[bool] = True  # its rows may be read by actors of Ray

    @abstractmethod
    def list_rows(self, source: str) -> Listing:
        """List the rows of `source`. Raises DataError if it cannot be read as this format."""

    def run(self, source: str, dest: str, *, workers: int = 0, say: Say = print) -> Manifest:
        """Import `source` as the dataset `dest`, with `workers` actors of Ray.

        Returns its manifest.

        Raises DataError, as `list_rows` and `ingest` do.
        """
        listing = self.list_rows(source)
        for note in listing.notes:
            say(note)
        options = to_dict(self if listing.options is None else listing.options)
        recorded = {n: v for n, v in options.items() if n not in ("_", "license", "max_bad")}
        return ingest(
            listing.rows,
            source,
            dest,
            license=options.get("license", listing.license),
            made_by=type(self).__module__,
            parameters={**recorded, **listing.facts, "sha256": listing.sha256},
            max_bad=self.max_bad,
            workers=workers,
            files=listing.files,
            say=say,
        )


def formats() -> list[str]:
    """Return the formats that ship, as the command line writes them."""
    return FORMATS.names()


def load(name: str) -> type[Importer]:
    """Return the importer of a format: `llava-json`, or the import path of a module that holds one.

    Raises DataError for a name that is neither, for a module whose import fails or that holds none.
    """
    return FORMATS.load_class(name)


def ingest(
    rows: Callable[[], Iterable[Row]],
    source: str,
    dest: str,
    *,
    license: str,
    made_by: str,
    parameters: Mapping[str, Any],
    max_bad: float,
    say: Say,
    workers: int = 0,
    files: int = 1,
    chunk_rows: int = CHUNK_ROWS,
) -> Manifest:
    """Write the good rows to `dest`, the bad ones to the table `DEST.quarantine`.

    `rows()` lists the rows of the source, always in the same order and without reading them.
    `workers` actors of Ray read them, `chunk_rows` at a time; with 0 this process does. Neither
    that number nor an interruption changes the result. A `dest` that was imported from the same
    source with the same parameters is left as it is. Raises DataError if it holds another dataset,
    and if more than the share `max_bad` of the rows is bad, or of the source's `files` unreadable.
    """
    source = _normalized(source)
    check_max_bad(max_bad)
    _refuse_inside(source, dest)
    existing = _imported_before(source, dest, made_by, license, parameters)
    if existing is not None:
        remove_stale(dest)
        say(f"{dest}: nothing to do, it holds these {existing.rows} rows already")
        return existing
    job = ImportJob.begin(
        source,
        dest,
        license=license,
        made_by=made_by,
        parameters=parameters,
        chunk_rows=chunk_rows,
    )
    total = complete = 0
    pending = chunks(rows(), chunk_rows)
    while wave := list(islice(pending, WAVE if workers else 1)):
        new = [chunk for chunk in wave if not job.store.holds(chunk)]
        if len(new) < len(wave) and not complete:
            say(f"{dest}: resumes an interrupted import")
        total, complete = total + len(wave), complete + len(wave) - len(new)
        map_on_actors(partial(_maker, job.store), new, workers, what="chunks of an import")
    quarantine = Quarantine(dest.rstrip("/") + ".quarantine", limit=max_bad)
    manifest = job.finish(total, quarantine, files)
    rest = f"; {len(quarantine)} quarantined, see {quarantine.folder}" if len(quarantine) else ""
    rest += "".join(f"; left out: {number} {kind}" for kind, number in manifest.left_out.items())
    say(f"{dest}: {manifest.rows} rows in {len(manifest.shards)} shards{rest}")
    return manifest


def _maker(store: ChunkStore) -> Callable[[Chunk], object]:
    return store.make


def _normalized(source: str) -> str:
    """Return a path in one spelling: `photos/` and `./photos` are `photos`."""
    return source if "://" in source else os.path.normpath(source)


def _refuse_inside(source: str, dest: str) -> None:
    """Raise DataError for a destination inside the source."""
    inner, outer = (find_store(path)[1].rstrip("/") + "/" for path in (dest, source))
    if inner.startswith(outer):
        raise DataError(
            f"{dest} is inside the source {source}, and would be read as a part of it. "
            "Fix: choose another DEST"
        )


def _imported_before(
    source: str, dest: str, made_by: str, license: str, parameters: Mapping[str, Any]
) -> Manifest | None:
    """Return the manifest of this very import, or None.

    Raises DataError for another dataset at `dest`.
    """
    fs, root = find_store(dest)
    if not fs.exists(f"{root}/manifest.json"):
        return None
    old = read_manifest(dest)
    wanted = json.loads(
        json.dumps({"source": source, "made_by": made_by, "license": license, **parameters})
    )
    found = {
        "source": _normalized(old.source),
        "made_by": old.made_by,
        "license": old.license,
        **old.parameters,
    }
    if found == wanted:
        return old
    name = next(k for k in sorted(found.keys() | wanted.keys()) if found.get(k) != wanted.get(k))
    raise DataError(
        f"{dest} holds another dataset. Got {name} {found.get(name)!r}; expected "
        f"{wanted.get(name)!r}. Fix: delete it, or choose another DEST"
    )


class Keys:
    """Keys that differ where rows do: the second content of `cat.jpg` is `cat.jpg#2`.

    A key of the source never collides with a generated one: if `cat.jpg#2` is the name of another
    row, that row is `cat.jpg#2#2`. A row that repeats name and content of another gets its key.
    """

    def __init__(self) -> None:
        self._contents: defaultdict[str, dict[bytes, str]] = defaultdict(dict)
        self._taken = set[str]()

    def __call__(self, name: str, content: Any) -> str:
        """Return the key of a row by its own name, or by the name that its number gives."""
        return self.find(name, content)[0]

    def of(self, row: Any, number: int, *names: str, content: Any) -> str:
        """Return the key of row `number` by the first field that names it, or by its number."""
        given = row if isinstance(row, dict) else {}
        found = (given[name] for name in names if given.get(name) is not None)
        name = next(found, None)
        if isinstance(name, str | int) and str(name):
            return self(str(name), content)
        return self(f"row-{number:08d}", number)

    def find(self, name: str, content: Any) -> tuple[str, bool]:
        """Return the key, and True if a row of this name and content was there before."""
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).digest()
        known = self._contents[name]
        if (key := known.get(digest[:8])) is not None:
            return key, True
        numbered = (f"{name}#{n}" for n in count(max(2, len(known) + 1)))
        wanted = numbered if known else chain([name], numbered)
        key = known[digest[:8]] = next(key for key in wanted if key not in self._taken)
        self._taken.add(key)
        return key, False


class Captions:
    """Keys for captions of images; a caption that its image already has is skipped."""

    def __init__(self) -> None:
        self._keys = Keys()

    def __call__(self, name: str, text: Any, make: Callable[[str], Sample]) -> Row:
        """Return the row of an image's caption; `make` builds its sample from the key."""
        key, repeated = self._keys.find(name, text)
        if repeated and isinstance(text, str) and text.strip():
            return key, partial(leave_out, "captions that their picture has already")
        return key, partial(make, key)


def leave_out(what: str) -> Sample:
    """Raise SkippedRow; `what` names the kind of row that the manifest counts."""
    raise SkippedRow(what)


def texts(value: Any) -> list[Any]:
    """Return the captions of a row: a list of texts, or the one; an empty list is a blank one."""
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return value or [""]
    return [value]


def caption(text: Any) -> str:
    """Return a caption, stripped.

    Raises BadSample for other types, blank texts and placeholders.
    """
    if not isinstance(text, str):
        raise BadSample(Reason.BAD_ROW, f"the caption is {type(text).__name__}; expected text")
    if PLACEHOLDER in text:
        raise BadSample(
            Reason.PLACEHOLDERS, f"the caption holds {PLACEHOLDER!r}, the place of an image"
        )
    if not text.strip():
        raise BadSample(Reason.EMPTY_TEXT, "the caption is empty")
    return text.strip()


def read_image(folder: str, name: Any) -> bytes:
    """Return the bytes of the file `name` inside `folder`.

    Raises BadSample for a path out of the folder, for a missing file and for one of over MAX_BYTES.
    """
    if not isinstance(name, str) or not name:
        raise BadSample(Reason.BAD_ROW, f"{name!r} is not the path of an image")
    if address(name):
        raise BadSample(
            Reason.OUTSIDE,
            f"{name!r} is an address, and nothing is fetched. Fix: download it, and name its file",
        )
    if not plain(name):
        raise BadSample(Reason.OUTSIDE, f"{name!r} is not a plain path inside the image folder")
    fs, root = find_store(folder)
    path = _existing(fs, root, name)
    if path is None:
        raise BadSample(Reason.MISSING_IMAGE, f"there is no file {name!r} in {folder}")
    if isinstance(fs, LocalFileSystem) and not os.path.realpath(path).startswith(
        os.path.realpath(root) + os.sep
    ):
        raise BadSample(Reason.OUTSIDE, f"{name!r} is a link out of the image folder")
    if fs.size(path) > MAX_BYTES:
        raise BadSample(
            Reason.TOO_MANY_BYTES,
            f"{name!r} has {fs.size(path)} bytes; at most {MAX_BYTES} are read",
        )
    return bytes(fs.cat_file(path))


def _existing(fs: Any, root: str, name: str) -> str | None:
    """Return the path of a file, in composed (Linux) or decomposed (macOS) Unicode form."""
    if fs.isfile(f"{root}/{name}"):
        return f"{root}/{name}"
    if name.isascii():
        return None
    path = root
    for part in name.split("/"):
        forms = dict.fromkeys((part, *(normalize(form, part) for form in ("NFC", "NFD"))))
        path = next((p for form in forms if fs.exists(p := f"{path}/{form}")), "")
        if not path:
            return None
    return path if fs.isfile(path) else None


def read_text(path: str) -> str:
    """Return the text of a table. Raises DataError if it is missing or not UTF-8."""
    fs, root = find_store(path)
    try:
        return bytes(fs.cat_file(root)).decode("utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None


def fingerprint(*content: str | bytes) -> str:
    """Return the sha256 (hex) of all that an import depends on: it identifies the source."""
    digest = hashlib.sha256()
    for item in content:
        digest.update(item.encode() if isinstance(item, str) else item)
        digest.update(b"\0")
    return digest.hexdigest()


def shrink(data: bytes, side: int, *, max_pixels: int) -> bytes:
    """Return an image within side x side, RGB on white, as the smaller of PNG and WebP (90)."""
    image = decode(data, max_pixels=max_pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    png, webp = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(webp, "WEBP", quality=90, method=6)
    return min(png.getvalue(), webp.getvalue(), key=len)
