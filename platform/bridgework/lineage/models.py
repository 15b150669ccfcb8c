"""Models by the words that people use, and who is champion.

`llava` is the champion, `llava@challenger` an alias, `llava:3` a version; what has a slash is an artefact's folder.
Promotion is gated: a version takes the alias `champion` only if its figure is better than the champion's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from bridgework.errors import TrackingError
from bridgework.tracking import Tracker, Version
from bridgework.training import artefact
from bridgework.training.record import StageResult

CHAMPION, PREVIOUS = "champion", "previous"


def split(model: str) -> tuple[str, str]:
    """`llava@challenger` -> (llava, challenger); a bare name means its champion."""
    for mark in "@:":
        name, found, which = model.partition(mark)
        if found:
            return name, which
    return model, CHAMPION


def is_folder(model: str) -> bool:
    return "/" in model


def register(tracker: Tracker, name: str, result: StageResult, tags: Mapping[str, str]) -> Version:
    """The version of a trained stage's weights, with its figures and `tags`; told twice, it is the same version.

    Raises TrackingError for a stage that was trained untracked.
    """
    if result.run_id is None or result.model_id is None:
        raise TrackingError(f"{result.artefact} was trained untracked; run its command again while the tracker answers")
    digest = artefact.describe(result.artefact).digest
    for version in tracker.registered(result.run_id):
        if version.tags.get("digest") == digest:
            return version
    figures = {key: f"{value:.6g}" for key, value in result.metrics.items() if "." in key}
    return tracker.register(
        name, result.model_id, result.run_id, str(result.artefact), {**figures, **tags, "digest": digest}
    )


@dataclass(frozen=True)
class Promotion:
    """What a promotion did: the new champion, the one before, and the two figures that were compared."""

    champion: Version
    before: Version | None
    compared: tuple[float, float] | None  # (candidate's, champion's)


def promote(tracker: Tracker, model: str, *, metric: str | None = None, lower: bool = False) -> Promotion:
    """Make a version the champion; the old one keeps the alias `previous`.

    With `metric` (a tag of registered versions, e.g. ranking.accuracy) raises TrackingError when the candidate lacks it
    or is no better than the champion; `lower` says that less is better.
    """
    name, which = split(model)
    candidate = tracker.version(name, which)
    before = _holder(tracker, name, CHAMPION)
    if before is not None and before.version == candidate.version:
        return Promotion(before, before, None)
    compared = _compared(candidate, before, metric, lower) if metric else None
    if before is not None:
        tracker.alias(name, PREVIOUS, before.version)
    tracker.alias(name, CHAMPION, candidate.version)
    return Promotion(tracker.version(name, CHAMPION), before, compared)


def rollback(tracker: Tracker, name: str) -> Promotion:
    """Make the champion before this one champion again; the two change places."""
    before, back = tracker.version(name, CHAMPION), tracker.version(name, PREVIOUS)
    tracker.alias(name, CHAMPION, back.version)
    tracker.alias(name, PREVIOUS, before.version)
    return Promotion(tracker.version(name, CHAMPION), before, None)


def _holder(tracker: Tracker, name: str, alias: str) -> Version | None:
    try:
        return tracker.version(name, alias)
    except TrackingError:
        return None


def _compared(candidate: Version, champion: Version | None, metric: str, lower: bool) -> tuple[float, float] | None:
    new = _figure(candidate, metric)
    if champion is None:
        return None
    old = _figure(champion, metric)
    if not (new < old if lower else new > old):  # so that a tie changes nothing, and a NaN is refused
        raise TrackingError(
            f"{candidate.name}:{candidate.version} has {metric} {new:g}, the champion, version {champion.version}, "
            f"{old:g}: not promoted; leave out --metric to promote it all the same"
        )
    return new, old


def _figure(version: Version, metric: str) -> float:
    figures = {key: float(value) for key, value in version.tags.items() if _is_number(value)}
    if metric not in figures:
        raise TrackingError(
            f"{version.name}:{version.version} carries no figure {metric!r}; "
            f"it has: {', '.join(sorted(figures)) or 'none'}"
        )
    return figures[metric]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
