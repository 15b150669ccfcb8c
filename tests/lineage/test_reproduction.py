"""Reproduction of a recorded model from MLflow alone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from bridgework import api, override
from bridgework.data.dataset import write
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, TrackingError
from bridgework.evaluation import HeldOutLoss
from bridgework.reproduction import read_record, reproduce
from bridgework.system import System, load
from bridgework.training.options import RunOptions


def system(dataset: str) -> System:
    tiny = override(load("llava").tiny(), {"stages.*.budget.steps": 2})
    stages = [
        replace(s, data=s.data.with_sources(lambda source: replace(source, dataset=dataset)))
        for s in tiny.stages
    ]
    return replace(tiny, stages=tuple(stages))


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("BRIDGEWORK_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    about = {"source": "here", "license": "CC0-1.0", "made_by": "test"}
    write(shapes(24, seed=5), str(home / "datasets" / "chats"), **about)
    return home


def test_run_is_trained_again_with_equal_losses_from_mlflow_alone(own_home: Path) -> None:
    api.train(system("chats"), run="first", home=own_home)
    shutil.rmtree(own_home / "runs" / "first")  # MLflow alone
    # Another dataset has the name now, and the recorded one has another name.
    (own_home / "datasets" / "chats").rename(own_home / "datasets" / "kept")
    about = {"source": "here", "license": "CC0-1.0", "made_by": "test"}
    write(shapes(24, seed=6), str(own_home / "datasets" / "chats"), **about)
    record = read_record("first", own_home)
    assert record.missing == () and record.workers == 0
    compared = reproduce(record, home=own_home)
    assert [(c.stage, c.steps, c.exact) for c in compared] == [
        ("align", 2, True),
        ("instruct", 2, True),
    ]


def test_run_that_kept_its_best_step_keeps_it_again(own_home: Path) -> None:
    # No weight changes, so that the first step is the best one.
    still = override(system("chats"), {"stages.align.optim.peak_lr": 1e-30})
    align = replace(still["align"], evals=(HeldOutLoss(dataset="chats", rows=8),))
    kept = replace(still, stages=(align, still["instruct"]))
    options = RunOptions(evaluate_every=1, keep_best="heldout.loss")
    first = api.train(kept, run="first", stages=["align"], home=own_home, options=options)
    assert first["align"].metrics["best_step"] == 1
    record = read_record("first", own_home)
    assert record.options == options
    (compared,) = reproduce(record, run="again", home=own_home)
    assert compared.exact
    again = json.loads((own_home / "runs/again/align/metrics.json").read_text())
    assert again["best_step"] == 1


def test_version_names_its_run_and_a_missing_dataset_is_listed(own_home: Path) -> None:
    api.train(system("chats"), run="first", home=own_home)
    shutil.rmtree(own_home / "datasets" / "chats")
    record = read_record("llava-tiny:1", own_home)
    assert record.run.name == "first"
    assert {d.digest for d in record.missing} == {d.digest for d in record.stages[0].inputs}
    with pytest.raises(DataError, match="not stored here"):
        reproduce(record, home=own_home)


def test_unknown_names_get_a_suggestion(own_home: Path) -> None:
    api.train(system("chats"), run="first", stages=["align"], home=own_home)
    with pytest.raises(TrackingError, match="did you mean 'first'"):
        read_record("frist", own_home)


def test_other_seed_is_not_equal(own_home: Path) -> None:
    api.train(system("chats"), run="first", stages=["align"], home=own_home)
    record = read_record("first", own_home)
    other = override(record.system, {"stages.*.seed": 1})
    (compared,) = reproduce(replace(record, system=other), home=own_home)
    assert not compared.exact and compared.largest > 0
    assert json.dumps(compared.steps) == "2"
