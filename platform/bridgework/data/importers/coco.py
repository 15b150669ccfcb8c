"""COCO (Lin et al. 2014, arXiv:1405.0312; captions: Chen et al. 2015, arXiv:1504.00325).

captions_*.json    one row per caption; with `instances`, with the boxes of its image
instances_*.json   one row per image, with its boxes and without a text
both in one file   one row per caption, with the boxes of its image; an image without one as above
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from math import isfinite
from typing import Any, NamedTuple

from bridgework.config import config_class
from bridgework.data.images import size_of
from bridgework.data.importers import (
    UNKNOWN,
    Captions,
    Importer,
    Listing,
    Row,
    caption,
    fingerprint,
    leave_out,
    read_image,
    read_text,
    texts,
)
from bridgework.data.importers.tables import document, listed, parent
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Box, Part, Sample, pair
from bridgework.errors import DataError


class Mark(NamedTuple):
    """A marked region of an image, not validated yet."""

    name: str | None  # of its category
    bbox: Any  # [left, top, width, height] in pixels
    crowd: bool  # around a group, not a single object


@dataclass(frozen=True)
class Picture:
    """The entries of the files for one image, not validated yet."""

    key: str
    file: Any
    width: Any
    height: Any
    license: str | None = None
    marks: tuple[Mark, ...] = ()


@config_class
class CocoImporter(Importer):
    """Import captions_*.json or instances_*.json.

    The images are in the folder `images`, by default the file's own.

    The second caption of an image gets the key `IMAGE_ID#2`; a caption that its image already has
    is left out and counted. `instances` is a file whose boxes and labels are added to the rows of a
    file of captions. Boxes around a crowd are dropped and counted in the row's provenance. A row
    has the license of its image, if the file has one.
    """

    images: str | None = None
    instances: str | None = None
    license: str = UNKNOWN

    def list_rows(self, source: str) -> Listing:
        text = read_text(source)
        boxes = "" if self.instances is None else read_text(self.instances)
        folder = parent(source) if self.images is None else self.images
        return Listing(
            partial(_rows, text, source, boxes, self.instances, folder),
            fingerprint(text, boxes),
            replace(self, images=folder),
        )


def _rows(text: str, source: str, base: str, instances: str | None, folder: str) -> Iterator[Row]:
    given = document(text, source)
    notes = listed(given, "annotations", source)
    boxed = "categories" in given and not any(map(_is_caption, notes))
    if boxed:
        listed(given, "categories", source)
    own = _marks(given, notes if boxed else list(filter(_is_mark, notes)))
    if own and instances is not None:
        raise DataError(
            f"{source} holds instances itself; instances={instances} goes with a file of captions"
        )
    others = dict[str | None, list[Mark]]()
    if instances is not None:
        other = document(base, instances)
        listed(other, "categories", instances)
        noted = listed(other, "annotations", instances)
        others = _marks(other, [note for note in noted if _is_mark(note) or not _is_caption(note)])
    pictures = _pictures(given, source, own | others)
    yield from _boxed(pictures, folder) if boxed else _captions(notes, own, pictures, folder)
    for image, found in (own | others).items():
        if image is None or (image in own and image not in pictures):
            yield (
                f"boxes-{image}",
                partial(_refused, f"{len(found)} boxes of image {image}, which is not there"),
            )
    if instances is not None:
        for _ in filter(_is_caption, noted):
            yield "caption", partial(leave_out, "captions of the file of instances")


def _is_caption(note: Any) -> bool:
    return isinstance(note, dict) and note.get("caption") is not None


def _is_mark(note: Any) -> bool:
    return isinstance(note, dict) and any(note.get(name) for name in ("bbox", "segmentation"))


def _captions(
    notes: list[Any],
    own: Mapping[str | None, list[Mark]],
    pictures: Mapping[str | int, Picture],
    folder: str,
) -> Iterator[Row]:
    """Yield a row per caption, and one per image that has boxes only, in the file itself."""
    captions, seen = Captions(), set[str]()
    for number, note in enumerate(notes):
        if not _is_caption(note) and _is_mark(note):
            continue
        image = _id(note, "image_id")
        if image is None or image not in pictures:
            why = f"a caption of no image of the file: {str(note)[:80]}"
            why = note.detail if isinstance(note, BadSample) else why
            yield f"row-{number:08d}", partial(_refused, why)
            continue
        seen.add(image)
        for text in texts(note.get("caption")):
            make = partial(_captioned, pictures[image], text, folder)
            yield captions(pictures[image].key, text, make)
    for entry, picture in pictures.items():
        if entry in own and entry not in seen:
            yield captions(picture.key, None, partial(_pictured, picture, folder))


def _boxed(pictures: Mapping[str | int, Picture], folder: str) -> Iterator[Row]:
    return (
        (picture.key, partial(_pictured, picture, folder, picture.key))
        for picture in pictures.values()
    )


def _refused(why: str) -> Sample:
    raise BadSample(Reason.BAD_ROW, why)


def _captioned(picture: Picture, text: Any, folder: str, key: str) -> Sample:
    data = read_image(folder, picture.file)
    return pair(key, data, caption(text), **_annotations(picture, data))


def _pictured(picture: Picture, folder: str, key: str) -> Sample:
    data = read_image(folder, picture.file)
    return Sample(key, (data,), (Part("caption", image=0),), **_annotations(picture, data))


def _annotations(picture: Picture, data: bytes) -> dict[str, Any]:
    """Return the fields of a row other than image and text."""
    single = [mark for mark in picture.marks if not mark.crowd]
    boxes = _boxes(picture, single, data) if picture.marks else ()
    dropped = {"boxes": len(single) - len(boxes), "crowds": len(picture.marks) - len(single)}
    counts = {f"dropped.{kind}": str(count) for kind, count in dropped.items() if count}
    return {
        "labels": tuple(dict.fromkeys(str(mark.name) for mark in picture.marks)),
        "boxes": boxes,
        "license": picture.license,
        "provenance": {"file": picture.file} | counts,
    }


def _boxes(picture: Picture, marks: list[Mark], data: bytes) -> tuple[Box, ...]:
    """Return the boxes clamped to the image, without those that have no area there."""
    sides = _side(picture.width), _side(picture.height)
    if sides[0] is None or sides[1] is None:
        raise BadSample(
            Reason.BAD_ROW,
            f"the image has boxes, and is {picture.width!r} x {picture.height!r} pixels",
        )
    wide, high = sides[0], sides[1]
    width, height = size_of(data)
    if abs(width * high - height * wide) > max(
        width, height, wide, high
    ):  # a smaller copy may be off by rounding
        raise BadSample(
            Reason.BAD_ROW,
            f"the boxes are for {wide:g} x {high:g} pixels, and the file has {width} x {height}",
        )
    if any(mark.name is None for mark in picture.marks):
        raise BadSample(Reason.BAD_ROW, "a box is of a category that the file does not name")
    placed = [Box(0, _corners(mark.bbox, wide, high), str(mark.name)) for mark in marks]
    return tuple(
        box for box in placed if box.corners[0] < box.corners[2] and box.corners[1] < box.corners[3]
    )


def _side(value: Any) -> float | None:
    """Return the pixels of a side, written as a number or as its digits; None for anything else."""
    try:
        side = (
            float(value)
            if isinstance(value, int | float | str) and not isinstance(value, bool)
            else 0.0
        )
    except (ValueError, OverflowError):
        return None
    return side if isfinite(side) and side > 0 else None


def _corners(bbox: Any, width: float, height: float) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom as fractions of the image, in [0, 1]."""
    numbers = (
        bbox
        if isinstance(bbox, list) and all(isinstance(value, int | float) for value in bbox)
        else []
    )
    try:
        left, top, wide, high = map(float, numbers)
    except (ValueError, OverflowError):
        raise BadSample(
            Reason.BAD_ROW, f"a box is {str(bbox)[:80]}; four numbers are wanted"
        ) from None
    if not all(map(isfinite, (left, top, wide, high))):
        raise BadSample(Reason.BAD_ROW, f"a box is {bbox}; its numbers must be finite")
    shares = left / width, top / height, (left + wide) / width, (top + high) / height
    left, top, right, bottom = (min(max(share, 0.0), 1.0) for share in shares)
    return left, top, right, bottom


