"""Documents on toy pages: which images stay, and which image a text sees."""

import pytest

from bridgework.data.samples import Part
from bridgework.data.templates import arrange_document, images_before_text, truncate_images


def page(text: str) -> list[Part]:
    """`a1b` is a text, the second image (0, 1, ...) of the page, and a text."""
    return [Part("caption", image=int(c)) if c.isdigit() else Part("caption", text=c) for c in text]


def read(parts: list[Part]) -> str:
    return "".join(part.text or str(part.image) for part in parts)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("a0b1c", "0a1bc"),
        ("0a1b", "01ab"),
        ("ab0c", "0abc"),
        ("a01b", "0a1b"),
        ("abc", "abc"),
        ("a0", "0a"),
    ],
)
def test_every_text_sees_the_image_behind_it_and_the_last_ones_the_last(
    document: str, expected: str
) -> None:
    assert read(images_before_text(page(document))) == expected


@pytest.mark.parametrize("document", ["a0b1c", "0a1b2", "ab0c", "01a"])
def test_nothing_is_lost_and_images_keep_their_order(document: str) -> None:
    moved = read(images_before_text(page(document)))
    assert sorted(moved) == sorted(document)
    for keep in (str.isdigit, str.isalpha):
        assert list(filter(keep, moved)) == list(filter(keep, document))


@pytest.mark.parametrize(("images", "expected"), [(0, "a"), (1, "a0b"), (2, "a0b1c"), (5, "a0b1c")])
def test_a_document_ends_before_the_first_image_too_many(images: int, expected: str) -> None:
    assert read(truncate_images(page("a0b1c"), images)) == expected


def test_all_or_no_documents_are_turned_at_the_ends_and_half_of_them_at_a_half() -> None:
    def share(following: float) -> float:
        made = [
            read(arrange_document(page("a0b"), choice, images=None, following=following))
            for choice in range(400)
        ]
        assert set(made) <= {"a0b", "0ab"}
        return made.count("0ab") / len(made)

    assert (share(0.0), share(1.0)) == (0.0, 1.0)
    assert share(0.5) == pytest.approx(0.5, abs=0.1)


def test_one_draw_gives_one_document() -> None:
    once, again = (arrange_document(page("a0b1c"), 7, images=1, following=0.5) for _ in range(2))
    assert once == again


def test_a_conversation_stays_as_it_is() -> None:
    talk = [Part("user", image=0), Part("user", text="q"), Part("assistant", text="a")]
    assert arrange_document(talk, 3, images=0, following=1.0) == talk
