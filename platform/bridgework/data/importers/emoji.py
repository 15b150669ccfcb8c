"""Emoji drawings: the npm packages emoji-datasource-twitter and emoji-datasource-google, as a .tgz or a folder.

The same concept in two artists' styles, with names and categories; Apple's and Facebook's have no licence to copy.
"""

import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import fsspec

from bridgework.data.importers import Row, Say, caption, fingerprint, ingest
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Sample, pair
from bridgework.data.shards import Manifest
from bridgework.data.transforms import MAX_BYTES
from bridgework.errors import DataError, suggest

LICENCES = {"twitter": "CC-BY-4.0", "google": "Apache-2.0"}

# The members that are read; all others, links among them, are passed over, and nothing is unpacked to disk.
_MEMBER = re.compile(r"(?:^|/)(emoji\.json|img/([a-z]+)/64/[0-9a-f-]+\.png)$")


def run(source: str, dest: str, *, max_bad: float = SHARE, say: Say = print) -> Manifest:
    """Import every emoji of the package `source` (skin tones aside) as a pair: its 64-pixel drawing and its name.

    Rows carry the category and subcategory as labels, and the code point in their provenance.
    """
    files = _files(source)
    style = _style(source, files)
    return ingest(
        lambda: _rows(source, files, style),
        source,
        dest,
        licence=LICENCES[style],
        made_by=__name__,
        parameters={
            "style": style,
            "sha256": fingerprint(*(v for _, item in sorted(files.items()) for v in (_, item))),
        },
        max_bad=max_bad,
        say=say,
    )


def _files(source: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(source)
    if fs.isdir(root):
        found = {str(path): match[1] for path in fs.find(root) if (match := _MEMBER.search(str(path)))}
        return {name: bytes(fs.cat_file(path)) for path, name in found.items()}
    try:
        with fs.open(root, "rb") as file, tarfile.open(fileobj=file, mode="r|gz") as archive:
            return dict(_members(archive))
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{source} is neither a folder nor a whole .tgz of an emoji package: {error}") from None


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in archive:
        match = _MEMBER.search(member.name)
        file = archive.extractfile(member) if match and member.isreg() and member.size <= MAX_BYTES else None
        if match and file:
            yield match[1], file.read()


def _style(source: str, files: dict[str, bytes]) -> str:
    styles = {match[2] for name in files if (match := _MEMBER.search(name)) and match[2]}
    if "emoji.json" not in files or len(styles) != 1:
        raise DataError(f"{source} holds no emoji.json with one folder img/STYLE/64 of drawings")
    style = styles.pop()
    if style not in LICENCES:
        raise DataError(f"the drawings of {style!r} must not be copied" + suggest(style, LICENCES))
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
        name, labels, code = entry["name"], (entry["category"], entry["subcategory"]), entry["unified"]
    except KeyError as error:
        raise BadSample(Reason.BAD_ROW, f"the emoji has no {error}") from None
    if image is None:
        raise BadSample(Reason.MISSING_IMAGE, f"there is no drawing {entry['image']}")
    return pair(key, image, caption(name).lower(), labels=labels, licence=LICENCES[style], provenance={"unicode": code})
