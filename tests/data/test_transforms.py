"""Decoding of hostile and unusual files, and resizing to a square."""

import io
import pickle
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from bridgework.data.image_metadata import without_metadata
from bridgework.data.images import decode, load_image, size_of, to_square
from bridgework.data.quarantine import BadSample, Reason
from bridgework.system import Pixels


def noise(width: int, height: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(8, 8)).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, form: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that declares a size and contains almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + head
        + chunk(b"IDAT", zlib.compress(bytes(100)))
        + chunk(b"IEND", b"")
    )


def reason(data: bytes, **options: int) -> Reason:
    with pytest.raises(BadSample) as caught:
        decode(data, **options)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "WEBP", "JPEG"])
def test_allowed_formats_decode_to_rgb(form: str) -> None:
    image = decode(saved(smooth(40, 30), form))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(smooth(40, 30), dtype=int)).mean() < 12


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", Reason.EMPTY_FILE),
        (b"<!DOCTYPE html><html>404</html>", Reason.NOT_AN_IMAGE),
        (saved(smooth(8, 8), "TIFF"), Reason.NOT_AN_IMAGE),
        (saved(smooth(8, 8), "ICO"), Reason.NOT_AN_IMAGE),
        (b"\x89PNG\r\n\x1a\n", Reason.CORRUPT),
        (b"\xff\xd8\xff" + bytes(50), Reason.CORRUPT),
        (b"RIFF\xff\xff\x00\x00WEBPVP8 ", Reason.TRUNCATED),
        (b"GIF89a", Reason.CORRUPT),
        (b"BM", Reason.CORRUPT),
        (png_header(0, 5), Reason.ZERO_PIXELS),
        (bytes(64_000_001), Reason.TOO_MANY_BYTES),
    ],
)
def test_files_that_are_not_images_have_a_reason(data: bytes, expected: Reason) -> None:
    assert reason(data) in (
        {expected, Reason.CORRUPT} if expected is Reason.ZERO_PIXELS else {expected}
    )


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_truncated_file_is_never_decoded(form: str) -> None:
    data = saved(Image.fromarray(noise(60, 60)), form)
    for share in (0.02, 0.3, 0.7, 0.95):
        assert reason(data[: int(len(data) * share)]) in (Reason.TRUNCATED, Reason.CORRUPT)


def test_decompression_bomb_is_rejected_by_its_header() -> None:
    assert (
        reason(png_header(60_000, 60_000)) is Reason.TOO_MANY_PIXELS
    )  # decoded, it would need 10 GB
    assert reason(saved(smooth(20, 20), "PNG"), max_pixels=399) is Reason.TOO_MANY_PIXELS


def test_size_in_pillows_warning_range_depends_on_our_limit_only() -> None:
    data = png_header(
        9_500, 9_500
    )  # Pillow's own opener warns of 90 million pixels, and warnings are errors here
    assert reason(data) is Reason.TRUNCATED
    assert reason(data, max_pixels=90_000_000) is Reason.TOO_MANY_PIXELS


def test_transparency_is_composited_on_white() -> None:
    half = np.dstack([np.zeros((4, 4, 3), np.uint8), np.full((4, 4), 128, np.uint8)])
    clear = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert np.asarray(decode(saved(Image.fromarray(half), "PNG"))).mean() == pytest.approx(
        127, abs=1
    )
    assert np.asarray(decode(saved(clear, "WEBP", lossless=True))).min() == 255
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert np.asarray(decode(saved(palette, "PNG", transparency=1))).min() == 255
    assert np.asarray(decode(saved(palette, "GIF")))[0, 0].tolist() == [40, 50, 60]
    grey = Image.new("LA", (4, 4), (0, 0))
    assert np.asarray(decode(saved(grey, "PNG"))).min() == 255


