"""Validation of a request: counts, text, sampling parameters and images, then the Pipeline's input.

protocol.py has validated the JSON. Here the limits of the server are applied, cheap checks first.
An image is a `data:` URL. Its checks, in this order: header length, base64 length, bytes, magic,
dimensions from the image header, pixels, frames, and the pixels of all images of the request. The
replica decodes it later.
"""

import base64
import binascii
import json
import re
import struct
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from bridgework.data.images import header
from bridgework.data.samples import Part
from bridgework.serving.errors import APIError
from bridgework.serving.options import Options, RequestLimits
from bridgework.serving.protocol import (
    Message,
    SamplingParams,
    TextParams,
    TextPart,
    VideoPart,
)

if TYPE_CHECKING:
    from bridgework.inference.generation import EngineSampling
    from bridgework.inference.preprocess import ImageFile

GREEDY_BELOW = 1e-4  # a temperature at which only the likeliest token is left; it overflows float32
VIDEO_HEADERS = ("data:video/jpeg;base64", "data:video/png;base64")
SCANS = 16  # scans of a JPEG that decode as fast as a PNG of its size; more count as more pixels
_SCAN = b"\xff\xda"  # marker of a scan
_URL_HEADER = re.compile(r"data:image/[a-z0-9.+-]+;base64", re.IGNORECASE)
_HEADER_ERRORS = (  # raised by Pillow and `struct` for a broken header
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


def read_conversation(
    messages: Sequence[Message],
    limits: RequestLimits,
    *,
    tiled: bool,
    texts: Sequence[str] = (),
) -> tuple[list[Part], list["ImageFile"]]:
    """Return the parts of a conversation in reading order, and its checked images.

    Counts and text are checked first, images last. `tiled`: the model cuts images into tiles.
    `texts` are others of the request, which count too. Raises APIError.
    """
    check_count("messages", len(messages), limits.messages)
    pieces = [piece for message in messages for piece in message.pieces()]
    check_count(
        "images", sum(not isinstance(p, TextPart) for p in pieces), limits.images, param="messages"
    )
    written = [piece.text for piece in pieces if isinstance(piece, TextPart)]
    check_text([*written, *texts], limits, "messages")
    parts: list[Part] = []
    urls: list[list[tuple[str, str]]] = []  # one for an image, one for each frame of a video
    videos: set[int] = set()
    for i, message in enumerate(messages):
        role = "system" if message.role == "developer" else message.role
        for j, piece in enumerate(message.pieces()):
            if j:  # the training data has a line break between an image and its question
                parts.append(Part(role, text="\n"))
            where = f"messages.{i}.content.{j}.{piece.type}"
            if isinstance(piece, TextPart):
                parts.append(Part(role, text=piece.text))
                continue
            parts.append(Part(role, image=len(urls)))
            if isinstance(piece, VideoPart):
                videos.add(len(urls))
                urls.append(_frames(piece.video_url.url, limits, f"{where}.url"))
                continue
            if tiled and piece.image_url.detail == "low":
                raise _low_detail(f"{where}.detail")
            urls.append([(f"{where}.url", piece.image_url.url)])
    read = iter(read_images([one for of_one in urls for one in of_one], limits))
    files = [tuple(islice(read, len(of_one))) for of_one in urls]
    return parts, [file if i in videos else file[0] for i, file in enumerate(files)]


def _frames(url: str, limits: RequestLimits, param: str) -> list[tuple[str, str]]:
    """Return the frames of data:video/jpeg;base64,FRAME,FRAME,... as URLs of images."""
    head, _, rest = url[: limits.header_chars].partition(",")
    if head.lower() not in VIDEO_HEADERS or not rest:
        expected = "data:video/jpeg;base64,FRAME,FRAME,..."
        reason = f"only data: URLs of a video's frames are read. Expected {expected}"
        raise _invalid(param, reason, "unsupported_video")
    frames = url[len(head) + 1 :].split(",", limits.video_frames)
    check_count("frames", len(frames), limits.video_frames, param=param)
    prefix = head.lower().replace("video/", "image/", 1)
    return [(param, f"{prefix},{frame}") for frame in frames]


def sampling_arguments(body: SamplingParams, options: Options) -> "EngineSampling":
    """Return the sampling arguments of the engine.

    An answer ends with the context at the latest, so a larger `max_tokens` changes nothing. Raises
    APIError for longer stop strings than the server allows.
    """
    stop_chars = sum(map(len, body.stops))
    if stop_chars > options.limits.stop_chars:
        message = (
            f"stop: too long. Got {stop_chars} characters in all stop strings; "
            f"expected at most {options.limits.stop_chars}"
        )
        raise APIError(400, message, code="text_too_long", param="stop")
    temperature = 1.0 if body.temperature is None else body.temperature
    arguments: EngineSampling = {
        "max_new_tokens": body.tokens or options.max_new_tokens,
        "temperature": 0.0 if temperature < GREEDY_BELOW else temperature,
        "top_p": 1.0 if body.top_p is None else body.top_p,
        "stop": body.stops,
        "seed": body.seed,
    }
    if not isinstance(body, TextParams):
        return arguments
    if body.presence_penalty:
        arguments["presence_penalty"] = body.presence_penalty
    if body.frequency_penalty:
        arguments["frequency_penalty"] = body.frequency_penalty
    if body.logit_bias:
        arguments["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    if body.top is not None:
        arguments["logprobs"] = body.top
    if body.json_form is not None:
        size, allowed = len(json.dumps(body.json_form)), options.limits.schema_chars
        if size > allowed:
            message = f"json_schema: too long. Got {size} characters; expected at most {allowed}"
            raise APIError(400, message, code="text_too_long", param="response_format")
        arguments["json_schema"] = body.json_form
    return arguments


def check_answers(body: TextParams, options: Options) -> None:
    """Raise APIError if a request asks for more answers than the server allows."""
    allowed = options.limits.answers
    if body.answers > allowed:
        message = f"n: too many answers. Got {body.answers}; expected at most {allowed}"
        raise APIError(400, message, code="too_many", param="n")


def check_count(what: str, given: int, allowed: int, *, param: str | None = None) -> None:
    """Raise APIError if a request has more than `allowed` things of a kind."""
    if given > allowed:
        message = f"{param or what}: too many {what}. Got {given}; expected at most {allowed}"
        raise APIError(400, message, code="too_many", param=param or what)


def check_text(texts: Iterable[str], limits: RequestLimits, param: str) -> None:
    """Raise APIError if the texts of a request have more than `limits.text_chars` characters."""
    given = sum(map(len, texts))
    if given > limits.text_chars:
        message = (
            f"{param}: text too long. Got {given} characters; "
            f"expected at most {limits.text_chars} in one request"
        )
        raise APIError(400, message, code="text_too_long", param=param)


def read_images(urls: Iterable[tuple[str, str]], limits: RequestLimits) -> list[bytes]:
    """Return `read_image` of the (param, URL) pairs of one request; their total pixels are limited.

    Raises APIError.
    """
    images: list[bytes] = []
    total = 0
    for param, url in urls:
        data, pixels = _read_checked(url, limits, param)
        total += pixels
        if total > limits.total_pixels:
            message = (
                f"{param}: the images up to this one are too large together. Got {total} pixels; "
                f"expected at most {limits.total_pixels} in one request. "
                "Fix: send fewer or smaller images"
            )
            raise APIError(413, message, code="image_too_large", param=param)
        images.append(data)
    return images


def read_image(url: str, limits: RequestLimits, param: str) -> bytes:
    """Return the bytes of the image in a data: URL: of an allowed format and size, not yet decoded.

    Raises APIError (400, or 413 for an image that is too large) that names `param`.
    """
    return _read_checked(url, limits, param)[0]


def _read_checked(url: str, limits: RequestLimits, param: str) -> tuple[bytes, int]:
    """Return the bytes of an image, and its pixels as `limits.total_pixels` counts them."""
    data = _decode_url(url, limits, param)
    kind = _format(data)
    if kind is None:
        reason = "unknown image format. Expected JPEG, PNG or WebP"
        raise _invalid(param, reason, "unsupported_image")
    try:
        if kind == "WebP":  # Pillow allocates the complete canvas before it returns the size
            _check_size(*_webp_size(data), limits, param)
        image = header(data, max_pixels=2**64)  # the server's limits are lower, with better errors
        _check_size(*image.size, limits, param)
        frames = getattr(image, "n_frames", 1)
    except _HEADER_ERRORS as error:
        if isinstance(error, APIError):
            raise
        reason = f"the {kind} header is broken. Fix: send the complete file"
        raise _invalid(param, reason, "invalid_image") from None
    if frames > limits.frames:
        reason = (
            f"too many frames in the {kind}. Got {frames}; expected at most {limits.frames}. "
            "Fix: send a still image"
        )
        raise _invalid(param, reason, "frames")
    return data, image.width * image.height * max(1, data.count(_SCAN) // SCANS)


def _decode_url(url: str, limits: RequestLimits, param: str) -> bytes:
    if url[:5].lower() != "data:":
        reason = "only data: URLs are read. Expected data:image/png;base64,..."
        raise _invalid(param, reason, "remote_image")
    comma = url.find(",", 0, limits.header_chars + 1)
    if comma < 0 or not _URL_HEADER.fullmatch(url[:comma]):
        reason = "invalid URL header. Expected one like data:image/png;base64,"
        raise _invalid(param, reason, "invalid_image_url")
    size = (len(url) - comma - 1) * 3 // 4
    if size > limits.image_bytes + 2:  # base64 pads with at most 2
        message = (
            f"{param}: the image is too large. Got {size} bytes; "
            f"expected at most {limits.image_bytes}. Fix: send a smaller one"
        )
        raise APIError(413, message, code="image_too_large", param=param)
    try:
        data = base64.b64decode(url[comma + 1 :], validate=True)
    except (binascii.Error, ValueError):
        reason = "the text after the comma is not base64 (standard alphabet, padded)"
        raise _invalid(param, reason, "invalid_base64") from None
    if not data:
        raise _invalid(param, "the image has 0 bytes", "invalid_image")
    return data


def _format(data: bytes) -> str | None:
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    return "WebP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) by RFC 9649. Raises ValueError or struct.error for a broken header."""
    match data[12:16]:
        case b"VP8X":
            width = 1 + int.from_bytes(data[24:27], "little")
            return width, 1 + int.from_bytes(data[27:30], "little")
        case b"VP8L":
            bits = struct.unpack_from("<I", data, 21)[0]
            return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
        case b"VP8 ":
            wide, high = struct.unpack_from("<HH", data, 26)
            return wide & 0x3FFF, high & 0x3FFF
    raise ValueError("the WebP has no image chunk")


def _check_size(width: int, height: int, limits: RequestLimits, param: str) -> None:
    if min(width, height) < 1:
        reason = f"the image is empty. Got {width} x {height} pixels; expected at least 1 x 1"
        raise _invalid(param, reason, "invalid_image")
    if max(width, height) > limits.side or width * height > limits.pixels:
        message = (
            f"{param}: the image is too large. Got {width} x {height} pixels; expected at most "
            f"{limits.side} per side and {limits.pixels} in all. Fix: send a smaller one"
        )
        raise APIError(413, message, code="image_too_large", param=param)


def _invalid(param: str, reason: str, code: str) -> APIError:
    return APIError(400, f"{param}: {reason}", code=code, param=param)


def _low_detail(param: str) -> APIError:
    reason = "this model reads images in tiles only. Got 'low'; expected 'auto' or 'high'"
    return _invalid(param, reason, "unsupported")
