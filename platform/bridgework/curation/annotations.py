"""What a judge knows of every row: a file of JSON lines for each shard, whole or absent.

It grows row group by row group under a name of its own, `FILE.<run>.part`; who goes on after an interruption takes
over the whole row groups of that. The files are written in this process or by Ray's actors. A fact depends on the
curation, its models and the row group that the row lies in: not on who judges it, or when.
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

PART = ".part"  # how the name of a file ends that is not whole yet

Fact = dict[str, Any]  # as JSON holds it; {"bad": [reason, detail]} where a row cannot be judged


class Annotator(Protocol):
    """Holds the models; made once in each actor."""

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        """One fact for each sample of a row group, in order; a function of the curation, its models and the group."""


class AnnotatedRow(NamedTuple):
    """A row by its key, and the fact of it."""

    key: str
    fact: Fact


@dataclass(frozen=True)
class Task:
    """One shard to be judged, and the file that its facts go to."""

    dataset: str  # path or URL
    shard: int
    rows: int
    file: str


def bad(error: BadSample) -> Fact:
    """The fact of a row that cannot be judged: it goes to the quarantine, with this reason."""
    return {"bad": [error.reason.value, error.detail]}


def judge(made: Callable[[], Annotator], tasks: Sequence[Task], workers: int) -> None:
    """Write the facts of all `tasks`: by at most `workers` actors of Ray, or with 0 in this process.

    `made` makes the judge, once in each of them. Raises what the judge raises.
    """
    map_on_actors(partial(_Worker, made), tasks, workers, gpus=True)


class _Worker:
    """Writes the facts of one shard a call."""

    def __init__(self, made: Callable[[], Annotator]) -> None:
        self._judge = made()

    def __call__(self, task: Task) -> None:
        dataset = open_dataset(task.dataset)
        save(task.file, dataset.manifest.group_rows, lambda known: self._told(dataset, task, known))

    def _told(self, dataset: Dataset, task: Task, known: int) -> Iterator[list[AnnotatedRow]]:
        """The facts of the row groups behind the first `known`, one after the other."""
        for group in range(known, -(-task.rows // dataset.manifest.group_rows)):
            samples = dataset.read_group(task.shard, group)
            facts = self._judge(samples)
            yield [
                AnnotatedRow(sample.key, fact) for sample, fact in zip(samples, facts, strict=True)
            ]


def save(
    path: str, group_rows: int, told: Callable[[int], Iterable[Sequence[AnnotatedRow]]]
) -> None:
    """Write a file of facts, so that nobody reads half of it and nothing that was told is lost.

    `told` gives the facts of the row groups behind so many, which an earlier try left.
    """
    fs, file = find_store(path)
    fs.makedirs(file.rpartition("/")[0], exist_ok=True)
    parts = _parts(fs, file)
    known = max((_begun(fs, part, group_rows) for part in parts), key=len, default=[])
    own = f"{file}.{uuid4().hex[:8]}{PART}"
    with fs.open(own, "w", encoding="utf-8") as out:
        for group in chain([known], told(len(known) // group_rows)):
            out.writelines(
                json.dumps(one._asdict(), ensure_ascii=False, allow_nan=False) + "\n"
                for one in group
            )
            out.flush()  # from here on it outlives the process
    with suppress(
        FileNotFoundError
    ):  # another run of the same command was quicker, and has tidied up
        fs.mv(own, file)
        for part in parts:
            fs.rm(part)


def _parts(fs: fsspec.AbstractFileSystem, file: str) -> list[str]:
    """What earlier tries to write a file of facts have left."""
    listed = map(str, fs.ls(file.rpartition("/")[0], detail=False))
    return [path for path in listed if path.startswith(f"{file}.")]


def _begun(fs: fsspec.AbstractFileSystem, part: str, group_rows: int) -> list[AnnotatedRow]:
    """The facts of the whole row groups in a part; what is cut off within a line ends there."""
    told = list[AnnotatedRow]()
    with (
        suppress(ValueError, TypeError, FileNotFoundError),
        fs.open(part, encoding="utf-8") as lines,
    ):
        for line in lines:
            told.append(AnnotatedRow(**json.loads(line)))
    return told[: len(told) // group_rows * group_rows]


def cut_off(folder: str) -> bool:
    """Whether a run was cut off within a file of facts in this folder."""
    fs, root = find_store(folder)
    return fs.exists(root) and any(str(path).endswith(PART) for path in fs.ls(root, detail=False))


def read(path: str, rows: int) -> Iterator[AnnotatedRow]:
    """The facts of a shard of `rows` rows, in order. Raises DataError for a file that is no such thing, or gone."""
    fs, file = find_store(path)
    number = 0
    if not fs.exists(file):
        raise DataError(
            f"{path}, with what is known of the rows, is gone; delete the dataset and curate it again"
        )
    with fs.open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield AnnotatedRow(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path}, line {number}: no fact ({error}); delete the file and run again"
                ) from None
    if number != rows:
        raise DataError(f"{path} has {number} facts for {rows} rows; delete the file and run again")


def there(path: str) -> bool:
    """Whether a file stands at `path`."""
    fs, file = find_store(path)
    return bool(fs.exists(file))
