"""Model registry: model names, registration of weights, and the challenger.

`llava` means the champion, `llava@challenger` an alias, `llava:3` a version; a name with a slash is
an artifact's folder. `promotion` decides about the champion.
"""

import re
from collections.abc import Mapping
from math import isnan
from pathlib import Path

from bridgework import artifacts, storage
from bridgework.artifacts import StageResult
from bridgework.errors import SpecError, TrackingError, WeightsError, suggest
from bridgework.evaluation import results
from bridgework.evaluation.results import EvaluationRecord
from bridgework.evaluation.statistics import difference
from bridgework.system import Direction
from bridgework.tracking import card
from bridgework.tracking.tracker import CHALLENGER, CHAMPION, Tracker, Version

CERTIFICATE = "parity.json"  # of an import, in the artifact's folder


def split(model: str) -> tuple[str, str]:
    """Split `llava@challenger` to (llava, challenger); a bare name means its champion."""
    for mark in "@:":
        name, found, which = model.partition(mark)
        if found:
            return name, which
    return model, CHAMPION


def is_folder(model: str) -> bool:
    return "/" in model


def register(tracker: Tracker, name: str, result: StageResult, tags: Mapping[str, str]) -> Version:
    """Register a trained stage's weights with its metrics and `tags`; returns the version.

    Registering the same weights again returns the existing version. Raises TrackingError for a
    stage that was trained untracked.
    """
    if result.run_id is None or result.model_id is None:
        raise TrackingError(
            f"{result.artifact} was trained untracked. "
            "Fix: run its command again while the tracker answers"
        )
    info = artifacts.describe(result.artifact)
    for version in tracker.registered([result.run_id]):
        if version.tags.get("digest") == info.digest:
            return version
    return tracker.register(
        name,
        result.model_id,
        result.run_id,
        str(result.artifact),
        {**_figures(result), **tags, "digest": info.digest, "steps": str(info.steps)},
        card.description(result.artifact, tags),
    )


def _figures(result: StageResult) -> dict[str, str]:
    """Return the figures of the stage's evaluations as tags, without the metrics of its batches."""
    stage = artifacts.recipe(result.artifact)[artifacts.describe(result.artifact).stage]
    names = tuple(f"{spec.name}." for spec in stage.evals)
    return {key: f"{value:.6g}" for key, value in result.metrics.items() if key.startswith(names)}


def register_folder(tracker: Tracker, name: str, folder: Path) -> Version:
    """Register the artifact of a folder that this tracker has no run of, e.g. an import.

    A run is recorded for it, with its certificate. Registering the same weights again returns the
    existing version. Raises WeightsError for a folder that is not an artifact, SpecError for an
    invalid name.
    """
    if not name.strip() or re.search(r"[@:/\\\s]", name):
        raise SpecError(
            f"a model's name has no spaces, '@', ':' or '/'. Got {name!r}; expected e.g. my-blip"
        )
    info, artifact = artifacts.describe(folder), str(folder.resolve())
    tags = {"digest": info.digest, "fingerprint": info.fingerprint, "stage": info.stage}
    made = tracker.produced(info.digest)
    if made is not None:
        run, model_id = made.run_id, made.model_id
    else:
        about = {"kind": "import", "system": info.system, "run_key": f"import/{info.digest}"}
        run = tracker.start(f"import {name}", tags=tags | about)
        if (folder / CERTIFICATE).is_file():
            tracker.file(run, folder / CERTIFICATE)
        model_id = tracker.output(run, name, artifact, tags)
        tracker.finish(run)
    for version in tracker.registered([run]):
        if version.name == name and version.tags.get("digest") == info.digest:
            return version
    text = card.description(folder, tags)
    return tracker.register(name, model_id, run, artifact, tags, text)


def challenge(
    tracker: Tracker, candidate: Version, metric: str, home: Path | None = None
) -> tuple[Version, str]:
    """Give `candidate` the alias `challenger` if it is free, or its holder is worse by `metric`.

    Returns the holder of the alias afterwards, and the reason why it did not move (empty if it
    did). Better means beyond the interval of the paired difference. Figures are comparable only if
    both are from the same evaluation: kind, dataset, rows, settings.
    """
    current = holder(tracker, candidate.name, CHALLENGER)
    if current is not None and current.version == candidate.version:
        return current, ""
    if current is not None and (reason := _not_better(candidate, current, metric, home)):
        return current, f"{CHALLENGER} stays {current.name}:{current.version}: {reason}"
    tracker.alias(candidate.name, CHALLENGER, candidate.version)
    return tracker.version(candidate.name, CHALLENGER), ""


def holder(tracker: Tracker, name: str, alias: str) -> Version | None:
    """Return the version with an alias; None if there is none. Raises for an unknown model."""
    try:
        return tracker.version(name, alias)
    except TrackingError:
        return None


def _not_better(candidate: Version, current: Version, metric: str, home: Path | None) -> str:
    """Return the reason why `candidate` is not better than `current`; empty if it is."""
    new, old = (_record(version, metric, home) for version in (candidate, current))
    if new is None or old is None or new.evaluation != old.evaluation:
        return (
            f"{metric} of the two is not from the same evaluation. Fix: compare both with "
            f"`bridgework compare {current.name}:{current.version} "
            f"{candidate.name}:{candidate.version}`"
        )
    way = _direction(new, metric)
    was, now = old.metrics[metric], new.metrics[metric]
    if isnan(was) and not isnan(now):
        return ""
    if metric not in new.rows or metric not in old.rows:
        better = now > was if way == "higher" else now < was
        return "" if better else f"its {metric} is {was:g}, the new one's {now:g}"
    found = difference(old.rows[metric], new.rows[metric])
    if (found.value > 0) == (way == "higher") and found.value and found.p < 0.05:
        return ""
    more = (
        f"; {found.rows_needed:,} rows would decide a difference of this size"
        if found.rows_needed and (found.value > 0) == (way == "higher")
        else ""
    )
    return (
        f"its {metric} is {was:.4g}, the new one's {now:.4g}: difference {found.value:+.4g} "
        f"[{found.low:.4g}, {found.high:.4g}] (n={found.n:,}){more}"
    )


def _record(version: Version, metric: str, home: Path | None) -> EvaluationRecord | None:
    """Return the newest stored evaluation with the metric; None without one."""
    try:
        weights = artifacts.describe(version.artifact).digest
    except WeightsError:
        return None
    place = home or storage.locate(version.artifact).parent
    records = results.records_of(version.artifact, weights, place)
    return next((record for record in records[::-1] if metric in record.metrics), None)


def _direction(record: EvaluationRecord, metric: str) -> Direction:
    """Return the better direction of a metric. Raises TrackingError for a baseline."""
    way = record.better.get(metric)
    if way is None:
        decisive = [name for name, direction in record.better.items() if direction is not None]
        raise TrackingError(
            f"{metric} is a baseline, so it cannot rank models" + suggest(metric, decisive)
        )
    return way