def test_16_bit_images_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65_535, 256, dtype=np.uint16)[None].repeat(2, 0)
    result = np.asarray(decode(saved(Image.fromarray(ramp), "PNG")))
    assert np.array_equal(result[0, :, 0], ramp[0] >> 8)


def test_cmyk_and_gray_jpegs_are_converted_to_rgb() -> None:
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    result = np.asarray(decode(saved(red.convert("CMYK"), "JPEG", quality=95)), dtype=int)
    assert np.abs(result - (200, 30, 30)).max() < 12
    assert decode(saved(red.convert("L"), "JPEG")).mode == "RGB"


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[274] = 6  # rotated left by the camera
    upright = smooth(32, 48)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    result = decode(saved(lying, "PNG", exif=exif))
    assert np.array_equal(np.asarray(result), np.asarray(upright))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_corrupt_exif_is_ignored() -> None:
    assert decode(saved(smooth(16, 16), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")).size == (
        16,
        16,
    )


def test_animations_decode_to_their_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for form in ("GIF", "WEBP", "PNG"):
        data = saved(
            frames[0],
            form,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if form == "WEBP" else {}),
        )
        assert np.asarray(decode(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("width", "height"), [(80, 60), (61, 203), (48, 48), (20, 31)])
def test_crop_matches_resizing_first_and_cropping_the_center(width: int, height: int) -> None:
    image, size = smooth(width, height), 48
    short = min(width, height)
    wide, high = int(size * width / short), int(size * height / short)
    left, top = (wide - size) // 2, (high - size) // 2
    expected = image.resize((wide, high), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )
    result = to_square(image, Pixels(size=size))
    assert (
        result.shape == (3, size, size) and result.dtype == np.uint8 and result.flags.c_contiguous
    )
    assert (
        np.abs(result.astype(int) - np.asarray(expected, dtype=int).transpose(2, 0, 1)).max() <= 2
    )


def test_pad_matches_padding_first_and_then_resizing() -> None:
    image, pixels = smooth(90, 60), Pixels(size=48, fit="pad", mean=(0.48, 0.46, 0.41))
    color = (122, 117, 105)
    square = Image.new("RGB", (90, 90), color)
    square.paste(image, (0, 15))
    other = np.asarray(square.resize((48, 48), Image.Resampling.BICUBIC), dtype=int).transpose(
        2, 0, 1
    )
    result = to_square(image, pixels)
    assert result[:, 0, 0].tolist() == list(color) and result[:, -1, -1].tolist() == list(color)
    assert (
        np.abs(result.astype(int) - other)[:, 10:38].max() <= 2
    )  # except for the edge, which is sharp here


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("size", [(1, 10_000), (10_000, 1), (1, 1)])
def test_extreme_shapes_give_a_square_of_their_color(
    fit: Literal["pad", "crop"], size: tuple[int, int]
) -> None:
    data = saved(Image.new("RGB", size, (10, 200, 30)), "PNG")
    result = load_image(data, Pixels(size=224, fit=fit))
    assert result.shape == (3, 224, 224)
    assert result[:, 112, 112 if size[0] >= size[1] else 111].tolist() in (
        [10, 200, 30],
        [128, 128, 128],
    )
    assert (result.reshape(3, -1).T == (10, 200, 30)).all(axis=1).sum() >= 224


def test_scaled_jpeg_decoding_stays_close_to_the_full_one() -> None:
    data = saved(smooth(1_000, 800), "JPEG", quality=95)
    assert decode(data, size=64).size == (250, 200)  # an eighth would be under twice the target
    full = to_square(decode(data), Pixels(size=64)).astype(int)
    assert np.abs(load_image(data, Pixels(size=64)) - full).mean() < 1


def test_bad_sample_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(BadSample(Reason.CORRUPT, "cut")))
    assert isinstance(error, BadSample) and (error.reason, error.detail) == (Reason.CORRUPT, "cut")


# --- metadata -------------------------------------------------------------------------------------

