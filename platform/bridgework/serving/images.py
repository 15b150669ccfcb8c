"""Images in a request: `data:` URLs only, and every cheap check before an expensive one.

Header length, base64 length, bytes, magic, format, dimensions from the header, pixels, frames, and the pixels of all
images of the request. Decoding comes last, in the model's replica.
"""

import base64
import binascii
import re
import struct
from collections.abc import Iterable

from bridgework.data.transforms import header
from bridgework.errors import SpecError
from bridgework.serving.protocol import MAX_LIST
from bridgework.serving.refusals import Refusal
from bridgework.spec import spec

SCANS = 16  # of a JPEG take as long to decode as the pixels of a PNG: more count as more pixels
_SCAN = b"\xff\xda"
_HEADER = re.compile(r"data:image/[a-z0-9.+-]+;base64", re.IGNORECASE)
_BROKEN = (OSError, SyntaxError, ValueError, IndexError, TypeError, KeyError, EOFError, RuntimeError, struct.error)


@spec
class Limits:
    """The bounds of one request."""

    body_bytes: int = 32 * 2**20
    body_s: float = 30.0  # from the first byte of a body to its last
    text_chars: int = 65_536  # over all texts of the request
    stop_chars: int = 1_024  # over its stop strings, which are searched for at every token
    messages: int = 256
    items: int = 128  # inputs to embed, labels, candidates
    images: int = 16  # in one conversation, or to caption
    image_bytes: int = 8 * 2**20  # each, decoded from base64
    header_chars: int = 64  # of a data: URL, before the comma
    side: int = 16_384  # pixels
    pixels: int = 40_000_000  # of one image; an 8k frame has 33 million
    total_pixels: int = 100_000_000  # of all images of the request; decoding them takes about 1.5 s of a core
    frames: int = 1

    def __post_init__(self) -> None:
        if self.body_s <= 0:
            raise SpecError(f"limits.body_s must be above 0, got {self.body_s:g}")
        low = [name for name, value in vars(self).items() if name != "body_s" and value < 1]
        if low:
            raise SpecError(f"limits.{low[0]} must be at least 1, got {getattr(self, low[0])}")
        high = [name for name in ("messages", "items", "images") if getattr(self, name) > MAX_LIST]
        if high:
            raise SpecError(f"limits.{high[0]} must be at most {MAX_LIST}, got {getattr(self, high[0])}")


def read_all(urls: Iterable[tuple[str, str]], limits: Limits) -> list[bytes]:
    """`read` for the (param, URL) pairs of one request, whose pixels are bounded together."""
    images: list[bytes] = []
    total = 0
    for param, url in urls:
        data, pixels = _read(url, limits, param)
        total += pixels
        if total > limits.total_pixels:
            message = (
                f"{param}: the images up to this one are too large together. Got {total} pixels; expected at most "
                f"{limits.total_pixels} in one request. Fix: send fewer or smaller images"
            )
            raise Refusal(413, message, code="image_too_large", param=param)
        images.append(data)
    return images


def read(url: str, limits: Limits, param: str) -> bytes:
    """The bytes of the image in a data: URL: complete, of an allowed format and size, not yet decoded.

    Raises Refusal (400, or 413 for an image that is too large) that names `param`.
    """
    return _read(url, limits, param)[0]


def _read(url: str, limits: Limits, param: str) -> tuple[bytes, int]:
    data = _payload(url, limits, param)
    kind = _format(data)
    if kind is None:
        allowed = "this server reads JPEG, PNG and WebP"
        raise _bad(f"the bytes are no image that it knows by its first bytes; {allowed}", "unsupported_image", param)
    try:
        if kind == "WebP":  # whose reader makes room for the whole canvas
            _check_size(*_webp_size(data), limits, param)
        image = header(data, max_pixels=2**64)  # the server's own limits are smaller, and say more
        _check_size(*image.size, limits, param)
        frames = getattr(image, "n_frames", 1)
    except _BROKEN as error:
        if isinstance(error, Refusal):
            raise
        raise _bad(f"the {kind} header is broken; send the whole file", "invalid_image", param) from None
    if frames > limits.frames:
        raise _bad(f"the {kind} has {frames} frames; at most {limits.frames} allowed, send a still", "frames", param)
    return data, image.width * image.height * max(1, data.count(_SCAN) // SCANS)


def _payload(url: str, limits: Limits, param: str) -> bytes:
    if url[:5].lower() != "data:":
        raise _bad("only data: URLs are read, never an address; send data:image/png;base64,...", "remote_image", param)
    comma = url.find(",", 0, limits.header_chars + 1)
    if comma < 0 or not _HEADER.fullmatch(url[:comma]):
        raise _bad("the URL must begin like data:image/png;base64,", "invalid_image_url", param)
    size = (len(url) - comma - 1) * 3 // 4
    if size > limits.image_bytes + 2:  # what base64 pads
        message = f"{param}: the image has {size} bytes; at most {limits.image_bytes} allowed, send a smaller one"
        raise Refusal(413, message, code="image_too_large", param=param)
    try:
        data = base64.b64decode(url[comma + 1 :], validate=True)
    except (binascii.Error, ValueError):
        raise _bad(
            "what follows the comma is not base64 (standard alphabet, padded)", "invalid_base64", param
        ) from None
    if not data:
        raise _bad("the image has 0 bytes", "invalid_image", param)
    return data


def _format(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _webp_size(data: bytes) -> tuple[int, int]:
    """(width, height) by RFC 9649: Pillow's own reader makes room for the whole canvas before it tells the size."""
    match data[12:16]:
        case b"VP8X":
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
        case b"VP8L":
            bits = struct.unpack_from("<I", data, 21)[0]
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            wide, high = struct.unpack_from("<HH", data, 26)
            return wide & 0x3FFF, high & 0x3FFF
    raise ValueError("no WebP chunk that holds an image")


def _check_size(width: int, height: int, limits: Limits, param: str) -> None:
    if min(width, height) < 1:
        raise _bad(f"the image is {width} x {height}", "invalid_image", param)
    if max(width, height) > limits.side or width * height > limits.pixels:
        allowed = f"at most {limits.side} a side and {limits.pixels} in all are allowed"
        message = f"{param}: the image is {width} x {height} pixels; {allowed}, send a smaller one"
        raise Refusal(413, message, code="image_too_large", param=param)


def _bad(message: str, code: str, param: str) -> Refusal:
    return Refusal(400, f"{param}: {message}", code=code, param=param)
