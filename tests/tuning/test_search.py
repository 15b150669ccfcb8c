"""A sweep through real Tune: every trial is a run, the best is registered, its command makes it again."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from ray import tune

from bridgework.cli import app
from bridgework.errors import RunError, SpecError
from bridgework.spec import override
from bridgework.system import load
from bridgework.tracking import MemoryTracker
from bridgework.training import artefact
from bridgework.tuning import search
from bridgework.tuning.space import Metric
from bridgework.tuning.space import load as load_space

SPACE = load_space("tests.tuning.tiny")


@dataclass(frozen=True)
class Swept:
    """One sweep, of which several truths are told."""

    outcome: search.Outcome
    tracker: MemoryTracker
    home: Path


@pytest.fixture(scope="module")
def swept(home: Path, ray_session: None) -> Swept:
    tracker = MemoryTracker()
    return Swept(search.sweep(SPACE, home=home, run="sweep", tracker=tracker), tracker, home)


def told(words: list[str], flag: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def test_every_trial_finishes_all_its_stages_and_the_best_comes_first(swept: Swept) -> None:
    rows = swept.outcome.rows
    assert [row.status for row in rows] == ["finished"] * 2
    scores = [row.score for row in rows if row.score is not None]
    assert len(scores) == 2
    assert scores == sorted(scores)
    for row in rows:
        assert artefact.describe(swept.home / "runs/sweep" / row.trial / "instruct/artefact").steps == 4


def test_the_winner_is_the_last_stage_of_the_best_trial(swept: Swept) -> None:
    best = swept.outcome.rows[0]
    assert swept.outcome.artefact == swept.home / "runs/sweep" / best.trial / "instruct/artefact"
    assert swept.outcome.metrics["heldout.loss"] == pytest.approx(best.score)


def test_the_command_makes_the_winners_recipe_again(swept: Swept) -> None:
    words = shlex.split(swept.outcome.command)
    assert words[:3] == ["bridgework", "train", "tests.tuning.tiny"]
    assert told(words, "--stage") == ["align", "instruct"]
    changes = dict(pair.split("=", 1) for pair in told(words, "--set"))
    again = override(load(words[2]), changes)
    assert again.fingerprint() == artefact.describe(swept.outcome.artefact).fingerprint


def test_the_command_parses(swept: Swept) -> None:
    words = shlex.split(swept.outcome.command)[1:]
    command = typer.main.get_command(app)
    context = command.make_context("bridgework", list(words))
    _, train, rest = command.resolve_command(context, words)
    train.make_context("train", rest, parent=context)


def test_the_winner_is_registered_as_challenger(swept: Swept) -> None:
    version = swept.tracker.version("llava", "challenger")
    assert version == swept.outcome.version
    assert version.artefact == str(swept.outcome.artefact)
    assert version.tags["command"] == swept.outcome.command
    assert float(version.tags["heldout.loss"]) == pytest.approx(swept.outcome.metrics["heldout.loss"], rel=1e-5)


def test_trials_are_children_of_the_sweep_with_their_figures(swept: Swept) -> None:
    runs = {run.name: run for run in swept.tracker.runs.values()}
    for row in swept.outcome.rows:
        trial = runs[f"sweep/{row.trial}"]
        assert swept.tracker.runs[str(trial.parent)] is runs["sweep"]
        assert (trial.status, trial.tags["sweep"]) == ("FINISHED", SPACE.name)
        assert dict(row.changes).items() <= trial.params.items()
        assert [p.step for p in trial.points if p.key == "heldout.loss"] == [2, 4]  # of the last stage alone


def test_the_same_sweep_is_not_run_again(swept: Swept) -> None:
    again = search.sweep(SPACE, home=swept.home, run="sweep", tracker=swept.tracker)
    assert again == swept.outcome
    assert [v.version for v in swept.tracker.versions["llava"]] == ["1"]


def test_another_sweep_of_that_name_is_refused(swept: Swept) -> None:
    with pytest.raises(RunError, match="holds another sweep"):
        search.sweep(search.limited(SPACE, trials=3), home=swept.home, run="sweep")


def test_a_path_a_stage_or_a_metric_that_is_not_there_is_refused_at_once(home: Path) -> None:
    wrong = {
        "no field 'peek_lr'; did you mean 'peak_lr'": replace(
            SPACE, space={"stages.*.optim.peek_lr": tune.uniform(0.1, 1)}
        ),
        "no stage 'alig'; did you mean 'align'": replace(SPACE, stages=("alig",)),
        r"no evaluation that gives 'ranking\.accuracy'; its evaluations: heldout": replace(
            SPACE, metric=Metric(name="ranking.accuracy", mode="max")
        ),
    }
    for said, space in wrong.items():
        with pytest.raises(SpecError, match=said):
            search.sweep(space, home=home, run="wrong")
    assert not (home / "runs/wrong").exists()
