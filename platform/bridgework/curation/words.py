"""A text as words, so that case, punctuation and line breaks make no difference."""

import re
import unicodedata
from itertools import groupby


def _marks() -> str:
    """Ranges of the signs that are part of the letter before them, such as vowel signs: \\w does not know them."""
    codes = [code for code in range(0x300, 0x20000) if unicodedata.category(chr(code)) in ("Mn", "Mc")]
    marks = [code for code in codes if not 0xFE00 <= code <= 0xFE0F]  # these choose between a glyph and an emoji
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
_ASCII = re.compile(r"[a-z0-9]+")  # three times as fast, for most captions


def words(text: str) -> list[str]:
    """The words of a text, case-folded and in Unicode's NFKC; each sign of a script without blanks is one."""
    if text.isascii():
        return _ASCII.findall(text.lower())
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
