"""Any-resolution against transformers' LLaVA-NeXT: the grid, and every pixel of every tile."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from bridgework.data.images import to_square
from bridgework.data.tiling import choose_grid, tile_image
from bridgework.system import Layout, Pixels

XGEN = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # columns, rows
PIXELS = Pixels(size=32, grids=XGEN)
SIZES = [(32, 32), (64, 64), (100, 50), (50, 100), (97, 31), (31, 97), (33, 47), (200, 8), (7, 90)]


def picture(width: int, height: int) -> Image.Image:
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def transformers_tiles(image: Image.Image, pixels: Pixels) -> Any:
    size, grids = (
        pixels.size,
        [[rows * pixels.size, columns * pixels.size] for columns, rows in pixels.grids],
    )
    processor: Any = LlavaNextImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, image_grid_pinpoints=grids,
        do_rescale=False, do_normalize=False, do_pad=False,
    )  # fmt: skip
    return np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_pixel_of_every_tile_is_that_of_transformers(size: tuple[int, int]) -> None:
    tiles, layout = tile_image(picture(*size), PIXELS)
    expected = transformers_tiles(picture(*size), PIXELS)
    assert tiles.dtype == np.uint8 and len(tiles) == 1 + layout.columns * layout.rows
    assert np.array_equal(tiles, expected)


@given(st.integers(1, 3000), st.integers(1, 3000), st.permutations(XGEN))
def test_the_grid_is_that_of_transformers(
    width: int, height: int, grids: Sequence[tuple[int, int]]
) -> None:
    layout = choose_grid(width, height, Pixels(size=384, grids=tuple(grids)))
    found = select_best_resolution(
        (height, width), [(rows * 384, columns * 384) for columns, rows in grids]
    )
    if found is not None:  # it has no answer where every grid would keep no pixel at all
        assert (layout.rows * 384, layout.columns * 384) == tuple(found)


@pytest.mark.parametrize(
    ("width", "height", "grid"),
    [
        (384, 384, (1, 2)),  # a tie keeps the first of the list
        (100, 50, (1, 2)),
        (768, 768, (2, 2)),
        (800, 400, (2, 1)),
        (1200, 400, (3, 1)),
        (400, 1200, (1, 3)),
    ],
)
def test_xgen_picks_the_grid_that_keeps_most(
    width: int, height: int, grid: tuple[int, int]
) -> None:
    assert choose_grid(width, height, Pixels(size=384, grids=XGEN)) == Layout(*grid, width, height)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_a_turned_image_turns_the_grid_unless_grids_tie(width: int, height: int) -> None:
    turned = tuple((rows, columns) for columns, rows in XGEN)
    layout = choose_grid(width, height, Pixels(size=384, grids=XGEN))
    other = choose_grid(height, width, Pixels(size=384, grids=turned))
    assert (layout.columns, layout.rows) == (other.rows, other.columns)


def test_tiles_put_together_are_the_image_where_nothing_pads() -> None:
    image = picture(64, 64)
    tiles, layout = tile_image(image, PIXELS)
    assert layout == Layout(2, 2, 64, 64)
    whole = tiles[1:].reshape(2, 2, 3, 32, 32).transpose(2, 0, 3, 1, 4).reshape(3, 64, 64)
    assert np.array_equal(whole.transpose(1, 2, 0), np.asarray(image))


def test_without_grids_an_image_is_its_square() -> None:
    tiles, layout = tile_image(picture(40, 20), Pixels(size=32))
    assert layout == Layout(0, 0, 40, 20)
    assert np.array_equal(tiles, to_square(picture(40, 20), Pixels(size=32))[None])
