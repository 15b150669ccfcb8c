"""Images in a request: `data:` URLs only, and every cheap check before an expensive one.

Header length, base64 length, bytes, magic, format, dimensions from the header, pixels, frames, and the pixels of all
images of the request. Decoding comes last, in the model's replica.

From messages to the Pipeline's input: parts in reading order, and the images that they show.
"""

import base64
import binascii
import re
import struct
from collections.abc import Iterable
from typing import TYPE_CHECKING

from bridgework.data.images import header
from bridgework.data.samples import Part
from bridgework.serving.errors import APIError
from bridgework.serving.options import Limits, Options
from bridgework.serving.protocol import ChatRequest, ImagePart, SamplingParams

if TYPE_CHECKING:
    from bridgework.inference.generation import Sampling

SCANS = 16  # of a JPEG take as long to decode as the pixels of a PNG: more count as more pixels
_SCAN = b"\xff\xda"
_HEADER = re.compile(r"data:image/[a-z0-9.+-]+;base64", re.IGNORECASE)
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    TypeError,
    KeyError,
    EOFError,
    RuntimeError,
    struct.error,
)


def read_images(urls: Iterable[tuple[str, str]], limits: Limits) -> list[bytes]:
    """`read` for the (param, URL) pairs of one request, whose pixels are bounded together."""
    images: list[bytes] = []
    total = 0
    for param, url in urls:
        data, pixels = _read_checked(url, limits, param)
        total += pixels
        if total > limits.total_pixels:
            message = (
                f"{param}: the images up to this one are too large together. Got {total} pixels; expected at most "
                f"{limits.total_pixels} in one request. Fix: send fewer or smaller images"
            )
            raise APIError(413, message, code="image_too_large", param=param)
        images.append(data)
    return images


def read_image(url: str, limits: Limits, param: str) -> bytes:
    """The bytes of the image in a data: URL: complete, of an allowed format and size, not yet decoded.

    Raises Refusal (400, or 413 for an image that is too large) that names `param`.
    """
    return _read_checked(url, limits, param)[0]


def _read_checked(url: str, limits: Limits, param: str) -> tuple[bytes, int]:
    data = _payload(url, limits, param)
    kind = _format(data)
    if kind is None:
        allowed = "this server reads JPEG, PNG and WebP"
        raise _bad(
            f"the bytes are no image that it knows by its first bytes; {allowed}",
            "unsupported_image",
            param,
        )
    try:
        if kind == "WebP":  # whose reader makes room for the whole canvas
            _check_size(*_webp_size(data), limits, param)
        image = header(data, max_pixels=2**64)  # the server's own limits are smaller, and say more
        _check_size(*image.size, limits, param)
        frames = getattr(image, "n_frames", 1)
    except _BROKEN as error:
        if isinstance(error, APIError):
            raise
        raise _bad(
            f"the {kind} header is broken; send the whole file", "invalid_image", param
        ) from None
    if frames > limits.frames:
        raise _bad(
            f"the {kind} has {frames} frames; at most {limits.frames} allowed, send a still",
            "frames",
            param,
        )
    return data, image.width * image.height * max(1, data.count(_SCAN) // SCANS)


def _payload(url: str, limits: Limits, param: str) -> bytes:
    if url[:5].lower() != "data:":
        raise _bad(
            "only data: URLs are read, never an address; send data:image/png;base64,...",
            "remote_image",
            param,
        )
    comma = url.find(",", 0, limits.header_chars + 1)
    if comma < 0 or not _HEADER.fullmatch(url[:comma]):
        raise _bad("the URL must begin like data:image/png;base64,", "invalid_image_url", param)
    size = (len(url) - comma - 1) * 3 // 4
    if size > limits.image_bytes + 2:  # what base64 pads
        message = f"{param}: the image has {size} bytes; at most {limits.image_bytes} allowed, send a smaller one"
        raise APIError(413, message, code="image_too_large", param=param)
    try:
        data = base64.b64decode(url[comma + 1 :], validate=True)
    except (binascii.Error, ValueError):
        raise _bad(
            "what follows the comma is not base64 (standard alphabet, padded)",
            "invalid_base64",
            param,
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
            return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(
                data[27:30], "little"
            )
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
        raise APIError(413, message, code="image_too_large", param=param)


def _bad(message: str, code: str, param: str) -> APIError:
    return APIError(400, f"{param}: {message}", code=code, param=param)


GREEDY_BELOW = (
    1e-4  # a temperature that leaves the likeliest token alone, and would overflow float32
)


def read_conversation(
    body: ChatRequest, limits: Limits, *, tiled: bool
) -> tuple[list[Part], list[bytes]]:
    """Parts and checked images; counts are checked first, images last. `tiled`: the model cuts images into tiles.

    Raises Refusal.
    """
    check_count("messages", len(body.messages), limits.messages)
    pieces = [piece for message in body.messages for piece in message.pieces()]
    check_count(
        "images", sum(isinstance(p, ImagePart) for p in pieces), limits.images, param="messages"
    )
    texts = [piece.text for piece in pieces if not isinstance(piece, ImagePart)]
    check_text([*texts, *(body.choices or ())], limits, "messages")
    parts: list[Part] = []
    urls: list[tuple[str, str]] = []
    for i, message in enumerate(body.messages):
        role = "system" if message.role == "developer" else message.role
        for j, piece in enumerate(message.pieces()):
            if j:  # between an image and its question, as the training data writes it
                parts.append(Part(role, text="\n"))
            if isinstance(piece, ImagePart):
                where = f"messages.{i}.content.{j}.image_url"
                if tiled and piece.image_url.detail == "low":
                    raise _coarse(f"{where}.detail")
                parts.append(Part(role, image=len(urls)))
                urls.append((f"{where}.url", piece.image_url.url))
            else:
                parts.append(Part(role, text=piece.text))
    return parts, read_images(urls, limits)


def draw(body: SamplingParams, options: Options) -> "Sampling":
    """The Pipeline's keywords for how to sample.

    Raises Refusal for more tokens or longer stop strings than the server allows.
    """
    if body.tokens is not None and body.tokens > options.max_new_tokens:
        message = (
            f"max_tokens {body.tokens} is above the {options.max_new_tokens} that this server gives"
        )
        raise APIError(400, message, code="too_many_tokens", param="max_tokens")
    stop_chars = sum(map(len, body.stops))
    if stop_chars > options.limits.stop_chars:
        message = f"stop: too long. Got {stop_chars} characters; expected at most {options.limits.stop_chars} together"
        raise APIError(400, message, code="text_too_long", param="stop")
    temperature = 1.0 if body.temperature is None else body.temperature
    return {
        "max_new_tokens": body.tokens or options.max_new_tokens,
        "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": body.stops,
        "seed": body.seed,
    }


def check_count(what: str, given: int, allowed: int, *, param: str | None = None) -> None:
    """Raises Refusal for more things of a kind than one request may hold."""
    if given > allowed:
        message = f"{given} {what} in one request; at most {allowed} allowed"
        raise APIError(400, message, code="too_many", param=param or what)


def check_text(texts: Iterable[str], limits: Limits, param: str) -> None:
    """Raises Refusal for more characters than one request may hold."""
    given = sum(map(len, texts))
    if given > limits.text_chars:
        message = f"{param}: {given} characters in one request; at most {limits.text_chars} allowed"
        raise APIError(400, message, code="text_too_long", param=param)


def _coarse(param: str) -> APIError:
    message = (
        f"{param}: this model reads images in tiles only. Got 'low'; expected 'auto' or 'high'"
    )
    return APIError(400, message, code="unsupported", param=param)
