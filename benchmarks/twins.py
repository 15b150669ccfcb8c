"""What a perceptual hash takes for one picture, with and without colors: `python -m benchmarks.twins`, half a minute.

The clip art of examples/data, none of it there twice, and copies of it in other encodings, sizes and brightness. Twins
are near by the hash, and by the colors of a thumbnail where these are asked too.
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
COPIED = 400  # pictures
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
    """A line of the table; `apart` holds how far apart the colors of those that are near by the hash are."""
    kept = sum(colors <= LIMITS.color for colors in apart)
    middle, most = (f"{np.percentile(apart, share):.0f}" for share in (50, 100))
    return f"| {name} | {of} | {near} | {kept} | {middle} | {most} |"


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    pictures = [sample.images[0] for sample in open_dataset(str(DATASET)).samples()]
    told = {image: code for image in pictures if (code := perceptual_code(image))}
    signed = list(told.values())
    pairs = [
        color_distance(signed[here], signed[there])
        for here, others in enumerate(
            earlier_neighbors(pack_codes("perceptual", signed), LIMITS.distance)
        )
        for there in others
    ]
    print(
        f"{len(signed)} pictures; twins by at most {LIMITS.distance} of 64 bits, and colors {LIMITS.color} of 255\n"
    )
    print(
        "| pairs | of | twins by the hash | and by colors | apart, median | most |\n|---|---|---|---|---|---|"
    )
    print(row("different files", len(pairs), len(signed) * (len(signed) - 1) // 2, pairs))
    for name, copied in COPIES.items():
        apart = []
        for image in list(told)[:COPIED]:
            code = perceptual_code(copied(decode(image)))
            if code and NearestIndex("perceptual", [told[image]])([code])[0][0] <= LIMITS.distance:
                apart.append(color_distance(told[image], code))
        print(row(name, len(apart), COPIED, apart))


if __name__ == "__main__":
    main()
