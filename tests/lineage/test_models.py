"""Who is champion: names that people use, promotion behind a gate, and the way back."""

from pathlib import Path

import pytest

from bridgework.errors import TrackingError
from bridgework.lineage.models import is_folder, promote, rollback, split
from bridgework.tracking import Tracker

METRIC = "ranking.accuracy"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return f"llava-{request.node.name.replace('[', '-').replace(']', '')}"


def register(tracker: Tracker, name: str, *figures: float | str) -> None:
    """A version for each figure, without alias."""
    for i, figure in enumerate(figures):
        run = tracker.start("align")
        model = tracker.output(run, name, f"/runs/{i}", {"digest": str(i)})
        tracker.register(name, model, run, f"/runs/{i}", {METRIC: str(figure)})


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
def test_a_model_is_named_as_people_say_it(said: str, meant: tuple[str, str]) -> None:
    assert split(said) == meant


def test_what_has_a_slash_is_a_folder(tmp_path: Path) -> None:
    assert is_folder("runs/monday/align/artefact")
    assert is_folder(str(tmp_path))
    assert not is_folder("runs")  # a folder of that name here must not hide the model
    assert not is_folder("llava@challenger")


def test_the_first_version_needs_no_comparison(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5)
    done = promote(tracker, f"{name}:1", metric=METRIC)
    assert (done.champion.version, done.before, done.compared) == ("1", None, None)
    assert champion(tracker, name) == "1"


def test_a_better_one_takes_the_place_and_the_old_one_is_remembered(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5, 0.7)
    promote(tracker, f"{name}:1")
    tracker.alias(name, "challenger", "2")
    done = promote(tracker, f"{name}@challenger", metric=METRIC)
    assert done.compared == (0.7, 0.5)
    assert champion(tracker, name) == "2"
    assert tracker.version(name, "previous").version == "1"


@pytest.mark.parametrize(("new", "lower"), [(0.4, False), (0.6, True), ("nan", False), ("nan", True)])
def test_a_worse_one_is_refused_and_nothing_moves(tracker: Tracker, name: str, new: float | str, lower: bool) -> None:
    register(tracker, name, 0.5, new)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"not promoted; leave out --metric"):
        promote(tracker, f"{name}:2", metric=METRIC, lower=lower)
    assert champion(tracker, name) == "1"
    assert tracker.version(name, "2").aliases == ()


def test_an_equal_one_changes_nothing(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5, 0.5)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"not promoted"):
        promote(tracker, f"{name}:2", metric=METRIC)
    assert champion(tracker, name) == "1"


def test_a_figure_that_is_missing_is_named_with_those_there_are(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5, 1.5e-05)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match=r"carries no figure 'loss'; it has: ranking\.accuracy"):
        promote(tracker, f"{name}:2", metric="loss")


def test_the_champion_promoted_again_stays_and_keeps_its_previous(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5, 0.7)
    promote(tracker, f"{name}:1")
    promote(tracker, f"{name}:2")
    assert promote(tracker, name).champion.version == "2"
    assert tracker.version(name, "previous").version == "1"


def test_rollback_swaps_the_two(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5, 0.7)
    promote(tracker, f"{name}:1")
    promote(tracker, f"{name}:2")
    assert rollback(tracker, name).champion.version == "1"
    assert tracker.version(name, "previous").version == "2"
    assert rollback(tracker, name).champion.version == "2"


def test_rollback_without_a_previous_one_says_so(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5)
    promote(tracker, f"{name}:1")
    with pytest.raises(TrackingError, match="no version or alias 'previous'"):
        rollback(tracker, name)


def test_unknown_model_is_refused_with_a_suggestion(tracker: Tracker, name: str) -> None:
    register(tracker, name, 0.5)
    with pytest.raises(TrackingError, match=f"did you mean '{name}'"):
        promote(tracker, name[:-1])