def _pictures(
    given: Any, source: str, marks: Mapping[str | None, list[Mark]]
) -> dict[str | int, Picture]:
    """Return the images by id; an entry without one, or with that of another, by its number."""
    licenses, pictures = _names(given.get("licenses")), dict[str | int, Picture]()
    for number, entry in enumerate(listed(given, "images", source)):
        image = _id(entry, "id")
        fields = entry if isinstance(entry, dict) and image is not None else {}
        pictures[number if image is None or image in pictures else image] = Picture(
            key=f"row-{number:08d}" if image is None else image,
            file=fields.get("file_name"),
            width=fields.get("width"),
            height=fields.get("height"),
            license=licenses.get(_id(fields, "license") or ""),
            marks=() if image is None else tuple(marks.get(image, ())),
        )
    return pictures


def _marks(given: Any, notes: list[Any]) -> dict[str | None, list[Mark]]:
    """Return the marks by the id of their image; under None, those without an image."""
    names, marks = _names(given.get("categories")), defaultdict[str | None, list[Mark]](list)
    for note in notes:
        fields = note if isinstance(note, dict) else {}
        name = names.get(_id(fields, "category_id") or "")
        if name is None and isinstance(
            fields.get("caption"), str
        ):  # a region that has a text of its own
            name = fields["caption"].strip() or None
        marks[_id(fields, "image_id")].append(Mark(name, fields.get("bbox"), _is_crowd(fields)))
    return dict(marks)


def _is_crowd(note: Mapping[str, Any]) -> bool:
    return note.get("iscrowd") in (1, "1", "true", "True")


def _names(entries: Any) -> dict[str, str]:
    """Return the names of categories or licenses, by their ids."""
    given = entries if isinstance(entries, list) else []
    found = {
        _id(e, "id"): e["name"]
        for e in given
        if isinstance(e, dict) and isinstance(e.get("name"), str)
    }
    return {name: text for name, text in found.items() if name is not None}


def _id(entry: Any, name: str) -> str | None:
    """Return an id as a text; an integer by its digits, in any notation. None if there is no id."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (
        str(value)
        if isinstance(value, int | str) and not isinstance(value, bool) and value != ""
        else None
    )
