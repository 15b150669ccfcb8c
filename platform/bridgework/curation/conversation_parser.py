"""Parser of generated instruction data: LLaVA's three kinds (arXiv:2304.08485, 3).

An answer is parsed into turns, or rejected with a reason.
"""

import re
from dataclasses import dataclass

from bridgework.curation.text import length, without_emoji
from bridgework.errors import DataError

Turn = tuple[str, str]  # a question and its answer


@dataclass(frozen=True)
class Kind:
    """Limits of one kind of data."""

    turns: tuple[int, int]  # minimum and maximum; (0, 0): an answer without a question
    words: tuple[int, int]  # of an answer, minimum and maximum


KINDS = {
    "conversation": Kind(turns=(2, 10), words=(1, 150)),
    "detail": Kind(turns=(0, 0), words=(30, 400)),
    "reasoning": Kind(turns=(1, 1), words=(20, 300)),
}
QUESTION_WORDS = 60  # maximum

# first words of a question and of an answer, in the languages that models use most
_QUESTION = (
    "question|pregunta|pergunta|frage|вопрос|السؤال|سؤال|प्रश्न|सवाल|问题|問題|问|問|質問|질문"
)
_ANSWER = (
    "answer|respuesta|resposta|réponse|antwort|ответ|الإجابة|إجابة|الجواب|جواب|उत्तर|जवाब|答案|回答|答え|"
    "答|답변|답"
)
_SPEAKER = re.compile(
    rf"^[\s*#]*(?:({_QUESTION})|({_ANSWER}))(?:\s*\d+)?[\s*]*[:\uff1a][\s*]*",
    re.IGNORECASE | re.MULTILINE,
)
_STOPS = (  # marks that end a sentence, by script
    ".!?\u2026\u203c\u2047\u2048\u2049\u203d"  # Latin, Cyrillic, Greek, Hebrew, Korean
    "\u3002\uff01\uff1f\uff0e\uff61\ufe52\u22ef"  # Chinese and Japanese
    "\u0964\u0965\u061f\u06d4\u061e\u0700\u0701\u0702"  # of India; Arabic, Urdu, Syriac
    # Armenian to Tibetan
    "\u0589\u055c\u055e\u1362\u1367\u1368\u104a\u104b\u17d4\u17d5\u17d6\u0f0d\u0f0e\u0f14"
    "\u1803\u1809\u1c7e\u1c7f\ua4ff\ua9c8\ua9c9\uaa5d\uaa5e\uaa5f\uabeb"  # Mongolian to Meitei
)
_CLOSING = (
    "\"')*_\\]}\u201d\u2019\u00bb\u203a\u300b"
    "\u300d\u300f\u3009\u3011\uff09\uff3d\u300f\u301f\ufe42\ufe44"
)
_ENDING = re.compile(
    rf"(?:[{_STOPS}]|[\u0e00-\u0eff])[\s{_CLOSING}]*$"  # Thai and Lao have no full stop
)
# references to the captions, because a reader of the data sees the image only
_REFERS_TO_SOURCE = re.compile(
    r"\b(?:given|provided|above) (?:captions?|text|descriptions?|information|context|sentences?)\b"
    r"|\b(?:according to|based on) (?:the|these|this|your|all|both) (?:\w+ )?(?:captions?|descriptions?|sentences)\b"
    r"|\b(?:from|in) (?:the|these|your|all|both) (?:\w+ )?captions\b|\bcaptions? (?:above|given|provided)\b"
    r"|\b(?:the|these|this|your|one|each|both|all|no) (?:\w+ )?"
    r"(?:captions?|sentences|descriptions?) (?:say|says|said|tells?|mentions?|states?|describes?|provided|suggests?)\b"
    r"|\b(?:the|this|your) text (?:describes|provided)\b"
    r"|\bbounding box|\b(?:box|the|given|provided) coordinates?\b|<image>|[\[(]\s*[01]?\.\d+\s*,",
    re.IGNORECASE,
)


def parse(raw: str, kind: str) -> list[Turn]:
    """Parse an answer into turns; a kind without questions has one turn with an empty question.

    Raises DataError with a short constant reason, which is stored in the manifest.
    """
    if not raw.strip():
        raise DataError("it is empty")
    limits = KINDS[kind]
    turns = _turns(raw) if limits.turns[1] else [("", raw.strip())]
    if limits.turns[1] and not limits.turns[0] <= len(turns) <= limits.turns[1]:
        raise DataError("too few or too many questions")
    least, most = limits.words
    for question, answer in turns:
        if _REFERS_TO_SOURCE.search(question) or _REFERS_TO_SOURCE.search(answer):
            raise DataError("it tells on its source")
        if length(question) > QUESTION_WORDS or not least <= length(answer) <= most:
            raise DataError("too short or too long")
    if _SPEAKER.search(turns[-1][1]):
        raise DataError("questions and answers do not alternate")
    if not _ENDING.search(without_emoji(turns[-1][1])):
        raise DataError("it breaks off")
    return turns


def _turns(raw: str) -> list[Turn]:
    # the regex has two groups, question and answer, so that three items follow each speaker
    before, *items = _SPEAKER.split(raw)
    asks = [word is not None for word in items[::3]]
    texts = [text.strip() for text in items[2::3]]
    if before.strip() or not items or asks != [True, False] * (len(asks) // 2) or not all(texts):
        raise DataError("questions and answers do not alternate")
    return list(zip(texts[::2], texts[1::2], strict=True))
