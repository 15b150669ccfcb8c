"""The winner of several objectives: the Pareto front, and rules."""

import pytest

from bridgework.errors import SpecError
from bridgework.tuning.choice import Rule, front, ranked
from bridgework.tuning.space import Metric
from bridgework.tuning.study import TrialRow

QUALITY, TOKENS = (
    Metric(name="ranking.accuracy", mode="max"),
    Metric(name="cost.tokens", mode="min"),
)
METRICS = (QUALITY, TOKENS)


def row(name: str, *scores: float, status: str = "finished") -> TrialRow:
    return TrialRow(name, {}, scores[0] if scores else None, status, 1.0, scores)


ROWS = [
    row("best", 0.90, 64.0),
    row("near", 0.895, 16.0),
    row("worse", 0.89, 32.0),
    row("cheap", 0.5, 4.0),
    row("failed", status="failed"),
    TrialRow("stopped", {}, 0.99, "stopped", 1.0),
]


def first(prefer: str) -> str:
    return ranked(ROWS, METRICS, prefer)[0].trial


def test_front_holds_the_trials_that_none_surpasses() -> None:
    assert [r.trial for r in front(ROWS, METRICS)] == ["best", "near", "cheap"]


@pytest.mark.parametrize(
    ("prefer", "winner"),
    [
        ("", "best"),
        ("quality >= best - 0.01, then tokens", "near"),
        ("ranking.accuracy >= best - 1%, then cost.tokens", "near"),
        ("quality >= best, then tokens", "best"),
        ("tokens", "cheap"),
        ("cost.tokens <= best + 30, then quality", "near"),
    ],
)
def test_a_rule_chooses_the_winner(prefer: str, winner: str) -> None:
    assert first(prefer) == winner


def test_a_stopped_or_failed_trial_never_wins() -> None:
    names = [r.trial for r in ranked(ROWS, METRICS, "")]
    assert names[-2:] == ["stopped", "failed"]


@pytest.mark.parametrize(
    ("prefer", "said"),
    [
        ("quality > best", r"cannot read 'quality > best'\. Fix: write it like"),
        ("qualty >= best, then tokens", "'qualty' is not an objective.*did you mean 'quality'"),
        ("quality <= best + 0.1", "wrong direction, because higher ranking.accuracy is better"),
        ("tokens <= best + 1e, then quality", "'1e' is not a number"),
    ],
)
def test_a_rule_that_cannot_be_read_is_refused(prefer: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Rule.parse(prefer, METRICS)
