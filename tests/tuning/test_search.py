"""A sweep with real Tune: every trial is a run, the best is registered with its command."""

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import typer
from ray import tune

from bridgework import artifacts
from bridgework.cli import app, sweeps
from bridgework.config import override
from bridgework.errors import RunError, SpecError
from bridgework.system import load
from bridgework.tracking.tracker import MemoryTracker
from bridgework.tuning import search
from bridgework.tuning.choice import ranked
from bridgework.tuning.space import Metric, Space
from bridgework.tuning.space import load as load_space

SPACE = load_space("tests.tuning.tiny")


@dataclass(frozen=True)
class Swept:
    """One sweep, shared by several tests."""

    outcome: search.Outcome
    tracker: MemoryTracker
    home: Path


@pytest.fixture(scope="module")
def swept(home: Path, ray_session: None) -> Swept:
    tracker = MemoryTracker()
    return Swept(search.sweep(SPACE, home=home, run="sweep", tracker=tracker), tracker, home)


def swept_again(swept: Swept, space: Space, run: str) -> None:
    search.sweep(space, home=swept.home, run=run, tracker=swept.tracker)


def values_of(words: list[str], flag: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == flag]


def test_every_trial_finishes_all_its_stages_and_the_best_comes_first(swept: Swept) -> None:
    rows = swept.outcome.rows
    assert [row.status for row in rows] == ["finished"] * 2
    scores = [row.score for row in rows if row.score is not None]
    assert len(scores) == 2
    assert scores == sorted(scores)
    for row in rows:
        assert (
            artifacts.describe(swept.home / "runs/sweep" / row.trial / "instruct/artifact").steps
            == 4
        )


def test_scores_in_the_table_and_in_the_report_have_their_intervals(
    swept: Swept, capsys: pytest.CaptureFixture[str]
) -> None:
    sweeps.show(SPACE, swept.outcome)
    table = " ".join(capsys.readouterr().out.split())
    assert swept.outcome.report is not None
    page = swept.outcome.report.read_text()
    for row in swept.outcome.rows:
        (found,) = swept.outcome.intervals[row.trial]
        assert found is not None and row.score is not None
        assert found.n == 4 and found.low < row.score < found.high
        shown = f"{row.score:.4g} [{found.low:.4g}, {found.high:.4g}]"
        assert shown in table and shown in page


def test_outcome_is_the_last_stage_of_the_best_trial(swept: Swept) -> None:
    best = swept.outcome.rows[0]
    assert swept.outcome.artifact == swept.home / "runs/sweep" / best.trial / "instruct/artifact"
    assert swept.outcome.metrics["heldout.loss"] == pytest.approx(best.score)


def test_command_has_the_recipe_of_the_best_trial(swept: Swept) -> None:
    words = shlex.split(swept.outcome.command)
    assert words[:3] == ["bridgework", "train", "tests.tuning.tiny"]
    assert values_of(words, "--stage") == ["align", "instruct"]
    changes = dict(pair.split("=", 1) for pair in values_of(words, "--set"))
    again = override(load(words[2]), changes)
    assert again.fingerprint() == artifacts.describe(swept.outcome.artifact).fingerprint


def test_the_command_parses(swept: Swept) -> None:
    words = shlex.split(swept.outcome.command)[1:]
    command = typer.main.get_command(app)
    context = command.make_context("bridgework", list(words))
    _, train, rest = command.resolve_command(context, words)
    train.make_context("train", rest, parent=context)


def test_best_trial_is_registered_as_challenger(swept: Swept) -> None:
    version = swept.tracker.version("llava-tiny", "challenger")
    assert version == swept.outcome.version
    assert version.artifact == str(swept.outcome.artifact)
    assert version.tags["command"] == swept.outcome.command
    assert float(version.tags["heldout.loss"]) == pytest.approx(
        swept.outcome.metrics["heldout.loss"], rel=1e-5
    )


def test_trials_are_children_of_the_sweep_with_their_metrics(swept: Swept) -> None:
    runs = {run.name: run for run in swept.tracker.runs.values()}
    for row in swept.outcome.rows:
        trial = runs[f"sweep/{row.trial}"]
        assert swept.tracker.runs[str(trial.parent)] is runs["sweep"]
        assert (trial.status, trial.tags["sweep"]) == ("FINISHED", SPACE.name)
        assert dict(row.changes).items() <= trial.params.items()
        assert [p.step for p in trial.points if p.key == "heldout.loss"] == [
            2,
            4,
        ]  # of the last stage alone


