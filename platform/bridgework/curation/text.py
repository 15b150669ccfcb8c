"""A text as words, so that case, punctuation and line breaks make no difference.

Which language a text is in, as py3langid finds it; its model is loaded once a process, in half a second.
"""

import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from itertools import groupby
from typing import Any


def _marks() -> str:
    """Ranges of the signs that are part of the letter before them, such as vowel signs: \\w does not know them."""
    codes = [
        code for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")
    ]
    marks = [
        code for code in codes if not 0xFE00 <= code <= 0xFE0F
    ]  # these choose between a glyph and an emoji
    runs = (list(run) for _, run in groupby(enumerate(marks), lambda pair: pair[1] - pair[0]))
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


# scripts that are written without blanks: Chinese and Japanese; Thai, Lao, Burmese and Khmer, whose signs bear marks
_SIGNS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_MARKED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
_MARK, _LETTER = f"[{_marks()}]", rf"[^\W_{_SIGNS}{_MARKED}]"
# letters and digits with their marks, and joiners between them; or a single sign
_WORD = re.compile(
    rf"{_LETTER}+(?:{_MARK}+{_LETTER}*|[\u200c\u200d]+{_LETTER}+)*|[{_SIGNS}]|(?=[{_MARKED}])[^\W_]{_MARK}*"
)
_SIGN, _MARKED_SIGN = re.compile(f"[{_SIGNS}]"), re.compile(rf"(?=[{_MARKED}])[^\W_]")
_JOINING = "\u200d\ufe0e\ufe0f\u20e3"  # emoji into one, and how they are drawn
_TONES = re.compile("[\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")  # of skin; and tags of a flag
_FLAG_LETTERS = "".join(map(chr, range(0x1F1E6, 0x1F200)))
_ASCII = re.compile(r"[a-z0-9]+")  # three times as fast, for most captions


def tokenize_words(text: str) -> list[str]:
    """The words of a text, case-folded and in Unicode's NFKC; each sign of a script without blanks is one."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def length(text: str) -> int:
    """The length of a text in words: what blanks separate, and in scripts without blanks about as much.

    Two signs of Chinese or Japanese count as a word, and four letters of Thai, Lao, Burmese or Khmer.
    """
    return sum(max(1, round(_weight(piece))) for piece in text.split())


def _weight(piece: str) -> float:
    return (
        0.0
        if piece.isascii()
        else len(_SIGN.findall(piece)) / 2 + len(_MARKED_SIGN.findall(piece)) / 4
    )


def without_emoji(text: str) -> str:
    """The text without emoji, and what joins them, after its last word or mark."""
    end = len(text)
    while end and (text[end - 1].isspace() or _is_emoji(text[end - 1])):
        end -= 1
    return text[:end]


def is_joined(text: str, at: int) -> bool:
    """True if the letter at `at` is drawn as one with the one before it: an accent, a joined emoji."""
    if not 0 < at < len(text):
        return False
    before, letter = text[at - 1], text[at]
    if (
        unicodedata.category(letter) in ("Mn", "Mc", "Me")
        or letter in _JOINING
        or _TONES.match(letter)
    ):
        return True
    if letter in _FLAG_LETTERS:  # the letters of flags are read in twos
        run = len(text[:at]) - len(text[:at].rstrip(_FLAG_LETTERS))
        return run % 2 == 1
    return before == "\u200d" and unicodedata.category(letter) == "So"


def _is_emoji(letter: str) -> bool:
    return unicodedata.category(letter) in ("So", "Sk") or letter in _JOINING


def language(text: str) -> tuple[str, float]:
    """An ISO 639 code, and its probability."""
    code, probability = _identifier().classify(text)
    return str(code), float(probability)


def codes() -> Sequence[str]:
    """All that `language` may find: two letters, or three where there are no two."""
    found: Sequence[str] = _identifier().labels
    return found


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
