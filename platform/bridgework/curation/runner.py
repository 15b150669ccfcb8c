"""What a curation says of its rows and its fields, in words.

How a curation runs: facts of every row (`facts`), a verdict on every row, and the dataset of what goes on.

`DEST.judged/<address>/` holds the facts of every row; the address names the curation, its models and the fields that
the facts depend on. Other thresholds take the same facts. A dataset that is whole is taken as it is.
"""

import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol

from bridgework.config import config_class, to_dict
from bridgework.curation import annotations
from bridgework.curation.annotations import Annotator as Annotator
from bridgework.curation.annotations import Fact as Fact
from bridgework.curation.annotations import bad as bad
from bridgework.data.catalog import resolve
from bridgework.data.dataset import Dataset, open_dataset, write
from bridgework.data.manifest import Manifest, read_manifest, refuse_within
from bridgework.data.quarantine import SHARE, BadSample, Quarantine, Reason, clear
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.mixture import check_max_bad

SHOWN = 100  # characters of a field's value, in an error


@dataclass
class Tally:
    """What became of the rows that came in, while they are written."""

    counts: Counter[str] = field(default_factory=Counter)  # rows, by the words of their verdicts
    aside: Counter[Reason] = field(default_factory=Counter)  # rows that could not be judged
    used: int = 0  # rows of which something goes on

    def __str__(self) -> str:
        rows = self.counts + Counter(
            {f"put aside: {reason}": rows for reason, rows in self.aside.items()}
        )
        return "; ".join(f"{number:,} {why}" for why, number in rows.most_common())


def identified(source: str, digests: Sequence[str]) -> str:
    """Datasets by the heads of their digests and their places: other rows may lie at the same place by now."""
    return f"{', '.join(digest[:8] for digest in digests)} of {source}"


def as_words(fields: Mapping[str, Any]) -> str:
    """Fields as they are given on a command line; of a long value the end is left out."""
    return shlex.join(f"{name}={_word(value)}" for name, value in fields.items())


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    word = ",".join(map(_word, value)) if isinstance(value, list) else str(value)
    return word if len(word) <= SHOWN else f"{word[:SHOWN]}.."


PLACE = (
    "makes",
    "sources",
)  # fields of system.CurationSpec: where it stands in a recipe, not what it does

Say = Callable[[str], object]
Rows = Callable[[], Iterator[tuple[Sample, Fact]]]  # every row that could be judged, in order
Model = Annotated[str, "an artifact's folder; on the command line, a registered model as well"]


@dataclass(frozen=True)
class Decision:
    """What becomes of one row of the source."""

    why: str  # a short constant phrase, counted and printed: "kept", "duplicate of an earlier row", ..
    samples: tuple[Sample, ...] = ()  # what goes on: none drops the row
    note: str = ""  # shown under the picture: a score, the twin's key


@config_class
class Limits:
    """What every curation takes beside its own fields: it decides whether there is a dataset, not what is in it."""

    max_bad: float = SHARE  # of the rows that come in, the share that may turn out bad

    def __post_init__(self) -> None:
        check_max_bad(self.max_bad)


LIMITS = Limits()


class Curation(Protocol):
    """A frozen spec, in the module of the command's name: `curation/dedup.py` holds Dedup."""

    drawn: ClassVar[
        tuple[str, ...]
    ]  # the attributes that facts depend on; all other fields only decide

    def models(self, home: Path) -> Mapping[str, str]:
        """The digest of every model, list and dataset that facts depend on, by role; a field's name where it has one.

        Raises DataError, WeightsError or SpecError for what is not there or does not fit.
        """

    def judge(self, home: Path) -> Annotator:
        """What tells the facts of a row; made once in each actor."""

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """One verdict for every row, in order. `rows` may be called several times: for global counts first."""