def test_the_same_sweep_is_not_run_again(swept: Swept) -> None:
    again = search.sweep(SPACE, home=swept.home, run="sweep", tracker=swept.tracker)
    assert again == swept.outcome
    assert [v.version for v in swept.tracker.versions["llava-tiny"]] == ["1"]


RATE = "stages.*.optim.peak_lr"


@pytest.mark.parametrize(
    ("space", "differs"),
    [
        (replace(SPACE, budget=replace(SPACE.budget, judgments=2)), "budget"),
        (replace(SPACE, metrics=(Metric(name="heldout.gap", mode="max"),)), "metrics"),
        (replace(SPACE, space={**SPACE.space, RATE: tune.uniform(1e-3, 1e-2)}), "space"),
        (replace(SPACE, space={**SPACE.space, RATE: tune.quniform(1e-3, 1e-2, 1e-3)}), "space"),
        (replace(SPACE, space={**SPACE.space, RATE: tune.loguniform(1e-3, 2e-2)}), "space"),
        (replace(SPACE, stages=("align",)), "stages"),
    ],
)
def test_another_sweep_of_the_same_name_is_rejected(
    swept: Swept, space: Space, differs: str
) -> None:
    runs = len(swept.tracker.runs)
    with pytest.raises(RunError, match=f"holds another sweep: its {differs} differ"):
        swept_again(swept, space, "sweep")
    assert len(swept.tracker.runs) == runs


def test_a_sweep_that_raises_leaves_no_run_open(swept: Swept) -> None:
    """A rate with a loss that is not finite ends every trial, and the sweep's own run FAILED."""
    fails = {RATE: tune.choice([1e30, 2e30])}
    with pytest.raises(RunError, match=r"none of 2 trials finished with a heldout\.loss"):
        swept_again(swept, replace(SPACE, space=fails), "fails")
    ours = [run for run in swept.tracker.runs.values() if run.name.startswith("fails")]
    assert len(ours) == 3
    assert {run.status for run in ours} == {"FAILED"}


def test_a_trial_without_a_score_never_wins() -> None:
    rows = [
        search.TrialRow("a", {}, None, "failed", 1.0),
        search.TrialRow("b", {}, 2.0, "stopped", 1.0),
        search.TrialRow("c", {}, 3.0, "finished", 1.0, (3.0,)),
    ]
    assert [row.trial for row in ranked(rows, SPACE.metrics, "")] == ["c", "b", "a"]


def test_unknown_path_stage_or_metric_is_rejected_before_the_sweep(home: Path) -> None:
    wrong = {
        "no field 'peek_lr'; did you mean 'peak_lr'": replace(
            SPACE, space={"stages.*.optim.peek_lr": tune.uniform(0.1, 1)}
        ),
        "no stage 'alig'; did you mean 'align'": replace(SPACE, stages=("alig",)),
        r"METRIC 'heldout\.los' is not a metric of .* instruct; did you mean 'heldout\.loss'": replace(
            SPACE, metrics=(Metric(name="heldout.los", mode="min"),)
        ),
        r"METRIC 'heldout\.loss_shuffled' is a baseline": replace(
            SPACE, metrics=(Metric(name="heldout.loss_shuffled", mode="min"),)
        ),
        r"mode 'max', and lower heldout\.loss is better": replace(
            SPACE, metrics=(Metric(name="heldout.loss", mode="max"),)
        ),
        "no kind 'mpl'; did you mean 'mlp'": replace(
            SPACE, space={"stages.*.model.bridge": tune.choice(["linear", "mlp", "mpl"])}
        ),
        r"peak_lr must be above 0, finite in float32, got 0": replace(
            SPACE, space={RATE: tune.uniform(0.0, 1.0)}
        ),
        "write a grid as tune.choice": replace(SPACE, space={RATE: tune.grid_search([1e-3, 1e-2])}),
        r"expected tune.choice, uniform": replace(
            SPACE, space={RATE: tune.sample_from(lambda _: 1e-3)}
        ),
        r"write .* a constant into FIXED": replace(SPACE, space={RATE: 1e-3}),
        r"Got .*Float.*xpected tune\.choice": replace(SPACE, space={RATE: tune.randn(0, 1)}),
    }
    for said, space in wrong.items():
        with pytest.raises(SpecError, match=said):
            search.sweep(space, home=home, run="wrong")
    assert not (home / "runs/wrong").exists()
