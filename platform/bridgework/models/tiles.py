"""Tiles of an image inside a model: masks of padded patches, and LLaVA-NeXT's rows with a newline.

`resample`  every square passes the bridge by itself; padded patches are masked (xGen-MM)
`unpad`     every patch is a token: the base square first, then the grid of all tiles without its
            padding, with a learned newline after every row (LLaVA-NeXT's `spatial_unpad`)
"""

# N images  S squares of all images, each the base, then its tiles
# P patches or tokens of a square, G x G  D width of the language model
# R, C rows and columns of patches in the grid of an image's tiles

from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from bridgework.errors import DataError
from bridgework.system import Layout

Tiles = Literal["resample", "unpad"]


def num_image_tokens(layout: Layout, tokens: int, tiles: Tiles) -> int:
    """Return the number of tokens of an image whose base square has `tokens`."""
    if tiles == "resample" or not layout.columns:
        return tokens * (1 + layout.columns * layout.rows)
    rows, columns = unpadded(layout, isqrt(tokens))
    return tokens + len(rows) * (len(columns) + 1)


def unpadded(layout: Layout, side: int) -> tuple[range, range]:
    """Return the (rows, columns) of the grid of patches, `side` per tile, without its padding.

    Rounds as transformers does. LLaVA's own code is one row short if a float is just below an
    integer.
    """
    high, wide = layout.rows * side, layout.columns * side
    if layout.width / layout.height > wide / high:
        pad = (high - int(round(layout.height * (wide / layout.width), 7))) // 2
        return range(pad, high - pad), range(wide)
    pad = (wide - int(round(layout.width * (high / layout.height), 7))) // 2
    return range(high), range(pad, wide - pad)


def unpack_layouts(layouts_N4: Tensor) -> list[Layout]:
    """Return the rows of a batch's layouts."""
    return [Layout(*row) for row in layouts_N4.tolist()]


def merge(tiles_SPD: Tensor, rows: int, columns: int) -> Tensor:
    """Join tiles (rows * columns, G * G, D), row by row, to one grid (R, C, D)."""
    side = isqrt(tiles_SPD.shape[1])
    tiles: Tensor = tiles_SPD.unflatten(1, (side, side)).unflatten(0, (rows, columns))
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def split(grid_RCD: Tensor, rows: int, columns: int) -> Tensor:
    """Cut a grid into tiles: the inverse of `merge`."""
    tiles: Tensor = grid_RCD.unflatten(1, (columns, -1)).unflatten(0, (rows, -1))
    return tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)


def patch_mask(layouts_N4: Tensor, patches: int) -> Tensor:
    """Return (S, P) bool on the CPU: False on padded patches; base squares have none."""
    side, masks = isqrt(patches), [torch.ones(0, patches, dtype=torch.bool)]
    for layout in unpack_layouts(layouts_N4):
        masks.append(torch.ones(1, patches, dtype=torch.bool))
        if layout.columns:
            rows, columns = unpadded(layout, side)
            grid_RC1 = torch.zeros(layout.rows * side, layout.columns * side, 1, dtype=torch.bool)
            grid_RC1[rows.start : rows.stop, columns.start : columns.stop] = True
            masks.append(split(grid_RC1, layout.rows, layout.columns).squeeze(-1))
    return torch.cat(masks)


class Unpad(nn.Module):
    """Learned `newline`, the embedding after every row of patches."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.newline = nn.Parameter(torch.randn(width) * width**-0.5)  # LLaVA-NeXT's initialization

    def forward(self, tokens_SPD: Tensor, layouts_N4: Tensor | None) -> Tensor:
        """Return (tokens, D) of all images, in order, from the squares (S, P, D).

        Without layouts each square is an image. Raises DataError if squares and layouts do not
        match.
        """
        layouts = [Layout(0, 0, 1, 1)] * len(tokens_SPD)
        if layouts_N4 is not None:
            layouts = unpack_layouts(layouts_N4)
        counts = [1 + layout.columns * layout.rows for layout in layouts]
        if sum(counts) != len(tokens_SPD):
            raise DataError(
                f"the layouts are of {sum(counts)} squares, and {len(tokens_SPD)} are given"
            )
        # empty slices put tokens and newline into the graph of a batch without images or tiles
        parts = [tokens_SPD.flatten(0, 1)[:0], self.newline.to(tokens_SPD.dtype).expand(0, -1)]
        for layout, squares in zip(layouts, tokens_SPD.split(counts), strict=True):
            parts.append(squares[0])
            if layout.columns:
                parts.append(self._rows(squares[1:], layout))
        return torch.cat(parts)

    def _rows(self, tiles_SPD: Tensor, layout: Layout) -> Tensor:
        """Return the tokens of a grid of tiles without padding, with a newline after every row."""
        rows, columns = unpadded(layout, isqrt(tiles_SPD.shape[1]))
        grid_RCD = merge(tiles_SPD, layout.rows, layout.columns)
        image_RCD = grid_RCD[rows.start : rows.stop, columns.start : columns.stop]
        newline_R1D = self.newline.to(image_RCD.dtype).expand(len(rows), 1, -1)
        return torch.cat([image_RCD, newline_R1D], dim=1).flatten(0, 1)
