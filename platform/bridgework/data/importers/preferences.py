"""Preference pairs: {"image", "question" or "prompt" or "conversations", "chosen", "rejected"} a row.

JSON lines, or a JSON list. RLHF-V's form (Yu et al. 2024, arXiv:2312.00849), where question and answers lie in a field
`text`, is read too, as are answers and questions that are turns: {"value": ...}, {"content": ...} or a list with one.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from bridgework.data.importers import PLACEHOLDER, Keys, Row, Say, fingerprint, ingest, read_image, read_text
from bridgework.data.importers.llava_json import parts
from bridgework.data.quarantine import SHARE, BadSample, Reason
from bridgework.data.samples import Sample
from bridgework.data.shards import Manifest
from bridgework.data.sources import fields, parent, rows, shallow


def run(
    source: str,
    dest: str,
    *,
    images: str | None = None,
    licence: str = "unknown",
    max_bad: float = SHARE,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Import the file `source`; its image paths are relative to `images`, by default the file's own folder.

    A question in which no `<image>` stands is asked below its images. Two equal answers are a bad row.
    """
    text = read_text(source)
    folder = parent(source) if images is None else images
    return ingest(
        partial(_rows, text, source, folder),
        source,
        dest,
        licence=licence,
        made_by=__name__,
        parameters={"images": folder, "sha256": fingerprint(text)},
        max_bad=max_bad,
        workers=workers,
        say=say,
    )


def _rows(text: str, source: str, folder: str) -> Iterator[Row]:
    keys = Keys()
    for number, entry in enumerate(rows(text, source)):
        given = entry if isinstance(entry, dict) else {}
        name = given.get("id", given.get("idx"))
        key = keys(str(name), entry) if isinstance(name, str | int) and str(name) else f"row-{number:08d}"
        yield key, partial(preference, key, entry, folder)


def preference(key: str, entry: Any, folder: str) -> Sample:
    """A row as a conversation whose last answer is the better one, with the worse one. Raises BadSample."""
    row = _fields(entry)
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadSample(Reason.BAD_ROW, "the chosen answer is the rejected one: the row prefers nothing")
    shown: Any = next((row[name] for name in ("image", "images", "image_path") if row.get(name) is not None), [])
    names = shown if isinstance(shown, list) else [shown]
    turns = row["conversations"] if "conversations" in row else [_question(row, len(names))]
    if not isinstance(turns, list):
        raise BadSample(Reason.BAD_ROW, f"`conversations` is {type(turns).__name__}, and a list of turns is wanted")
    told = tuple(parts([*turns, {"from": "gpt", "value": chosen}]))
    return Sample(key, tuple(read_image(folder, name) for name in names), told, rejected=rejected)


def _fields(entry: Any) -> dict[str, Any]:
    """The row, with what lies in RLHF-V's `text`, which may be JSON inside JSON."""
    given = fields(entry)
    inner: Any = {} if "chosen" in given else given.get("text")
    try:
        told = shallow(json.loads(inner)) if isinstance(inner, str) else inner
        return {**given, **told}
    except (TypeError, ValueError, RecursionError):
        raise BadSample(
            Reason.BAD_ROW, f"the row is no object with `chosen` and `rejected`: {str(entry)[:80]}"
        ) from None


def _question(row: dict[str, Any], images: int) -> dict[str, Any]:
    """As a turn of LLaVA's: below its images, where it does not say itself where they stand."""
    text = _said(row.get("question", row.get("prompt")))
    if text is None:
        raise BadSample(Reason.BAD_ROW, f"the row has no text `question` or `prompt`: {str(row)[:80]}")
    return {"from": "human", "value": text if PLACEHOLDER in text else f"{PLACEHOLDER}\n" * images + text.strip()}


def _answer(row: dict[str, Any], name: str) -> str:
    text = _said(row.get(name))
    if text is None:
        raise BadSample(Reason.BAD_ROW, f"the row has no text `{name}`: {str(row)[:80]}")
    if PLACEHOLDER in text:
        raise BadSample(Reason.PLACEHOLDERS, f"the {name} answer holds {PLACEHOLDER!r}")
    if not text.strip():
        raise BadSample(Reason.EMPTY_TEXT, f"the {name} answer is empty")
    return text.strip()


def _said(value: Any) -> str | None:
    """A text, or that of one turn."""
    turn = value[0] if isinstance(value, list) and len(value) == 1 else value
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else turn
    return text if isinstance(text, str) else None
