"""Visual Dialog 1.0 (Das et al. 2017, arXiv:1611.08669): ten questions per image, 100 candidates.

{"data": {"questions": [..], "answers": [..], "dialogs": [{"image_id", "caption", "dialog":
[{"question", "answer", "answer_options", "gt_index"}]}]}}, where questions and answers are numbers
into the two lists.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bridgework.config import config_class
from bridgework.data.importers import (
    PLACEHOLDER,
    UNKNOWN,
    Importer,
    Listing,
    Row,
    fingerprint,
    read_image,
    read_text,
)
from bridgework.data.importers.tables import document, fields, listed, parent
from bridgework.data.importers.vqa import check_pattern, file_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample

ROUND = ("question", "answer_options", "gt_index")


@config_class
class VisDialImporter(Importer):
    """Import every question of every dialog as a row, with its candidate answers.

    The user shows the image and gives the caption and the questions and answers before this one as
    the dialog's history (InstructBLIP, arXiv:2305.06500, appendix). A round whose correct answer is
    unknown, as in a test split, is a bad row. Images are the files `pattern`, with the image_id
    inserted, in `images`, by default next to SOURCE.
    """

    images: str | None = None
    pattern: str = "VisualDialog_val2018_{:012d}.jpg"
    license: str = UNKNOWN

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def list_rows(self, source: str) -> Listing:
        text = read_text(source)
        folder = parent(source) if self.images is None else self.images
        return Listing(
            partial(_rows, text, source, folder, self.pattern),
            fingerprint(text),
            replace(self, images=folder),
        )


def _rows(text: str, source: str, folder: str, pattern: str) -> Iterator[Row]:
    content = document(text, source)
    data = content.get("data") if isinstance(content, dict) else None
    questions, answers, dialogs = (
        listed(data, name, source) for name in ("questions", "answers", "dialogs")
    )
    for number, dialog in enumerate(dialogs):
        rounds = dialog.get("dialog") if isinstance(dialog, dict) else None
        for turn in range(len(rounds) if isinstance(rounds, list) else 1):
            key = f"dialog-{number:06d}-{turn:02d}"
            yield key, partial(_sample, key, dialog, turn, questions, answers, folder, pattern)


def _sample(
    key: str,
    dialog: Any,
    turn: int,
    questions: Sequence[Any],
    answers: Sequence[Any],
    folder: str,
    pattern: str,
) -> Sample:
    given = fields(dialog, "image_id", "caption", "dialog")
    if not isinstance(given["dialog"], list):
        raise BadSample(Reason.BAD_ROW, f"`dialog` is {type(given['dialog']).__name__}, not a list")
    *before, now = [fields(one, "question") for one in given["dialog"][: turn + 1]]
    asked = fields(now, *ROUND)
    options = asked["answer_options"]
    if not isinstance(options, list):
        raise BadSample(Reason.BAD_ROW, f"`answer_options` is {type(options).__name__}, not a list")
    candidates = tuple(_text(answers, option, "answer") for option in options)
    right = asked["gt_index"]
    if not isinstance(right, int) or isinstance(right, bool) or not 0 <= right < len(candidates):
        raise BadSample(
            Reason.NO_TARGET, f"`gt_index` is {right!r}, and there are {len(candidates)} candidates"
        )
    history = [f"{_text(questions, fields(one, 'answer')['question'], 'question')}? "
            f"{_text(answers, one['answer'], 'answer')}." for one in before]  # fmt: skip
    if not isinstance(given["caption"], str):
        raise BadSample(Reason.EMPTY_TEXT, "the dialog has no caption")
    context = " ".join([f"{given['caption'].strip()}.", *history])
    question = f"{_text(questions, asked['question'], 'question')}?"
    text = f"Dialog history: {context}\nQuestion: {question}"
    if any(PLACEHOLDER in part for part in (text, *candidates)):
        raise BadSample(Reason.PLACEHOLDERS, f"a text holds {PLACEHOLDER!r}")
    image = read_image(folder, file_of(pattern, given["image_id"]))
    said = (
        Part("user", image=0),
        Part("user", text="\n" + text),
        Part("assistant", text=candidates[right]),
    )
    return Sample(key, (image,), said, candidates=candidates)


def _text(texts: Sequence[Any], number: Any, what: str) -> str:
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(texts):
        raise BadSample(Reason.BAD_ROW, f"the {what} {number!r} is none of the file's {len(texts)}")
    text = texts[number]
    if not isinstance(text, str) or not text.strip():
        raise BadSample(Reason.EMPTY_TEXT, f"the {what} {number} is empty, or not a text")
    return text.strip()
