"""VQA v2 (Goyal et al. 2017, arXiv:1612.00837) and what has its form, e.g. OK-VQA: questions with ten answers each.

{"questions": [{"question_id", "image_id", "question"}]} and {"annotations": [{"question_id", "multiple_choice_answer",
"answers": [{"answer"}]}]}.
"""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

from bridgework.data.importers import PLACEHOLDER, Row, Say, fingerprint, ingest, read_image, read_text
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import document, listed, parent
from bridgework.errors import DataError


def run(
    source: str,
    dest: str,
    *,
    annotations: str | None = None,
    images: str | None = None,
    pattern: str = "COCO_train2014_{:012d}.jpg",
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the questions `source` with the answers of the file `annotations`.

    The image of a question is the file `pattern`, with its image_id put in, under the folder `images`, by default
    beside `source`. The answer is the one that most people gave; the `labels` are all of theirs, in the file's order,
    which the VQA accuracy reads.
    """
    if annotations is None:
        raise DataError(
            f"{source} holds questions alone: give annotations=FILE with their answers; test splits have none"
        )
    _try(pattern)
    asked, answered = read_text(source), read_text(annotations)
    folder = parent(source) if images is None else images
    return ingest(
        partial(_rows, asked, source, answered, annotations, folder, pattern),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={
            "annotations": annotations,
            "images": folder,
            "pattern": pattern,
            "sha256": fingerprint(asked, answered),
        },
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _try(pattern: str) -> None:
    try:
        tells = pattern.format(1) != pattern.format(2)
    except (ValueError, IndexError, KeyError, AttributeError):
        tells = False
    if not tells:
        raise DataError(f"pattern {pattern!r} gives no file for an image_id; it is one like COCO_val2014_{{:012d}}.jpg")


def _rows(asked: str, source: str, answered: str, annotations: str, folder: str, pattern: str) -> Iterator[Row]:
    answers = {
        note["question_id"]: note
        for note in listed(document(answered, annotations), "annotations", annotations)
        if isinstance(note, dict) and isinstance(note.get("question_id"), int | str)
    }
    for number, entry in enumerate(listed(document(asked, source), "questions", source)):
        name = entry.get("question_id") if isinstance(entry, dict) else None
        known = isinstance(name, int | str) and str(name)
        key = str(name) if known else f"row-{number:08d}"
        yield key, partial(_sample, key, entry, answers.get(name) if known else None, folder, pattern)


def _sample(key: str, entry: Any, note: Any, folder: str, pattern: str) -> Sample:
    question = entry.get("question") if isinstance(entry, dict) else None
    if not isinstance(question, str) or note is None:
        raise BadSample(Reason.BAD_ROW, f"no `question`, or no answers for its question_id: {str(entry)[:80]}")
    if note.get("image_id", entry.get("image_id")) != entry.get("image_id"):
        raise BadSample(Reason.BAD_ROW, f"asked of image {entry.get('image_id')!r}, answered of {note['image_id']!r}")
    given, answer = _answers(note)
    if any(PLACEHOLDER in text for text in (question, answer)):
        raise BadSample(Reason.PLACEHOLDERS, f"a text holds {PLACEHOLDER!r}")
    if not question.strip() or not answer:
        raise BadSample(Reason.EMPTY_TEXT, "the question or its answer is empty")
    shown, said = Part("user", image=0), Part("user", text="\n" + question.strip())
    told = {name: note[name] for name in ("question_type", "answer_type") if isinstance(note.get(name), str)}
    image = read_image(folder, _file(pattern, entry.get("image_id")))
    return Sample(key, (image,), (shown, said, Part("assistant", text=answer)), labels=given, provenance=told)


def _answers(note: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """All answers, and the one that stands for them: the file's own choice, else the most frequent."""
    given = note.get("answers")
    people = given if isinstance(given, list) else []
    texts = tuple(str(one["answer"]) for one in people if isinstance(one, dict) and isinstance(one.get("answer"), str))
    if not texts or len(texts) < len(people):
        raise BadSample(Reason.BAD_ROW, f"`answers` is no list of objects with a text `answer`: {str(given)[:80]}")
    chosen = note.get("multiple_choice_answer", Counter(texts).most_common(1)[0][0])
    if not isinstance(chosen, str):
        raise BadSample(Reason.BAD_ROW, f"`multiple_choice_answer` is {type(chosen).__name__}, and text is wanted")
    return texts, chosen.strip()


def _file(pattern: str, image: Any) -> str:
    try:
        return pattern.format(image if isinstance(image, int | str) else int(image))
    except (ValueError, TypeError):
        raise BadSample(Reason.BAD_ROW, f"image_id {str(image)[:80]!r} does not go into {pattern!r}") from None
