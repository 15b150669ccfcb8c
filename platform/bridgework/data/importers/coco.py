"""COCO (Lin et al. 2014, arXiv:1405.0312; captions: Chen et al. 2015, arXiv:1504.00325): captions, boxes, or both.

captions_*.json    a caption a row; with `instances`, each knows the boxes of its image
instances_*.json   an image a row, with its boxes and no text
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite
from typing import Any

from bridgework.data.importers import Keys, Row, Say, caption, fingerprint, ingest, read_image, read_text
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Box, Part, Sample, pair
from bridgework.data.shards import Manifest
from bridgework.data.sources import document, listed, parent
from bridgework.data.transforms import size_of
from bridgework.errors import DataError

Mark = tuple[str | None, Any]  # the name of a category, and [left, top, width, height] in pixels


@dataclass(frozen=True)
class Picture:
    """What the files say of one image; nothing of it is checked yet."""

    key: str
    file: Any
    width: Any
    height: Any
    licence: str | None = None
    marks: tuple[Mark, ...] = ()


def run(
    source: str,
    dest: str,
    *,
    images: str | None = None,
    instances: str | None = None,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import captions_*.json or instances_*.json; the images lie in the folder `images`, by default beside the file.

    The second caption of an image gets the key `IMAGE_ID#2`. `instances`, a file beside one of captions, gives boxes
    and labels to its rows. A row's licence is that of its image, where the file says it.
    """
    text = read_text(source)
    beside = "" if instances is None else read_text(instances)
    folder = parent(source) if images is None else images
    return ingest(
        partial(_rows, text, source, beside, instances, folder),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"images": folder, "instances": instances, "sha256": fingerprint(text, beside)},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _rows(text: str, source: str, beside: str, instances: str | None, folder: str) -> Iterator[Row]:
    whole, marks = document(text, source), dict[int | None, list[Mark]]()
    notes = listed(whole, "annotations", source)
    boxed = "categories" in whole
    if boxed and instances is not None:
        raise DataError(f"{source} holds instances itself; instances={instances} goes with a file of captions")
    if boxed:
        marks = _marks(whole, source)
    elif instances is not None:
        marks = _marks(document(beside, instances), instances)
    pictures = _pictures(whole, source, marks)
    yield from _boxed(pictures, folder) if boxed else _captions(notes, pictures, folder)
    for image in marks:
        if image is None or (boxed and image not in pictures):
            yield f"boxes-{image}", partial(_refused, f"{len(marks[image])} boxes of image {image}, which is not there")


def _captions(notes: list[Any], pictures: Mapping[int | str, Picture], folder: str) -> Iterator[Row]:
    keys = Keys()
    for number, note in enumerate(notes):
        picture = pictures.get(note["image_id"]) if _has_id(note, "image_id") else None
        if picture is None:
            yield f"row-{number:08d}", partial(_refused, f"a caption of no image of the file: {str(note)[:80]}")
        else:
            key = keys(picture.key, note.get("caption"))
            yield key, partial(_captioned, key, picture, note.get("caption"), folder)


def _boxed(pictures: Mapping[int | str, Picture], folder: str) -> Iterator[Row]:
    return ((picture.key, partial(_pictured, picture, folder)) for picture in pictures.values())


def _refused(why: str) -> Sample:
    raise BadSample(Reason.BAD_ROW, why)


def _captioned(key: str, picture: Picture, text: Any, folder: str) -> Sample:
    data = read_image(folder, picture.file)
    return pair(key, data, caption(text), **_told(picture, data))


def _pictured(picture: Picture, folder: str) -> Sample:
    data = read_image(folder, picture.file)
    return Sample(picture.key, (data,), (Part("caption", image=0),), **_told(picture, data))


