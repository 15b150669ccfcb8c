"""Decode image files and resize them for a vision tower: in training, features and serving.

Files are untrusted. The checks come in this order: number of bytes, first bytes, header, size, and
last the decoder.
"""

import io
import re
import struct
import zlib
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

from bridgework.data.image_metadata import without_metadata
from bridgework.data.quarantine import BadSample, Reason
from bridgework.system import Pixels

MAX_BYTES = 64_000_000  # of one file: Parquet's row groups must stay small
# Pillow needs 0.7 GB for so many, up to 1.6 while it composites them on white; it warns from half
# of that
MAX_PIXELS = 178_000_000
# of a JPEG; encoders write ten. Each scan decodes all pixels again, from as little as ten bytes
MAX_SCANS = 100
MAX_MARKERS = 20_000  # of a JPEG
PIECE_BYTES = 128  # minimum average size of the pieces of a file after its header
# bytes that Pillow may move while it joins the pieces of a header: about a second
HEADER_WORK = 4_000_000_000
# a JPEG is decoded at the smallest scale that is at least twice the target, so the last halving is
# bicubic
DRAFT_MARGIN = 2

# Opened by class instead of Image.open: no other format reaches a parser, and MAX_PIXELS limits the
# size instead of a warning that depends on the filters of the process.
_OPENERS: tuple[tuple[bytes, int, Callable[[io.BytesIO], ImageFile.ImageFile]], ...] = (
    (b"\xff\xd8\xff", 0, JpegImagePlugin.JpegImageFile),
    (b"\x89PNG\r\n\x1a\n", 0, PngImagePlugin.PngImageFile),
    (b"WEBP", 8, WebPImagePlugin.WebPImageFile),
    (b"GIF8", 0, GifImagePlugin.GifImageFile),
    (b"BM", 0, BmpImagePlugin.BmpImageFile),
)
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,  # of a WebP, whose canvas is allocated when its header is read
)
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # excludes stuffed bytes and restart markers
_NO_LENGTH = (0x01, 0xD8)  # markers of a JPEG without a length, except restarts and the end
_RUN_LENGTHS = (1, 2)  # run-length compressions of a BMP: Pillow decodes them pixel by pixel
_TRANSPOSES = {  # inverse of each orientation of EXIF tag 274 other than 1
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = {_TRANSPOSES[tag] for tag in (5, 6, 7, 8)}


def load_image(data: bytes, pixels: Pixels, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a file's bytes at the necessary scale and call `to_square`.

    Returns uint8 (3, size, size).
    """
    return to_square(decode(data, max_pixels=max_pixels, size=pixels.size), pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """Decode the (first) image of a JPEG, PNG, WebP, GIF or BMP to upright RGB.

    Transparency is composited on white. With `size`, a JPEG may be scaled down, but both sides stay
    at least 2 x size if they were before. Raises BadSample with a reason.
    """
    image = header(data, max_pixels=max_pixels)
    if size is not None:
        draft = DRAFT_MARGIN * size
        image.draft(None, (draft, draft))  # JPEG only; no effect on other formats
    try:
        image.load()
        transpose, rgb = _transpose(image), _rgb(image)
        return rgb if transpose is None else rgb.transpose(transpose)
    except _DECODE_ERRORS as error:
        raise _bad_sample(data, error) from None


def size_of(data: bytes) -> tuple[int, int]:
    """Return (width, height) of the upright image of a file, from its header.

    Raises BadSample as `decode` does.
    """
    image = header(data)
    width, height = image.size
    return (height, width) if _transpose(image) in _SWAPS_SIDES else (width, height)


def to_square(image: Image.Image, pixels: Pixels) -> NDArray[np.uint8]:
    """Resize an image to uint8 (3, size, size), bicubic.

    `crop`: resize the short side to `size`, then crop the center (CLIP). `pad`: resize the long
    side to `size` and fill the rest with the mean color. (LLaVA 1.5 pads first and then resizes:
    the same, except for a blurred edge at the padding.) Only the remaining pixels are resized, so a
    1 x 10,000 strip costs no more than a square.
    """
    square = _pad(_rgb(image), pixels) if pixels.fit == "pad" else _crop(_rgb(image), pixels.size)
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


def header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """Open the image in a file: read its header, but not its pixels.

    Either takes seconds at most, for any file.

    Raises BadSample with a reason.
    """
    if not data:
        raise BadSample(Reason.EMPTY_FILE, "the image has 0 bytes")
    if len(data) > MAX_BYTES:
        raise BadSample(
            Reason.TOO_MANY_BYTES, f"the image has {len(data)} bytes; expected at most {MAX_BYTES}"
        )
    opener = next(
        (opener for magic, offset, opener in _OPENERS if data.startswith(magic, offset)), None
    )
    if opener is None:
        expected = "expected JPEG, PNG, WebP, GIF or BMP"
        raise BadSample(Reason.NOT_AN_IMAGE, f"the bytes begin with {data[:12]!r}; {expected}")
    try:
        file = _LimitedReads(without_metadata(data))
        image = opener(file)
        file.header_done()
        _check(image, file)
    except _DECODE_ERRORS as error:
        raise _bad_sample(data, error) from None
    width, height = image.size
    if width * height == 0:
        raise BadSample(Reason.ZERO_PIXELS, f"the image is {width} x {height}")
    if width * height > max_pixels:
        raise BadSample(
            Reason.TOO_MANY_PIXELS,
            f"the image is {width} x {height}; expected at most {max_pixels} pixels",
        )
    return image


class _LimitedReads(io.BytesIO):
    """File with a limited number of small reads.

    Pillow iterates over the pieces of a file in Python.

    It appends each piece of a header to all before it, so the time grows with the square of their
    number.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = HEADER_WORK
        self._in_header = True

    def header_done(self) -> None:
        """Switch to the limit after the header, where Pillow no longer joins the pieces."""
        self._left = 10_000 + self.getbuffer().nbytes // PIECE_BYTES
        self._in_header = False

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= self.tell() if self._in_header else 1
        if self._left < 0:
            raise OSError("the file is in too many small pieces")
        return super().read(size)


def _check(image: ImageFile.ImageFile, file: io.BytesIO) -> None:
    """Raise OSError for a wrong checksum of pixels, and for files that could take hours to decode.

    `file` is at the position where `image` left it.
    """
    if isinstance(image, BmpImagePlugin.BmpImageFile) and image.info["compression"] in _RUN_LENGTHS:
        raise OSError("the BMP is compressed by run lengths")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and _may_have_more_scans(image, file):
        _check_scans(file.getvalue())
    if isinstance(image, PngImagePlugin.PngImageFile):
        _check_sums(file)


def _check_sums(file: io.BytesIO) -> None:
    """Compare the checksums of the pixels of a PNG; Pillow compares those of all other chunks."""
    begin = file.tell()
    file.seek(begin - 8)
    while (head := file.read(8))[4:] == b"IDAT":
        body, stored = file.read(int.from_bytes(head[:4], "big")), file.read(4)
        checksum = zlib.crc32(body, zlib.crc32(b"IDAT"))
        if len(stored) == 4 and checksum != int.from_bytes(stored, "big"):
            raise OSError("the checksum of the pixels is wrong")
    file.seek(begin)


def _check_scans(data: bytes) -> None:
    """Raise OSError for more than MAX_SCANS scans before the end of the image."""
    at, scans = 2, 0
    for _ in range(MAX_MARKERS):
        match = _MARKER.search(data, at)
        if match is None or match[0] == b"\xff\xd9":
            return
        scans += match[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise OSError(f"the JPEG has more than {MAX_SCANS} scans")
        length = int.from_bytes(data[match.end() : match.end() + 2])
        at = match.end() + (0 if match[0][1] in _NO_LENGTH else length)
    raise OSError(f"the JPEG has more than {MAX_MARKERS} segments")


def _may_have_more_scans(image: JpegImagePlugin.JpegImageFile, file: io.BytesIO) -> bool:
    """Return True if other scans may follow the first.

    `file` is right after the header of the first.
    """
    parts = image.layers
    begin = file.tell() - 8 - 2 * parts
    first_has_all_parts = file.getbuffer()[begin : begin + 5] == b"\xff\xda" + struct.pack(
        ">HB", 6 + 2 * parts, parts
    )
    # a header of 4 parts has room for a hidden one
    return "progressive" in image.info or not first_has_all_parts or parts == 4


def _bad_sample(data: bytes, error: Exception) -> BadSample:
    """Convert an error of Pillow into a BadSample."""
    if isinstance(error, Image.DecompressionBombError):
        return BadSample(Reason.TOO_MANY_PIXELS, str(error))
    declared = int.from_bytes(data[4:8], "little") + 8 if data[:4] == b"RIFF" else 0
    short = len(data) < declared or "truncated" in str(error).lower()
    return BadSample(
        Reason.TRUNCATED if short else Reason.CORRUPT, str(error) or type(error).__name__
    )


def _rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, with transparency composited on white."""
    if image.mode.startswith("I"):  # Pillow's conversion clips 16 bits at 255 instead of scaling
        gray = np.asarray(image).astype(np.uint16)
        transparent = image.info.get("transparency", -1)
        gray_8bit = np.where(gray == transparent, 255, gray >> 8).astype(np.uint8)
        return Image.fromarray(gray_8bit).convert("RGB")
    if image.mode == "P" and image.palette is None:
        raise OSError("its colors have no palette")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "LA":
        canvas = Image.new("L", image.size, "white")
        canvas.paste(image.getchannel("L"), mask=image)
        return canvas.convert("RGB")
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(rgba, mask=rgba)
    return canvas


def _transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that makes an image upright, or None."""
    try:
        return _TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _DECODE_ERRORS:  # corrupt metadata; the pixels are valid
        return None


def _crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    # floor, as in CLIP's own preprocessing
    wide, high = size * width // short, size * height // short
    left, top = (wide - size) // 2, (high - size) // 2
    box = (
        left * width / wide,
        top * height / high,
        (left + size) * width / wide,
        (top + size) * height / high,
    )
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _pad(image: Image.Image, pixels: Pixels) -> Image.Image:
    longest = max(image.size)
    wide, high = (max(1, round(side * pixels.size / longest)) for side in image.size)
    red, green, blue = (round(255 * mean) for mean in pixels.mean)
    square = Image.new("RGB", (pixels.size, pixels.size), (red, green, blue))
    square.paste(
        image.resize((wide, high), Image.Resampling.BICUBIC),
        ((pixels.size - wide) // 2, (pixels.size - high) // 2),
    )
    return square
