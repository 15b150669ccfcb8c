"""Models by the words that people use, and who is champion.

`llava` is the champion, `llava@challenger` an alias, `llava:3` a version; what has a slash is an artifact's folder.
Promotion is gated: a version takes the alias `champion` only if its figure is better than the champion's. Which way is
better is declared by the evaluation that gave the figure, in the recipe that lies with the weights.
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
        raise TrackingError(
            f"{result.artifact} was trained untracked; run its command again while the tracker answers"
        )
    digest = artifacts.describe(result.artifact).digest
    for version in tracker.registered(result.run_id):
        if version.tags.get("digest") == digest:
            return version
    figures = {key: f"{value:.6g}" for key, value in result.metrics.items() if "." in key}
    return tracker.register(
        name,
        result.model_id,
        result.run_id,
        str(result.artifact),
        {**figures, **tags, "digest": digest},
    )


@dataclass(frozen=True)
class Promotion:
    """What a promotion did: the new champion, the one before, and the two figures that were compared."""

    champion: Version
    before: Version | None
    compared: tuple[float, float] | None  # (candidate's, champion's)


def promote(
    tracker: Tracker, model: str, *, metric: str | None = None, lower: bool | None = None
) -> Promotion:
    """Make a version the champion; the old one keeps the alias `previous`.

    With `metric` (a tag of registered versions, e.g. ranking.accuracy) raises TrackingError when the candidate lacks it
    or is not better than the champion. The evaluation declares which way is better; `lower` decides only for a figure
    that no evaluation of the candidate's recipe gives.
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

    Returns the holder of the alias afterwards, and the reason why it did not move (empty if it did). Figures compare
    only if the same evaluation gave both: the same kind, dataset, rows and settings.
    """
    holder = _holder(tracker, candidate.name, CHALLENGER)
    if holder is not None and holder.version == candidate.version:
        return holder, ""
    if holder is not None and (reason := _not_better(candidate, holder, metric)):
        return holder, f"{CHALLENGER} stays {holder.name}:{holder.version}: {reason}"
    tracker.alias(candidate.name, CHALLENGER, candidate.version)
    return tracker.version(candidate.name, CHALLENGER), ""


def _not_better(candidate: Version, holder: Version, metric: str) -> str:
    """The reason why `candidate` is not better than `holder`; empty if it is."""
    judged, other = _evaluation(candidate, metric), _evaluation(holder, metric)
    if judged is None or judged != other:
        return (
            f"{metric} of the two was not given by the same evaluation; judge both with `bridgework eval`, "
            f"then `bridgework promote {candidate.name}:{candidate.version}`"
        )
    new, old = _figure(candidate, metric), _figure(holder, metric)
    better = new < old if direction(candidate, metric, None) == "lower" else new > old
    return (
        ""
        if better or (isnan(old) and not isnan(new))
        else f"its {metric} is {old:g}, the new one's {new:g}"
    )


def direction(version: Version, metric: str, lower: bool | None) -> Direction:
    """Return which way `metric` of `version` is better, as the evaluation in its recipe declares.

    Raises TrackingError for a baseline such as ranking.chance, where `lower` contradicts the evaluation, and where
    no evaluation of the recipe gives the figure and `lower` is None.
    """
    evaluation = _evaluation(version, metric)
    if evaluation is None:
        if lower is None:
            raise TrackingError(
                f"{version.name}:{version.version}: no evaluation of its recipe gives {metric!r}, so which way is "
                "better is not known. Fix: say --lower or --higher"
            )
        return "lower" if lower else "higher"
    declared = evaluation.better[metric.removeprefix(f"{evaluation.name}.")]
    if declared is None:
        decisive = [
            f"{evaluation.name}.{key}" for key, way in evaluation.better.items() if way is not None
        ]
        raise TrackingError(
            f"{metric} is a baseline and decides nothing" + suggest(metric, decisive)
        )
    if lower is not None and lower is not (declared == "lower"):
        raise TrackingError(
            f"{metric}: {declared} is better. Got --{'lower' if lower else 'higher'}. Fix: leave it out"
        )
    return declared


def _evaluation(version: Version, metric: str) -> EvalSpec | None:
    """The evaluation that gave the figure, of the recipe next to the weights; None without one."""
    try:
        stage = artifacts.recipe(version.artifact)[artifacts.describe(version.artifact).stage]
    except WeightsError:
        return None
    return next((e for e in stage.evals if metric in {f"{e.name}.{key}" for key in e.better}), None)


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


def _compared(
    candidate: Version, champion: Version | None, metric: str, lower: bool | None
) -> tuple[float, float] | None:
    new = _figure(candidate, metric)
    way = direction(candidate, metric, lower)
    if champion is None:
        return None
    old = _figure(champion, metric)
    if not (
        new < old if way == "lower" else new > old
    ):  # so that a tie changes nothing, and a NaN is refused
        raise TrackingError(
            f"{candidate.name}:{candidate.version} has {metric} {new:g}, the champion, version {champion.version}, "
            f"{old:g}, and {way} is better: not promoted; leave out --metric to promote it all the same"
        )
    return new, old


def _figure(version: Version, metric: str) -> float:
    figures = {key: float(value) for key, value in version.tags.items() if _is_number(value)}
    if metric not in figures:
        raise TrackingError(
            f"{version.name}:{version.version} carries no figure {metric!r}"
            + suggest(metric, figures)
        )
    return figures[metric]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
