"""Image files that mean harm, or are only odd: each with the reason it is refused for, or the picture that it is."""

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bridgework.data.quarantine import Reason

File = Callable[[], bytes]
Color = tuple[int, int, int]
WHITE: Color = (255, 255, 255)
RED: Color = (200, 30, 30)


def noise(width: int = 24, height: int = 20, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def saved(image: Image.Image | NDArray[Any], form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        file, form, **options
    )
    return file.getvalue()


# --- PNG, chunk by chunk ---------------------------------------------------------------------------------------------

GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6  # PNG's color types


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    size: tuple[int, int],
    rows: Sequence[bytes],
    *before: bytes,
    depth: int = 8,
    color: int = RGB,
    after: bytes = b"",
) -> bytes:
    """A PNG of `rows` as they lie in the file; `before` and `after` are chunks around the pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, color, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows), 9))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(before) + body + after + chunk(b"IEND", b"")


def small_png(*before: bytes, after: bytes = b"") -> bytes:
    """20 x 4 pixels of RED."""
    return png((20, 4), [bytes(RED) * 20] * 4, *before, after=after)


def inflated(kind: bytes) -> bytes:
    """A compressed text, or ICC profile, of 200 MB in 0.2."""
    return small_png(chunk(kind, b"name\0\0" + zlib.compress(bytes(200_000_000), 1)))


def more_rows_than_it_says() -> bytes:
    return png((20, 4), [*[bytes(RED) * 20] * 4, bytes(64_000_000)])


def wrong_checksum() -> bytes:
    data = bytearray(small_png())
    data[data.index(b"IDAT") + 6] ^= 1
    return bytes(data)


# --- JPEG, segment by segment ----------------------------------------------------------------------------------------


def jpeg(**options: Any) -> bytes:
    return saved(noise(), "JPEG", quality=95, **options)


def ycck(color: Color) -> bytes:
    """A JPEG whose ink is coded as luma and chroma of its complement, as Photoshop writes for print."""
    inks = Image.new("RGB", (16, 16), tuple(255 - v for v in color)).convert("YCbCr")
    planes = (
        *(Image.eval(band, lambda v: 255 - v) for band in inks.split()),
        Image.new("L", (16, 16)),
    )
    data = bytearray(saved(Image.merge("CMYK", planes), "JPEG", quality=100, subsampling=0))
    data[data.index(b"Adobe") + 11] = 2  # how the four planes are coded: before, as they are
    return bytes(data)


def segments(count: int, body: bytes) -> bytes:
    """A JPEG with so many segments of EXIF in its header."""
    data = jpeg()
    return data[:2] + (b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body) * count + data[2:]


def scans(count: int, before: bytes = b"") -> bytes:
    """A progressive JPEG that refines its last coefficients over and over, with a few hundred bytes each time."""
    data = saved(Image.new("L", (200, 200), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xc4")  # the table of the last scan, and the scan
    return data[:-2] + (before + data[last:-2]) * count + data[-2:]


def exif(*entry: int, count: int = 1, after: int = 0) -> bytes:
    """A directory of one entry (tag, type, number, value), said to be of `count`, with another one `after` it."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHIII", count, *entry, after)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("../../evil.sh", "echo harm")
    return jpeg() + file.getvalue()


# --- other formats ---------------------------------------------------------------------------------------------------


def run_lengths(width: int, height: int) -> bytes:
    """A BMP of 1 kB whose pixels are a run of one and `to the end of the line`."""
    palette = b"".join(bytes((i, 0, 255 - i, 0)) for i in range(256))
    head = b"BM" + struct.pack("<IHHI", 54 + len(palette) + 6, 0, 0, 54 + len(palette))
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 6, 0, 0, 256, 0)
    return head + info + palette + b"\x01\x05\x00\x00\x00\x01"


