"""Exporters: each module holds one config class, whose fields are the options of a format.

`bridgework data export llava-json SOURCE DEST` runs `llava_json.LlavaJsonExporter`; one of your own
is given by the import path of its module. An export is complete or absent, and reports the fields
that its format could not hold.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from uuid import uuid4

import fsspec

from bridgework.data.dataset import open_dataset
from bridgework.data.importers import UNKNOWN
from bridgework.data.manifest import refuse_within
from bridgework.data.names import check_place
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.plugins import Plugins
from bridgework.storage import find_store

FORMATS = Plugins(
    kind="format",
    package=__name__,
    methods=("run",),
    example="my_lab.tables",
    hint="docs/data-formats.md",
    separator="-",
    error=DataError,
)

_MAGIC = (
    (b"\xff\xd8\xff", 0, "jpg"),
    (b"\x89PNG", 0, "png"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"BM", 0, "bmp"),
)


@dataclass(frozen=True)
class Exported:
    """Counts of an export: rows, images, and the rows in which a field was lost."""

    rows: int
    images: int
    lost: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lost = ", ".join(f"{name} of {rows:,} rows" for name, rows in sorted(self.lost.items()))
        return f"{self.rows:,} rows, {self.images:,} images; lost: {lost or 'nothing'}"


class Exporter(Protocol):
    """A config class whose fields are the options of a format."""

    def run(self, source: str, dest: str) -> Exported:
        """Write the dataset at `source` to `dest`.

        Raises DataError, and then leaves nothing there.
        """


def formats() -> list[str]:
    """Return the formats that ship, as the command line writes them."""
    return FORMATS.names()


def load(name: str) -> type[Exporter]:
    """Return the exporter of a format: `llava-json`, or the import path of a module that holds one.

    Raises DataError for a name that is neither, for a module whose import fails or that holds none.
    """
    return FORMATS.load_class(name)


class Losses(Counter[str]):
    """Counter of the rows in which a filled field is lost."""

    def note(self, sample: Sample, names: tuple[str, ...]) -> None:
        """Count those of the fields `names` that this sample fills."""
        self.update(name for name in names if getattr(sample, name))


@contextmanager
def staged(dest: str, *, last: str) -> Iterator[tuple[fsspec.AbstractFileSystem, str]]:
    """Yield (file system, folder); its files are moved to `dest` at the end, `last` last.

    On any error nothing is left. Raises DataError for an existing `dest`, and inside a dataset.
    """
    check_place(dest)
    refuse_within(dest)
    fs, root = find_store(dest.rstrip("/"))
    if fs.exists(root) and (not fs.isdir(root) or fs.ls(root, detail=False)):
        raise DataError(f"{dest} is there already. Fix: delete it, or choose another DEST")
    stage = f"{root}.part-{uuid4().hex[:8]}"
    try:
        fs.makedirs(stage)
        yield fs, stage
        names = [str(path).rsplit(stage, 1)[1].lstrip("/") for path in fs.find(stage)]
        for name in sorted(names, key=lambda name: (name == last, name)):
            fs.makedirs(f"{root}/{name}".rsplit("/", 1)[0], exist_ok=True)
            fs.mv(f"{stage}/{name}", f"{root}/{name}")
    finally:
        if fs.exists(stage):
            fs.rm(stage, recursive=True)


def licensed(source: str) -> Iterator[Sample]:
    """Yield the samples of a dataset, each with its own license, or the dataset's if that is known.

    An export has no manifest, so a license that is only there would be lost.
    """
    dataset = open_dataset(source)
    of_all = None if dataset.manifest.license == UNKNOWN else dataset.manifest.license
    return (
        sample if sample.license else replace(sample, license=of_all)
        for sample in dataset.samples()
    )


def ending(image: bytes) -> str:
    """Return the ending of a file of these bytes: jpg, png, webp, gif, bmp.

    Raises DataError for others.
    """
    for magic, offset, name in _MAGIC:
        if image.startswith(magic, offset):
            return name
    raise DataError(
        f"an image begins with {image[:12]!r}, which is not an image. "
        "Fix: run `bridgework data verify`"
    )


def filled(sample: Sample) -> dict[str, Any]:
    """Return the filled fields of a sample, except key and images, ready for JSON."""
    fields = {
        name: value
        for name, value in vars(sample).items()
        if value and name not in ("key", "images", "parts")
    }
    parts = [
        {name: value for name, value in vars(part).items() if value is not None}
        for part in sample.parts
    ]
    return (
        {"parts": parts}
        | fields
        | ({"boxes": [vars(box) for box in sample.boxes]} if sample.boxes else {})
    )
