"""Texts on the sheet: what fits is shown, what does not ends in dots, and a long one costs no more."""

import random

import pytest
from PIL import ImageFont

from bridgework.curation.contact_sheet import wrap_text
from bridgework.evaluation.figures import FONT, TEXT


class Ruler(ImageFont.FreeTypeFont):
    """Counts what it measures."""

    calls = signs = 0

    def getlength(self, text: str | bytes, *args: object, **kwargs: object) -> float:
        self.calls, self.signs = self.calls + 1, self.signs + len(text)
        return super().getlength(text)


@pytest.fixture
def ruler() -> Ruler:
    font = ImageFont.load_default(FONT)
    assert isinstance(font, ImageFont.FreeTypeFont)
    font.path.seek(0)
    return Ruler(font.path, FONT)


def test_a_long_word_is_cut_where_it_no_longer_fits(ruler: Ruler) -> None:
    for word in ("\u732b" * 300, "W" * 300, "".join(random.Random(0).choices("ilWm", k=300))):
        (line,) = wrap_text(word, ruler, 4)
        shown = line.removesuffix("..")
        assert shown != line and word.startswith(shown)
        assert ruler.getlength(line) <= TEXT < ruler.getlength(word[: len(shown) + 1] + "..")


def test_text_that_fits_is_complete(ruler: Ruler) -> None:
    text = " ".join(["a dog in the grass"] * 9)
    lines = wrap_text(text, ruler, 4)
    assert (
        " ".join(lines) == text
        and len(lines) > 1
        and all(ruler.getlength(line) <= TEXT for line in lines)
    )
    assert wrap_text("one\n\ntwo", ruler, 4) == ["one", "", "two"] and wrap_text("", ruler, 4) == []
    assert wrap_text("one\ntwo\nthree", ruler, 2) == ["one", "two .."]


@pytest.mark.parametrize(
    "text", ["\u732b" * 6000, "\u732b" * 6000 + " cat" * 6000, "cat " * 6000, "cat\n" * 6000]
)
def test_a_long_text_is_measured_no_further_than_it_is_shown(text: str, ruler: Ruler) -> None:
    assert 1 <= len(wrap_text(text, ruler, 4)) <= 4
    assert ruler.calls < 200 and ruler.signs < 10_000
