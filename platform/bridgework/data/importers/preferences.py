"""Preference pairs: rows of "image", "question" or "conversations", "chosen" and "rejected".

JSON lines, a JSON list, Parquet or Arrow. RLHF-V's form (Yu et al. 2024, arXiv:2312.00849), where
question and answers are in a field `text`, and RLAIF-V's (arXiv:2405.17220) are read as published.
Questions and answers may be turns: {"value": ...}, {"content": ...}, or a list with one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from bridgework.config import added, config_class
from bridgework.data.importers import PLACEHOLDER, UNKNOWN, Importer, Keys, Listing, Row
from bridgework.data.importers.image_fields import FIRST, read_cell, shown
from bridgework.data.importers.llava_json import asked, parts
from bridgework.data.importers.records import Records, open_records
from bridgework.data.importers.tables import fields, parse, shallow
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample

IDS = ("id", "idx")  # fields that name a row


@config_class
class PreferencesImporter(Importer):
    """Import the file SOURCE, or the Parquet files of a folder.

    Image paths are relative to `images`, by default the file's own folder; images in cells are kept
    as they are. A question without `<image>` is asked below its images. Two equal answers are a bad
    row. `split` is required if the Parquet files are of several.
    """

    images: str | None = None
    split: str | None = added(default=None)  # recorded for Parquet and Arrow alone
    license: str = UNKNOWN

    def list_rows(self, source: str) -> Listing:
        found = open_records(source, self.split)
        folder = found.folder if self.images is None else self.images
        return Listing(
            partial(self._rows, found, folder),
            found.sha256,
            replace(self, images=folder, split=found.split),
            files=found.files,
        )

    def _rows(self, found: Records, folder: str) -> Iterator[Row]:
        keys = Keys()
        for number, (row, read) in enumerate(found.rows(*IDS)):
            key = keys.of(row, number, *IDS, content=row if found.split is None else number)
            yield key, partial(self.read_row, key, read, folder)

    def read_row(self, key: str, read: Callable[[], Any], folder: str) -> Sample:
        """Return the sample of a row that `read` gives, with images of `folder`.

        Raises BadSample.
        """
        return preference(key, read(), folder)


def preference(key: str, entry: Any, folder: str) -> Sample:
    """Return a row as a conversation that ends with the chosen answer. Raises BadSample."""
    row = _fields(entry)
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    if chosen == rejected:
        raise BadSample(
            Reason.BAD_ROW, "the chosen answer is the rejected one: the row prefers nothing"
        )
    cells = shown(row)
    if not cells and any(row.get(name) == "" for name in FIRST):
        raise BadSample(Reason.BAD_ROW, "the path of the image is empty")
    turns = (
        row["conversations"]
        if row.get("conversations") is not None
        else [_question(row, len(cells))]
    )
    if not isinstance(turns, list):
        raise BadSample(
            Reason.BAD_ROW,
            f"`conversations` is {type(turns).__name__}; expected a list of turns",
        )
    turns, dropped = asked(turns)
    content = tuple(parts([*turns, {"from": "gpt", "value": chosen}]))
    files = tuple(read_cell(folder, cell) for cell in cells)
    return Sample(key, files, content, rejected=rejected, provenance=dropped)


def _fields(entry: Any) -> dict[str, Any]:
    """Return the row, with the fields of RLHF-V's `text`, which may be JSON inside JSON."""
    given = fields(entry)
    inner: Any = {} if given.get("chosen") is not None else given.get("text")
    try:
        within = shallow(parse(inner)) if isinstance(inner, str) else inner
        return {**given, **within}
    except (TypeError, ValueError, RecursionError):
        raise BadSample(
            Reason.BAD_ROW,
            f"the row is not an object with `chosen` and `rejected`: {str(entry)[:80]}",
        ) from None


def _question(row: dict[str, Any], images: int) -> dict[str, Any]:
    """Return the question as a turn of LLaVA's, below its images unless it places them itself."""
    text = _said(row.get("question", row.get("prompt")))
    if text is None:
        raise BadSample(
            Reason.BAD_ROW, f"the row has no text `question` or `prompt`: {str(row)[:80]}"
        )
    return {
        "from": "human",
        "value": text if PLACEHOLDER in text else f"{PLACEHOLDER}\n" * images + text.strip(),
    }


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
    """Return a text, or that of one turn, whose content may be a list of texts and images."""
    turn = value[0] if isinstance(value, list) and len(value) == 1 else value
    text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else turn
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):
        said = [f"{PLACEHOLDER}\n" if p.get("type") == "image" else p.get("text") for p in text]
        text = "".join(said) if all(isinstance(piece, str) for piece in said) else None
    return text if isinstance(text, str) else None
