"""What a judge knows of every row, shard by shard: a file of JSON lines each, whole or absent, so that work goes on.

The files are written in this process or by Ray's actors. A fact depends on the curation, its models and the row group
that the row lies in: not on who judges it, or when.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol
from uuid import uuid4

import fsspec

from bridgework.cluster import each
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.data.shards import open_dataset
from bridgework.errors import DataError

Fact = dict[str, Any]  # as JSON holds it; {"bad": [reason, detail]} where a row cannot be judged


class Judge(Protocol):
    """Holds the models; made once in each actor."""

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        """One fact for each sample of a row group, in order; a function of the curation, its models and the group."""


class Told(NamedTuple):
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


def judge(made: Callable[[], Judge], tasks: Sequence[Task], workers: int) -> None:
    """Write the facts of all `tasks`: by at most `workers` actors of Ray, or with 0 in this process.

    `made` makes the judge, once in each of them. Raises what the judge raises.
    """
    each(partial(_Worker, made), tasks, workers, gpus=True)


class _Worker:
    """Writes the facts of one shard a call."""

    def __init__(self, made: Callable[[], Judge]) -> None:
        self._judge = made()

    def __call__(self, task: Task) -> None:
        save(task.file, self._told(task))

    def _told(self, task: Task) -> Iterator[Told]:
        dataset = open_dataset(task.dataset)
        for group in range(-(-task.rows // dataset.manifest.group_rows)):
            samples = dataset.read_group(task.shard, group)
            for sample, fact in zip(samples, self._judge(samples), strict=True):
                yield Told(sample.key, fact)


def save(path: str, told: Iterable[Told]) -> None:
    """Write a file of facts: under a temporary name first, so that nobody reads half of it."""
    fs, file = fsspec.core.url_to_fs(path)
    fs.makedirs(file.rpartition("/")[0], exist_ok=True)
    temporary = f"{file}.{uuid4().hex[:8]}.tmp"
    try:
        with fs.open(temporary, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(one._asdict(), ensure_ascii=False, allow_nan=False) + "\n" for one in told)
        fs.mv(temporary, file)
    finally:
        if fs.exists(temporary):
            fs.rm(temporary)


def read(path: str, rows: int) -> Iterator[Told]:
    """The facts of a shard of `rows` rows, in order. Raises DataError for a file that is no such thing."""
    fs, file = fsspec.core.url_to_fs(path)
    number = 0
    with fs.open(file, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield Told(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}, line {number}: no fact ({error}); delete the file and run again") from None
    if number != rows:
        raise DataError(f"{path} has {number} facts for {rows} rows; delete the file and run again")


def there(path: str) -> bool:
    """Whether a file stands at `path`."""
    fs, file = fsspec.core.url_to_fs(path)
    return bool(fs.exists(file))
