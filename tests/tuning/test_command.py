"""The commands of sweeps, reports and mixtures: their arguments, errors and tables."""

from typing import Any

import pytest

from bridgework.cli import main
from bridgework.cli.sweeps import _trials, shortened
from bridgework.errors import SpecError
from bridgework.evaluation.statistics import Interval
from bridgework.tuning.compare import score_cells
from bridgework.tuning.study import TrialRow


def refused(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """Run a command that is refused; returns its error, which is one line."""
    monkeypatch.setattr("sys.argv", ["bridgework", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error") and "\n" not in error
    return error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "tiny_bridg"], "did you mean 'tiny_bridge'?"),
        (["sweep", "tiny_bridge", "--trials", "-3"], "--trials: invalid number. Got '-3'"),
        (["sweep", "tiny_bridge", "--trials", "+"], "expected e.g. 8, or +8 for more"),
        (["sweep", "tiny_bridge", "--set", "stages.algn.budget.steps=3"], "did you mean 'align'"),
        (
            ["sweep", "tiny_bridge", "--set", "stages.*.optim.peak_lr=1e-3"],
            "searched and fixed at the same time",
        ),
        (["sweep", "tiny_bridge", "--prefer", "tokens"], "'tokens' is not an objective"),
        (["sweep", "tiny_bridge", "--run", "../x"], "leave out '..'"),
        (["report", "no-such-sweep"], "there is no sweep 'no-such-sweep'"),
        (["mixture", "search", "llava"], "expected SYSTEM/STAGE, got 'llava'"),
        (["mixture", "search", "llava/align", "--tiny"], "has no evaluation, so mixtures cannot"),
        (["mixture", "search", "llava/algn", "--tiny"], "did you mean 'align'"),
        (["train", "llava", "--tiny", "--features", "cache"], "did you mean 'cached'"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert said in " ".join(refused(words, monkeypatch, capsys).split())


def test_columns_are_the_shortest_ends_that_differ() -> None:
    paths = [
        "stages.*.model.bridge",
        "stages.warm.optim.peak_lr",
        "stages.align.optim.peak_lr",
        "stages.*.data.alpha",
    ]
    assert shortened(paths) == ["bridge", "warm.optim.peak_lr", "align.optim.peak_lr", "alpha"]
    assert shortened(["a.b"]) == ["b"]


@pytest.mark.parametrize(
    ("row", "cells"),
    [
        (
            TrialRow("t0", {}, 0.5, "finished", 1.0, (0.5, 3.0)),
            ["0.5 [0.4, 0.6]", "3"],
        ),
        (TrialRow("t1", {}, 0.25, "stopped", 1.0), ["0.25", "-"]),
        (TrialRow("t2", {}, None, "failed", 1.0), ["-", "-"]),
    ],
)
def test_a_score_has_its_interval_where_there_is_one(row: TrialRow, cells: list[str]) -> None:
    found = (Interval(0.5, 0.4, 0.6, 30, 30), None) if row.finished else (None, None)
    assert score_cells(row, found) == cells


def test_a_plus_means_more_trials() -> None:
    assert [_trials(text) for text in (None, "8", "+8")] == [(None, 0), (8, 0), (None, 8)]
    with pytest.raises(SpecError):
        _trials("0")
