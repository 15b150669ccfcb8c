"""Reproduction: trains a recorded model again from its record in MLflow, and compares the losses.

The record is the recipe, the digests of the datasets, the commit and the environment. No file of
the first run is read.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bridgework.config import from_dict
from bridgework.data.catalog import home as default_home
from bridgework.data.catalog import names, resolve
from bridgework.data.manifest import read_manifest
from bridgework.errors import DataError, RunError, TrackingError, suggest
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking import environment, registry
from bridgework.tracking.lineage import RunView
from bridgework.tracking.mlflow_store import MLflowReader
from bridgework.training.options import RunOptions

RECIPE = "recipe.json"
LOSS = "train/loss"
COMPARED = ("git_commit", "versions", "hardware")


@dataclass(frozen=True)
class Record:
    """A recorded run of a system, or its first stages."""

    run: RunView
    system: System
    stages: tuple[RunView, ...]  # in their order of training
    missing: tuple[DatasetInput, ...]  # datasets that are not stored here
    differs: tuple[tuple[str, str, str], ...]  # (tag, then, now) of the environment

    @property
    def workers(self) -> int:
        found = re.search(r"workers=(\d+)", self.stages[0].tags.get("execution", ""))
        return int(found[1]) if found else 0

    @property
    def options(self) -> RunOptions:
        """Options that decide which step became the result."""
        execution = self.stages[0].tags.get("execution", "")
        found = re.search(r"evaluate_every=(\d+) keep_best=(.+)", execution)
        if found is None:
            return RunOptions()
        return RunOptions(evaluate_every=int(found[1]), keep_best=found[2])


@dataclass(frozen=True)
class Comparison:
    """Losses of one stage, then and now."""

    stage: str
    steps: int  # that both have
    equal: int  # steps with equal bits
    largest: float  # difference
    same_weights: bool

    @property
    def exact(self) -> bool:
        return self.same_weights and self.steps == self.equal


def read_record(what: str, home: Path | None = None) -> Record:
    """Read the record of a run (its name or id) or a model (`llava`, `llava:3`, `llava@alias`).

    Raises TrackingError for an unknown name, or if the run has no recipe or no finished stage.
    """
    place = home or default_home()
    reader = MLflowReader(None, place)
    found = _find(what, reader)
    last = found if found.tags.get("stage") else None
    run = reader.run(found.parent) if last is not None and found.parent else found
    stages = [s for s in reader.children(run.id) if s.tags.get("stage") and s.outputs]
    if last is not None:
        stages = [s for s in stages if s.id == last.id or _before(s, last, stages)]
    if not stages:
        raise TrackingError(f"{what}: no stage of the run {run.name!r} is finished")
    text = reader.text(run.id, RECIPE)
    if text is None:
        raise TrackingError(f"{what}: the run {run.name!r} has no {RECIPE} in MLflow")
    system = from_dict(json.loads(text))
    if not isinstance(system, System):
        raise TrackingError(f"{what}: {RECIPE} of the run {run.name!r} does not hold a recipe")
    stored = _stored(place)
    missing = {
        d.digest: d for s in stages for d in s.inputs if _place(d, system, stored, place) is None
    }
    now = environment.tags()
    differs = [
        (tag, stages[0].tags.get(tag, ""), now.get(tag, ""))
        for tag in COMPARED
        if stages[0].tags.get(tag, "") != now.get(tag, "")
    ]
    placed = _with_datasets(system, stages, stored, place)
    return Record(run, placed, tuple(stages), tuple(missing.values()), tuple(differs))


def reproduce(
    record: Record, *, run: str | None = None, workers: int | None = None, home: Path | None = None
) -> list[Comparison]:
    """Train the stages of a record as a new run, and compare it with the record.

    run: name of the new run; default: `reproduce-` and eight digits of the recorded run's id.
    workers: default: as recorded.

    Raises DataError if a dataset is missing, and the errors of `bridgework.train`.
    """
    from bridgework import api

    if record.missing:
        listed = ", ".join(f"{d.name} ({d.digest[:12]})" for d in record.missing)
        raise DataError(
            f"run {record.run.name!r} read datasets that are not stored here. Got {listed}. "
            "Fix: copy them to <home>/datasets"
        )
    place = home or default_home()
    names_ = [s.tags["stage"] for s in record.stages]
    results = api.train(
        record.system,
        stages=names_,
        workers=record.workers if workers is None else workers,
        run=run or f"reproduce-{record.run.id[:8]}",
        home=place,
        options=record.options,
    )
    reader = MLflowReader(None, place)
    compared = []
    for then, name in zip(record.stages, names_, strict=True):
        new = results[name]
        if new.run_id is None:
            raise RunError(f"{name} was trained untracked, so its losses cannot be compared")
        digests = {w.digest for w in reader.run(new.run_id).outputs}
        same = bool(digests & {w.digest for w in then.outputs})
        compared.append(
            _compare(name, reader.history(then.id, LOSS), reader.history(new.run_id, LOSS), same)
        )
    return compared


def _compare(
    stage: str, then: Mapping[int, float], now: Mapping[int, float], same_weights: bool
) -> Comparison:
    both = sorted(then.keys() & now.keys())
    differences = [abs(then[step] - now[step]) for step in both]
    equal = sum(difference == 0 for difference in differences)
    return Comparison(stage, len(both), equal, max(differences, default=0.0), same_weights)


def _find(what: str, reader: MLflowReader) -> RunView:
    if re.fullmatch(r"[0-9a-f]{32}", what):
        return reader.run(what)
    name, which = registry.split(what)
    if known := reader.versions(name):
        if name != what:
            return reader.run(reader.version(name, which).run_id)
        return reader.run(next((v for v in known if which in v.aliases), known[-1]).run_id)
    if runs := reader.named(what):
        return runs[-1]
    raise TrackingError(
        f"{what!r} is not a run or a model" + suggest(what, [*reader.models(), *reader.run_names()])
    )


def _before(stage: RunView, last: RunView, stages: Sequence[RunView]) -> bool:
    """Return True if `last` starts, directly or not, from the weights of `stage`."""
    digests = {w.digest for w in stage.outputs}
    start = last.tags.get("starts_from_digest", "")
    if start in digests:
        return True
    between = [s for s in stages if s.id != last.id and start in {w.digest for w in s.outputs}]
    return any(_before(stage, s, stages) for s in between if s.id != stage.id)


def _stored(home: Path) -> dict[str, str]:
    """Return digest -> path of the datasets under `home`."""
    found = {}
    for name in names(home):
        path = resolve(name, home)
        found[read_manifest(path).digest] = path
    return found


def _place(
    dataset: DatasetInput, system: System, stored: Mapping[str, str], home: Path
) -> str | None:
    """Return where a dataset of this digest is: under its own name, elsewhere in the home, or None.

    A dataset that a stage's curation writes is made again.
    """
    makes = {s.curation.makes for s in system.stages if s.curation is not None}
    recorded = {s.dataset for stage in system.stages for s in stage.data.leaves}
    if dataset.digest in stored:
        return stored[dataset.digest]
    if any(name in makes for name in recorded if Path(dataset.path).name == name):
        return dataset.path
    for path in (dataset.path, *recorded):
        try:
            at = resolve(path, home)
            if read_manifest(at).digest == dataset.digest:
                return at
        except DataError:
            continue
    return None


def _with_datasets(
    system: System, runs: Sequence[RunView], stored: Mapping[str, str], home: Path
) -> System:
    """Return the system with the paths of datasets whose name means another dataset here."""
    by_stage = {run.tags["stage"]: run for run in runs}

    def placed(stage: Stage) -> Stage:
        run = by_stage.get(stage.name)
        recorded = {d.name: d for d in run.inputs} if run else {}
        mixture = stage.data
        for source in stage.data.leaves:
            dataset = recorded.get(source.name)
            if dataset is None or (stage.curation and stage.curation.makes == source.dataset):
                continue
            try:
                same = read_manifest(resolve(source.dataset, home)).digest == dataset.digest
            except DataError:
                same = False
            path = _place(dataset, system, stored, home)
            if not same and path is not None:
                mixture = mixture.with_dataset(source.dataset, path)
        return replace(stage, data=mixture)

    return replace(system, stages=tuple(map(placed, system.stages)))