def make(
    curation: Curation,
    sources: Sequence[str],
    dest: str,
    *,
    home: Path,
    limits: Limits = LIMITS,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """The manifest of the dataset at `dest`, made now unless it is there; a run that was cut off goes on.

    `sources` are read one after the other. `workers` actors of Ray judge; 0 works in this process. Every row is kept,
    dropped or quarantined, and the counts stand in the manifest. Raises DataError for another dataset at `dest`, for
    more rows that cannot be judged than the limits allow, and where nothing is kept.
    """
    making = CurationRun.of(curation, sources, dest, home, limits)
    if (made := making.made()) is not None:
        say(f"{making.command}: nothing to do, {dest} holds these {made.rows:,} rows already")
        return made
    tasks = making.tasks()
    left = [task for task in tasks if not annotations.there(task.file)]
    known = (
        f"; {len(tasks) - len(left)} of {len(tasks)} shards were judged before"
        if len(left) < len(tasks)
        else ""
    )
    known += (
        "; a shard that was cut off goes on where it was"
        if left and annotations.cut_off(making.judged)
        else ""
    )
    say(f"{making.command}: {making.rows_in:,} rows to judge{known}")
    annotations.judge(partial(curation.judge, home), left, workers)
    made = making.write(tally := Tally())
    several = "" if made.rows == tally.used else f" and become {made.rows:,}"
    say(f"{making.command}: {tally.used:,} of {making.rows_in:,} rows go on{several} ({tally})")
    return made


class Row(NamedTuple):
    """A row of a source, by its place."""

    dataset: Dataset
    number: int  # of the row in it
    key: str
    fact: Fact

    @property
    def error(self) -> BadSample | None:
        """Why the row cannot be judged."""
        if "bad" not in self.fact:
            return None
        reason, detail = self.fact["bad"]
        return BadSample(Reason(reason), detail)

    def sample(self) -> Sample:
        shard, group, place = self.dataset.locate(self.number)
        return self.dataset.read_group(shard, group)[place]


@dataclass(frozen=True)
class CurationRun:
    """A curation with its sources and models at hand."""

    curation: Curation
    dest: str
    datasets: tuple[Dataset, ...]
    models: Mapping[str, str]
    limits: Limits

    @classmethod
    def of(
        cls,
        curation: Curation,
        sources: Sequence[str],
        dest: str,
        home: Path,
        limits: Limits = LIMITS,
    ) -> "CurationRun":
        """Raises DataError for a source that is not there or stands twice, and what `curation.models` raises."""
        datasets = tuple(open_dataset(resolve(source, home)) for source in sources)
        if len({dataset.manifest.digest for dataset in datasets}) < max(1, len(datasets)):
            raise DataError(
                f"a curation reads one source or several, each once; got {', '.join(sources) or 'none'}"
            )
        place = (
            dest if "://" in dest else os.path.abspath(dest)
        )  # actors run in folders of their own
        refuse_within(place)
        return cls(curation, place.rstrip("/"), datasets, dict(curation.models(home)), limits)

    @property
    def module(self) -> str:
        return type(self.curation).__module__

    @property
    def command(self) -> str:
        return self.module.rpartition(".")[2]

    @property
    def parents(self) -> tuple[str, ...]:
        return tuple(dataset.manifest.digest for dataset in self.datasets)

    @property
    def source(self) -> str:
        return ", ".join(dataset.path for dataset in self.datasets)

    @property
    def licenses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(dataset.manifest.license for dataset in self.datasets))

    @property
    def rows_in(self) -> int:
        return sum(dataset.manifest.rows for dataset in self.datasets)

    def parameters(self) -> dict[str, Any]:
        """What, beside its parents, decides the dataset: the spec's fields; a model by its digest, not its place."""
        told = {
            name: value
            for name, value in to_dict(self.curation).items()
            if name not in ("_", *PLACE)
        }
        return told | dict(self.models)

    @property
    def judged(self) -> str:
        """The folder of the facts."""
        drawn = {
            name: to_dict(getattr(self.curation, name)) for name in self.curation.drawn
        } | dict(self.models)
        address = hashlib.sha256(
            json.dumps([self.module, drawn], sort_keys=True).encode()
        ).hexdigest()[:16]
        return f"{self.dest}.judged/{address}"

    def tasks(self) -> list[annotations.Task]:
        """Every shard of every source, in order."""
        folder = self.judged
        return [
            annotations.Task(d.path, n, s.rows, f"{folder}/{d.manifest.digest[:16]}-{n:05d}.jsonl")
            for d in self.datasets
            for n, s in enumerate(d.manifest.shards)
        ]

    def told(self) -> Iterator[Row]:
        """Every row of every source, without its images."""
        tasks = iter(self.tasks())
        for dataset in self.datasets:
            number = 0
            for _ in dataset.manifest.shards:
                task = next(tasks)
                for key, fact in annotations.read(task.file, task.rows):
                    yield Row(dataset, number, key, fact)
                    number += 1

    def rows(self) -> Iterator[tuple[Sample, Fact]]:
        """What a curation decides on."""
        samples = (sample for dataset in self.datasets for sample in dataset.samples())
        for sample, row in zip(samples, self.told(), strict=True):
            if sample.key != row.key:
                raise DataError(
                    f"{self.dest}.judged has the key {row.key!r} for {sample.key!r}; delete the folder"
                )
            if row.error is None:
                yield sample, row.fact

    def verdicts(self) -> Iterator[tuple[Row, Decision]]:
        """Every row that could be judged, with what becomes of it. Raises DataError where they are not as many."""
        told = (row for row in self.told() if row.error is None)
        verdicts = self.curation.decide(self.rows)
        for row in told:
            verdict = next(verdicts, None)
            if verdict is None:
                raise DataError(
                    f"{self.module}: decide gives fewer verdicts than rows; {row.key!r} has none"
                )
            yield row, verdict
        if next(verdicts, None) is not None:
            raise DataError(f"{self.module}: decide gives more verdicts than rows")

    # --- out ---------------------------------------------------------------------------------------------------------

    def made(self) -> Manifest | None:
        """What stands at `dest`, if it is what would be made. Raises DataError where it is something else."""
        if not annotations.there(f"{self.dest}/manifest.json"):
            return None
        manifest = read_manifest(self.dest)
        had, wanted = self._differing(manifest)
        if not had:
            return manifest
        raise DataError(
            f"{self.dest} holds another dataset: it was made with `{as_words(had)}`, and asked for is "
            f"`{as_words(wanted)}`; delete it or choose another place"
        )

    def _differing(self, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
        """The fields in which what stands at `dest` is not what would be made: with its values, and with ours."""
        if manifest.made_by != self.module:
            return {"curation": manifest.made_by}, {"curation": self.module}
        had, wanted = {**manifest.parameters, "counts": None}, self.parameters()
        if manifest.parents != self.parents:
            had["sources"] = identified(manifest.source, manifest.parents)
            wanted["sources"] = identified(self.source, self.parents)
        names = [
            name for name in sorted(had.keys() | wanted.keys()) if had.get(name) != wanted.get(name)
        ]
        return {name: had.get(name) for name in names}, {name: wanted.get(name) for name in names}

    def write(self, tally: Tally) -> Manifest:
        """Decide on every row and write what goes on; all facts are there. The tally is filled."""
        quarantine = self._quarantine()
        tally.aside.update(quarantine.reasons)
        parameters = self.parameters()
        return write(
            self._samples(tally, parameters),
            self.dest,
            source=self.source,
            license=", ".join(self.licenses),
            made_by=self.module,
            parameters=parameters,  # with the counts, as soon as the last sample is written
            parents=self.parents,
            quarantine=quarantine,
        )

    def _quarantine(self) -> Quarantine:
        """The table of the rows that could not be judged. Raises DataError where they are too many."""
        folder = f"{self.dest}.quarantine"
        clear(folder)
        quarantine = Quarantine(folder, limit=self.limits.max_bad)
        for row in self.told():
            if (error := row.error) is not None:
                quarantine.add(row.dataset.manifest.digest, row.key, row.number, error)
        quarantine.check(self.rows_in)
        quarantine.limit = (
            1.0  # it is a share of the rows that come in, and `write` knows only those that go on
        )
        return quarantine

    def _samples(self, tally: Tally, parameters: dict[str, Any]) -> Iterator[Sample]:
        keys = set[str]()
        for row, verdict in self.verdicts():
            tally.counts[verdict.why] += 1
            tally.used += bool(verdict.samples)
            for sample in verdict.samples:
                keys.add(key := _free(sample.key, keys))
                yield self._stamped(sample, key, row)
        if not keys:
            raise DataError(
                f"{self.command} keeps nothing of {self.rows_in:,} rows ({tally}), so {self.dest} is not "
                "written; loosen what it asks for"
            )
        judged, aside = tally.counts.total(), tally.aside.total()
        if judged + aside != self.rows_in:
            raise DataError(
                f"{self.command}: {self.rows_in:,} rows came in, {judged:,} have a verdict, {aside:,} are bad"
            )
        parameters["counts"] = dict(tally.counts)

    def _stamped(self, sample: Sample, key: str, row: Row) -> Sample:
        """The sample under its key, with where it comes from, and its license where the sources have several."""
        told = {"dataset": row.dataset.manifest.digest, "key": row.key, **self.models}
        stamp = {f"{self.command}.{name}": value for name, value in told.items()}
        license = row.dataset.manifest.license if len(self.licenses) > 1 else None
        return replace(
            sample,
            key=key,
            license=sample.license or license,
            provenance={**sample.provenance, **stamp},
        )


def _free(key: str, taken: Set[str]) -> str:
    """`key`, or `key#2` and on: rows of two sources may share a key, and in one dataset they may not."""
    return (
        key if key not in taken else next(k for n in count(2) if (k := f"{key}#{n}") not in taken)
    )
