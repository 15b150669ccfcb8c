"""Samples: images, and parts of text and image places in reading order.

One Arrow schema for every kind.

pair            parts = image and text, both of role caption
conversation    parts = turns of system, user and assistant; an image is at its position in the turn
preference      a conversation whose last answer is the chosen one, and `rejected`, the other
interleaved     parts = texts and images of a document, in order, all of role caption
video           images = frames, and `times_s`, the time of each
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import pyarrow as pa

from bridgework.data.quarantine import BadSample, Reason

Role = Literal["caption", "system", "user", "assistant"]
ROLES: tuple[str, ...] = get_args(Role)
SCHEMA_VERSION = 1
# column and manifest key of the license in schema 1: another spelling would change every digest
LICENSE = "licence"
# key in the provenance column of the candidates, as JSON, so that older versions read the shards
CANDIDATES = "bridgework:candidates"


@dataclass(frozen=True)
class Part:
    """Either a text or the place of an image, which is an index into the sample's images."""

    role: Role
    text: str | None = None
    image: int | None = None

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise BadSample(
                Reason.BAD_ROW,
                f"unknown role of a part. Got {self.role!r}; expected {', '.join(ROLES)}",
            )
        if (self.text is None) == (self.image is None):
            raise BadSample(
                Reason.BAD_ROW, f"a part of role {self.role} needs a text or an image, but not both"
            )


@dataclass(frozen=True)
class Box:
    """A labeled rectangle.

    `corners` are left, top, right, bottom as shares of the image, in [0, 1].
    """

    image: int
    corners: tuple[float, float, float, float]
    label: str = ""

    def __post_init__(self) -> None:
        if not all(0 <= corner <= 1 for corner in self.corners):  # rejects NaN too
            raise BadSample(
                Reason.BAD_ROW,
                f"a box is outside its image. Got {self.corners}; expected corners in [0, 1]",
            )


@dataclass(frozen=True)
class Sample:
    """One training sample. `images` are the original files (JPEG, PNG, ...), never pixels."""

    key: str
    images: tuple[bytes, ...]
    parts: tuple[Part, ...]
    rejected: str | None = None
    times_s: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    ocr: str | None = None
    language: str | None = None
    license: str | None = None
    provenance: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()  # answers of a multiple-choice question, in order

    def __post_init__(self) -> None:
        if not self.key:
            raise BadSample(Reason.BAD_ROW, "the sample has no key")
        if self.candidates and (
            len(self.candidates) < 2 or not all(map(str.strip, self.candidates))
        ):
            raise BadSample(
                Reason.BAD_ROW,
                f"invalid candidates. Got {self.candidates}; expected two or more, none blank",
            )
        places = [part.image for part in self.parts if part.image is not None]
        if sorted(set(places)) != list(range(len(self.images))):
            raise BadSample(
                Reason.PLACEHOLDERS,
                f"the parts do not match the images. Got parts with images {places}; "
                f"expected each of {len(self.images)} images, from 0 on",
            )
        if any(not 0 <= box.image < len(self.images) for box in self.boxes):
            raise BadSample(
                Reason.BAD_ROW,
                f"a box has an image index out of range; the sample has {len(self.images)} images",
            )
        if self.times_s and len(self.times_s) != len(self.images):
            raise BadSample(
                Reason.BAD_ROW, f"{len(self.times_s)} times for {len(self.images)} frames"
            )

    @property
    def text(self) -> str:
        """All texts in order, one per line, the rejected answer last.

        For display and curations, not for training.
        """
        texts = (*(part.text for part in self.parts), self.rejected)
        return "\n".join(text for text in texts if text is not None)


def pair(key: str, image: bytes, caption: str, **optional: Any) -> Sample:
    """Return a sample of one image and its caption; `optional` sets further fields of `Sample`.

    Raises BadSample for a blank caption.
    """
    if not caption.strip():
        raise BadSample(Reason.EMPTY_TEXT, "the caption is empty")
    return Sample(
        key, (image,), (Part("caption", image=0), Part("caption", text=caption)), **optional
    )


_PART = pa.struct([("role", pa.string()), ("text", pa.string()), ("image", pa.int32())])
_BOX = pa.struct(
    [("image", pa.int32()), ("corners", pa.list_(pa.float32(), 4)), ("label", pa.string())]
)
SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),
        pa.field("images", pa.list_(pa.binary()), nullable=False),
        pa.field("parts", pa.list_(_PART), nullable=False),
        pa.field("rejected", pa.string()),
        pa.field("times_s", pa.list_(pa.float32()), nullable=False),
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("boxes", pa.list_(_BOX), nullable=False),
        pa.field("ocr", pa.string()),
        pa.field("language", pa.string()),
        pa.field(LICENSE, pa.string()),
        pa.field("provenance", pa.map_(pa.string(), pa.string()), nullable=False),
    ]
)


def to_row(sample: Sample) -> dict[str, Any]:
    """Return a sample as a row of SCHEMA."""
    row = vars(sample) | {
        "images": list(sample.images),
        "parts": [vars(part) for part in sample.parts],
        "boxes": [vars(box) for box in sample.boxes],
        "provenance": list(sample.provenance.items()),
    }
    row[LICENSE] = row.pop("license")
    if candidates := row.pop("candidates"):
        row["provenance"].append((CANDIDATES, json.dumps(candidates, ensure_ascii=False)))
    return row


def from_row(row: Mapping[str, Any]) -> Sample:
    """Return the sample of a row from pyarrow's `to_pylist`: the inverse of `to_row`.

    Raises BadSample for a row that is not a valid sample.
    """
    row = dict(row)
    row["license"] = row.pop(LICENSE)
    provenance = dict(row["provenance"])
    stored = provenance.pop(CANDIDATES, None)
    candidates = row.get("candidates") or (_from_json(stored) if stored is not None else [])
    if not isinstance(candidates, list | tuple) or not all(
        isinstance(text, str) for text in candidates
    ):
        raise BadSample(
            Reason.BAD_ROW,
            f"invalid candidates. Got {str(candidates)[:80]}; expected a list of strings",
        )
    return Sample(
        **{
            **row,
            "images": tuple(image or b"" for image in row["images"]),  # null: a file of 0 bytes
            "parts": tuple(Part(**part) for part in row["parts"]),
            "times_s": tuple(row["times_s"]),
            "labels": tuple(row["labels"]),
            "boxes": tuple(
                Box(**{**box, "corners": tuple(box["corners"])}) for box in row["boxes"]
            ),
            "provenance": provenance,
            "candidates": tuple(candidates),
        }
    )


def _from_json(stored: str) -> Any:
    """Parse the candidates of the provenance column. Raises BadSample for invalid JSON."""
    try:
        return json.loads(stored)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadSample(Reason.BAD_ROW, f"the candidates are not valid JSON: {error}") from None
