"""Quarantine of bad samples: a reason code for each, a table on disk, and a limit on their share.

The table is a folder of JSON-lines parts, each complete or absent, so that many readers can write
to it. Each line is {"dataset", "key", "row", "reason", "detail", "digest"}. A run reads the planned
rows except those in its table.
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
DETAIL_CHARS = 1_000  # of a record: a bad row may contain a file name of a million characters


class Reason(StrEnum):
    """Reason codes of quarantined samples."""

    EMPTY_FILE = "empty_file"  # 0 bytes
    # no JPEG, PNG, WebP, GIF or BMP by its first bytes, e.g. HTML, a tar, a TIFF
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_BYTES = "too_many_bytes"
    ZERO_PIXELS = "zero_pixels"
    TOO_MANY_PIXELS = "too_many_pixels"  # by the header, before anything is decoded
    MISSING_IMAGE = "missing_image"
    OUTSIDE = "outside"  # the path of an image is absolute or leaves the folder
    EMPTY_TEXT = "empty_text"
    PLACEHOLDERS = "placeholders"  # number of `<image>` in the text differs from that of images
    BAD_ROW = "bad_row"  # the row does not follow its format
    DUPLICATE_KEY = "duplicate_key"
    LICENSE = "license"  # the row has another license than its dataset
    NO_TARGET = "no_target"  # no token with loss after tokenizing and truncation

    @classmethod
    def _missing_(cls, value: object) -> "Reason | None":
        return cls.LICENSE if value == "licence" else None  # spelling of older tables


class BadSample(DataError):
    """Error of a single sample that does not affect the others.

    `reason` is its code in the quarantine.
    """

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadSample"], tuple[Reason, str]]:
        # the default would pass the message to __init__
        return type(self), (self.reason, self.detail)


class UnreadableFile(BadSample):
    """File that cannot be read to its end: one row of the table, for an unknown number of rows."""


class SkippedRow(Exception):
    """Valid row that the importer skips and counts: `SkippedRow("documents without an image")`."""


@dataclass(frozen=True)
class Record:
    """One bad row of a dataset (digest of its manifest) or an import's source (its path)."""

    dataset: str
    key: str
    row: int
    reason: Reason
    detail: str
    digest: str = ""  # sha256 of the manifest, or of the import's description of the source


class Quarantine:
    """Appends records to the table under `folder` (a path or a URL); a row is added only once."""

    def __init__(self, folder: str, *, limit: float = SHARE) -> None:
        self.folder = folder.rstrip("/")
        self.limit = limit
        self.reasons: Counter[Reason] = Counter()
        self._seen: set[tuple[str, int]] = set()
        self._pending: list[Record] = []

    def add(
        self, dataset: str, key: str, row: int, error: BadSample, *, digest: str | None = None
    ) -> None:
        """Add row `row` of `dataset` with the reason of `error`. `digest` defaults to `dataset`."""
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
        """Return the quarantined rows as a share of `rows`."""
        return len(self) / rows if rows else 0.0

    def check(self, rows: int) -> None:
        """Raise DataError, with the table's path, if too large a share of `rows` is quarantined."""
        if self.share(rows) > self.limit:
            self.flush()
            raise self._too_many(self.reasons, rows)

    def check_table(self, rows: int) -> None:
        """Raise DataError as `check` does, for the rows of all writers of the table."""
        reasons = {(record.dataset, record.row): record.reason for record in records(self.folder)}
        if len(reasons) > self.limit * rows:
            raise self._too_many(Counter(reasons.values()), rows)

    def _too_many(self, reasons: Counter[Reason], rows: int) -> DataError:
        counts = ", ".join(f"{n} {reason}" for reason, n in reasons.most_common())
        bad = reasons.total()
        return DataError(
            f"{bad} of {rows} rows are bad ({counts}). Got {bad / max(rows, 1):.2%}; at most "
            f"{self.limit:.2%} is allowed. "
            f"Fix: read {self.folder}, then fix the source or raise max_bad"
        )

    def flush(self) -> bool:
        """Write the pending records as one part.

        A temporary name ensures that readers see complete parts.

        Returns False if there were none.
        """
        if not self._pending:
            return False
        fs, folder = find_store(self.folder)
        fs.makedirs(folder, exist_ok=True)
        part = f"{folder}/part-{time.time_ns():020d}-{uuid4().hex[:6]}.jsonl"
        # backslashreplace: for half of a surrogate pair
        with fs.open(part + ".tmp", "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(
                json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self._pending
            )
        fs.mv(part + ".tmp", part)
        self._pending = []
        return True


def records(folder: str) -> Iterator[Record]:
    """Yield the records of the table under `folder`, in the order of writing."""
    fs, root = find_store(folder)
    for part in sorted(fs.glob(f"{root.rstrip('/')}/part-*.jsonl")):
        with fs.open(part, encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield Record(**{**row, "reason": Reason(row["reason"])})


def scratch_quarantine(home: Path, what: str) -> str:
    """Clear and return a quarantine folder under <home>/cache, for read-only commands.

    Such commands (preview, order) must not write to the table of a run. `what` describes the data
    and determines the folder's name.
    """
    folder = str(home / "cache" / "looked" / hashlib.sha256(what.encode()).hexdigest()[:12])
    clear(folder)
    return folder


def clear(folder: str) -> None:
    """Delete the table that an earlier, failed attempt left under `folder`."""
    fs, root = find_store(folder)
    for part in fs.glob(f"{root.rstrip('/')}/part-*.jsonl*"):
        fs.rm(part)
