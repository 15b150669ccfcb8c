"""Models by the words that people use, and who is champion.

`llava` is the champion, `llava@challenger` an alias, `llava:3` a version; what has a slash is an artefact's folder.
Promotion is gated: a version takes the alias `champion` only if its figures are not worse than the champion's.
"""

from dataclasses import dataclass
from pathlib import Path

from bridgework.errors import TrackingError
from bridgework.tracking import Tracker, Version

CHAMPION, PREVIOUS = "champion", "previous"


def split(model: str) -> tuple[str, str]:
    """`llava@challenger` -> (llava, challenger); a bare name means its champion."""
    for mark in "@:":
        name, found, which = model.partition(mark)
        if found:
            return name, which
    return model, CHAMPION


def is_folder(model: str) -> bool:
    return "/" in model or Path(model).is_dir()


@dataclass(frozen=True)
class Promotion:
    """What a promotion did: the new champion, the one before, and the two figures that were compared."""

    champion: Version
    before: Version | None
    compared: tuple[float, float] | None  # (candidate's, champion's)


def promote(tracker: Tracker, model: str, *, metric: str | None = None, lower: bool = False) -> Promotion:
    """Make a version the champion; the old one keeps the alias `previous`.

    With `metric` (a tag of registered versions, e.g. ranking.accuracy) raises TrackingError when the candidate lacks it
    or is worse than the champion; `lower` says that less is better.
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
    if not (new <= old if lower else new >= old):  # so that a NaN is refused
        raise TrackingError(
            f"{candidate.name}:{candidate.version} has {metric} {new:g}, the champion, version {champion.version}, "
            f"{old:g}: not promoted; leave out --metric to promote it all the same"
        )
    return new, old


def _figure(version: Version, metric: str) -> float:
    try:
        return float(version.tags[metric])
    except (KeyError, ValueError):
        figures = sorted(k for k, v in version.tags.items() if v.replace(".", "", 1).replace("-", "", 1).isdigit())
        raise TrackingError(
            f"{version.name}:{version.version} carries no figure {metric!r}; it has: {', '.join(figures) or 'none'}"
        ) from None
