"""From bytes to the square of pixels that a vision tower reads. Training, features and serving all come through here.

The order of the checks is that of trust: bytes, first bytes, header, size, and only then the decoder.
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
MAX_PIXELS = 178_000_000  # Pillow holds them in 0.7 GB, up to 1.6 while they are laid on white; it warns from half on
MAX_SCANS = 100  # of a JPEG, which encoders give ten: each goes over all pixels again, in as little as ten bytes
MAX_MARKERS = 20_000  # of a JPEG
PIECE_BYTES = 128  # of a file behind its header, on average at least
HEADER_WORK = 4_000_000_000  # bytes that Pillow may move while it joins the pieces of a header: about a second
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
_BROKEN = (
    *(
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        TypeError,
        KeyError,
        EOFError,
        RuntimeError,
        struct.error,
    ),
    Image.DecompressionBombError,  # of a WebP, whose canvas is allocated while its header is read
)
_MARKER = re.compile(
    rb"\xff[^\x00\xd0-\xd7\xff]"
)  # not a byte of the pixels, nor a restart among them
_ALONE = (
    0x01,
    0xD8,
)  # markers of a JPEG without a length; restarts and the end are looked for by themselves
_RUN_LENGTHS = (1, 2)  # how a BMP may be compressed: Pillow decodes these in Python, pixel by pixel
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


def load_image(data: bytes, pixels: Pixels, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """uint8 (3, size, size) straight from a file's bytes: `decode` no finer than needed, then `to_square`."""
    return to_square(decode(data, max_pixels=max_pixels, size=pixels.size), pixels)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS, size: int | None = None) -> Image.Image:
    """The (first) picture in a JPEG, PNG, WebP, GIF or BMP: upright, RGB, transparency composited on white.

    With `size`, a JPEG may come out scaled down, with both sides still at least 2 x size if they were before.
    Raises BadSample with a reason.
    """
    image = header(data, max_pixels=max_pixels)
    if size is not None:
        image.draft(
            None, (DRAFT_MARGIN * size, DRAFT_MARGIN * size)
        )  # JPEG only; elsewhere it does nothing
    try:
        image.load()
        turn, upright = _turn(image), _rgb(image)
        return upright if turn is None else upright.transpose(turn)
    except _BROKEN as error:
        raise _broken(data, error) from None


