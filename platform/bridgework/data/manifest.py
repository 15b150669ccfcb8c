"""Manifests: manifest.json, next to the shards of a dataset.

Its digest identifies the dataset everywhere.

The digest covers every shard's sha256, so two folders with the same digest hold the same bytes.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from bridgework.data.samples import LICENSE, SCHEMA_VERSION
from bridgework.errors import DataError
from bridgework.storage import find_store, unreachable

FILE = "manifest.json"
# name of a shard: a file in the manifest's own folder
_SHARD_NAME = re.compile(r"[\w-][\w.-]{0,199}\.parquet", re.ASCII)


@dataclass(frozen=True)
class Shard:
    """One Parquet file of a dataset."""

    file: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Rows, shards and origin of a dataset.

    Every row group except a shard's last has `group_rows` rows.
    """

    rows: int
    group_rows: int
    shards: tuple[Shard, ...]
    source: str
    license: str
    made_by: str  # importer or curation
    parameters: Mapping[str, Any] = field(default_factory=dict)
    parents: tuple[str, ...] = ()  # digests of the datasets that this one was derived from
    quarantined: Mapping[str, int] = field(default_factory=dict)  # reason -> rejected rows
    left_out: Mapping[str, int] = field(default_factory=dict)  # kind -> valid rows, skipped
    schema: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        if self.schema != SCHEMA_VERSION:
            raise DataError(
                f"unknown schema of the manifest. Got {self.schema}; expected {SCHEMA_VERSION}"
            )
        tables = (self.parameters, self.quarantined, self.left_out)
        if not all(
            isinstance(table, Mapping) and all(isinstance(key, str) for key in table)
            for table in tables
        ):
            raise DataError(
                "parameters, quarantined or left_out in the manifest is not a mapping of strings"
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
            raise DataError("source, license, made_by or a parent in the manifest is not a string")
        if self.rows != (rows := sum(shard.rows for shard in self.shards)):
            raise DataError(f"the manifest counts {self.rows} rows, its shards {rows}")
        if not all(
            isinstance(shard.file, str) and _SHARD_NAME.fullmatch(shard.file)
            for shard in self.shards
        ):
            raise DataError(
                "the manifest names a shard outside its own folder; expected names NAME.parquet"
            )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON of all fields."""
        return hashlib.sha256(json.dumps(self._fields(), sort_keys=True).encode()).hexdigest()

    def to_json(self) -> str:
        """Return the content of manifest.json: all fields and the digest."""
        fields = self._fields() | {"digest": self.digest}
        return json.dumps(fields, indent=1, sort_keys=True, ensure_ascii=False) + "\n"

    def _fields(self) -> dict[str, Any]:
        fields = dict(vars(self))  # asdict takes 5 s for 100,000 shards
        fields.pop("digest", None)  # cached
        fields["shards"] = [vars(shard) for shard in self.shards]
        fields[LICENSE] = fields.pop("license")
        if not self.left_out:  # keeps the digests of datasets from before this field existed
            del fields["left_out"]
        return fields

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Parse manifest.json.

        Raises DataError if it is not a manifest or does not match its own digest.
        """
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
    """Read the manifest of the dataset at `path` (a folder or a URL).

    Raises DataError if it is missing or corrupt, ResourceError if its store is unreachable.
    """
    fs, root = find_store(path)
    try:
        data = fs.cat_file(f"{root}/{FILE}")
    except (FileNotFoundError, NotADirectoryError):
        has_shards = fs.exists(root) and any(
            str(name).endswith(".parquet") for name in fs.ls(root, detail=False)
        )
        problem = (
            "shards but no manifest, because a write was interrupted. Fix: write it again"
            if has_shards
            else "no dataset here"
        )
        raise DataError(f"{path}: {problem} (expected {FILE})") from None
    except Exception as error:  # from the client library of the store
        raise unreachable(f"{path}/{FILE}", error) from None
    try:
        return _parsed(data)
    except UnicodeDecodeError as error:
        raise DataError(f"{path}/{FILE}: not a manifest: {error}") from None
    except DataError as error:
        raise DataError(
            f"{path}/{FILE}: {error}. Fix: restore it, or write the dataset again"
        ) from None


@lru_cache(4)  # a run opens each of its datasets several times
def _parsed(data: bytes) -> Manifest:
    return Manifest.from_json(data.decode())


def refuse_within(dest: str) -> None:
    """Raise DataError if `dest` is inside a dataset, because `verify` would report its files."""
    fs, root = find_store(dest)
    folder = root.rstrip("/").rpartition("/")[0]
    while folder:
        with suppress(DataError, OSError):  # another manifest.json, or no permission
            if fs.exists(f"{folder}/{FILE}") and read_manifest(fs.unstrip_protocol(folder)):
                break
        folder = folder.rpartition("/")[0]
    if folder:
        raise DataError(
            f"{dest} is inside the dataset {folder}, which must not change. "
            "Fix: choose another destination"
        )
