"""Any-resolution: an image as its base square and a grid of tiles (LLaVA-NeXT; xGen-MM, arXiv:2408.08872).

Grid, sizes and padding are those of both releases, to the pixel: weights that were trained on them expect nothing else.
"""

# S side of a tile in pixels

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bridgework.data.images import to_square
from bridgework.system import Layout, Pixels


def choose_grid(width: int, height: int, pixels: Pixels) -> Layout:
    """How an image of this size is cut: the grid that keeps most of its pixels; of equals the one that wastes least.

    Without `pixels.grids` there is the base square alone. Ties keep the first grid of the list.
    """
    if not pixels.grids:
        return Layout(0, 0, width, height)
    columns, rows = max(pixels.grids, key=lambda grid: _merit(width, height, grid, pixels.size))
    return Layout(columns, rows, width, height)


def _merit(width: int, height: int, grid: tuple[int, int], size: int) -> tuple[int, int]:
    """(pixels that the grid keeps, minus what it wastes): more is better."""
    room = grid[0] * size, grid[1] * size
    scale = min(room[0] / width, room[1] / height)
    kept = min(int(width * scale) * int(height * scale), width * height)
    return kept, kept - room[0] * room[1]


def tile_image(image: Image.Image, pixels: Pixels) -> tuple[NDArray[np.uint8], Layout]:
    """(tiles (n, 3, S, S) uint8, how they lie): the base square, then the grid row by row, black where it pads.

    Beside a grid the base square is the whole image, squeezed. Without one it is what `to_square` makes of it.
    """
    layout, size = choose_grid(*image.size, pixels), pixels.size
    if not layout.columns:
        return to_square(image, pixels)[None], layout
    upright = image.convert("RGB")
    base_1HWC = np.asarray(upright.resize((size, size), Image.Resampling.BICUBIC), dtype=np.uint8)[
        None
    ]
    canvas_HWC = np.asarray(
        _fitted(upright, layout.columns * size, layout.rows * size), dtype=np.uint8
    )
    tiles = (
        canvas_HWC.reshape(layout.rows, size, layout.columns, size, 3)
        .swapaxes(1, 2)
        .reshape(-1, size, size, 3)
    )
    return np.ascontiguousarray(np.concatenate([base_1HWC, tiles]).transpose(0, 3, 1, 2)), layout


def _fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The image as large as it fits, in the middle of a black canvas."""
    scale_wide, scale_high = width / image.width, height / image.height
    if scale_wide < scale_high:
        wide, high = width, min(math.ceil(image.height * scale_wide), height)
    else:
        wide, high = min(math.ceil(image.width * scale_high), width), height
    canvas = Image.new("RGB", (width, height))
    scaled = image.resize((wide, high), Image.Resampling.BICUBIC)
    canvas.paste(scaled, ((width - wide) // 2, (height - high) // 2))
    return canvas
