"""Words of a text, in the scripts that captions are written in."""

import unicodedata

import pytest

from bridgework.curation.text import is_joined, length, tokenize_words, without_emoji


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "\u092f\u0939 \u090f\u0915 \u0939\u093f\u0928\u094d\u0926\u0940 \u0935\u093e\u0915\u094d\u092f",
            4,
        ),  # Hindi
        ("\u0bae\u0bb0\u0bae\u0bcd", 1),  # Tamil
        ("\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f", 1),  # Arabic with its vowels
        ("\u0dc1\u0dca\u200d\u0dbb\u0dd3 \u0dbd\u0d82\u0d9a\u0dcf", 2),  # Sinhala, with a joiner
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", 1),  # Persian, with a non-joiner
        ("\u0130stanbul", 1),  # case-folding makes the dot a mark
    ],
)
def test_a_word_holds_its_marks(text: str, told: int) -> None:
    assert len(tokenize_words(text)) == told
    assert " ".join(tokenize_words(text)) == unicodedata.normalize("NFKC", text).casefold()


def test_an_underscore_separates_words() -> None:
    assert tokenize_words("a nude_girl_01.jpg picture") == [
        "a",
        "nude",
        "girl",
        "01",
        "jpg",
        "picture",
    ]
    assert tokenize_words("_Stra\u00dfe_01_") == ["strasse", "01"]


def test_each_sign_of_a_script_without_blanks_is_a_word() -> None:
    assert tokenize_words("\u8001\u8857 \u3042A1") == ["\u8001", "\u8857", "\u3042", "a1"]
    thai, burmese = "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u1019\u103c\u1014\u103a\u104b"
    assert tokenize_words(thai) == ["\u0e2a", "\u0e27\u0e31", "\u0e2a", "\u0e14\u0e35"]
    assert tokenize_words(burmese) == ["\u1019\u103c", "\u1014\u103a"]  # and the full stop is none


def test_case_width_and_punctuation_make_no_difference() -> None:
    assert (
        tokenize_words("A Dog\u2019s \uff2c\uff21\uff2d\uff30!")
        == tokenize_words("a dog's, lamp")
        == ["a", "dog", "s", "lamp"]
    )
    assert tokenize_words("caf\u00e9") == tokenize_words("CAFE\u0301") == ["caf\u00e9"]


def test_emoji_are_not_words() -> None:
    assert tokenize_words("I \u2764\ufe0f it \U0001f469\u200d\U0001f680") == [
        "i",
        "it",
    ] and tokenize_words("1\ufe0f\u20e3") == ["1"]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("It's a red-brick house, isn't it?", 6),
        ("这是一栋红色的房子。", 4),
        ("家です。", 2),
        ("บ้านสีแดงหลังหนึ่ง", 3),
        ("यह लाल है।", 3),
        ("빨간 집이다.", 2),
        ("标志上写着 STOP 。", 4),
        ("", 0),
    ],
)
def test_a_text_is_as_long_in_any_script(text: str, size: int) -> None:
    assert length(text) == size
    if text.isascii():
        assert length(text) == len(text.split())


FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
CLUSTERS = (
    *(FAMILY, "\u2764\ufe0f\u200d\U0001f525", "\U0001f44d\U0001f3fd", "1\ufe0f\u20e3", "e\u0301"),
    *(
        "\U0001f1e9\U0001f1ea",
        "\U0001f3f4\U000e0067\U000e0062\U000e007f",
        "क\u094d\u200d",
        "a",
        "家",
    ),
)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_letters_that_are_drawn_as_one_are_joined(cluster: str) -> None:
    text = f"x{cluster}{cluster}y"
    cuts = [at for at in range(len(text) + 1) if not is_joined(text, at)]
    size = len(cluster)
    assert cuts == [0, 1, 1 + size, 1 + 2 * size, 2 + 2 * size]


def test_emoji_after_a_text_are_removed() -> None:
    for end in (" \U0001f642", f"{FAMILY}{FAMILY} ", " \u2764\ufe0f", ""):
        assert without_emoji(f"It is red.{end}") == "It is red."
    assert without_emoji("\U0001f642") == ""
