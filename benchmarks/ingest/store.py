"""Data of the benchmarks, created once under the home: the same bytes in every library's format.

<home>/benchmarks/<pictures>-<rows>-v1/<part>/bridgework     our dataset
<home>/benchmarks/<pictures>-<rows>-v1/<part>/<library>      the same rows in the same order
"""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from bridgework.data.catalog import home
from bridgework.data.dataset import open_dataset, write
from bridgework.data.samples import pair

CLIPART = "examples/data/clipart"  # 1,866 WebP files of 128 px, 2 kB each
PHOTOS = {"photos": (640, 480), "large": (1_280, 960)}  # pixels
DISTINCT = 512  # images of each kind; the rows repeat them, with different keys
VERSION = 1  # of the data; another number creates it again
SHARDS = 4  # per part, if a library's writer does not limit bytes
WHOLE = ("whole",)
MIX = ("mix-0", "mix-1", "mix-2", "mix-3")  # a half, a quarter, an eighth and an eighth of the rows
SIZES = {"whole": 1, "mix-0": 2, "mix-1": 4, "mix-2": 8, "mix-3": 8}  # part -> all rows / its rows


class Raw(NamedTuple):
    """A stored sample."""

    key: str  # <part>/<number>
    image: bytes  # a file
    text: str


Write = Callable[[Iterable[Raw], Path], None]


@dataclass(frozen=True)
class Store:
    """`rows` rows with one kind of image."""

    pictures: str  # clipart | photos | large
    rows: int

    def size(self, part: str) -> int:
        return self.rows // SIZES[part]

    def dataset(self, part: str) -> Path:
        """Return our dataset of a part; creates it if missing."""

        def make(folder: Path) -> None:
            samples = (pair(*raw) for raw in self._make(part))
            write(
                samples,
                str(folder),
                source=self.pictures,
                license="public domain",
                made_by="benchmarks.ingest",
                shard_rows=max(32, self.size(part) // SHARDS // 32 * 32),
            )

        return _once(self._folder(part) / "bridgework", make)

    def folder(self, part: str, library: str, write: Write) -> Path:
        """Return the part in the format of a library, written from our dataset if missing."""
        return _once(self._folder(part) / library, lambda folder: write(self.raws(part), folder))

    def raws(self, part: str) -> Iterator[Raw]:
        """Yield the samples of a part, from our dataset."""
        for sample in open_dataset(str(self.dataset(part))).samples():
            yield Raw(sample.key, sample.images[0], sample.text)

    def _folder(self, part: str) -> Path:
        return home() / "benchmarks" / f"{self.pictures}-{self.rows}-v{VERSION}" / part

    def _make(self, part: str) -> Iterator[Raw]:
        art = _clipart()
        for row in range(self.size(part)):
            file, text = art[row % len(art)]
            size = PHOTOS.get(self.pictures)
            yield Raw(
                f"{part}/{row:06d}", file if size is None else photo(row % DISTINCT, *size), text
            )


@cache
def photo(row: int, width: int, height: int) -> bytes:
    """Return a JPEG of quality 90, 70 kB at 640 x 480: clip art on a gradient with fine grain.

    Deterministic in its arguments.
    """
    draw = np.random.default_rng(row)
    y, x = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[:, None]
    corner, right, down = draw.uniform(120, 255, (3, 3))
    image = Image.fromarray(
        (corner * (1 - x - y) + right * x + down * y).clip(60, 255).astype(np.uint8)
    )
    art = _clipart()
    for _ in range(3):
        side = int(draw.integers(height // 3, 5 * height // 6))
        file, _ = art[int(draw.integers(len(art)))]
        layer = Image.new("RGB", (width, height), "white")
        place = (
            int(draw.integers(width - side // 2)) - side // 4,
            int(draw.integers(height - side // 2)) - side // 4,
        )
        layer.paste(Image.open(io.BytesIO(file)).convert("RGB").resize((side, side)), place)
        image = ImageChops.multiply(image, layer)
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))) + draw.normal(
        0, 4, (height, width, 1)
    )
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


@cache
def _clipart() -> list[tuple[bytes, str]]:
    return [(sample.images[0], sample.text) for sample in open_dataset(CLIPART).samples()]


def in_shards(raws: Iterable[Raw], rows: int) -> Iterator[tuple[int, list[Raw]]]:
    """Yield (number, samples) of every shard."""
    left, number = iter(raws), 0
    while shard := list(islice(left, rows)):
        yield number, shard
        number += 1


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Create `folder` atomically, with `make` in a temporary folder; an existing one is kept."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = folder.with_name(f".{folder.name}-{uuid4().hex[:8]}")
        try:
            make(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder
