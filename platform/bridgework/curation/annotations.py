"""Annotations of rows: one JSON-lines file per shard, complete or absent.

A file grows row group by row group under a temporary name, `FILE.<run>.part`. After an
interruption, the next run takes over the complete row groups of that file. Files are written in
this process or by Ray actors. An annotation depends on the curation, its models and the row group
of the row; it does not depend on the worker or on time.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import fsspec

from bridgework.data.dataset import Dataset, open_dataset
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.ray_utils import map_on_actors
from bridgework.storage import find_store

PART = ".part"  # suffix of a file that is not complete

Annotation = dict[str, Any]  # JSON values; {"bad": [reason, detail]} for a row that is quarantined


class Annotator(Protocol):
    """Holds the models of a curation; built once per worker."""

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        """Return one annotation per sample of a row group, in order.

        The result must depend only on the curation, its models and the row group.
        """


class AnnotatedRow(NamedTuple):
    """Key of a row and its annotation: one line of a file, with these names."""

    key: str
    fact: Annotation


@dataclass(frozen=True)
class Task:
    """One shard to annotate, and the file for its annotations."""

    dataset: str  # path or URL
    shard: int
    rows: int
    file: str


def bad(error: BadSample) -> Annotation:
    """Return the annotation of a row that cannot be used; it is quarantined with this reason."""
    return {"bad": [error.reason.value, error.detail]}


def annotate(build: Callable[[], Annotator], tasks: Sequence[Task], workers: int) -> None:
    """Write the annotations of all `tasks`, with at most `workers` Ray actors; 0 uses this process.

    `build` builds the annotator, once per worker. Raises the errors of the annotator.
    """
    map_on_actors(partial(_Worker, build), tasks, workers, gpus=True, what="annotations")


class _Worker:
    """Writes the annotations of one shard per call."""

    def __init__(self, build: Callable[[], Annotator]) -> None:
        self._annotator = build()

    def __call__(self, task: Task) -> None:
        dataset = open_dataset(task.dataset)
        save(task.file, dataset.manifest.group_rows, lambda done: self._groups(dataset, task, done))

    def _groups(self, dataset: Dataset, task: Task, done: int) -> Iterator[list[AnnotatedRow]]:
        """Yield the annotations of every row group after the first `done`."""
        for group in range(done, -(-task.rows // dataset.manifest.group_rows)):
            samples = dataset.read_group(task.shard, group)
            annotations = self._annotator(samples)
            yield [AnnotatedRow(s.key, a) for s, a in zip(samples, annotations, strict=True)]


def save(
    path: str, group_rows: int, annotate: Callable[[int], Iterable[Sequence[AnnotatedRow]]]
) -> None:
    """Write a file of annotations; it appears only when it is complete.

    `annotate(n)` yields the annotations of the row groups after the first `n`, which were written
    by an earlier run.
    """
    fs, file = find_store(path)
    fs.makedirs(file.rpartition("/")[0], exist_ok=True)
    parts = _parts(fs, file)
    written = max((_complete_groups(fs, part, group_rows) for part in parts), key=len, default=[])
    own = f"{file}.{uuid4().hex[:8]}{PART}"
    with fs.open(own, "w", encoding="utf-8") as out:
        for group in chain([written], annotate(len(written) // group_rows)):
            out.writelines(
                json.dumps(row._asdict(), ensure_ascii=False, allow_nan=False) + "\n"
                for row in group
            )
            out.flush()  # from here on it survives the end of the process
    # another run of the same command may have finished first, and removed the parts
    with suppress(FileNotFoundError):
        fs.mv(own, file)
        for part in parts:
            fs.rm(part)


def read(path: str, rows: int) -> Iterator[AnnotatedRow]:
    """Yield the annotations of a shard of `rows` rows, in order.

    Raises DataError for a file that is missing, damaged, or has another number of rows.
    """
    fs, file = find_store(path)
    number = 0
    if not fs.exists(file):
        raise DataError(
            f"{path}: the file of annotations is gone. Fix: delete the dataset and curate it again"
        )
    with fs.open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield AnnotatedRow(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: not an annotation ({error}). "
                    "Fix: delete the file and run again"
                ) from None
    if number != rows:
        raise DataError(
            f"{path}: wrong number of annotations. Got {number}; expected {rows}. "
            "Fix: delete the file and run again"
        )


def exists(path: str) -> bool:
    """Return True if there is a file at `path`."""
    fs, file = find_store(path)
    return bool(fs.exists(file))


def has_parts(folder: str) -> bool:
    """Return True if the folder has an incomplete file of an interrupted run."""
    fs, root = find_store(folder)
    return fs.exists(root) and any(str(path).endswith(PART) for path in fs.ls(root, detail=False))


def _parts(fs: fsspec.AbstractFileSystem, file: str) -> list[str]:
    """List the incomplete files of earlier runs."""
    listed = map(str, fs.ls(file.rpartition("/")[0], detail=False))
    return [path for path in listed if path.startswith(f"{file}.")]


def _complete_groups(
    fs: fsspec.AbstractFileSystem, part: str, group_rows: int
) -> list[AnnotatedRow]:
    """Return the annotations of the complete row groups of a part, up to the first broken line."""
    rows = list[AnnotatedRow]()
    with (
        suppress(ValueError, TypeError, FileNotFoundError),
        fs.open(part, encoding="utf-8") as lines,
    ):
        for line in lines:
            rows.append(AnnotatedRow(**json.loads(line)))
    return rows[: len(rows) // group_rows * group_rows]