NOISE = np.random.default_rng(0)
XMP = b"<x:xmpmeta>" + b"<rdf:li>layer history entry</rdf:li>" * 60_000  # 2 MB, packed 6 kB
RANDOM = NOISE.bytes(65_000)
SEGMENTS = 320  # of 65 kB: 20 MB


def shot(kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(64 * 96 * 3, dtype=np.uint8).reshape(64, 96, 3)).save(
        file, kind, **how
    )
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segments(marker: int, head: bytes = b"", count: int = SEGMENTS) -> bytes:
    body = head + RANDOM
    return (b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body) * count


def blocks(data: bytes) -> bytes:
    cut = (data[at : at + 255] for at in range(0, len(data), 255))
    return b"".join(bytes([len(piece)]) + piece for piece in cut) + b"\0"


PNG_TEXTS: dict[str, bytes] = {
    "history": chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + zlib.compress(XMP)),
    "international": chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP)),
    "plain": chunk(b"tEXt", b"Comment\0" + XMP * 10),
    "a profile": chunk(b"iCCP", b"CMYK\0\0" + zlib.compress(NOISE.bytes(2_500_000))),
    "many": chunk(b"zTXt", b"XML\0\0" + zlib.compress(bytes(900_000))) * 60,
    "not a text": chunk(b"caBX", bytes(20_000_000)),
}


@pytest.mark.parametrize("name", PNG_TEXTS)
@pytest.mark.parametrize("where", ["before the pixels", "after them"])
def test_metadata_of_a_png_changes_no_pixel(name: str, where: str) -> None:
    original, at = shot("PNG"), 33 if where == "before the pixels" else -12
    data = original[:at] + PNG_TEXTS[name] + original[at:]
    assert decode(data).tobytes() == decode(original).tobytes()
    assert size_of(data) == (96, 64)


JPEG_SEGMENTS: dict[str, bytes] = {
    "extended XMP": segments(0xE1, b"http://ns.adobe.com/xmp/extension/\0"),
    "a profile": segments(0xE2, b"ICC_PROFILE\0\1\2"),
    "Photoshop": segments(0xED, b"Photoshop 3.0\0"),
    "comments": segments(0xFE),
    "a depth map": segments(0xE5),
}


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("name", JPEG_SEGMENTS)
def test_metadata_of_a_jpeg_changes_no_pixel(name: str, progressive: bool) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for how in ({}, {"exif": exif}):
        original = shot("JPEG", progressive=progressive, **how)
        for at in (2, original.index(b"\xff\xdb")):
            data = original[:at] + JPEG_SEGMENTS[name] + original[at:]
            assert decode(data).tobytes() == decode(original).tobytes()
            assert size_of(data) == size_of(original)


@pytest.mark.parametrize("progressive", [False, True])
def test_video_after_a_jpeg_is_ignored(progressive: bool) -> None:
    original = shot("JPEG", progressive=progressive)
    film = (b"\xff\xda" + RANDOM) * 300
    assert decode(original + film).tobytes() == decode(original).tobytes()


@pytest.mark.parametrize("kind", [b"!\xfe", b"!\xff\x0bXMP DataXMP"])
def test_metadata_of_a_gif_changes_no_pixel(kind: bytes) -> None:
    original = shot("GIF")
    at = 13 + (3 << (original[10] & 7) + 1)
    data = original[:at] + kind + blocks(RANDOM * 50) + original[at:]
    assert decode(data).tobytes() == decode(original).tobytes()


def test_small_metadata_is_not_removed() -> None:
    text = chunk(b"zTXt", b"XML\0\0" + zlib.compress(XMP[:500_000]))
    for original, at, more in (
        (shot("PNG"), 33, text),
        (shot("JPEG"), 2, segments(0xED, count=3)),
        (shot("GIF"), 13, b""),
    ):
        data = original[:at] + more + original[at:]
        assert without_metadata(data) is data
