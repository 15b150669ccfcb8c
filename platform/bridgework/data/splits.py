"""The files of a Hugging Face dataset, by split: as `save_to_disk` lays them out, and as they lie on the Hub.

data-00000-of-00002.arrow           one dataset
train/data-00000-of-00002.arrow     a dataset of splits
data/train-00000-of-00005.parquet   the Hub
default/train/0000.parquet          the Hub's own conversion
"""

import os.path
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from bridgework.errors import DataError, suggest
from bridgework.stores import find_store

EDGE_BYTES = 64 << 10  # at a file's begin and end: there lie the footers, which know where all else lies

_ENDINGS = (".arrow", ".parquet")
_PART = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})")
_NO_SPLIT = re.compile(r"data|part[-_]?\d+.*|\d+")  # names of files that tell no split: their folder's does


class File(NamedTuple):
    """One file: its path or URL, and its name below the source."""

    path: str
    name: str


def find(source: str, split: str | None = None) -> tuple[str, list[File]]:
    """(name of the split, its files in order); the name is empty where the files tell none.

    Raises DataError where there is no file, where one is missing, and for a split that is unknown or left open.
    """
    fs, root = find_store(source)
    found = [str(root)] if fs.isfile(root) else sorted(map(str, fs.find(root)))
    top = os.path.dirname(root) if fs.isfile(root) else root
    splits: defaultdict[str, list[File]] = defaultdict(list)
    for path in found:
        name = os.path.relpath(path, top)
        if name.endswith(_ENDINGS) and not os.path.basename(name).startswith((".", "cache-")):
            url = str(fs.unstrip_protocol(path)) if "://" in source else path
            splits[_split_of(name)].append(File(url, name))
    if not splits:
        raise DataError(f"{source} holds no {' and no '.join(_ENDINGS)} file; give the folder that save_to_disk wrote")
    if split is None and len(splits) > 1:
        raise DataError(f"{source} holds the splits {', '.join(sorted(splits))}; choose one, e.g. split={min(splits)}")
    chosen = next(iter(splits)) if split is None else split
    if chosen not in splits:
        raise DataError(f"{source} has no split {chosen!r}" + suggest(chosen, splits))
    if fs.isdir(root):
        _check(source, [file.name for file in splits[chosen]])
    return chosen, splits[chosen]


def _split_of(name: str) -> str:
    folder, base = os.path.split(name)
    stem = base.rpartition(".")[0]
    numbered = _PART.match(stem)
    split = numbered["split"] if numbered else stem
    return os.path.basename(folder) if _NO_SPLIT.fullmatch(split) else split


def _check(source: str, names: Sequence[str]) -> None:
    """Raises DataError for the files of two datasets, and for the third of five files where there is no fourth."""
    folders = sorted({os.path.dirname(name) for name in names})
    if len(folders) > 1:
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
