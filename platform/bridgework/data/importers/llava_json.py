"""LLaVA's JSON: a list of {"id", "image"?, "conversations": [{"from", "value"}]}.

Turns are `from` "human", "gpt" or "system". `image`, `images` or `image_path` is a path, a list of
paths, or absent; `<image>` in the texts is the place of each. `candidates` are the answers of a
multiple-choice question. A .jsonl holds one such object per line.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle, takewhile
from typing import Any

from bridgework.config import config_class
from bridgework.data.importers import (
    PLACEHOLDER,
    UNKNOWN,
    Importer,
    Keys,
    Listing,
    Row,
    fingerprint,
    read_text,
)
from bridgework.data.importers.image_fields import read_cell, shown
from bridgework.data.importers.tables import entries, fields, lines, parent
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Role, Sample

ROLES: dict[Any, Role] = {"human": "user", "gpt": "assistant", "system": "system"}


@config_class
class LlavaJsonImporter(Importer):
    """Import the file SOURCE; image paths are relative to `images`, by default its own folder.

    LLaVA's mixes use an image's name as the id of many rows: the second conversation about it gets
    the key `ID#2`. Turns of the assistant before the first question are dropped and counted, as in
    LLaVA's own training.
    """

    images: str | None = None
    license: str = UNKNOWN

    def list_rows(self, source: str) -> Listing:
        text = read_text(source)
        folder = parent(source) if self.images is None else self.images
        return Listing(
            partial(_rows, text, source, folder), fingerprint(text), replace(self, images=folder)
        )


def _rows(text: str, source: str, folder: str) -> Iterator[Row]:
    keys = Keys()
    for number, entry in enumerate(
        lines(text) if source.endswith(".jsonl") else entries(text, source)
    ):
        key = keys.of(entry, number, "id", content=entry)
        yield key, partial(_sample, key, entry, folder)


def _sample(key: str, entry: Any, folder: str) -> Sample:
    given = fields(entry, "conversations")
    if not isinstance(given["conversations"], list):
        raise BadSample(
            Reason.BAD_ROW,
            f"`conversations` is {type(given['conversations']).__name__}, not a list",
        )
    if given.get("video") or given.get("videos"):
        raise BadSample(
            Reason.BAD_ROW,
            "the row shows a video; llava-json reads images, `data import video` reads videos",
        )
    turns, dropped = asked(given["conversations"])
    content = tuple(parts(turns))
    files = tuple(read_cell(folder, cell) for cell in shown(given))
    candidates = choices(given.get("candidates") or [])
    return Sample(key, files, content, candidates=candidates, provenance=dropped)


def choices(given: Any) -> tuple[str, ...]:
    """Return the candidates of a multiple-choice question.

    Raises BadSample unless they are texts.
    """
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise BadSample(
            Reason.BAD_ROW, f"the candidates are not a list of texts: {str(given)[:80]}"
        )
    return tuple(text.strip() for text in given)


def asked(turns: list[Any]) -> tuple[list[Any], dict[str, str]]:
    """Return the turns from the first question on, and the count of the assistant's before."""
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    first = int(speakers[:1] == ["system"])
    greeting = len(list(takewhile(lambda speaker: speaker == "gpt", speakers[first:])))
    counts = {"dropped.turns": str(greeting)} if greeting else {}
    return [*turns[:first], *turns[first + greeting :]], counts


def parts(turns: list[Any]) -> Iterator[Part]:
    """Yield the parts of a list of {"from", "value"}. Raises BadSample for malformed turns."""
    images = 0
    for role, text in _turns(turns):
        for place, segment in enumerate(text.split(PLACEHOLDER)):
            if place:
                yield Part(role, image=images)
                images += 1
            if segment:
                yield Part(role, text=segment)


def _turns(turns: list[Any]) -> Iterator[tuple[Role, str]]:
    """Yield (role, text): a system's if there is one, then questions and answers in turn."""
    spoken: list[tuple[Role, str]] = []
    for turn in turns:
        speaker, text = (
            (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        )
        if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(text, str):
            raise BadSample(
                Reason.BAD_ROW, f"a turn by {speaker!r}; {', '.join(ROLES)} may speak, and in text"
            )
        spoken.append((ROLES[speaker], text))
    pairs = spoken[1:] if spoken and spoken[0][0] == "system" else spoken
    if not pairs or [role for role, _ in pairs] != ["user", "assistant"] * (len(pairs) // 2):
        due = zip(cycle(("user", "assistant")), [role for role, _ in pairs], strict=False)
        at = next((n for n, (expected, role) in enumerate(due) if role != expected), len(pairs))
        found = f"is by the {pairs[at][0]}" if at < len(pairs) else "is missing"
        expected = "an answer" if at % 2 else "a question"
        turn = len(spoken) - len(pairs) + at + 1
        raise BadSample(
            Reason.BAD_ROW,
            f"the turns are not questions, each with its answer: turn {turn} {found}, "
            f"where {expected} is due",
        )
    for role, text in pairs:
        if role == "assistant" and PLACEHOLDER in text:
            raise BadSample(Reason.PLACEHOLDERS, f"an answer holds {PLACEHOLDER!r}")
        if not text.strip():
            raise BadSample(Reason.EMPTY_TEXT, f"a turn of the {role} is empty")
    yield from spoken
