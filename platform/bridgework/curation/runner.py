"""Runner of curations: annotate every row, decide on it, and write the kept samples.

`DEST.judged/<address>/` holds the annotations. The address identifies the curation, its models and
the fields on which annotations depend, so that other thresholds reuse the same annotations. A
complete dataset at DEST is reused.
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
from bridgework.curation.annotations import Annotation as Annotation
from bridgework.curation.annotations import Annotator as Annotator
from bridgework.curation.annotations import bad as bad
from bridgework.data.catalog import resolve
from bridgework.data.dataset import Dataset, open_dataset, write
from bridgework.data.manifest import Manifest, read_manifest, refuse_within
from bridgework.data.quarantine import SHARE, BadSample, Quarantine, Reason, clear
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.mixture import check_max_bad
from bridgework.tracking.openlineage_events import dataset_written

PLACE = ("makes", "sources")  # fields of system.CurationSpec that do not affect the decisions
MAX_VALUE = 100  # characters of a field's value in an error

Say = Callable[[str], object]
# all rows that are not quarantined, in order
Rows = Callable[[], Iterator[tuple[Sample, Annotation]]]
Model = Annotated[str, "an artifact's folder; on the command line, a registered model as well"]


# --- interface of a curation -------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """Result of a curation for one row of the source."""

    why: str  # short constant phrase, counted and printed, e.g. "kept"
    samples: tuple[Sample, ...] = ()  # to write to the new dataset; none drops the row
    note: str = ""  # shown below the image on the contact sheet, e.g. a score


class Curation(Protocol):
    """Frozen config with the command's name as its module: `curation/dedup.py` holds Dedup."""

    # attributes on which annotations depend; all other fields affect decisions only
    drawn: ClassVar[tuple[str, ...]]

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digest of every model, list and dataset that annotations depend on, by role.

        The role is the name of the field, if there is one. Raises DataError, WeightsError or
        SpecError for a model, list or dataset that is missing or does not fit.
        """

    def judge(self, home: Path) -> Annotator:
        """Build the annotator, once per worker."""

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Yield one decision per row, in order.

        `rows` may be called several times, e.g. to count over all rows first.
        """


@config_class
class CurationLimits:
    """Options of all curations, in addition to their own fields; they do not affect the output."""

    max_bad: float = SHARE  # share of the source rows that may be quarantined

    def __post_init__(self) -> None:
        check_max_bad(self.max_bad)


LIMITS = CurationLimits()


# --- running a curation ------------------------------------------------------------------------


def make(
    curation: Curation,
    sources: Sequence[str],
    dest: str,
    *,
    home: Path,
    limits: CurationLimits = LIMITS,
    workers: int = 0,
    say: Say = print,
) -> Manifest:
    """Write a curated copy of `sources` to `dest` and return its manifest.

    An interrupted run resumes, and an existing complete dataset is reused.

    Args:
        curation: a config, e.g. `dedup.Dedup()`.
        sources: datasets, read one after the other.
        dest: folder or URL of the new dataset.
        home: folder in which names of datasets and models are resolved.
        limits: default: 0.5 % of the rows may be quarantined.
        workers: number of Ray actors that annotate; 0, the default, uses this process.
        say: receives progress messages.

    Returns:
        The manifest. It counts the rows by decision, and the quarantined rows.

    Raises:
        DataError: there is another dataset at `dest`, too many rows are quarantined, or no row is
            kept.
    """
    run = CurationRun.of(curation, sources, dest, home, limits)
    if (manifest := run.existing()) is not None:
        say(f"{run.command}: nothing to do, {dest} holds these {manifest.rows:,} rows already")
        return manifest
    tasks = run.tasks()
    left = [task for task in tasks if not annotations.exists(task.file)]
    resumed = ""
    if len(left) < len(tasks):
        resumed = f"; {len(tasks) - len(left)} of {len(tasks)} shards are already annotated"
    if left and annotations.has_parts(run.annotations_dir):
        resumed += "; an interrupted shard resumes"
    say(f"{run.command}: {run.rows_in:,} rows to annotate{resumed}")
    annotations.annotate(partial(curation.judge, home), left, workers)
    manifest = run.write(counts := DecisionCounts())
    several = "" if manifest.rows == counts.used else f" as {manifest.rows:,} samples"
    say(f"{run.command}: kept {counts.used:,} of {run.rows_in:,} rows{several} ({counts})")
    dataset_written(home, "CURATION", sources, dest, manifest)
    return manifest


@dataclass
class DecisionCounts:
    """Numbers of rows by decision, filled while the dataset is written."""

    decisions: Counter[str] = field(default_factory=Counter)  # by `Decision.why`
    quarantined: Counter[Reason] = field(default_factory=Counter)
    used: int = 0  # rows with at least one sample in the new dataset

    def __str__(self) -> str:
        quarantined = {f"quarantined: {why}": rows for why, rows in self.quarantined.items()}
        rows = self.decisions + Counter(quarantined)
        return "; ".join(f"{number:,} {why}" for why, number in rows.most_common())


