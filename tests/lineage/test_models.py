"""Model registry: names, gated promotion, and rollback."""

from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
import torch

from bridgework import artifacts
from bridgework.errors import TrackingError
from bridgework.evaluation import HeldOutLoss, Ranking
from bridgework.system import EvalSpec, System, load
from bridgework.tracking.registry import CHALLENGER, challenge, is_folder, promote, rollback, split
from bridgework.tracking.tracker import Tracker, Version

METRIC = "ranking.accuracy"
LOSS = "heldout.loss"
RANKING, HELDOUT = Ranking(dataset="synthetic:shapes"), HeldOutLoss(dataset="synthetic:shapes")


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"llava-{request.node.name.replace('[', '-').replace(']', '')}"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


def judged_by(*evals: EvalSpec) -> System:
    """Return LLaVA with these evaluations in its first stage."""
    system = load("llava").tiny()
    return replace(system, stages=(replace(system["align"], evals=evals), *system.stages[1:]))


def register(
    tracker: Tracker,
    name: str,
    weights: Path,
    *figures: float | str,
    metric: str = METRIC,
    evals: tuple[EvalSpec, ...] = (RANKING, HELDOUT),
) -> list[Version]:
    """Register a version for each value, without alias, of weights whose recipe has `evals`."""
    versions = []
    for figure in figures:
        folder = weights / uuid4().hex
        info = artifacts.save(
            folder, {"w": torch.zeros(1)}, system=judged_by(*evals), stage="align"
        )
        run = tracker.start("align")
        model = tracker.output(run, name, str(folder), {"digest": info.digest})
        versions.append(tracker.register(name, model, run, str(folder), {metric: str(figure)}))
    return versions


def champion(tracker: Tracker, name: str) -> str:
    return tracker.version(name, "champion").version


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("llava", ("llava", "champion")),
        ("llava@challenger", ("llava", "challenger")),
        ("llava:3", ("llava", "3")),
    ],
)
def test_model_names_are_split(said: str, meant: tuple[str, str]) -> None:
    assert split(said) == meant


def test_name_with_a_slash_is_a_folder(tmp_path: Path) -> None:
    assert is_folder("runs/monday/align/artifact")
    assert is_folder(str(tmp_path))
    assert not is_folder("runs")  # a folder of that name here must not hide the model
    assert not is_folder("llava@challenger")


def test_the_first_version_needs_no_comparison(tracker: Tracker, name: str, weights: Path) -> None:
    register(tracker, name, weights, 0.5)
    done = promote(tracker, f"{name}:1", metric=METRIC)
    assert (done.champion.version, done.before, done.compared) == ("1", None, None)
    assert champion(tracker, name) == "1"


def test_better_version_becomes_champion_and_the_old_one_previous(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 0.5, 0.7)
    promote(tracker, f"{name}:1")
    tracker.alias(name, "challenger", "2")
    done = promote(tracker, f"{name}@challenger", metric=METRIC)
    assert done.compared == (0.7, 0.5)
    assert champion(tracker, name) == "2"
    assert tracker.version(name, "previous").version == "1"


@pytest.mark.parametrize(
    ("new", "metric"), [(0.4, METRIC), (0.6, LOSS), ("nan", METRIC), ("nan", LOSS)]
)
def test_worse_version_is_rejected_and_no_alias_moves(
    tracker: Tracker, name: str, weights: Path, new: float | str, metric: str
) -> None:
    register(tracker, name, weights, 0.5, new, metric=metric)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"not promoted, .* Fix: leave out --metric"):
        promote(tracker, f"{name}:2", metric=metric)
    assert champion(tracker, name) == "1"
    assert tracker.version(name, "2").aliases == ()


def test_equal_version_is_rejected(tracker: Tracker, name: str, weights: Path) -> None:
    register(tracker, name, weights, 0.5, 0.5)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"was not promoted"):
        promote(tracker, f"{name}:2", metric=METRIC)
    assert champion(tracker, name) == "1"


