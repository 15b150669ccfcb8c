"""Emoji drawings: npm's emoji-datasource-twitter and emoji-datasource-google, a .tgz or a folder.

They show the same concepts in two artists' styles, with names and categories. Apple's and
Facebook's drawings must not be copied.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from bridgework.config import config_class
from bridgework.data.importers import Importer, Listing, Row, caption, fingerprint
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample, pair
from bridgework.errors import DataError, suggest
from bridgework.storage import find_store

LICENSES = {"twitter": "CC-BY-4.0", "google": "Apache-2.0"}

# The members that are read; all others, including links, are ignored. Nothing is unpacked to disk.
_MEMBER = re.compile(r"(?:^|/)(emoji\.json|img/([a-z]+)/64/[0-9a-f-]+\.png)$")
MAX_DRAWING, MAX_TABLE, MAX_PACKAGE = (
    1 << 20,
    16 << 20,
    256 << 20,
)  # bytes; all drawings are held in memory


@config_class
class EmojiImporter(Importer):
    """Import every emoji of a package, without skin tones: its 64-pixel drawing and its name.

    Rows carry the category and subcategory as labels, and the code point in their provenance.
    """

    parallel: ClassVar[bool] = False  # all drawings are held in memory

    def list_rows(self, source: str) -> Listing:
        files = _files(source)
        style = _style(source, files)
        return Listing(
            partial(_rows, source, files, style),
            fingerprint(*(part for file in sorted(files.items()) for part in file)),
            facts={"style": style},
            license=LICENSES[style],
        )


def _files(source: str) -> dict[str, bytes]:
    """Return the members by name.

    Raises DataError for another kind of file, and for a larger one.
    """
    fs, root = find_store(source)
    if fs.isdir(root):
        sizes = {str(path): int(info["size"]) for path, info in fs.find(root, detail=True).items()}
        return _held(
            source, ((path, size, partial(fs.cat_file, path)) for path, size in sizes.items())
        )
    try:
        with fs.open(root, "rb") as file, tarfile.open(fileobj=file, mode="r|gz") as archive:
            return _held(
                source, ((m.name, m.size, partial(_read, archive, m)) for m in archive if m.isreg())
            )
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source} is neither a folder nor a complete .tgz of an emoji package: {error}"
        ) from None


def _held(source: str, found: Iterable[tuple[str, int, Callable[[], bytes]]]) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    room = MAX_PACKAGE
    for path, size, read in found:
        match = _MEMBER.search(path)
        if match is None:
            continue
        room -= size
        if size > (MAX_DRAWING if match[2] else MAX_TABLE) or room < 0:
            raise DataError(
                f"{source}: {match[1]} has {size:,} bytes; a drawing may have {MAX_DRAWING:,}, "
                "emoji.json "
                f"{MAX_TABLE:,}, all together {MAX_PACKAGE:,}: is it an emoji package?"
            )
        files[match[1]] = bytes(read())
    return files


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _style(source: str, files: dict[str, bytes]) -> str:
    styles = {match[2] for name in files if (match := _MEMBER.search(name)) and match[2]}
    if "emoji.json" not in files or len(styles) != 1:
        raise DataError(f"{source} holds no emoji.json with one folder img/STYLE/64 of drawings")
    style = styles.pop()
    if style not in LICENSES:
        raise DataError(f"the drawings of {style!r} must not be copied" + suggest(style, LICENSES))
    return style


def _rows(source: str, files: dict[str, bytes], style: str) -> Iterator[Row]:
    try:
        entries = [entry for entry in json.loads(files["emoji.json"]) if entry[f"has_img_{style}"]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{source}: emoji.json is not a list of emoji: {error}") from None
    for number, entry in enumerate(entries):
        key = f"{style}-{entry.get('unified', number)}".lower()
        yield key, partial(_sample, key, entry, files, style)


def _sample(key: str, entry: dict[str, Any], files: dict[str, bytes], style: str) -> Sample:
    try:
        image = files.get(f"img/{style}/64/{entry['image']}")
        name, labels, code = (
            entry["name"],
            (entry["category"], entry["subcategory"]),
            entry["unified"],
        )
    except KeyError as error:
        raise BadSample(Reason.BAD_ROW, f"the emoji has no {error}") from None
    if image is None:
        raise BadSample(Reason.MISSING_IMAGE, f"there is no drawing {entry['image']}")
    return pair(
        key,
        image,
        caption(name).lower(),
        labels=labels,
        license=LICENSES[style],
        provenance={"unicode": code},
    )
