"""Whatever bytes come as an image: a picture, right to the pixel, or a reason; soon, and without eating the memory."""

import resource
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from bridgework.data.images import decode, header, load_image, size_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.tiling import tile_image
from bridgework.system import Pixels
from tests.hostile import images

TILES = Pixels(size=16, grids=((1, 2), (2, 1), (2, 2)))
# Of broken EXIF and animations Pillow says so and goes on; a process of its own is not told to stop at that.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")


def tiled(data: bytes) -> NDArray[np.uint8]:
    return tile_image(decode(data), TILES)[0]


def square(data: bytes) -> NDArray[np.uint8]:
    return load_image(data, Pixels(size=16))


@pytest.mark.parametrize("name", images.REFUSED)
def test_every_hostile_image_is_refused_for_its_reason(name: str) -> None:
    make, reason = images.REFUSED[name]
    data = make()
    for read in (decode, square, tiled):
        with pytest.raises(BadSample) as caught:
            read(data)
        assert caught.value.reason is reason, caught.value
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "name", [name for name, (_, reason) in images.REFUSED.items() if reason is images.LARGE]
)
def test_a_bomb_is_refused_by_its_header(name: str) -> None:
    data = images.REFUSED[name][0]()
    for read in (header, size_of):
        with pytest.raises(BadSample, match="too_many_pixels"):
            read(data)


def test_bombs_take_no_memory() -> None:
    files = [
        make()
        for make, reason in images.REFUSED.values()
        if reason in (images.LARGE, images.CORRUPT)
    ]
    peak_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for data in files:
        for read in (decode, size_of):
            try:
                read(data)
            except BadSample:
                continue
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 100_000


@pytest.mark.parametrize("name", images.PICTURES)
def test_every_odd_image_is_the_picture_that_it_is(name: str) -> None:
    make, size, color = images.PICTURES[name]
    data = make()
    found = decode(data)
    assert (found.mode, found.size, size_of(data)) == ("RGB", size, size)
    assert np.abs(np.asarray(found, dtype=int) - color).max() <= 1
    for squares in (square(data)[None], tiled(data)[:1]):
        assert squares.shape == (1, 3, 16, 16)
        assert np.abs(squares.transpose(0, 2, 3, 1).astype(int) - color).max() <= 1


@pytest.mark.parametrize("name", images.BESIDE)
def test_what_stands_beside_the_pixels_does_not_change_them(name: str) -> None:
    data, expected = images.BESIDE[name](), np.asarray(decode(images.jpeg()))
    assert np.array_equal(np.asarray(decode(data)), expected)
    assert size_of(data) == expected.shape[1::-1]


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_the_header_tells_the_size_that_the_picture_has(form: str, turn: int) -> None:
    exif = Image.Exif()
    exif[0x112] = turn
    data = images.saved(images.noise(), form, exif=exif)
    assert size_of(data) == decode(data).size == ((24, 20) if turn < 5 else (20, 24))


@pytest.mark.parametrize("data", [pytest.param(data, id=name) for name, data in images.cut()])
def test_a_cut_file_is_never_taken_for_a_picture(data: bytes) -> None:
    for read in (decode, square, tiled):
        with pytest.raises(BadSample) as caught:
            read(data)
        assert caught.value.reason in (Reason.TRUNCATED, Reason.CORRUPT)


def test_any_file_is_a_picture_or_a_bad_sample() -> None:
    reads: list[Callable[[bytes], object]] = [
        lambda data: decode(data, max_pixels=10**6),
        square,
        size_of,
    ]
    outcomes = {"picture": 0, "bad": 0}
    for data in images.mutations(3_000, seed=0):
        for read in reads:
            try:
                read(data)
                outcomes["picture"] += 1
            except BadSample as error:
                assert "\n" not in str(error)
                outcomes["bad"] += 1
    assert min(outcomes.values()) > 1_000, (
        outcomes
    )  # the mutations are neither all harmless nor all plain


def test_sixteen_bits_are_scaled_and_not_clipped() -> None:
    ramp = np.linspace(0, 65_535, 256, dtype=">u2")
    found = np.asarray(decode(images.png((256, 1), [ramp.tobytes()], depth=16, color=images.GREY)))
    assert np.array_equal(found[0, :, 0], ramp.astype(int) >> 8)