class SourceRow(NamedTuple):
    """Row of a source, by position, with its annotation."""

    dataset: Dataset
    number: int  # of the row in the dataset
    key: str
    annotation: Annotation

    @property
    def error(self) -> BadSample | None:
        """Reason why the row is quarantined; None for a usable row."""
        if "bad" not in self.annotation:
            return None
        reason, detail = self.annotation["bad"]
        return BadSample(Reason(reason), detail)

    def sample(self) -> Sample:
        """Read the sample."""
        shard, group, place = self.dataset.locate(self.number)
        return self.dataset.read_group(shard, group)[place]


@dataclass(frozen=True)
class CurationRun:
    """A curation with its opened sources and the digests of its models."""

    curation: Curation
    dest: str
    datasets: tuple[Dataset, ...]
    models: Mapping[str, str]
    limits: CurationLimits

    @classmethod
    def of(
        cls,
        curation: Curation,
        sources: Sequence[str],
        dest: str,
        home: Path,
        limits: CurationLimits = LIMITS,
    ) -> "CurationRun":
        """Open the sources.

        Raises DataError for a source that is missing or given twice, and the errors of
        `curation.models`.
        """
        datasets = tuple(open_dataset(resolve(source, home)) for source in sources)
        if len({dataset.manifest.digest for dataset in datasets}) < max(1, len(datasets)):
            raise DataError(
                "a curation reads one source or several, each once. "
                f"Got {', '.join(sources) or 'none'}"
            )
        # absolute, because actors have their own working directories
        folder = dest if "://" in dest else os.path.abspath(dest)
        refuse_within(folder)
        return cls(curation, folder.rstrip("/"), datasets, dict(curation.models(home)), limits)

    @property
    def module(self) -> str:
        """Import path of the curation's module."""
        return type(self.curation).__module__

    @property
    def command(self) -> str:
        """Name of the curation: the last part of its module."""
        return self.module.rpartition(".")[2]

    @property
    def parents(self) -> tuple[str, ...]:
        """Digests of the sources."""
        return tuple(dataset.manifest.digest for dataset in self.datasets)

    @property
    def source(self) -> str:
        """Paths of the sources, as one text."""
        return ", ".join(dataset.path for dataset in self.datasets)

    @property
    def licenses(self) -> tuple[str, ...]:
        """Licenses of the sources, each once."""
        return tuple(dict.fromkeys(dataset.manifest.license for dataset in self.datasets))

    @property
    def rows_in(self) -> int:
        """Number of rows of all sources."""
        return sum(dataset.manifest.rows for dataset in self.datasets)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of the dataset: fields of the config, and models by digest."""
        fields = {
            name: value
            for name, value in to_dict(self.curation).items()
            if name not in ("_", *PLACE)
        }
        return fields | dict(self.models)

    @property
    def annotations_dir(self) -> str:
        """Folder of the annotations."""
        fields = {name: to_dict(getattr(self.curation, name)) for name in self.curation.drawn}
        text = json.dumps([self.module, fields | dict(self.models)], sort_keys=True)
        return f"{self.dest}.judged/{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def tasks(self) -> list[annotations.Task]:
        """Return one task per shard of every source, in order."""
        folder = self.annotations_dir
        return [
            annotations.Task(d.path, n, s.rows, f"{folder}/{d.manifest.digest[:16]}-{n:05d}.jsonl")
            for d in self.datasets
            for n, s in enumerate(d.manifest.shards)
        ]

    def annotated_rows(self) -> Iterator[SourceRow]:
        """Yield every row of every source, without its images."""
        tasks = iter(self.tasks())
        for dataset in self.datasets:
            number = 0
            for _ in dataset.manifest.shards:
                task = next(tasks)
                for key, annotation in annotations.read(task.file, task.rows):
                    yield SourceRow(dataset, number, key, annotation)
                    number += 1

    def rows(self) -> Iterator[tuple[Sample, Annotation]]:
        """Yield the sample and annotation of every row that is not quarantined."""
        samples = (sample for dataset in self.datasets for sample in dataset.samples())
        for sample, row in zip(samples, self.annotated_rows(), strict=True):
            if sample.key != row.key:
                raise DataError(
                    f"{self.dest}.judged: the annotations belong to other rows. "
                    f"Got key {row.key!r}; expected {sample.key!r}. Fix: delete the folder"
                )
            if row.error is None:
                yield sample, row.annotation

    def decisions(self) -> Iterator[tuple[SourceRow, Decision]]:
        """Yield every row that is not quarantined, with its decision.

        Raises DataError if `decide` yields more or fewer decisions than rows.
        """
        rows = (row for row in self.annotated_rows() if row.error is None)
        decisions = self.curation.decide(self.rows)
        for row in rows:
            decision = next(decisions, None)
            if decision is None:
                raise DataError(
                    f"{self.module}: decide gives fewer decisions than rows. "
                    f"Got none for {row.key!r}; expected one per row"
                )
            yield row, decision
        if next(decisions, None) is not None:
            raise DataError(
                f"{self.module}: decide gives more decisions than rows; expected one per row"
            )

    def existing(self) -> Manifest | None:
        """Return the manifest of the same dataset at `dest`, or None if there is no dataset.

        Raises DataError if there is another dataset.
        """
        if not annotations.exists(f"{self.dest}/manifest.json"):
            return None
        manifest = read_manifest(self.dest)
        old, new = self._differences(manifest)
        if not old:
            return manifest
        raise DataError(
            f"{self.dest}: it holds another dataset. It was made with `{_format_fields(old)}`; "
            f"expected `{_format_fields(new)}`. Fix: delete it or choose another DEST"
        )

    def _differences(self, manifest: Manifest) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parameters in which a dataset at `dest` differs: its values and ours."""
        if manifest.made_by != self.module:
            return {"curation": manifest.made_by}, {"curation": self.module}
        old, new = {**manifest.parameters, "counts": None}, self.parameters()
        if manifest.parents != self.parents:
            old["sources"] = _format_sources(manifest.source, manifest.parents)
            new["sources"] = _format_sources(self.source, self.parents)
        names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
        return {name: old.get(name) for name in names}, {name: new.get(name) for name in names}

    def write(self, counts: DecisionCounts) -> Manifest:
        """Decide on every row, write the kept samples and fill the counts.

        All annotations must exist. Raises DataError as `make` does.
        """
        quarantine = self._quarantine()
        counts.quarantined.update(quarantine.reasons)
        parameters = self.parameters()
        return write(
            self._samples(counts, parameters),
            self.dest,
            source=self.source,
            license=", ".join(self.licenses),
            made_by=self.module,
            parameters=parameters,  # the counts are added after the last sample
            parents=self.parents,
            quarantine=quarantine,
        )

    def _quarantine(self) -> Quarantine:
        """Return the table of quarantined rows. Raises DataError if there are too many."""
        folder = f"{self.dest}.quarantine"
        clear(folder)
        quarantine = Quarantine(folder, limit=self.limits.max_bad)
        for row in self.annotated_rows():
            if (error := row.error) is not None:
                quarantine.add(row.dataset.manifest.digest, row.key, row.number, error)
        quarantine.check(self.rows_in)
        # `write` would compute the share of the kept rows, but the limit is a share of source rows
        quarantine.limit = 1.0
        return quarantine

    def _samples(self, counts: DecisionCounts, parameters: dict[str, Any]) -> Iterator[Sample]:
        keys = set[str]()
        for row, decision in self.decisions():
            counts.decisions[decision.why] += 1
            counts.used += bool(decision.samples)
            for sample in decision.samples:
                keys.add(key := _unique_key(sample.key, keys))
                yield self._with_provenance(sample, key, row)
        if not keys:
            raise DataError(
                f"{self.command}: it keeps nothing of {self.rows_in:,} rows ({counts}), so "
                f"{self.dest} is not written. Fix: loosen the limits"
            )
        decided, quarantined = counts.decisions.total(), counts.quarantined.total()
        if decided + quarantined != self.rows_in:
            raise DataError(
                f"{self.command}: wrong number of decisions. Got {decided:,} decisions and "
                f"{quarantined:,} quarantined rows; expected {self.rows_in:,} in total"
            )
        parameters["counts"] = dict(counts.decisions)

    def _with_provenance(self, sample: Sample, key: str, row: SourceRow) -> Sample:
        """Return the sample with its key, provenance, and license if the sources have several."""
        origin = {"dataset": row.dataset.manifest.digest, "key": row.key, **self.models}
        stamp = {f"{self.command}.{name}": value for name, value in origin.items()}
        license = row.dataset.manifest.license if len(self.licenses) > 1 else None
        return replace(
            sample,
            key=key,
            license=sample.license or license,
            provenance={**sample.provenance, **stamp},
        )


def _unique_key(key: str, taken: Set[str]) -> str:
    """Return `key`, or `key#2` and so on, because rows of two sources may have the same key."""
    if key not in taken:
        return key
    return next(other for n in count(2) if (other := f"{key}#{n}") not in taken)


def _format_sources(source: str, digests: Sequence[str]) -> str:
    """Format datasets by the first digits of their digests, and their paths.

    The digests are needed, because the path may contain other rows by now.
    """
    return f"{', '.join(digest[:8] for digest in digests)} of {source}"


def _format_fields(fields: Mapping[str, Any]) -> str:
    """Format fields as on a command line; long values are truncated."""
    return shlex.join(f"{name}={_format_value(value)}" for name, value in fields.items())


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    text = ",".join(map(_format_value, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}.."
