"""VQA v2 (Goyal et al. 2017, arXiv:1612.00837) and datasets of its form, e.g. OK-VQA.

Questions have ten answers each: {"questions": [{"question_id", "image_id", "question"}]} and
{"annotations": [{"question_id", "multiple_choice_answer", "answers": [{"answer"}]}]}.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from string import Formatter
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
from bridgework.data.importers.tables import document, listed, parent
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError

MAX_WIDTH = 100  # characters that a field of a pattern may ask for
MAX_NAME = 1000  # characters of what a pattern gives


@config_class
class VQAImporter(Importer):
    """Import the questions SOURCE with the answers of the file `annotations`.

    The image of a question is the file `pattern`, with its image_id inserted, in the folder
    `images`, by default next to SOURCE. The answer is the most frequent one; the `labels` are all
    answers, in the file's order, which the VQA accuracy reads.
    """

    annotations: str | None = None
    images: str | None = None
    pattern: str = "COCO_train2014_{:012d}.jpg"
    license: str = UNKNOWN

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def list_rows(self, source: str) -> Listing:
        if self.annotations is None:
            raise DataError(
                f"{source} holds questions without answers. Fix: give annotations=FILE with their "
                "answers; test splits have none"
            )
        asked, answered = read_text(source), read_text(self.annotations)
        folder = parent(source) if self.images is None else self.images
        return Listing(
            partial(_rows, asked, source, answered, self.annotations, folder, self.pattern),
            fingerprint(asked, answered),
            replace(self, images=folder),
        )


def check_pattern(pattern: str) -> None:
    """Raise DataError for a pattern that names no image, or gives longer names than files have."""
    try:
        width = _width(pattern)
        names = [pattern.format(image) for image in (1, 2)] if width <= MAX_WIDTH else []
    except (ValueError, IndexError):
        width, names = 0, ["", ""]
    if width > MAX_WIDTH or len(names[0]) > MAX_NAME:
        why = f"asks for more than {MAX_WIDTH} characters in a field, or {MAX_NAME} in all"
    elif names[0] == names[1]:
        why = "gives no file for an image_id"
    else:
        return
    raise DataError(f"pattern {pattern[:100]!r} {why}; it is one like COCO_val2014_{{:012d}}.jpg")


def _width(pattern: str) -> int:
    """Return the widest field of a pattern.

    Raises ValueError for a field other than the image_id.
    """
    fields = [
        (name, spec or "") for _, name, spec, _ in Formatter().parse(pattern) if name is not None
    ]
    if any(
        name not in ("", "0") or "{" in spec for name, spec in fields
    ):  # {0:{0}d} is as wide as an image_id says
        raise ValueError(pattern)
    return max(
        (int(number) for _, spec in fields for number in re.findall(r"\d+", spec)), default=0
    )


def _rows(
    asked: str, source: str, answered: str, annotations: str, folder: str, pattern: str
) -> Iterator[Row]:
    answers = _notes(listed(document(answered, annotations), "annotations", annotations))
    for number, entry in enumerate(listed(document(asked, source), "questions", source)):
        name = _question_id(entry)
        key = f"row-{number:08d}" if name is None else str(name)
        yield (
            key,
            partial(
                _sample, key, entry, None if name is None else answers.get(name), folder, pattern
            ),
        )


def _notes(given: list[Any]) -> dict[int | str, Any]:
    """Return the annotations by their question; a BadSample where several differ."""
    notes = dict[int | str, Any]()
    for note in given:
        name = _question_id(note)
        if name is None:
            continue
        if notes.setdefault(name, note) != note:
            why = (
                f"the annotations answer question {str(name)[:80]} more than once, and "
                "differently; leave one of them"
            )
            notes[name] = BadSample(Reason.BAD_ROW, why)
    return notes


def _question_id(entry: Any) -> int | str | None:
    name = entry.get("question_id") if isinstance(entry, dict) else None
    return (
        name if isinstance(name, int | str) and not isinstance(name, bool) and name != "" else None
    )


def _sample(key: str, entry: Any, note: Any, folder: str, pattern: str) -> Sample:
    if isinstance(note, BadSample):
        raise note
    question = entry.get("question") if isinstance(entry, dict) else None
    if not isinstance(question, str) or note is None:
        raise BadSample(
            Reason.BAD_ROW, f"no `question`, or no answers for its question_id: {str(entry)[:80]}"
        )
    if note.get("image_id", entry.get("image_id")) != entry.get("image_id"):
        raise BadSample(
            Reason.BAD_ROW,
            f"asked of image {entry.get('image_id')!r}, answered of {note['image_id']!r}",
        )
    given, answer = _answers(note)
    if any(PLACEHOLDER in text for text in (question, answer)):
        raise BadSample(Reason.PLACEHOLDERS, f"a text holds {PLACEHOLDER!r}")
    if not question.strip() or not answer:
        raise BadSample(Reason.EMPTY_TEXT, "the question or its answer is empty")
    shown, said = Part("user", image=0), Part("user", text="\n" + question.strip())
    kinds = {
        name: note[name]
        for name in ("question_type", "answer_type")
        if isinstance(note.get(name), str)
    }
    image = read_image(folder, file_of(pattern, entry.get("image_id")))
    return Sample(
        key, (image,), (shown, said, Part("assistant", text=answer)), labels=given, provenance=kinds
    )


def _answers(note: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """Return all answers, and the one to learn: the file's choice, else the most frequent."""
    given = note.get("answers")
    people = given if isinstance(given, list) else []
    texts = tuple(
        str(one["answer"])
        for one in people
        if isinstance(one, dict) and isinstance(one.get("answer"), str)
    )
    if not texts or len(texts) < len(people):
        raise BadSample(
            Reason.BAD_ROW,
            f"`answers` is not a list of objects with a text `answer`: {str(given)[:80]}",
        )
    chosen = note.get("multiple_choice_answer", Counter(texts).most_common(1)[0][0])
    if not isinstance(chosen, str):
        raise BadSample(
            Reason.BAD_ROW,
            f"`multiple_choice_answer` is {type(chosen).__name__}; expected text",
        )
    return texts, chosen.strip()


def file_of(pattern: str, image: Any) -> str:
    """Return the name of the file of an image_id.

    Raises BadSample for one that the pattern refuses.
    """
    name = int(image) if isinstance(image, float) and image.is_integer() else image
    try:
        if isinstance(name, int | str) and not isinstance(name, bool):
            return pattern.format(name)
    except (ValueError, TypeError):
        pass
    raise BadSample(
        Reason.BAD_ROW,
        f"image_id {str(image)[:80]!r} does not fit into {pattern!r}; expected an integer",
    )
