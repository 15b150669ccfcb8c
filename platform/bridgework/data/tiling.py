"""Any-resolution: a base square and a grid of tiles (LLaVA-NeXT; xGen-MM, arXiv:2408.08872).

Grid, sizes and padding match both releases to the pixel, because their weights were trained on
them.

# S side of a tile in pixels
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bridgework.data.images import to_square
from bridgework.system import Layout, Pixels


def choose_grid(width: int, height: int, pixels: Pixels) -> Layout:
    """Return the grid that keeps most pixels of an image.

    Among equals, it is the one that wastes least.

    Without `pixels.grids`, the layout has the base square only. On ties, the first grid of the list
    wins.
    """
    if not pixels.grids:
        return Layout(0, 0, width, height)
    columns, rows = max(pixels.grids, key=lambda grid: _score(width, height, grid, pixels.size))
    return Layout(columns, rows, width, height)


def _score(width: int, height: int, grid: tuple[int, int], size: int) -> tuple[int, int]:
    """Return (effective pixels of the image, minus wasted pixels) of a grid: higher is better."""
    grid_width, grid_height = grid[0] * size, grid[1] * size
    scale = min(grid_width / width, grid_height / height)
    effective = min(int(width * scale) * int(height * scale), width * height)
    return effective, effective - grid_width * grid_height


def tile_image(image: Image.Image, pixels: Pixels) -> tuple[NDArray[np.uint8], Layout]:
    """Cut an image into tiles. Returns (tiles (n, 3, S, S) uint8, their layout).

    The base square comes first, then the grid row by row, with black padding. With a grid, the base
    square is the complete image, resized to a square. Without one, it is the result of `to_square`.
    """
    layout, size = choose_grid(*image.size, pixels), pixels.size
    if not layout.columns:
        return to_square(image, pixels)[None], layout
    rgb = image.convert("RGB")
    base_HWC = np.asarray(rgb.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)
    canvas = _fit_on_canvas(rgb, layout.columns * size, layout.rows * size)
    tiles = (
        np.asarray(canvas, dtype=np.uint8)
        .reshape(layout.rows, size, layout.columns, size, 3)
        .swapaxes(1, 2)
        .reshape(-1, size, size, 3)
    )
    stacked = np.concatenate([base_HWC[None], tiles]).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(stacked), layout


def _fit_on_canvas(image: Image.Image, width: int, height: int) -> Image.Image:
    """Return the image, as large as it fits, in the center of a black canvas."""
    scale_wide, scale_high = width / image.width, height / image.height
    if scale_wide < scale_high:
        wide, high = width, min(math.ceil(image.height * scale_wide), height)
    else:
        wide, high = min(math.ceil(image.width * scale_high), width), height
    canvas = Image.new("RGB", (width, height))
    scaled = image.resize((wide, high), Image.Resampling.BICUBIC)
    canvas.paste(scaled, ((width - wide) // 2, (height - high) // 2))
    return canvas