def _told(picture: Picture, data: bytes) -> dict[str, Any]:
    """What a row knows beside image and text."""
    boxes = _boxes(picture, data) if picture.marks else ()
    lost = len(picture.marks) - len(boxes)
    return {
        "labels": tuple(dict.fromkeys(str(name) for name, _ in picture.marks)),
        "boxes": boxes,
        "licence": picture.licence,
        "provenance": {"file": picture.file} | ({"dropped.boxes": str(lost)} if lost else {}),
    }


def _boxes(picture: Picture, data: bytes) -> tuple[Box, ...]:
    """The boxes clamped to the image, without those that have no area there."""
    sides = picture.width, picture.height
    if not all(isinstance(side, int) and side > 0 for side in sides):
        raise BadSample(Reason.BAD_ROW, f"the image has boxes, and is {sides[0]!r} x {sides[1]!r} pixels")
    width, height = size_of(data)
    if abs(width * sides[1] - height * sides[0]) > max(width, height, *sides):  # a smaller copy may be off by rounding
        raise BadSample(
            Reason.BAD_ROW, f"the boxes are for {sides[0]} x {sides[1]} pixels, and the file has {width} x {height}"
        )
    if any(name is None for name, _ in picture.marks):
        raise BadSample(Reason.BAD_ROW, "a box is of a category that the file does not name")
    placed = [Box(0, _corners(bbox, *sides), str(name)) for name, bbox in picture.marks]
    return tuple(box for box in placed if box.corners[0] < box.corners[2] and box.corners[1] < box.corners[3])


def _corners(bbox: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right, bottom as shares of the image, in [0, 1]."""
    numbers = bbox if isinstance(bbox, list) and all(isinstance(value, int | float) for value in bbox) else []
    try:
        left, top, wide, high = map(float, numbers)
    except (ValueError, OverflowError):
        raise BadSample(Reason.BAD_ROW, f"a box is {str(bbox)[:80]}; four numbers are wanted") from None
    if not all(map(isfinite, (left, top, wide, high))):
        raise BadSample(Reason.BAD_ROW, f"a box is {bbox}; its numbers must be finite")
    shares = left / width, top / height, (left + wide) / width, (top + high) / height
    left, top, right, bottom = (min(max(share, 0.0), 1.0) for share in shares)
    return left, top, right, bottom


def _pictures(whole: Any, source: str, marks: Mapping[int | None, list[Mark]]) -> dict[int | str, Picture]:
    """By id; an entry without one, or with that of another, stands under the number of its row."""
    licences, pictures = _names(whole.get("licenses")), dict[int | str, Picture]()
    for number, entry in enumerate(listed(whole, "images", source)):
        row, known = f"row-{number:08d}", _has_id(entry, "id")
        fields, image = (entry, entry["id"]) if known else ({}, None)
        pictures[row if image is None or image in pictures else image] = Picture(
            key=row if image is None else str(image),
            file=fields.get("file_name"),
            width=fields.get("width"),
            height=fields.get("height"),
            licence=licences.get(fields["license"]) if _has_id(fields, "license") else None,
            marks=() if image is None else tuple(marks.get(image, ())),
        )
    return pictures


def _marks(whole: Any, source: str) -> dict[int | None, list[Mark]]:
    """What is marked in each image, by its id; under None, what belongs to none."""
    names, marks = _names(listed(whole, "categories", source)), defaultdict[int | None, list[Mark]](list)
    for note in listed(whole, "annotations", source):
        name = names.get(note["category_id"]) if _has_id(note, "category_id") else None
        image = note["image_id"] if _has_id(note, "image_id") else None
        marks[image].append((name, note.get("bbox") if isinstance(note, dict) else None))
    return dict(marks)


def _names(entries: Any) -> dict[int, str]:
    """The names of categories or licences, by their ids."""
    given = entries if isinstance(entries, list) else []
    return {e["id"]: e["name"] for e in given if _has_id(e, "id") and isinstance(e.get("name"), str)}


def _has_id(entry: Any, name: str) -> bool:
    return isinstance(entry, dict) and type(entry.get(name)) is int  # True is an int, and no id
