"""Words, length, emoji and language of a text.

Words ignore case, punctuation and line breaks. The language is detected by py3langid, whose model
is loaded once per process in half a second.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any


def _combining_marks() -> str:
    """Return regex ranges of the marks that belong to the letter before them, e.g. vowel signs.

    They are needed because \\w does not match them.
    """
    codes = [
        code for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
    ]
    # variation selectors, which choose between a glyph and an emoji, are excluded
    marks = [code for code in codes if not 0xFE00 <= code <= 0xFE0F]
    runs = (list(run) for _, run in groupby(enumerate(marks), lambda pair: pair[1] - pair[0]))
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


# scripts without blanks: Chinese and Japanese; Thai, Lao, Burmese and Khmer, which have marks
_SIGNS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_MARKED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_MARK, _LETTER = f"[{_combining_marks()}]", rf"[^\W_{_SIGNS}{_MARKED}]"
# letters and digits with their marks and joiners; or a single sign of a script without blanks
_WORD = re.compile(
    rf"{_LETTER}+(?:{_MARK}+{_LETTER}*|[\u200c\u200d]+{_LETTER}+)*|[{_SIGNS}]|(?=[{_MARKED}])[^\W_]{_MARK}*"
)
_SIGN, _MARKED_SIGN = re.compile(f"[{_SIGNS}]"), re.compile(rf"(?=[{_MARKED}])[^\W_]")
_JOINING = "\u200d\ufe0e\ufe0f\u20e3"  # joiner of emoji, variation selectors, keycap
_TONES = re.compile("[\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")  # of skin; and flag tags
_FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
_ASCII = re.compile(r"[a-z0-9]+")  # three times as fast, and enough for most captions


def tokenize_words(text: str) -> list[str]:
    """Return the words of a text, case-folded and in Unicode NFKC.

    In scripts without blanks, each sign is a word.
    """
    if text.isascii():
        return _ASCII.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def length(text: str) -> int:
    """Return the length of a text in words, comparable in scripts without blanks.

    Two signs of Chinese or Japanese count as a word, and so do four letters of Thai, Lao, Burmese
    or Khmer.
    """
    return sum(max(1, round(_weight(piece))) for piece in text.split())


def _weight(piece: str) -> float:
    if piece.isascii():
        return 0.0
    return len(_SIGN.findall(piece)) / 2 + len(_MARKED_SIGN.findall(piece)) / 4


def without_emoji(text: str) -> str:
    """Return the text without emoji, and their joiners, at its end."""
    end = len(text)
    while end and (text[end - 1].isspace() or _is_emoji(text[end - 1])):
        end -= 1
    return text[:end]


def is_joined(text: str, at: int) -> bool:
    """Return True if the character at `at` is displayed with the one before, e.g. an accent."""
    if not 0 < at < len(text):
        return False
    before, letter = text[at - 1], text[at]
    if (
        unicodedata.category(letter) in ("Mn", "Mc", "Me")
        or letter in _JOINING
        or _TONES.match(letter)
    ):
        return True
    if letter in _FLAG_LETTERS:  # two letters form a flag
        run = len(text[:at]) - len(text[:at].rstrip(_FLAG_LETTERS))
        return run % 2 == 1
    return before == "\u200d" and unicodedata.category(letter) == "So"


def _is_emoji(letter: str) -> bool:
    return unicodedata.category(letter) in ("So", "Sk") or letter in _JOINING


def language(text: str) -> tuple[str, float]:
    """Return the ISO 639 code of a text's language, and its probability."""
    code, probability = _identifier().classify(text)
    return str(code), float(probability)


def codes() -> Sequence[str]:
    """Return all codes that `language` can return: two letters, or three if there are no two."""
    labels: Sequence[str] = _identifier().labels
    return labels


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