def test_missing_metric_is_reported_with_the_known_ones(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 0.5, 1.5e-05)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"has no metric 'loss'; known: ranking\.accuracy"):
        promote(tracker, f"{name}:2", metric="loss")


def test_the_champion_promoted_again_stays_and_keeps_its_previous(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 0.5, 0.7)
    promote(tracker, f"{name}:1")
    promote(tracker, f"{name}:2")
    assert promote(tracker, name).champion.version == "2"
    assert tracker.version(name, "previous").version == "1"


def test_rollback_swaps_the_two(tracker: Tracker, name: str, weights: Path) -> None:
    register(tracker, name, weights, 0.5, 0.7)
    promote(tracker, f"{name}:1")
    promote(tracker, f"{name}:2")
    assert rollback(tracker, name).champion.version == "1"
    assert tracker.version(name, "previous").version == "2"
    assert rollback(tracker, name).champion.version == "2"


def test_rollback_without_a_previous_one_says_so(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 0.5)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match="no version or alias 'previous'"):
        rollback(tracker, name)


def test_unknown_model_is_rejected_with_a_suggestion(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 0.5)
    with pytest.raises(TrackingError, match=f"did you mean '{name}'"):
        promote(tracker, name[:-1])


def test_a_lower_loss_is_promoted_and_a_higher_one_is_not(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 2.0, 1.5, 1.8, metric=LOSS)
    promote(tracker, f"{name}:1")
    assert promote(tracker, f"{name}:2", metric=LOSS).compared == (1.5, 2.0)
    with pytest.raises(
        TrackingError, match=r"not promoted, because lower is better\. Got heldout\.loss 1\.8"
    ):
        promote(tracker, f"{name}:3", metric=LOSS)


def test_direction_against_the_evaluation_is_rejected(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 2.0, 1.5, metric=LOSS)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"heldout\.loss: lower is better\. Got --higher"):
        promote(tracker, f"{name}:2", metric=LOSS, lower=False)


def test_metric_without_evaluation_needs_a_direction(
    tracker: Tracker, name: str, weights: Path
) -> None:
    register(tracker, name, weights, 20.0, 15.0, metric="latency_ms")
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match="give --lower or --higher"):
        promote(tracker, f"{name}:2", metric="latency_ms")
    assert promote(tracker, f"{name}:2", metric="latency_ms", lower=True).compared == (15.0, 20.0)


def test_baseline_cannot_decide_a_promotion(tracker: Tracker, name: str, weights: Path) -> None:
    register(tracker, name, weights, 0.05, 0.06, metric="ranking.chance")
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match="is a baseline, so it cannot decide a promotion"):
        promote(tracker, f"{name}:2", metric="ranking.chance")


@pytest.mark.parametrize(("metric", "better", "worse"), [(METRIC, 0.7, 0.6), (LOSS, 1.5, 1.6)])
def test_the_challenger_is_only_replaced_by_a_better_one(
    tracker: Tracker, name: str, weights: Path, metric: str, better: float, worse: float
) -> None:
    first, second, third = register(tracker, name, weights, worse, better, worse, metric=metric)
    assert challenge(tracker, first, metric)[0].version == "1"
    assert challenge(tracker, second, metric)[0].version == "2"
    held, why = challenge(tracker, third, metric)
    assert (held.version, tracker.version(name, CHALLENGER).version) == ("2", "2")
    assert f"challenger stays {name}:2: its {metric} is {better:g}" in why


def test_metrics_of_other_evaluations_do_not_replace_the_challenger(
    tracker: Tracker, name: str, weights: Path
) -> None:
    (first,) = register(tracker, name, weights, 0.5)
    (second,) = register(tracker, name, weights, 0.9, evals=(replace(RANKING, candidates=2),))
    challenge(tracker, first, METRIC)
    held, why = challenge(tracker, second, METRIC)
    assert held.version == "1"
    assert "not from the same evaluation" in why
