"""A written answer read as a talk, or what is wrong with it: LLaVA's three kinds (arXiv:2304.08485, 3)."""

import re
from dataclasses import dataclass

from bridgework.errors import DataError

Turn = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Kind:
    """How many turns a talk has, and how many words."""

    turns: tuple[int, int]  # at least and at most; (0, 0) is an answer alone, whose question is ours
    words: tuple[int, int]  # of an answer


KINDS = {
    "conversation": Kind(turns=(2, 10), words=(1, 150)),
    "detail": Kind(turns=(0, 0), words=(30, 400)),
    "reasoning": Kind(turns=(1, 1), words=(20, 300)),
}
QUESTION_WORDS = 60

_SPEAKER = re.compile(r"^[\s*#]*(question|answer)(?:\s+\d+)?[\s*]*:[\s*]*", re.IGNORECASE | re.MULTILINE)
_ENDING = re.compile(r"[.!?\u2026][\"'\u201d\u2019)*]*$")
_TELLS = re.compile(  # that it was written from a text: the picture is all that a reader knows of
    r"\bcaptions?\b|\b(?:given|provided|above) (?:text|descriptions?|information|context|sentences?)\b"
    r"|\b(?:the|these|your|this) (?:sentences|descriptions?|text) (?:say|says|mentions?|states?|describes?|provided)\b"
    r"|\bbounding box|\bcoordinates?\b|<image>|[\[(]\s*[01]?\.\d+\s*,",
    re.IGNORECASE,
)


def read(raw: str, kind: str) -> list[Turn]:
    """The turns; of a kind without questions, one whose question is empty. Raises DataError in a few constant words."""
    if not raw.strip():
        raise DataError("it is empty")
    wanted = KINDS[kind]
    turns = _turns(raw) if wanted.turns[1] else [("", raw.strip())]
    if wanted.turns[1] and not wanted.turns[0] <= len(turns) <= wanted.turns[1]:
        raise DataError("too few or too many questions")
    for question, answer in turns:
        if _TELLS.search(question) or _TELLS.search(answer):
            raise DataError("it tells on its source")
        if len(question.split()) > QUESTION_WORDS or not wanted.words[0] <= len(answer.split()) <= wanted.words[1]:
            raise DataError("too short or too long")
    if _SPEAKER.search(turns[-1][1]):
        raise DataError("questions and answers do not alternate")
    if not _ENDING.search(turns[-1][1]):
        raise DataError("it breaks off")
    return turns


def _turns(raw: str) -> list[Turn]:
    before, *said = _SPEAKER.split(raw)
    speakers, texts = [word.lower() for word in said[::2]], [text.strip() for text in said[1::2]]
    if before.strip() or not said or speakers != ["question", "answer"] * (len(speakers) // 2) or not all(texts):
        raise DataError("questions and answers do not alternate")
    return list(zip(texts[::2], texts[1::2], strict=True))
