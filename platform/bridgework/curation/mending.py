"""Rules that mend a description and leave a mended one as it is (MiniGPT-4, arXiv:2304.10592, 3.2).

They remove and never add: marks without a meaning, scaffolding, words that repeat themselves; and of sentences, those
that stood before, break off, are in another language or speak of the model instead of the picture.
"""

import re
import unicodedata

from bridgework.curation.text import language

LETTERS = 0.8  # of a sentence's letters are Latin ones, at least
TELLING_WORDS = 8  # a sentence of fewer says too little of its language
SURE = 0.95  # probability of another language: a sentence is dropped

_SCAFFOLD = re.compile(
    r"#{2,}\s*(?:(?:human|assistant|system)\s*:?)?|\b(?:human|assistant)\s*:|</?img>|<image(?:here)?>"
    r"|<\|[^|<>]{1,40}\|>|</?s>|<unk>|<pad>",
    re.IGNORECASE,
)
_MARKS = re.compile(  # more than three of one mark, and boxes for glyphs that are no emoji
    r"([^\w\s\u200d\ufe0f])\1{3,}|(?:[\u25a0-\u25fc\u25ff\ufffd\ufffc](?![\ufe0f\u200d]))+"
)
_JOINED = re.compile(  # invisible letters that are part of the letters around them
    r"(?<=[\w\u0900-\u0dff\ufe0f\u20e3\u2190-\u2bff\U0001f000-\U0001faff\U000e0061-\U000e007f])"
    r"\u200d(?=[\w\u2190-\u2bff\U0001f000-\U0001faff])"
    r"|(?<=\w)\u200c(?=\w)|(?<=\U0001f3f4)[\U000e0020-\U000e007e]+\U000e007f"
)
# with white space between, and no digits: 1,000,000 is a number, and "20 20" may be what a sign says
_REPEATED = re.compile(
    r"\b([^\W\d]++(?:[^\w.!?]++[^\W\d]++){0,5}?)(?:(?:\s?,)?\s++\1\b)+", re.IGNORECASE
)
_ENDS = re.compile(  # the second kind: Chinese and Japanese put no space there
    r"(?!(?<=\b[Nn][Oo]\.)\s+\d)"
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bvs\.)(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])\s+"
    r"|(?<=[\u3002\uff01\uff1f])\s*"
)
_WHOLE = re.compile(r"[.!?][\"')\]]*$")
_LEFT_OVER = re.compile(
    r"\b(?:I am|I'm) (?:sorry|afraid|unable|not able|an? (?:AI|language model|assistant))\b|\bI apologi[sz]e\b"
    r"|\bas an? (?:AI|language model|assistant)\b|\blet me know\b|\bI (?:cannot|can't|can not) (?:see|view|continue)\b"
    r"|^(?:sure|certainly|of course|okay)\b[,!.]|\bthe corrected description\b|\bhere is the\b.*\bdescription\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """The text by all rules, as often as they find something: mended twice is mended once. May be empty."""
    mended = _once(text)
    while mended != text:
        text, mended = mended, _once(mended)
    return mended


def wrong(text: str, min_words: int) -> str | None:
    """Why a mended text is dropped, in a few constant words; None where it is not."""
    words = len(text.split())
    if not words:
        return "nothing is left"
    if words < min_words:
        return "too short"
    return None if language(text)[0] == "en" else "not English"


def _once(text: str) -> str:
    text = _visible(unicodedata.normalize("NFC", text))
    text = " ".join(_MARKS.sub(" ", _SCAFFOLD.sub(" ", text)).split())
    kept: dict[str, str] = {}
    for sentence in _ENDS.split(text):
        sentence = _REPEATED.sub(r"\1", sentence)
        words = re.findall(r"\w+", sentence.casefold())
        if (
            len(words) > 1
            and _WHOLE.search(sentence)
            and not _LEFT_OVER.search(sentence)
            and _english(sentence)
        ):
            kept.setdefault(" ".join(words), sentence)
    return " ".join(kept.values())


def _visible(text: str) -> str:
    """The text without control letters and the like, but for those that join emoji and letters."""
    joined = {at for found in _JOINED.finditer(text) for at in range(*found.span())}
    return "".join(
        letter
        for at, letter in enumerate(text)
        if letter.isspace() or unicodedata.category(letter)[0] != "C" or at in joined
    )


def _english(sentence: str) -> bool:
    letters = [c for c in sentence if c.isalpha()]
    if not letters or sum(c < "\u0250" for c in letters) < LETTERS * len(
        letters
    ):  # Basic Latin to Extended-B
        return False
    if len(sentence.split()) < TELLING_WORDS:
        return True
    code, probability = language(sentence)
    return code == "en" or probability < SURE
