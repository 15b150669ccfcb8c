"""Where bad samples go: a reason code each, a table on disk, and a limit on their share.

A folder of JSON-lines parts, each complete or absent, so that many readers may write to one table:
{"dataset", "key", "row", "reason", "detail", "digest"} a line. What is read is what was planned minus what stands here.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from uuid import uuid4

from bridgework.errors import DataError
from bridgework.mixture import MAX_BAD
from bridgework.storage import find_store

SHARE = MAX_BAD
FLUSH_ROWS = 1_000
DETAIL_CHARS = 1_000  # of a record: a bad row may name a file by a million letters


class Reason(StrEnum):
    """Why a sample was put aside."""

    EMPTY_FILE = "empty_file"  # 0 bytes
    NOT_AN_IMAGE = (
        "not_an_image"  # no JPEG, PNG, WebP, GIF or BMP by its first bytes: HTML, a tar, a TIFF
    )
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_BYTES = "too_many_bytes"
    ZERO_PIXELS = "zero_pixels"
    TOO_MANY_PIXELS = "too_many_pixels"  # by the header, before anything is decoded
    MISSING_IMAGE = "missing_image"
    OUTSIDE = "outside"  # the path of an image is absolute or leaves the folder
    EMPTY_TEXT = "empty_text"
    PLACEHOLDERS = (
        "placeholders"  # `<image>` stands in the text more or less often than there are images
    )
    BAD_ROW = "bad_row"  # the row is not what the format says
    DUPLICATE_KEY = "duplicate_key"
    LICENSE = "license"  # the row is not under the license of its dataset
    NO_TARGET = "no_target"  # after tokenizing and cutting to length, nothing is left to learn from

    @classmethod
    def _missing_(cls, value: object) -> "Reason | None":
        return cls.LICENSE if value == "licence" else None  # as tables were written before


class BadSample(DataError):
    """One sample is wrong; the rest of the dataset is not. `reason` is its code in the quarantine."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[Reason, str]]:
        return type(self), (
            self.reason,
            self.detail,
        )  # the default would hand the message to __init__


class UnreadableFile(BadSample):
    """A file that cannot be read, or not to its end: one row of the table, and nobody knows how many it held."""


class SkippedRow(Exception):
    """A row is sound, and its importer has no use for it: `LeftOut("documents without an image")` is counted."""


@dataclass(frozen=True)
class Record:
    """One bad row: of a dataset, by its manifest's digest, or of a source that is being imported, by its path."""

    dataset: str
    key: str
    row: int
    reason: Reason
    detail: str
    digest: str = ""  # sha256 of the manifest, or of what the importer knew of the source


class Quarantine:
    """Appends records to the table under `folder` (a path or a URL); a row that was added before is not added again."""

    def __init__(self, folder: str, *, limit: float = SHARE) -> None:
        self.folder = folder.rstrip("/")
        self.limit = limit
        self.reasons: Counter[Reason] = Counter()
        self._seen: set[tuple[str, int]] = set()
        self._pending: list[Record] = []

    def add(
        self, dataset: str, key: str, row: int, error: BadSample, *, digest: str | None = None
    ) -> None:
        """Put aside row `row` of `dataset` for what `error` says; without `digest`, `dataset` is one."""
        if (dataset, row) in self._seen:
            return
        self._seen.add((dataset, row))
        self.reasons[error.reason] += 1
        detail = error.detail[:DETAIL_CHARS]
        self._pending.append(
            Record(dataset, key, row, error.reason, detail, dataset if digest is None else digest)
        )
        if len(self._pending) >= FLUSH_ROWS:
            self.flush()

    def __len__(self) -> int:
        return len(self._seen)

    def __str__(self) -> str:
        counts = ", ".join(f"{rows} {reason}" for reason, rows in self.reasons.most_common())
        return f"{len(self)} rows quarantined ({counts})"

    def share(self, rows: int) -> float:
        """Rows put aside, as a share of `rows`."""
        return len(self) / rows if rows else 0.0

    def check(self, rows: int) -> None:
        """Raises DataError, naming the table, if more than the limit's share of `rows` was put aside."""
        if self.share(rows) > self.limit:
            self.flush()
            raise self._too_many(self.reasons, rows)

    def check_table(self, rows: int) -> None:
        """`check` of the whole table: what all that write to it put aside."""
        found = {(record.dataset, record.row): record.reason for record in records(self.folder)}
        if len(found) > self.limit * rows:
            raise self._too_many(Counter(found.values()), rows)

    def _too_many(self, reasons: Counter[Reason], rows: int) -> DataError:
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        bad = reasons.total()
        return DataError(
            f"{bad} of {rows} rows are bad ({counts}): {bad / max(rows, 1):.2%}, and {self.limit:.2%} is allowed; "
            f"read {self.folder}, then mend the source or allow a larger share (max_bad)"
        )

    def flush(self) -> bool:
        """Write what is pending as one part: under a temporary name first, so no reader sees half of it.

        False when nothing was.
        """
        if not self._pending:
            return False
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        part = f"{folder}/part-{time.time_ns():020d}-{uuid4().hex[:6]}.jsonl"
        with fs.open(
            part + ".tmp", "w", encoding="utf-8", errors="backslashreplace"
        ) as file:  # half a surrogate pair
            file.writelines(
                json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self._pending
            )
        fs.mv(part + ".tmp", part)
        self._pending = []
        return True


def records(folder: str) -> Iterator[Record]:
    """The table under `folder`, in the order of writing."""
    fs, root = find_store(folder)
    for part in sorted(fs.glob(f"{root.rstrip('/')}/part-*.jsonl")):
        with fs.open(part, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield Record(**{**row, "reason": Reason(row["reason"])})


def scratch_quarantine(home: Path, what: str) -> str:
    """An empty table for who only looks, and must not write to a run's: under <home>/cache, named by what is read."""
    folder = str(home / "cache" / "looked" / hashlib.sha256(what.encode()).hexdigest()[:12])
    clear(folder)
    return folder


def clear(folder: str) -> None:
    """Drop the table that an earlier, failed try left under `folder`."""
    fs, root = find_store(folder)
    for part in fs.glob(f"{root.rstrip('/')}/part-*.jsonl*"):
        fs.rm(part)