def canvas(width: int, height: int) -> bytes:
    """A WebP of two tiny frames on a huge canvas."""
    data = saved(noise(), "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 20))])
    at = data.index(b"VP8X") + 12
    return (
        data[:at]
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
        + data[at + 6 :]
    )


def frames(form: str) -> bytes:
    """A thousand frames, of which the first is RED."""
    others = [Image.new("RGB", (8, 8), (i % 256, i // 256, 7)) for i in range(999)]
    options = {"lossless": True} if form == "WEBP" else {}
    return saved(
        Image.new("RGB", (8, 8), RED), form, save_all=True, append_images=others, **options
    )


def palette(colors: Sequence[int]) -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette(bytes(colors))
    return image


# --- with their answers ----------------------------------------------------------------------------------------------

CORRUPT, FOREIGN, LARGE = Reason.CORRUPT, Reason.NOT_AN_IMAGE, Reason.TOO_MANY_PIXELS
REFUSED: Mapping[str, tuple[File, Reason]] = {
    "no bytes": (lambda: b"", Reason.EMPTY_FILE),
    "64 MB": (lambda: jpeg() + bytes(64_000_000), Reason.TOO_MANY_BYTES),
    "PNG of 60,000 x 60,000": (lambda: png((60_000, 60_000), [bytes(100)]), LARGE),
    "JPEG of 65,500 x 65,500": (
        lambda: jpeg().replace(struct.pack(">HH", 20, 24), b"\xff\xdc\xff\xdc", 1),
        LARGE,
    ),
    "GIF of 65,535 x 65,535": (lambda: b"GIF89a" + b"\xff" * 4 + saved(noise(), "GIF")[10:], LARGE),
    "WebP of 16,383 x 16,383": (lambda: canvas(16_383, 16_383), LARGE),
    "WebP of 60,000 x 60,000": (lambda: canvas(60_000, 60_000), LARGE),
    "PNG of 0 x 5": (lambda: png((0, 5), [b""] * 5), CORRUPT),
    "PNG of 5 x 0": (lambda: png((5, 0), []), CORRUPT),
    "PNG with a byte turned": (wrong_checksum, CORRUPT),
    "PNG without its palette": (lambda: png((3, 1), [b"\0\1\2"], color=PALETTE), CORRUPT),
    "PNG with a bomb as text": (lambda: inflated(b"zTXt"), CORRUPT),
    "PNG with a bomb as profile": (lambda: inflated(b"iCCP"), CORRUPT),
    "PNG of countless chunks": (lambda: small_png(chunk(b"prVt", b"") * 200_000), CORRUPT),
    "PNG of countless chunks at its end": (
        lambda: small_png(after=chunk(b"prVt", b"") * 200_000),
        CORRUPT,
    ),
    "JPEG of countless segments": (lambda: segments(200_000, b"Exif\0\0" + bytes(10)), CORRUPT),
    "JPEG of countless scans": (lambda: scans(500), CORRUPT),
    "JPEG of countless scans after a mark without a length": (
        lambda: scans(500, b"\xff\x01\x7f\xff"),
        CORRUPT,
    ),
    "JPEG of countless scans after an end in a comment": (
        lambda: scans(500, b"\xff\xfe\0\4\xff\xd9"),
        CORRUPT,
    ),
    "BMP by run lengths": (lambda: run_lengths(17_000, 10_000), CORRUPT),
    "HTML": (lambda: b"<!DOCTYPE html><html>404 Not Found</html>", FOREIGN),
    "SVG": (
        lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>",
        FOREIGN,
    ),
    "tar": (lambda: b"evil.sh".ljust(100, b"\0") + b"0000644\0" + bytes(404), FOREIGN),
    "zip": (lambda: zipped()[len(jpeg()) :], FOREIGN),
    "pickle": (lambda: b"\x80\x04cos\nsystem\n(S'echo harm'\ntR.", FOREIGN),
    "PDF": (lambda: saved(noise(), "PDF"), FOREIGN),
    "EPS": (lambda: saved(noise(), "EPS"), FOREIGN),
    "PSD": (
        lambda: b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 4, 4, 8, 3) + bytes(62),
        FOREIGN,
    ),
    "TIFF": (lambda: saved(noise(), "TIFF"), FOREIGN),
    "TIFF of floats": (lambda: saved(noise()[..., 0].astype(np.float32), "TIFF"), FOREIGN),
    "TIFF of 16 bits": (lambda: saved(noise()[..., 0].astype(np.uint16), "TIFF"), FOREIGN),
    "ICO": (lambda: saved(noise(), "ICO"), FOREIGN),
    "JPEG 2000": (lambda: b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), FOREIGN),
    "AVIF": (lambda: b"\0\0\0\x1cftypavif" + bytes(99), FOREIGN),
    "polyglot that begins as HTML": (lambda: b"<!--" + jpeg() + b"-->", FOREIGN),
}

PICTURES: Mapping[str, tuple[File, tuple[int, int], Color]] = {  # file, width and height, the color of every pixel
    "1 x 1": (lambda: png((1, 1), [bytes(RED)]), (1, 1), RED),
    "1 x 10,000": (lambda: png((1, 10_000), [bytes(RED)] * 10_000), (1, 10_000), RED),
    "10,000 x 1": (lambda: png((10_000, 1), [bytes(RED) * 10_000]), (10_000, 1), RED),
    "more rows than it says": (more_rows_than_it_says, (20, 4), RED),
    "no end": (lambda: small_png()[:-12], (20, 4), RED),
    "a comment of 1 MB": (lambda: small_png(chunk(b"tEXt", b"k\0" + b"x" * 10**6)), (20, 4), RED),
    "CMYK white": (lambda: saved(Image.new("CMYK", (16, 16)), "JPEG"), (16, 16), WHITE),
    "CMYK red": (lambda: saved(Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", quality=100), (16, 16), RED),
    "YCCK white": (lambda: ycck(WHITE), (16, 16), WHITE),
    "YCCK red": (lambda: ycck(RED), (16, 16), RED),
    "16 bits RGB": (lambda: png((1, 1), [struct.pack(">3H", *(257 * v for v in RED))], depth=16), (1, 1), RED),
    "16 bits grey": (lambda: png((1, 1), [b"\x64\xff"], depth=16, color=GREY), (1, 1), (100, 100, 100)),
    "16 bits grey, clear": (
        lambda: png((1, 1), [b"\x64\xff"], chunk(b"tRNS", b"\x64\xff"), depth=16, color=GREY), (1, 1), WHITE,
    ),
    "16 bits, a little clear": (
        lambda: png((1, 1), [struct.pack(">4H", 0, 0, 0, 0x7FFF)], depth=16, color=RGBA), (1, 1), (128, 128, 128),
    ),
    "1 bit white": (lambda: png((8, 1), [b"\xff"], depth=1, color=GREY), (8, 1), WHITE),
    "1 bit black": (lambda: png((8, 1), [b"\0"], depth=1, color=GREY), (8, 1), (0, 0, 0)),
    "4 bits grey": (lambda: png((2, 1), [b"\x77"], depth=4, color=GREY), (2, 1), (119, 119, 119)),
    "palette": (lambda: saved(palette([9, 9, 9, *RED]), "PNG"), (8, 8), RED),
    "palette, clear": (lambda: saved(palette([9, 9, 9, *RED]), "PNG", transparency=1), (8, 8), WHITE),
    "palette, clear, GIF": (lambda: saved(palette([9, 9, 9, *RED]), "GIF", transparency=1), (8, 8), WHITE),
    "a color clear": (lambda: small_png(chunk(b"tRNS", struct.pack(">3H", *RED))), (20, 4), WHITE),
    "grey and alpha": (lambda: saved(Image.new("LA", (8, 8), (0, 51)), "PNG"), (8, 8), (204, 204, 204)),
    "a thousand frames, GIF": (lambda: frames("GIF"), (8, 8), RED),
    "a thousand frames, PNG": (lambda: frames("PNG"), (8, 8), RED),
    "a thousand frames, WebP": (lambda: frames("WEBP"), (8, 8), RED),
}  # fmt: skip

BESIDE: Mapping[
    str, File
] = {  # what stands beside the pixels is odd; the picture is that of `jpeg()`
    "EXIF whose directory follows itself": lambda: jpeg(exif=exif(0x112, 3, 1, 1, after=8)),
    "EXIF of a number that is none": lambda: jpeg(exif=exif(0x112, 3, 1, 99)),
    "EXIF of a text for a number": lambda: jpeg(exif=exif(0x112, 2, 2, 0x36)),
    "EXIF of 2 GB": lambda: jpeg(exif=exif(0x112, 2, 0x7FFFFFFF, 8)),
    "EXIF of 65,535 entries": lambda: jpeg(exif=exif(0x112, 3, 1, 1, count=65_535)),
    "EXIF of noise": lambda: jpeg(exif=b"Exif\0\0" + b"\xff" * 100),
    "EXIF of a few segments": lambda: segments(9, b"Exif\0\0" + bytes(60_000)),
    "XMP of entities": lambda: jpeg(xmp=b"<!DOCTYPE a [<!ENTITY b 'harm'>]>" + b"<a>&b;" * 9_000),
    "ICC of 4 MB": lambda: jpeg(icc_profile=bytes(4_000_000)),
    "a ZIP behind it": zipped,
    "a script behind it": lambda: jpeg() + b"<script>alert(1)</script>" * 1_000,
}


def cut() -> Iterator[tuple[str, bytes]]:
    """Files of every format, cut at ten points each."""
    for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP"):
        data = saved(noise(60, 60), form)
        for tenth in range(1, 10):
            yield f"{form} cut at {tenth}/10", data[: len(data) * tenth // 10]
        yield f"{form} cut in its header", data[:14]


# --- mutations -------------------------------------------------------------------------------------------------------


def seeds() -> list[bytes]:
    """Small sound files of every format and mode."""
    image, turned = Image.fromarray(noise()), Image.Exif()
    turned[0x112] = 6
    modes = [saved(image.convert(mode), "PNG") for mode in ("L", "LA", "P", "1", "RGBA")]
    moving = [
        partial(saved, image, form, save_all=True, append_images=[image.rotate(90)])
        for form in ("GIF", "PNG")
    ]
    return [
        *modes,
        *(make() for make in moving),
        *(jpeg(), jpeg(progressive=True), jpeg(exif=turned)),
        saved(image.convert("CMYK"), "JPEG"),
        saved(noise()[..., 0].astype(np.uint16) * 257, "PNG"),
        saved(image, "PNG", transparency=(1, 2, 3), exif=turned),
        saved(image, "WEBP"),
        saved(image.convert("RGBA"), "WEBP", lossless=True, exif=turned),
        *(saved(image, form) for form in ("GIF", "BMP")),
        *(saved(image.convert(mode), "BMP") for mode in ("1", "P")),
        *(
            png((24, 20), [bytes(12)] * 20, depth=4, color=GREY),
            png((8, 8), [bytes(16)] * 8, depth=16, color=GREY),
        ),
    ]


def mutations(count: int, seed: int) -> Iterator[bytes]:
    """`count` files, each with some bytes turned, dropped, added or cut off; half of the PNGs sound by checksum."""
    draw, sound = random.Random(seed), seeds()
    for _ in range(count):
        data = bytearray(draw.choice(sound))
        for _ in range(draw.choice((1, 1, 2, 4, 16))):
            at = draw.randrange(len(data) if draw.random() < 0.6 else min(len(data), 80))
            few = draw.randrange(1, 9)
            match draw.randrange(6):
                case 0 | 1:
                    data[at] = draw.choice((0, 1, 127, 128, 254, 255, draw.randrange(256)))
                case 2:
                    del data[at : at + few]
                case 3:
                    data[at:at] = draw.randbytes(few)
                case 4:
                    data[at : at + 4] = draw.choice(
                        (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\xff\xff")
                    )
                case _:
                    del data[max(12, at) :]
            data = data or bytearray(1)
        yield bytes(_summed(data) if draw.random() < 0.5 else data)


def _summed(data: bytearray) -> bytearray:
    """A PNG with the checksums of what it says now; anything else as it is."""
    at = 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : end]))
        at = end + 4
    return data
