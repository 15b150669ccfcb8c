"""From bytes to the square of pixels that a vision tower reads. Training, features and serving all come through here.

The order of the checks is that of trust: bytes, first bytes, header, size, and only then the decoder.
"""

import io
import struct
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
)

from bridgework.data.quarantine import BadSample, Reason
from bridgework.system import Pixels

MAX_BYTES = 64_000_000  # of one file: Parquet's row groups must stay small
MAX_PIXELS = 178_000_000  # decodes to 0.5 GB; twice the size at which Pillow begins to warn
DRAFT_MARGIN = 2  # a JPEG is decoded at the smallest scale that is still twice the target: the last halving is bicubic

# Opened by class rather than by Image.open: no other format gets near its parser, and the size is judged here by
# MAX_PIXELS instead of by a warning that depends on the process's filters.
_OPENERS: tuple[tuple[bytes, int, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", 0, JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", 0, PngImagePlugin.PngImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
    (b"GIF8", 0, GifImagePlugin.GifImageFile),
    (b"BM", 0, BmpImagePlugin.BmpImageFile),
)
_BROKEN = (OSError, SyntaxError, ValueError, IndexError, TypeError, KeyError, EOFError, RuntimeError, struct.error)
_TURNS = {  # what undoes each orientation of EXIF tag 274 other than 1
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = {_TURNS[tag] for tag in (5, 6, 7, 8)}


def read_square(data: bytes, pixels: Pixels, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 (3, size, size) straight from a file's bytes: `decode` no finer than needed, then `to_square`."""
    return to_square(decode(data, max_pixels=max_pixels, size=pixels.size), pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """The (first) picture in a JPEG, PNG, WebP, GIF or BMP: upright, RGB, transparency composited on white.

    With `size`, a JPEG may come out scaled down, with both sides still at least 2 x size if they were before.
    Raises BadSample with a reason.
    """
    image = _open(data)
    width, height = image.size
    if width * height == 0:
        raise BadSample(Reason.ZERO_PIXELS, f"the image is {width} x {height}")
    if width * height > max_pixels:
        raise BadSample(
            Reason.TOO_MANY_PIXELS, f"the image is {width} x {height}; at most {max_pixels} pixels are decoded"
        )
    if size is not None:
        image.draft(None, (DRAFT_MARGIN * size, DRAFT_MARGIN * size))  # JPEG only; elsewhere it does nothing
    try:
        image.load()
        turn, upright = _turn(image), _rgb(image)
        return upright if turn is None else upright.transpose(turn)
    except _BROKEN as error:
        raise _broken(data, error) from None


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture in a file, by its header alone. Raises BadSample as `decode` does."""
    image = _open(data)
    turned = _turn(image) in _SIDEWAYS
    width, height = image.size
    return (height, width) if turned else (width, height)


def to_square(image: Image.Image, pixels: Pixels) -> NDArray[np.uint8]:
    """uint8 (3, size, size), bicubic.

    `crop`: the short side becomes size, then the centre is cut out (CLIP). `pad`: the long side becomes size, the rest
    is the mean colour (LLaVA 1.5 pads first and resizes then: the same, but for a blurred edge at the padding).
    Only the pixels that are kept are ever resized, so a 1 x 10,000 strip costs no more than a square.
    """
    square = _pad(_rgb(image), pixels) if pixels.fit == "pad" else _crop(_rgb(image), pixels.size)
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


def _open(data: bytes) -> ImageFile.ImageFile:
    if not data:
        raise BadSample(Reason.EMPTY_FILE, "the image has 0 bytes")
    if len(data) > MAX_BYTES:
        raise BadSample(Reason.TOO_MANY_BYTES, f"the image has {len(data)} bytes; at most {MAX_BYTES} are read")
    for magic, offset, opener in _OPENERS:
        if data.startswith(magic, offset):
            try:
                return opener(io.BytesIO(data))
            except _BROKEN as error:
                raise _broken(data, error) from None
    raise BadSample(
        Reason.NOT_AN_IMAGE, f"the bytes begin with {data[:12]!r}; JPEG, PNG, WebP, GIF and BMP are allowed"
    )


def _broken(data: bytes, error: Exception) -> BadSample:
    declared = int.from_bytes(data[4:8], "little") + 8 if data[:4] == b"RIFF" else 0
    short = len(data) < declared or "truncated" in str(error).lower()
    return BadSample(Reason.TRUNCATED if short else Reason.CORRUPT, str(error) or type(error).__name__)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16 bits at 255 instead of scaling them
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layers = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layers, mask=layers.getchannel("A"))
    return white


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN:  # the pixels are sound all the same
        return None


def _crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    wide, high = size * width // short, size * height // short  # floor, as in CLIP's own preprocessing
    left, top = (wide - size) // 2, (high - size) // 2
    box = (left * width / wide, top * height / high, (left + size) * width / wide, (top + size) * height / high)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _pad(image: Image.Image, pixels: Pixels) -> Image.Image:
    longest = max(image.size)
    wide, high = (max(1, round(side * pixels.size / longest)) for side in image.size)
    red, green, blue = (round(255 * mean) for mean in pixels.mean)
    square = Image.new("RGB", (pixels.size, pixels.size), (red, green, blue))
    square.paste(
        image.resize((wide, high), Image.Resampling.BICUBIC), ((pixels.size - wide) // 2, (pixels.size - high) // 2)
    )
    return square
