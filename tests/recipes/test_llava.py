"""LLaVA's page: what an image is padded with says nothing to the tower."""

import numpy as np
import pytest
import torch
from PIL import Image

from bridgework.data.transforms import to_square
from bridgework.models.vision import normalise
from bridgework.system import load


@pytest.mark.parametrize("size", [(90, 60), (31, 80), (1, 300)])
def test_a_padded_square_is_as_large_as_the_longer_side_centred_in_what_the_tower_takes_for_nothing(
    size: tuple[int, int],
) -> None:
    pixels = load("llava")["align"].model.pixels
    white = Image.new("RGB", size, "white")
    square = to_square(white, pixels)
    assert square.shape == (3, pixels.size, pixels.size)
    whole = np.flatnonzero((square == 255).all(0).any(1)), np.flatnonzero((square == 255).all(0).any(0))
    for side, kept in zip(size[::-1], whole, strict=True):
        share = (kept[-1] - kept[0] + 1) / pixels.size
        assert abs(share - side / max(size)) <= 2 / pixels.size
        assert abs((kept[0] + kept[-1] + 1) / 2 - pixels.size / 2) <= 1  # centred
    border = (
        torch.from_numpy(square[:, :1, :1].copy()) if size[0] > size[1] else torch.from_numpy(square[:, :, :1].copy())
    )
    seen = normalise(border.unsqueeze(0), pixels)
    limit = torch.tensor([1 / 255 / std for std in pixels.std]).view(1, 3, 1, 1)
    assert bool((seen.abs() <= limit).all())
