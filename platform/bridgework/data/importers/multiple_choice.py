"""Multiple-choice questions: ScienceQA, A-OKVQA, IconQA and datasets of their form.

Lu et al. 2022, arXiv:2209.09513; Schwenk et al. 2022, arXiv:2206.01718; Lu et al. 2021,
arXiv:2110.13214. A list of objects, or an object of them by id. `question` and `choices` are texts,
and `answer` (or `correct_choice_idx`) is the number of the correct choice. `image` is a path,
`image_id` a number to insert into `pattern`.
"""

from collections.abc import Iterator, Mapping
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
from bridgework.data.importers.llava_json import choices
from bridgework.data.importers.tables import document, fields, lines, parent, shallow
from bridgework.data.importers.vqa import check_pattern, file_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import letter
from bridgework.errors import DataError

ANSWERS = ("answer", "correct_choice_idx")  # fields that may hold the correct choice


@config_class
class MultipleChoiceImporter(Importer):
    """Import the questions of SOURCE with their choices as candidates; the correct one answers.

    The user shows the image, if there is one, gives the `hint` as context and asks. Images are
    paths in the folder `images`, by default that of SOURCE: `image`, or `split`/`id`/`image` as
    ScienceQA stores them, or `pattern` with the image_id inserted. `split` selects the rows of one
    split. With `solutions` the answer is ScienceQA's lecture and solution, and then "The answer is
    B.", which LLaVA learns (arXiv:2304.08485, 5.2).
    """

    images: str | None = None
    pattern: str = "{:012d}.jpg"
    split: str | None = None
    solutions: bool = False
    license: str = UNKNOWN

    def __post_init__(self) -> None:
        check_pattern(self.pattern)

    def list_rows(self, source: str) -> Listing:
        text = read_text(source)
        folder = parent(source) if self.images is None else self.images
        return Listing(
            partial(_rows, text, source, folder, self.pattern, self.split, self.solutions),
            fingerprint(text),
            replace(self, images=folder),
        )


def _rows(
    text: str, source: str, folder: str, pattern: str, split: str | None, solutions: bool
) -> Iterator[Row]:
    taken = 0
    for number, (name, entry) in enumerate(_entries(text, source)):
        if split is None or not isinstance(entry, dict) or entry.get("split") == split:
            taken += 1
            key = f"row-{number:08d}" if name is None else name
            yield key, partial(_sample, key, entry, folder, pattern, solutions)
    if not taken:
        known = sorted(
            {str(e.get("split")) for _, e in _entries(text, source) if isinstance(e, dict)}
        )
        raise DataError(
            f"{source} has no row of the split {split!r}; it has {', '.join(known) or 'no rows'}"
        )


def _entries(text: str, source: str) -> Iterator[tuple[str | None, Any]]:
    """Yield (id, row) of a list, of an object by id, or of JSON lines."""
    content = list(lines(text)) if source.endswith(".jsonl") else document(text, source)
    if isinstance(content, dict):
        yield from ((str(name), shallow(entry)) for name, entry in content.items())
    elif isinstance(content, list):
        for entry in map(shallow, content):
            given = entry if isinstance(entry, dict) else {}
            name = given.get("question_id", given.get("id"))
            yield (str(name) if isinstance(name, str | int) and str(name) else None), entry
    else:
        raise DataError(
            f"{source} is not a list of questions. Got {type(content).__name__}; expected a "
            "list, or an object by id. Fix: give the file of the questions"
        )


def _sample(key: str, entry: Any, folder: str, pattern: str, solutions: bool) -> Sample:
    given = fields(entry, "question", "choices")
    question, candidates = given["question"], choices(given["choices"])
    if not isinstance(question, str) or not question.strip():
        raise BadSample(Reason.EMPTY_TEXT, "the question is empty, or not a text")
    right = _right(given, candidates)
    answer = _solved(given, right) if solutions else candidates[right]
    hint = given.get("hint") if isinstance(given.get("hint"), str) else ""
    asked = "\n".join(text.strip() for text in (str(hint), question) if text.strip())
    if any(PLACEHOLDER in text for text in (asked, answer, *candidates)):
        raise BadSample(Reason.PLACEHOLDERS, f"a text holds {PLACEHOLDER!r}")
    files = _images(key, given, folder, pattern)
    shown = [Part("user", image=0)] * len(files)
    facts = {
        n: str(given[n])
        for n in ("subject", "topic", "grade", "split")
        if isinstance(given.get(n), str)
    }
    said = (*shown, Part("user", text="\n" * bool(files) + asked), Part("assistant", text=answer))
    return Sample(key, files, said, candidates=candidates, provenance=facts)


def _right(given: Mapping[str, Any], candidates: tuple[str, ...]) -> int:
    """Return the number of the correct choice, given as such, as a letter, or as its text."""
    answer = next((given[name] for name in ANSWERS if given.get(name) is not None), None)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(candidates):
        return answer
    if isinstance(answer, str) and answer.strip() in candidates:
        return candidates.index(answer.strip())
    letters = [letter(place).upper() for place in range(len(candidates))]
    if isinstance(answer, str) and answer.strip() in letters:
        return letters.index(answer.strip())
    raise BadSample(
        Reason.NO_TARGET,
        f"no `{'` or `'.join(ANSWERS)}` says which of the {len(candidates)} choices is right: "
        f"{answer!r}",
    )


def _solved(given: Mapping[str, Any], right: int) -> str:
    """Return the reasons, then the answer's letter (arXiv:2304.08485, 5.2)."""
    reasons = [
        str(given[n]).strip() for n in ("lecture", "solution") if isinstance(given.get(n), str)
    ]
    return " ".join([*filter(None, reasons), f"The answer is {letter(right).upper()}."])


def _images(key: str, given: Mapping[str, Any], folder: str, pattern: str) -> tuple[bytes, ...]:
    image = given.get("image")
    if image is None and given.get("image_id") is None:
        return ()
    if image is None:
        return (read_image(folder, file_of(pattern, given["image_id"])),)
    if isinstance(image, str) and "/" not in image and isinstance(given.get("split"), str):
        return (read_image(folder, f"{given['split']}/{key}/{image}"),)
    return (read_image(folder, image),)
