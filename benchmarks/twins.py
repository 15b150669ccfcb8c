"""Precision of the perceptual hash, with and without colors.

python -m benchmarks.twins         half a minute

Compares the clip art of examples/data, which has no duplicates, with copies in other encodings,
sizes and brightness. Near duplicates are close by the hash, and optionally by the colors of a
thumbnail.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

from bridgework.curation.dedup import Dedup
from bridgework.curation.near_duplicates import (
    NearestIndex,
    color_distance,
    earlier_neighbors,
    pack_codes,
    perceptual_code,
)
from bridgework.data.dataset import open_dataset
from bridgework.data.images import decode

DATASET = Path(__file__).parents[1] / "examples" / "data" / "clipart"
COPIED = 400  # images
LIMITS = Dedup(by="perceptual")


def file(image: Image.Image, form: str, quality: int = 80) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, quality=quality)
    return stream.getvalue()


def half(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


COPIES: dict[str, Callable[[Image.Image], bytes]] = {
    "JPEG at quality 50": lambda image: file(image, "JPEG", 50),
    "JPEG at quality 20": lambda image: file(image, "JPEG", 20),
    "WebP at quality 30": lambda image: file(image, "WEBP", 30),
    "half the size": lambda image: file(half(image), "WEBP"),
    "15 % brighter": lambda image: file(ImageEnhance.Brightness(image).enhance(1.15), "PNG"),
    "15 % darker": lambda image: file(ImageEnhance.Brightness(image).enhance(0.85), "PNG"),
    "grey": lambda image: file(image.convert("L"), "PNG"),
}


def row(name: str, near: int, of: int, apart: list[int]) -> str:
    """Return a line of the table; `apart` are the color distances of the pairs near by the hash."""
    by_color = sum(colors <= LIMITS.color for colors in apart)
    median, largest = (f"{np.percentile(apart, share):.0f}" for share in (50, 100))
    return f"| {name} | {of} | {near} | {by_color} | {median} | {largest} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    images = [sample.images[0] for sample in open_dataset(str(DATASET)).samples()]
    by_image = {image: code for image in images if (code := perceptual_code(image))}
    hashes = list(by_image.values())
    pairs = [
        color_distance(hashes[here], hashes[there])
        for here, others in enumerate(
            earlier_neighbors(pack_codes("perceptual", hashes), LIMITS.distance)
        )
        for there in others
    ]
    print(
        f"{len(hashes)} images; near duplicates: at most {LIMITS.distance} of 64 bits, "
        f"and colors {LIMITS.color} of 255\n"
    )
    print(
        "| pairs | of | near by the hash | and by colors | distance, median | largest |\n"
        "|---|---|---|---|---|---|"
    )
    print(row("different files", len(pairs), len(hashes) * (len(hashes) - 1) // 2, pairs))
    for name, copied in COPIES.items():
        apart = []
        for image in list(by_image)[:COPIED]:
            code = perceptual_code(copied(decode(image)))
            index = NearestIndex("perceptual", [by_image[image]])
            if code and index([code])[0][0] <= LIMITS.distance:
                apart.append(color_distance(by_image[image], code))
        print(row(name, len(apart), COPIED, apart))


if __name__ == "__main__":
    main()
