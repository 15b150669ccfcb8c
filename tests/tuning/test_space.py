"""Search spaces, and their errors before a sweep runs."""

import pytest

from bridgework.errors import SpecError
from bridgework.system import load as load_system
from bridgework.tuning.space import Metric, SweepBudget, load, spaces, with_trials


def test_shipped_spaces_load_and_match_their_systems() -> None:
    assert "llava_bridge" in spaces()
    for name in spaces():
        space = load(name)
        system = load_system(space.system)
        figures = {f"{e.name}.{key}" for e in system[space.stages[-1]].evals for key in e.better}
        assert space.metric.name in figures


def test_unknown_space_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match=r"no sweep 'llava_bridg'.*did you mean 'llava_bridge'"):
        load("llava_bridg")


def test_unknown_user_module_is_rejected() -> None:
    with pytest.raises(SpecError, match=r"no sweep 'tests\.tuning\.nothing'"):
        load("tests.tuning.nothing")


def test_missing_names_are_reported_with_an_example() -> None:
    with pytest.raises(
        SpecError,
        match=r"does not define SPACE, METRIC, BUDGET\. Fix: see tune_spaces/llava_bridge\.py",
    ):
        load("tests.tuning.bare")


@pytest.mark.parametrize("field", ["trials", "concurrent", "judgments"])
def test_zero_budget_is_rejected(field: str) -> None:
    with pytest.raises(SpecError, match=f"{field} of at least 1, got 0"):
        SweepBudget(**{field: 0})


def test_limited_space_differs_only_in_its_trials() -> None:
    space = load("tests.tuning.tiny")
    assert with_trials(space, trials=None) is space
    assert with_trials(space, trials=7).budget.trials == 7
    assert (
        with_trials(space, trials=7).metric
        == space.metric
        == Metric(name="heldout.loss", mode="min")
    )