def size_of(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright picture in a file, by its header alone. Raises BadSample as `decode` does."""
    image = header(data)
    turned = _turn(image) in _SIDEWAYS
    width, height = image.size
    return (height, width) if turned else (width, height)


def to_square(image: Image.Image, pixels: Pixels) -> NDArray[np.uint8]:
    """uint8 (3, size, size), bicubic.

    `crop`: the short side becomes size, then the centre is cut out (CLIP). `pad`: the long side becomes size, the rest
    is the mean color (LLaVA 1.5 pads first and resizes then: the same, but for a blurred edge at the padding).
    Only the pixels that are kept are ever resized, so a 1 x 10,000 strip costs no more than a square.
    """
    square = _pad(_rgb(image), pixels) if pixels.fit == "pad" else _crop(_rgb(image), pixels.size)
    return np.ascontiguousarray(np.asarray(square, dtype=np.uint8).transpose(2, 0, 1))


def header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> ImageFile.ImageFile:
    """The picture in a file, its header read and its pixels not yet; both take seconds at most, whatever the file says.

    Raises BadSample with a reason.
    """
    if not data:
        raise BadSample(Reason.EMPTY_FILE, "the image has 0 bytes")
    if len(data) > MAX_BYTES:
        raise BadSample(
            Reason.TOO_MANY_BYTES, f"the image has {len(data)} bytes; at most {MAX_BYTES} are read"
        )
    opener = next(
        (opener for magic, offset, opener in _OPENERS if data.startswith(magic, offset)), None
    )
    if opener is None:
        allowed = "JPEG, PNG, WebP, GIF and BMP are allowed"
        raise BadSample(Reason.NOT_AN_IMAGE, f"the bytes begin with {data[:12]!r}; {allowed}")
    try:
        file = _Metered(without_metadata(data))
        image = opener(file)
        file.opened()
        _check(image, file)
    except _BROKEN as error:
        raise _broken(data, error) from None
    width, height = image.size
    if width * height == 0:
        raise BadSample(Reason.ZERO_PIXELS, f"the image is {width} x {height}")
    if width * height > max_pixels:
        raise BadSample(
            Reason.TOO_MANY_PIXELS,
            f"the image is {width} x {height}; at most {max_pixels} pixels are decoded",
        )
    return image


class _Metered(io.BytesIO):
    """A file that will not be read in countless small pieces.

    Pillow walks them in Python, and those of a header it joins, each to all that it has: time grows with their square.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = HEADER_WORK
        self._in_header = True

    def opened(self) -> None:
        """The header is read: what follows is walked and no longer joined."""
        self._left = 10_000 + self.getbuffer().nbytes // PIECE_BYTES
        self._in_header = False

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= self.tell() if self._in_header else 1
        if self._left < 0:
            raise OSError("the file is in too many small pieces")
        return super().read(size)


def _check(image: ImageFile.ImageFile, file: io.BytesIO) -> None:
    """Raises OSError for pixels that were changed, and for those that may take hours, of however few bytes.

    `file` stands where `image` left it.
    """
    if isinstance(image, BmpImagePlugin.BmpImageFile) and image.info["compression"] in _RUN_LENGTHS:
        raise OSError("the BMP is compressed by run lengths")
    if isinstance(image, JpegImagePlugin.JpegImageFile) and _more_scans(image, file):
        _check_scans(file.getvalue())
    if isinstance(image, PngImagePlugin.PngImageFile):
        _check_sums(file)


def _check_sums(file: io.BytesIO) -> None:
    """Pillow compares the checksums of all chunks of a PNG but those of its pixels."""
    begin = file.tell()
    file.seek(begin - 8)
    while (head := file.read(8))[4:] == b"IDAT":
        body, given = file.read(int.from_bytes(head[:4], "big")), file.read(4)
        if len(given) == 4 and zlib.crc32(body, zlib.crc32(b"IDAT")) != int.from_bytes(
            given, "big"
        ):
            raise OSError("the checksum of the pixels is wrong")
    file.seek(begin)


def _check_scans(data: bytes) -> None:
    """Raises OSError for more scans than are decoded; what follows the end of the picture is none."""
    at, scans = 2, 0
    for _ in range(MAX_MARKERS):
        found = _MARKER.search(data, at)
        if found is None or found[0] == b"\xff\xd9":
            return
        scans += found[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise OSError(f"the JPEG has more than {MAX_SCANS} scans")
        alone = found[0][1] in _ALONE
        at = found.end() + (0 if alone else int.from_bytes(data[found.end() : found.end() + 2]))
    raise OSError(f"the JPEG has more than {MAX_MARKERS} segments")


def _more_scans(image: JpegImagePlugin.JpegImageFile, file: io.BytesIO) -> bool:
    """Whether scans may follow the first, which the file stands behind the header of."""
    parts = image.layers
    begin = file.tell() - 8 - 2 * parts
    whole = file.getbuffer()[begin : begin + 5] == b"\xff\xda" + struct.pack(
        ">HB", 6 + 2 * parts, parts
    )
    return (
        "progressive" in image.info or not whole or parts == 4
    )  # in a header of 4 there is room to hide another


def _broken(data: bytes, error: Exception) -> BadSample:
    if isinstance(error, Image.DecompressionBombError):
        return BadSample(Reason.TOO_MANY_PIXELS, str(error))
    declared = int.from_bytes(data[4:8], "little") + 8 if data[:4] == b"RIFF" else 0
    short = len(data) < declared or "truncated" in str(error).lower()
    return BadSample(
        Reason.TRUNCATED if short else Reason.CORRUPT, str(error) or type(error).__name__
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(
        "I"
    ):  # Pillow's own conversion clips 16 bits at 255 instead of scaling them
        grey = np.asarray(image).astype(np.uint16)
        clear = image.info.get("transparency", -1)
        return Image.fromarray(np.where(grey == clear, 255, grey >> 8).astype(np.uint8)).convert(
            "RGB"
        )
    if image.mode == "P" and image.palette is None:
        raise OSError("its colors have no palette")
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    if image.mode == "LA":
        light = Image.new("L", image.size, "white")
        light.paste(image.getchannel("L"), mask=image)
        return light.convert("RGB")
    layers = image if image.mode == "RGBA" else image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layers, mask=layers)
    return white


def _turn(image: Image.Image) -> Image.Transpose | None:
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN:  # the pixels are sound all the same
        return None


def _crop(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    wide, high = (
        size * width // short,
        size * height // short,
    )  # floor, as in CLIP's own preprocessing
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
