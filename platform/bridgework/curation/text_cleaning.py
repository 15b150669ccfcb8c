"""Rules that clean generated descriptions (MiniGPT-4, arXiv:2304.10592, 3.2).

The rules remove text and never add any: meaningless marks, scaffolding, repeated words, and
sentences that are repeated, incomplete, in another language or about the model instead of the
image. Cleaning is idempotent.
"""

import re
import unicodedata

from bridgework.curation.text import language

LATIN_SHARE = 0.8  # minimum share of Latin letters in a sentence
MIN_LANGUAGE_WORDS = 8  # the language of a shorter sentence cannot be detected
OTHER_LANGUAGE = 0.95  # probability of another language from which a sentence is dropped

_SCAFFOLD = re.compile(
    r"#{2,}\s*(?:(?:human|assistant|system)\s*:?)?|\b(?:human|assistant)\s*:|</?img>|<image(?:here)?>"
    r"|<\|[^|<>]{1,40}\|>|</?s>|<unk>|<pad>",
    re.IGNORECASE,
)
_MARKS = re.compile(  # more than three equal marks, and boxes for missing glyphs
    r"([^\w\s\u200d\ufe0f])\1{3,}|(?:[\u25a0-\u25fc\u25ff\ufffd\ufffc](?![\ufe0f\u200d]))+"
)
_JOINED = re.compile(  # invisible characters that join the ones around them
    r"(?<=[\w\u0900-\u0dff\ufe0f\u20e3\u2190-\u2bff\U0001f000-\U0001faff\U000e0061-\U000e007f])"
    r"\u200d(?=[\w\u2190-\u2bff\U0001f000-\U0001faff])"
    r"|(?<=\w)\u200c(?=\w)|(?<=\U0001f3f4)[\U000e0020-\U000e007e]+\U000e007f"
)
# with white space between and without digits, because 1,000,000 is a number and "20 20" may be on a
# sign
_REPEATED = re.compile(
    r"\b([^\W\d]++(?:[^\w.!?]++[^\W\d]++){0,5}?)(?:(?:\s?,)?\s++\1\b)+", re.IGNORECASE
)
_ENDS = re.compile(  # ends of sentences; in Chinese and Japanese (last line) without a space
    r"(?!(?<=\b[Nn][Oo]\.)\s+\d)"
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bvs\.)(?<!e\.g\.)(?<!i\.e\.)(?<=[.!?])\s+"
    r"|(?<=[\u3002\uff01\uff1f])\s*"
)
_COMPLETE = re.compile(r"[.!?][\"')\]]*$")
_ABOUT_MODEL = re.compile(
    r"\b(?:I am|I'm) (?:sorry|afraid|unable|not able|an? (?:AI|language model|assistant))\b|\bI apologi[sz]e\b"
    r"|\bas an? (?:AI|language model|assistant)\b|\blet me know\b|\bI (?:cannot|can't|can not) (?:see|view|continue)\b"
    r"|^(?:sure|certainly|of course|okay)\b[,!.]|\bthe corrected description\b|\bhere is the\b.*\bdescription\b",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    """Apply all rules until nothing changes. The result may be empty."""
    cleaned = _clean_once(text)
    while cleaned != text:
        text, cleaned = cleaned, _clean_once(cleaned)
    return cleaned


def find_fault(text: str, min_words: int) -> str | None:
    """Return a short constant reason to drop a cleaned text; None if it can be kept."""
    words = len(text.split())
    if not words:
        return "nothing is left"
    if words < min_words:
        return "too short"
    return None if language(text)[0] == "en" else "not English"


def _clean_once(text: str) -> str:
    text = _remove_invisible(unicodedata.normalize("NFC", text))
    text = " ".join(_MARKS.sub(" ", _SCAFFOLD.sub(" ", text)).split())
    sentences: dict[str, str] = {}
    for sentence in _ENDS.split(text):
        sentence = _REPEATED.sub(r"\1", sentence)
        words = re.findall(r"\w+", sentence.casefold())
        if (
            len(words) > 1
            and _COMPLETE.search(sentence)
            and not _ABOUT_MODEL.search(sentence)
            and _is_english(sentence)
        ):
            sentences.setdefault(" ".join(words), sentence)
    return " ".join(sentences.values())


def _remove_invisible(text: str) -> str:
    """Remove control characters and the like, except those that join emoji and letters."""
    joiners = {at for match in _JOINED.finditer(text) for at in range(*match.span())}
    return "".join(
        char
        for at, char in enumerate(text)
        if char.isspace() or unicodedata.category(char)[0] != "C" or at in joiners
    )


def _is_english(sentence: str) -> bool:
    letters = [c for c in sentence if c.isalpha()]
    latin = sum(c < "\u0250" for c in letters)  # Basic Latin to Extended-B
    if not letters or latin < LATIN_SHARE * len(letters):
        return False
    if len(sentence.split()) < MIN_LANGUAGE_WORDS:
        return True
    code, probability = language(sentence)
    return code == "en" or probability < OTHER_LANGUAGE
