"""The synthetic shapes: their captions are true, and a seed is all they depend on."""

import re

import numpy as np

from bridgework.data.images import decode
from bridgework.data.synthetic import COLORS, PLACES, shapes

CAPTION = re.compile(r"a (small|large) (\w+) (\w+) (above|left of) a (small|large) (\w+) (\w+)")


def test_captions_are_true() -> None:
    for sample in shapes(64, size=64):
        found = CAPTION.fullmatch(sample.parts[1].text or "")
        assert found is not None
        pixels = np.asarray(decode(sample.images[0]))
        for (x, y), color, size in zip(
            PLACES[found[4]], (found[2], found[6]), (found[1], found[5]), strict=True
        ):
            near = pixels[int(y * 64) - 16 : int(y * 64) + 16, int(x * 64) - 16 : int(x * 64) + 16]
            painted = (near == COLORS[color]).all(axis=2)
            assert painted[16, 16]
            assert (painted.any(axis=0).sum() > 22) == (size == "large")  # its width tells its size


def test_rows_depend_on_seed_and_number_alone() -> None:
    assert list(shapes(5)) == list(shapes(9))[:5]
    assert list(shapes(5)) != list(shapes(5, seed=1))
    assert len({sample.key for sample in shapes(50)}) == 50
