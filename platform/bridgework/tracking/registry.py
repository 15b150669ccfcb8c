"""Model registry: model names, registration, and promotion to champion or challenger.

`llava` means the champion, `llava@challenger` an alias, `llava:3` a version; a name with a slash is
an artifact's folder. Promotion is gated: with a metric, a version becomes champion only if its
value is better than the champion's. The better direction is declared by the evaluation of the
metric, in the recipe next to the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan
from typing import Literal

from bridgework import artifacts
from bridgework.artifacts import StageResult
from bridgework.errors import TrackingError, WeightsError, suggest
from bridgework.system import EvalSpec
from bridgework.tracking.tracker import Tracker, Version

CHAMPION, CHALLENGER, PREVIOUS = "champion", "challenger", "previous"
Direction = Literal["higher", "lower"]


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
    digest = artifacts.describe(result.artifact).digest
    for version in tracker.registered(result.run_id):
        if version.tags.get("digest") == digest:
            return version
    metrics = {key: f"{value:.6g}" for key, value in result.metrics.items() if "." in key}
    return tracker.register(
        name,
        result.model_id,
        result.run_id,
        str(result.artifact),
        {**metrics, **tags, "digest": digest},
    )


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion: the new champion, the one before, and the compared metric values."""

    champion: Version
    before: Version | None
    compared: tuple[float, float] | None  # (candidate's, champion's)


def promote(
    tracker: Tracker, model: str, *, metric: str | None = None, lower: bool | None = None
) -> Promotion:
    """Make a version the champion; the old champion gets the alias `previous`.

    metric: a tag of registered versions, e.g. ranking.accuracy. With it, TrackingError is raised if
    the candidate has no such tag or is not better than the champion. The evaluation declares the
    better direction; `lower` applies only to a metric that no evaluation of the candidate's recipe
    returns.
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


def challenge(tracker: Tracker, candidate: Version, metric: str) -> tuple[Version, str]:
    """Give `candidate` the alias `challenger` if it is free, or its holder is worse by `metric`.

    Returns the holder of the alias afterwards, and the reason why it did not move (empty if it
    did). Values are comparable only if both are from the same evaluation: kind, dataset, rows,
    settings.
    """
    holder = _holder(tracker, candidate.name, CHALLENGER)
    if holder is not None and holder.version == candidate.version:
        return holder, ""
    if holder is not None and (reason := _not_better(candidate, holder, metric)):
        return holder, f"{CHALLENGER} stays {holder.name}:{holder.version}: {reason}"
    tracker.alias(candidate.name, CHALLENGER, candidate.version)
    return tracker.version(candidate.name, CHALLENGER), ""


def rollback(tracker: Tracker, name: str) -> Promotion:
    """Make the previous champion champion again; the two swap their aliases."""
    before, back = tracker.version(name, CHAMPION), tracker.version(name, PREVIOUS)
    tracker.alias(name, CHAMPION, back.version)
    tracker.alias(name, PREVIOUS, before.version)
    return Promotion(tracker.version(name, CHAMPION), before, None)


def direction(version: Version, metric: str, lower: bool | None) -> Direction:
    """Return the better direction of a metric, as declared by the evaluation in the recipe.

    Raises TrackingError for a baseline such as ranking.chance, if `lower` contradicts the
    evaluation, and if no evaluation of the recipe returns the metric and `lower` is None.
    """
    evaluation = _evaluation(version, metric)
    if evaluation is None:
        if lower is None:
            raise TrackingError(
                f"{version.name}:{version.version}: no evaluation of its recipe returns "
                f"{metric!r}, so the better direction is unknown. Fix: give --lower or --higher"
            )
        return "lower" if lower else "higher"
    declared = evaluation.better[metric.removeprefix(f"{evaluation.name}.")]
    if declared is None:
        decisive = [
            f"{evaluation.name}.{key}" for key, way in evaluation.better.items() if way is not None
        ]
        raise TrackingError(
            f"{metric} is a baseline, so it cannot decide a promotion" + suggest(metric, decisive)
        )
    if lower is not None and lower is not (declared == "lower"):
        raise TrackingError(
            f"{metric}: {declared} is better. Got --{'lower' if lower else 'higher'}. "
            "Fix: leave it out"
        )
    return declared


def _not_better(candidate: Version, holder: Version, metric: str) -> str:
    """Return the reason why `candidate` is not better than `holder`; empty if it is."""
    evaluation = _evaluation(candidate, metric)
    if evaluation is None or evaluation != _evaluation(holder, metric):
        return (
            f"{metric} of the two is not from the same evaluation. Fix: evaluate both with "
            "`bridgework eval`, then "
            f"`bridgework promote {candidate.name}:{candidate.version}`"
        )
    new, old = _metric(candidate, metric), _metric(holder, metric)
    better = new < old if direction(candidate, metric, None) == "lower" else new > old
    if better or (isnan(old) and not isnan(new)):
        return ""
    return f"its {metric} is {old:g}, the new one's {new:g}"


def _evaluation(version: Version, metric: str) -> EvalSpec | None:
    """Return the evaluation of the metric in the recipe next to the weights; None without one."""
    try:
        stage = artifacts.recipe(version.artifact)[artifacts.describe(version.artifact).stage]
    except WeightsError:
        return None
    return next((e for e in stage.evals if metric in {f"{e.name}.{key}" for key in e.better}), None)


def _holder(tracker: Tracker, name: str, alias: str) -> Version | None:
    try:
        return tracker.version(name, alias)
    except TrackingError:
        return None


def _compared(
    candidate: Version, champion: Version | None, metric: str, lower: bool | None
) -> tuple[float, float] | None:
    new = _metric(candidate, metric)
    way = direction(candidate, metric, lower)
    if champion is None:
        return None
    old = _metric(champion, metric)
    better = new < old if way == "lower" else new > old  # False for a tie and a NaN
    if not better:
        raise TrackingError(
            f"{candidate.name}:{candidate.version} was not promoted, because {way} is better. Got "
            f"{metric} {new:g}; expected better than {old:g} of the champion, version "
            f"{champion.version}. Fix: leave out --metric to promote it anyway"
        )
    return new, old


def _metric(version: Version, metric: str) -> float:
    metrics = {key: float(value) for key, value in version.tags.items() if _is_number(value)}
    if metric not in metrics:
        raise TrackingError(
            f"{version.name}:{version.version} has no metric {metric!r}" + suggest(metric, metrics)
        )
    return metrics[metric]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
