"""The commands of sweeps, reports and mixtures: their arguments, errors and tables."""

from typing import Any

import pytest

from bridgework.cli import main
from bridgework.cli.sweeps import _trials, shortened
from bridgework.errors import SpecError


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


def test_a_plus_means_more_trials() -> None:
    assert [_trials(text) for text in (None, "8", "+8")] == [(None, 0), (8, 0), (None, 8)]
    with pytest.raises(SpecError):
        _trials("0")
