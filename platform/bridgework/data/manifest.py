"""What a dataset says of itself: manifest.json beside its shards. Its digest is the dataset's name everywhere.

The digest covers every shard's sha256, so two folders with one digest hold the same bytes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from bridgework.data.samples import LICENSE, SCHEMA_VERSION
from bridgework.errors import DataError
from bridgework.storage import find_store, unreachable

FILE = "manifest.json"
_PLAIN = re.compile(
    r"[\w-][\w.-]{0,199}\.parquet", re.ASCII
)  # a shard's name: a file of the manifest's own folder


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a dataset."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Rows, shards, and where they came from. Every row group but a shard's last has `group_rows` rows."""

    rows: int
    group_rows: int
    shards: tuple[Shard, ...]
    source: str
    license: str
    made_by: str  # importer or curation
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()  # digests of the datasets that this one was made from
    quarantined: Mapping[str, int] = field(
        default_factory=dict
    )  # reason -> rows that the source had and this has not
    left_out: Mapping[str, int] = field(
        default_factory=dict
    )  # sound rows that the importer had no use for, by kind
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise DataError(
                f"the manifest is of schema {self.schema}, and this version reads {SCHEMA_VERSION}; import again"
            )
        tables = (self.parameters, self.quarantined, self.left_out)
        if not all(
            isinstance(table, Mapping) and all(isinstance(key, str) for key in table)
            for table in tables
        ):
            raise DataError(
                "the parameters, quarantined or left_out rows in the manifest are no table of names"
            )
        counts = (
            self.rows,
            self.group_rows,
            *(n for shard in self.shards for n in (shard.rows, shard.bytes)),
        )
        counts += (*self.quarantined.values(), *self.left_out.values())
        if any(type(n) is not int or n < 0 for n in counts) or not self.group_rows:
            raise DataError("a count in the manifest is not an integer, or is below 0")
        if not all(
            isinstance(text, str)
            for text in (self.source, self.license, self.made_by, *self.parents)
        ):
            raise DataError("the source, license, maker or a parent in the manifest is no text")
        if self.rows != sum(shard.rows for shard in self.shards):
            raise DataError(
                f"the manifest counts {self.rows} rows, its shards {sum(s.rows for s in self.shards)}"
            )
        if not all(
            isinstance(shard.file, str) and _PLAIN.fullmatch(shard.file) for shard in self.shards
        ):
            raise DataError(
                "the manifest names a shard outside its own folder, or by no plain name NAME.parquet"
            )

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the canonical JSON of all fields."""
        return hashlib.sha256(json.dumps(self._fields(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        told = self._fields() | {"digest": self.digest}
        return json.dumps(told, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = asdict(self)
        fields[LICENSE] = fields.pop("license")
        if (
            not self.left_out
        ):  # digests of datasets that were made before it was counted stay what they were
            del fields["left_out"]
        return fields

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises DataError for what is no manifest, or one that no longer matches the digest inside it."""
        try:
            fields = json.loads(text)
            digest = fields.pop("digest")
            fields["license"] = fields.pop(LICENSE)
            fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
            manifest = cls(**{**fields, "parents": tuple(fields["parents"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise DataError(f"not a manifest: {error}") from None
        if manifest.digest != digest:
            raise DataError(
                "the manifest was changed after it was written: its digest does not match"
            )
        return manifest


def read_manifest(path: str) -> Manifest:
    """The manifest of the dataset at `path` (a folder or a URL).

    Raises DataError when it is missing or broken, ResourceError where its store does not answer.
    """
    fs, root = find_store(path)
    try:
        data = fs.cat_file(f"{root}/{FILE}")
    except (FileNotFoundError, NotADirectoryError):
        torn = fs.exists(root) and any(
            str(name).endswith(".parquet") for name in fs.ls(root, detail=False)
        )
        why = (
            "shards but no manifest: a writer was cut off; write it again"
            if torn
            else "no dataset here"
        )
        raise DataError(f"{path}: {why} (looked for {FILE})") from None
    except Exception as error:  # of the package that speaks with the store
        raise unreachable(f"{path}/{FILE}", error) from None
    try:
        return Manifest.from_json(data.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{path}/{FILE}: not a manifest: {error}") from None
    except DataError as error:
        raise DataError(f"{path}/{FILE}: {error}; restore it, or write the dataset again") from None


def refuse_within(dest: str) -> None:
    """Raises DataError for a place inside a dataset, where `verify` would find files that are not its own."""
    fs, root = find_store(dest)
    folder = root.rstrip("/").rpartition("/")[0]
    while folder:
        with suppress(DataError, OSError):  # no manifest of ours, or a folder that is closed to us
            if fs.exists(f"{folder}/{FILE}") and read_manifest(fs.unstrip_protocol(folder)):
                break
        folder = folder.rpartition("/")[0]
    if folder:
        raise DataError(
            f"{dest} lies inside the dataset {folder}, which is not to change; choose another place"
        )
