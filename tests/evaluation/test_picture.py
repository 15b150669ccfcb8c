"""The sheet of images and captions: everything is on it, and nothing runs over."""

import numpy as np
from PIL import Image

from bridgework.evaluation.figures import IMAGE, PAD, RIGHT, TEXT, Choice, FigureTile, grid

SQUARE = np.full((3, 32, 32), 90, np.uint8)
GREEN = tuple(int(RIGHT[i : i + 2], 16) for i in (1, 3, 5))
COLUMN = IMAGE + TEXT + 3 * PAD


def tile(*captions: str, right: int | None = None) -> FigureTile:
    return FigureTile(
        SQUARE, [Choice(i + 1, c, 1.0 - i, right=i == right) for i, c in enumerate(captions)]
    )


def has(sheet: Image.Image, color: tuple[int, ...], box: tuple[int, int, int, int]) -> bool:
    return bool((np.asarray(sheet.crop(box)) == color).all(-1).any())


def test_two_tiles_are_in_a_row() -> None:
    one, two, three = (grid([tile("a", "b", "c")] * n) for n in (1, 2, 3))
    assert one.size == two.size == (2 * COLUMN, IMAGE + 2 * PAD)
    assert three.size == (2 * COLUMN, 2 * (IMAGE + 2 * PAD))


def test_images_and_only_the_right_caption_are_in_their_colors() -> None:
    sheet = grid([tile("a", "b", right=1), tile("a", "b")])
    left, right = (0, 0, COLUMN, sheet.height), (COLUMN, 0, 2 * COLUMN, sheet.height)
    assert has(sheet, (90, 90, 90), left) and has(sheet, (90, 90, 90), right)
    assert has(sheet, GREEN, left) and not has(sheet, GREEN, right)


def test_long_captions_stay_in_their_place() -> None:
    words, word = "many words and then some more " * 9, "w" * 300
    sheet = grid([tile(words, word, words, word, right=3), tile("")])
    assert sheet.height > IMAGE + 2 * PAD
    score = COLUMN - 12 - PAD  # scores end here; beyond is the next tile
    assert not (np.asarray(sheet.crop((score + 1, 0, COLUMN + PAD - 2, sheet.height))) != 255).any()
    last = np.asarray(sheet.crop((0, sheet.height - 4, COLUMN, sheet.height)))
    assert (last == 255).all()
