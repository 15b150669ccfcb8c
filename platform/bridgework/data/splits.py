"""The files of a dataset in Arrow or Parquet, by split.

data-00000-of-00002.arrow           one dataset, as `save_to_disk` writes it
train/data-00000-of-00002.arrow     a dataset of splits
data/train-00000-of-00005.parquet   the Hub
default/train/0000.parquet          the Hub's own conversion
0356AFpwqkWuS1bVOfu7Da_000000.parquet   Ray Data; part.0.parquet dask; data_0.parquet DuckDB
year=2024/data_0.parquet            partitions, whose folders hold values of columns
"""

import os.path
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bridgework.data.sources import files, hidden
from bridgework.errors import DataError, suggest
from bridgework.stores import find_store

EDGE_BYTES = 64 << 10  # at a file's begin and end: there are the footers, which say where all else is

_ENDINGS = (".arrow", ".parquet")
_UNREAD = ("_temporary", "_delta_log")  # folders of what a writer keeps for itself
_OTHERS = (".csv", ".tsv", ".jsonl", ".feather", ".orc", ".avro", ".pq", ".parq", ".tar", ".zip", ".gz", ".zst")
_PART = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_NO_SPLIT = re.compile(r"data|part[-_]?\d+.*|\d+")  # names of files that name no split: their folder's does
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}", re.IGNORECASE)
_HASH = re.compile(  # hexadecimal, or of all letters and digits, as Ray Data names what it writes
    r"(?=.*\d)(?:[0-9a-f]{4,}|[0-9A-F]{4,}|(?=.*[a-z])(?=.*[A-Z])[0-9A-Za-z]{16,})"
)
_DIGITS = re.compile(r"\d+$")
_MADE = re.compile(  # words of writers, which name no split
    r"(?:batch|block|chunk|data|export|file|out|output|part|partition|result|shard|tid)s?\d*"
    r"|c\d+|brotli|gz|gzip|lz4|snappy|zstd",
    re.IGNORECASE,
)


class File(NamedTuple):
    """One file: its path or URL, and its name below the source."""

    path: str
    name: str


def find(source: str, split: str | None = None) -> tuple[str, list[File]]:
    """(name of the split, its files in order); the name is empty where the files name none.

    Raises DataError where there is no file, where one is missing, and for a split that is unknown or left open.
    """
    fs, root = find_store(source)
    alone = fs.isfile(root)
    names = [os.path.basename(root)] if alone else _names(source) if fs.isdir(root) else []
    if not names:
        raise DataError(f"{source} holds no {' and no '.join(_ENDINGS)} file; give the folder that save_to_disk wrote")
    splits = _grouped(names, {name: _split_of(name) for name in names})
    if split not in splits and (len(splits) > 1 or len(_folders(names)) > 1):
        splits = _grouped(names, _series(names))
    if split is None and len(splits) > 1:
        raise DataError(f"{source} holds the splits {', '.join(sorted(splits))}; choose one, e.g. split={min(splits)}")
    chosen = next(iter(splits)) if split is None else split
    if chosen not in splits:
        raise DataError(f"{source} has no split {chosen!r}" + suggest(chosen, splits))
    if not alone:
        _check(source, splits[chosen])
    paths = [str(root) if alone else f"{str(root).rstrip('/')}/{name}" for name in splits[chosen]]
    urls = [str(fs.unstrip_protocol(path)) if "://" in source else path for path in paths]
    return chosen, [File(url, name) for url, name in zip(urls, splits[chosen], strict=True)]


def others(source: str) -> list[str]:
    """The files of a folder that may hold rows, and are neither Arrow nor Parquet: none of them is read."""
    fs, root = find_store(source)
    names = (name for name, _ in files(source)) if fs.isdir(root) else ()
    return [name for name in names if name.lower().endswith(_OTHERS) and not hidden(name)]


def _names(source: str) -> list[str]:
    found = (name for name, _ in files(source) if name.endswith(_ENDINGS) and not hidden(name))
    return [n for n in found if not os.path.basename(n).startswith("cache-") and not {*_UNREAD} & {*n.split("/")}]


def _grouped(names: Sequence[str], splits: Mapping[str, str]) -> dict[str, list[str]]:
    found: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        found[splits[name]].append(name)
    return dict(found)


def _split_of(name: str) -> str:
    """The split that a file's own name holds, or its folder's."""
    stem = os.path.basename(name).rpartition(".")[0]
    numbered = _PART.match(stem)
    split = numbered["split"] if numbered else stem
    return _folder_of(name) if _NO_SPLIT.fullmatch(split) else split


def _folder_of(name: str) -> str:
    """The name of the folder that a file is in, but for folders that hold a column's value."""
    return next((part for part in reversed(name.split("/")[:-1]) if "=" not in part), "")


def _series(names: Sequence[str]) -> dict[str, str]:
    """The split of each file where files that one writer numbered, or named at random, are one."""
    alike: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        alike[os.path.dirname(name), _words(name)].append(name)
    found = {}
    for (_, words), group in alike.items():
        for name in group:
            found[name] = words if words and _numbered(group) else _split_of(name) if words else _folder_of(name)
    return found


def _words(name: str) -> str:
    """A file's name without numbers, hashes and the words of writers."""
    stem = os.path.basename(name).rpartition(".")[0]
    stem = numbered["split"] if (numbered := _PART.match(stem)) else _UUID.sub("", stem)
    kept = [word for word in re.split(r"([._-]+)", stem) if not _is_made(word)]
    return "".join(kept).strip("._-")


def _is_made(word: str) -> bool:
    return word.isdecimal() or _HASH.fullmatch(word) is not None or _MADE.fullmatch(word) is not None


def _numbered(names: Iterable[str]) -> bool:
    """True if numbers distinguish the files of one set: with zeros in front, or counted from 0 or 1."""
    stems = [os.path.basename(name).rpartition(".")[0] for name in names]
    words = [[word for word in re.split(r"[._-]", stem) if _is_made(word)] for stem in stems]
    found = [[n for word in of_one for n in _DIGITS.findall(word)] for of_one in words]
    if any(number.startswith("0") and len(number) > 1 for numbers in found for number in numbers):
        return True
    last = sorted(int(numbers[-1]) for numbers in found if numbers)
    return len(last) == len(stems) and last[0] in (0, 1) and last == [*range(last[0], last[0] + len(last))]


def _folders(names: Iterable[str]) -> list[str]:
    """The folders of files, but for those that hold a column's value."""
    parts = (name.split("/")[:-1] for name in names)
    return sorted({"/".join(part for part in of_one if "=" not in part) for of_one in parts})


def _check(source: str, names: Sequence[str]) -> None:
    """Raises DataError for the files of two datasets, and for the third of five files where there is no fourth."""
    if len(folders := _folders(names)) > 1:
        raise DataError(f"{source} holds one split in the folders {', '.join(folders)}; give one of them as SOURCE")
    parts = [part for name in names if (part := _PART.match(os.path.basename(name)))]
    count = max((int(part["count"]) for part in parts), default=0)
    if missing := sorted(set(range(count)) - {int(part["number"]) for part in parts}):
        raise DataError(f"{source} is not whole: file {missing[0]} of {count}, counted from 0, is missing; fetch it")


def edges(path: str) -> tuple[bytes, bytes, str]:
    """What tells a file from another of its name, without reading it all: its begin, its end, its size."""
    fs, root = find_store(path)
    size = int(fs.size(root))
    return fs.cat_file(root, 0, EDGE_BYTES), fs.cat_file(root, max(0, size - EDGE_BYTES), size), str(size)
