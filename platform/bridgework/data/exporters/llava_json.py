"""LLaVA's JSON: a list of {"id", "image"?, "conversations": [{"from", "value"}]}, and its images.

An image is named by its sha256, so one that many rows show is stored once. The format holds
conversations and no other field of a row.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import fsspec

from bridgework.config import config_class
from bridgework.data.exporters import Exported, Losses, ending, licensed, staged
from bridgework.data.importers import PLACEHOLDER
from bridgework.data.importers.llava_json import ROLES, parts
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError

FILE = "conversations.json"
LOST = ("rejected", "times_s", "labels", "boxes", "ocr", "language", "license", "provenance")

_SPEAKERS = {role: speaker for speaker, role in ROLES.items()}


@config_class
class LlavaJsonExporter:
    """Write a dataset as DEST/conversations.json and DEST/images/.

    With `prompt`, a pair becomes a conversation of one turn: the prompt, and the caption as its
    answer. A row that is not a conversation is an error, and so is an existing DEST; then nothing
    is left there.
    """

    prompt: str | None = None

    def run(self, source: str, dest: str) -> Exported:
        losses, rows, images = Losses(), 0, 0
        with (
            staged(dest, last=FILE) as (fs, folder),
            fs.open(f"{folder}/{FILE}", "w", encoding="utf-8") as file,
        ):
            fs.makedirs(f"{folder}/images")
            for sample in licensed(source):
                entry = _entry(sample, self.prompt)
                names = [_image(fs, folder, image) for image in _shown(sample)]
                entry |= {"image": names[0] if len(names) == 1 else names} if names else {}
                entry |= {"candidates": list(sample.candidates)} if sample.candidates else {}
                file.write((",\n" if rows else "[\n") + json.dumps(entry, ensure_ascii=False))
                losses.note(sample, LOST)
                rows, images = rows + 1, images + len(sample.images)
            file.write("\n]\n")
        return Exported(rows, images, losses)


def _shown(sample: Sample) -> list[bytes]:
    """Return the images, each as often as it is shown."""
    return [sample.images[part.image] for part in sample.parts if part.image is not None]


def _image(fs: fsspec.AbstractFileSystem, folder: str, image: bytes) -> str:
    name = hashlib.sha256(image).hexdigest()[:32]
    path = f"images/{name[:2]}/{name}.{ending(image)}"
    if not fs.exists(f"{folder}/{path}"):
        fs.makedirs(f"{folder}/images/{name[:2]}", exist_ok=True)
        fs.pipe_file(f"{folder}/{path}", image)
    return path


def _entry(sample: Sample, prompt: str | None) -> dict[str, Any]:
    """Return a row of the JSON. Raises DataError for a sample that an import would change."""
    spoken = _numbered(sample.parts if prompt is None else _asked(sample.parts, prompt))
    turns = [
        {
            "from": _SPEAKERS.get(role),
            "value": "".join(PLACEHOLDER if p.text is None else p.text for p in of_role),
        }
        for role, of_role in groupby(spoken, key=lambda part: part.role)
    ]
    try:
        same = list(parts(turns)) == spoken
    except BadSample as error:
        hint = (
            "; prompt=TEXT makes one of a pair" if prompt is None and _is_pair(sample.parts) else ""
        )
        raise DataError(
            f"{sample.key!r} is not a conversation of questions and answers: {error.detail}{hint}"
        ) from None
    if not same:
        raise DataError(
            f"{sample.key!r}: a text holds {PLACEHOLDER!r} or is empty, which LLaVA's JSON cannot "
            "hold"
        )
    return {"id": sample.key, "conversations": turns}


def _numbered(given: Iterable[Part]) -> list[Part]:
    """Return the parts with images numbered as shown, and consecutive texts of one role joined."""
    numbered: list[Part] = []
    for part in given:
        last = numbered[-1] if numbered else None
        if part.image is not None:
            numbered.append(replace(part, image=sum(p.image is not None for p in numbered)))
        elif last is not None and last.text is not None and last.role == part.role:
            numbered[-1] = replace(part, text=f"{last.text}{part.text}")
        else:
            numbered.append(part)
    return numbered


def _is_pair(given: Sequence[Part]) -> bool:
    return [(part.role, part.text is None) for part in given] == [
        ("caption", True),
        ("caption", False),
    ]


def _asked(given: Sequence[Part], prompt: str) -> Sequence[Part]:
    """Return a pair as a question about its image with its answer; anything else unchanged."""
    if not _is_pair(given):
        return given
    return (
        Part("user", image=0),
        Part("user", text=f"\n{prompt}"),
        replace(given[1], role="assistant"),
    )
