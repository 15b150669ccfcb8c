"""Images in requests: allowed formats and sizes, checked before expensive work."""

import base64
import io
import struct
import tracemalloc
import zlib

import pytest
from PIL import Image

from bridgework.errors import SpecError
from bridgework.serving.errors import APIError
from bridgework.serving.options import RequestLimits
from bridgework.serving.requests import _webp_size, read_image

LIMITS = RequestLimits()


def picture(kind: str = "PNG", size: tuple[int, int] = (9, 7), **options: object) -> bytes:
    stream = io.BytesIO()
    Image.new(options.pop("mode", "RGB"), size, "red").save(stream, kind, **options)
    return stream.getvalue()


def url(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def refused(given: str, limits: RequestLimits = LIMITS) -> tuple[int, str]:
    with pytest.raises(APIError) as caught:
        read_image(given, limits, "image")
    assert caught.value.param == "image"
    return caught.value.status, caught.value.code


def png(width: int, height: int, *extra: bytes) -> bytes:
    """Return a PNG without pixel data."""

    def block(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = block(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + b"".join(extra)
        + block(b"IDAT", zlib.compress(b""))
        + block(b"IEND", b"")
    )


def webp_canvas(width: int, height: int) -> bytes:
    chunk = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\0" * 4
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
def test_allowed_image_is_returned_unchanged(kind: str) -> None:
    data = picture(kind)
    assert read_image(url(data), LIMITS, "image") == data


@pytest.mark.parametrize(
    "options",
    [{"lossless": True}, {"quality": 50}, {"quality": 50, "mode": "RGBA"}],
    ids=["VP8L", "VP8", "VP8X"],
)
def test_webp_size_equals_pillow(options: dict[str, object]) -> None:
    data = picture("WebP", (301, 177), **options)
    assert _webp_size(data) == Image.open(io.BytesIO(data)).size == (301, 177)


HOSTILE = {
    "remote": ("https://example.org/cat.png", 400, "remote_image"),
    "file": ("file:///etc/passwd", 400, "remote_image"),
    "no comma": ("data:image/png;base64" + "A" * 100, 400, "invalid_image_url"),
    "endless header": (
        "data:image/png;" + "x=y;" * 10_000 + "base64,AAAA",
        400,
        "invalid_image_url",
    ),
    "not base64 at all": ("data:image/png,raw", 400, "invalid_image_url"),
    "html by its type": (
        url(b"<html>", "png").replace("image/png", "text/html"),
        400,
        "invalid_image_url",
    ),
    "html by its bytes": (url(b"<!doctype html><html></html>"), 400, "unsupported_image"),
    "bad base64": ("data:image/png;base64,@@@@", 400, "invalid_base64"),
    "url-safe base64": ("data:image/png;base64,__--", 400, "invalid_base64"),
    "line breaks": ("data:image/png;base64,iVBO\nRw0K", 400, "invalid_base64"),
    "nothing": ("data:image/png;base64,", 400, "invalid_image"),
    "gif": (url(picture("GIF"), "gif"), 400, "unsupported_image"),
    "svg": (url(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "svg+xml"), 400, "unsupported_image"),
    "magic alone": (url(b"\x89PNG\r\n\x1a\n"), 400, "invalid_image"),
    "jpeg cut in its header": (url(picture("JPEG")[:40]), 400, "invalid_image"),
    "webp without a chunk": (url(b"RIFF\x04\0\0\0WEBP"), 400, "invalid_image"),
    "0 x 5": (url(png(0, 5)), 400, "invalid_image"),
    "60,000 x 60,000": (url(png(60_000, 60_000)), 413, "image_too_large"),
    "long and thin": (url(png(1, 20_000)), 413, "image_too_large"),
    "webp canvas": (url(webp_canvas(2**24, 2**24)), 413, "image_too_large"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_image_is_rejected_with_a_reason(name: str) -> None:
    given, status, code = HOSTILE[name]
    assert refused(given) == (status, code)


def test_animation_is_rejected() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "green")]
    for kind in ("PNG", "WebP"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        assert refused(url(stream.getvalue())) == (400, "frames")
        assert (
            read_image(url(stream.getvalue()), RequestLimits(frames=3), "image")
            == stream.getvalue()
        )


def test_length_is_checked_before_base64_and_base64_before_magic() -> None:
    small = RequestLimits(image_bytes=100)
    assert refused("data:image/png;base64," + "@" * 200, small) == (413, "image_too_large")
    assert refused("data:image/png;base64," + "@" * 100, small) == (400, "invalid_base64")


def test_a_huge_canvas_takes_no_memory() -> None:
    given = [url(webp_canvas(16_000, 16_000)), url(png(60_000, 60_000))]
    tracemalloc.start()
    for one in given:
        assert refused(one) == (413, "image_too_large")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_a_limit_below_one_is_a_spec_error() -> None:
    with pytest.raises(SpecError, match=r"limits.frames must be at least 1, got 0"):
        RequestLimits(frames=0)
