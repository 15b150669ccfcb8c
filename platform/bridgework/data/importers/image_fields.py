"""Pictures of a row: the fields that may hold them, and the cells that they may be."""

import re
from collections.abc import Mapping
from typing import Any

from bridgework.data.importers import read_image
from bridgework.data.quarantine import BadSample, Reason

FIRST = ("image", "images", "image_path")  # of several fields that hold pictures, these lead

_FIELD = re.compile(
    r"(?:image|img|pic|picture|photo)s?(?:_?(?:file|filename|file_name|link|name|path|uri|url)s?)?"
    r"|file_?name|file_?path",
    re.IGNORECASE,
)
_NEAR = re.compile(r"image|img|pic|photo|visual|media|file|path", re.IGNORECASE)
_ID = re.compile(r"(?:image|img|pic|picture|photo)_?ids?", re.IGNORECASE)
_FILE = re.compile(
    r".*\.(?:avif|bmp|gif|heic|jfif|jpe?g|jpe|png|tiff?|webp)(?:[?#].*)?", re.I | re.S
)


def shown(row: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row as it names them: of the first field that holds any.

    A field is `image`, `images`, `image_path`, `img_path` and the like. Raises BadSample for a row
    that seems to have a picture, which none of these names.
    """
    names = [name for name in row if isinstance(name, str)]
    fields = dict.fromkeys((*FIRST, *(name for name in names if _FIELD.fullmatch(name))))
    for name in fields:
        if found := _listed(row.get(name)):
            return found
    for name in names:
        if _ID.fullmatch(name) and row[name] not in (None, "", []):
            raise BadSample(
                Reason.BAD_ROW,
                f"the row names its picture by `{name}` alone: {str(row[name])[:80]}. "
                "Fix: give the path of its file as `image`",
            )
        if _NEAR.search(name) and any(map(_is_picture, _listed(row[name]))):
            raise BadSample(
                Reason.BAD_ROW,
                f"the field `{name}` seems to hold the row's picture and is not read. Fix: rename "
                "it to `image`",
            )
    return []


def read_cell(folder: str, cell: Any) -> bytes:
    """The picture in a cell: its bytes, {bytes, path}, or a path inside `folder`.

    Raises BadSample.
    """
    if isinstance(cell, dict):
        cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
    if isinstance(cell, bytes):
        return cell
    if cell is None:
        raise BadSample(Reason.MISSING_IMAGE, "the cell of the image is empty")
    return read_image(folder, cell)


def _listed(value: Any) -> list[Any]:
    """The pictures that a field holds, without those that are null or blank."""
    given = value if isinstance(value, list) else [value]
    return [cell for cell in given if cell is not None and cell != "" and not _is_null(cell)]


def _is_null(cell: Any) -> bool:
    return isinstance(cell, dict) and all(cell.get(name) is None for name in ("bytes", "path"))


def _is_picture(cell: Any) -> bool:
    if isinstance(cell, str):
        return cell.startswith("data:image") or _FILE.fullmatch(cell) is not None
    return isinstance(cell, bytes) or (
        isinstance(cell, dict) and not cell.keys() - {"bytes", "path"}
    )
