"""Identity of a run: options may change; any other change needs a recorded fork."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bridgework import artifacts
from bridgework.config import override
from bridgework.data.dataset import write
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, Paused, RunError, SpecError
from bridgework.evaluation import HeldOutLoss
from bridgework.system import System
from bridgework.tracking.tracker import MemoryTracker
from bridgework.training import checkpoint, run_dir
from bridgework.training.driver import train
from bridgework.training.fork import Fork
from bridgework.training.options import RunOptions
from tests.training.support import Stop, go, llava, losses, same, stop_at, weights
from tests.training.test_checkpoint import unsigned
from tests.training.test_elastic import engine

LR = {"stages__align__optim__peak_lr": 1e-3}


def stopped(system: System, home: Path, run: str, at: int = 5, **how: Any) -> None:
    """Train a run that ends after `at` steps, with a checkpoint every second step."""
    with pytest.raises(Stop):
        go(system, home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(at), **how)


def steps(home: Path, run: str, stage: str = "align") -> list[int]:
    return [step for step, _ in losses(home, run, stage)]


# --- options ---------------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "micro": {"stages__align__budget__micro": 2},
    "max_bad": {"stages__align__data__max_bad": 0.5},
    "rows of the paper": {"stages__align__data__sources__blip558k__rows": 7},
    "evaluations": {
        "stages__align__evals": (HeldOutLoss(name="later", dataset="synthetic:shapes", rows=4),)
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_may_change_between_attempts(home: Path, run: str, option: str) -> None:
    tracker = MemoryTracker()
    go(llava(7), home, f"{run}-complete")
    stopped(llava(7), home, run, tracker=tracker)
    changed = llava(7, **OPTIONS[option])
    assert (
        changed.fingerprint() != llava(7).fingerprint()
        and changed.identity() == llava(7).identity()
    )
    found = go(changed, home, run, tracker=tracker)["align"]
    assert steps(home, run) == [0, 1, 2, 3, 4, 4, 5, 6]
    assert dict(losses(home, run)) == pytest.approx(dict(losses(home, f"{run}-complete")), rel=1e-5)
    assert run_dir.recipe(home, run) == changed
    history = json.loads((home / "runs" / run / "recipes.json").read_text())
    assert [entry["fingerprint"] for entry in history] == [
        llava(7).fingerprint(),
        changed.fingerprint(),
    ]
    assert len(history[1]["changed"]) == 1
    if option == "evaluations":
        assert "later.loss" in found.metrics
    if option == "micro":
        stage = next(each for each in tracker.runs.values() if each.name == "align")
        assert (stage.params["budget.micro"], stage.tags["now.budget.micro"]) == (8, "2")


def test_fix_for_too_many_bad_samples_works(home: Path, run: str, tmp_path: Path) -> None:
    samples = [
        replace(each, images=(b"no image",)) if i % 4 == 3 else each
        for i, each in enumerate(shapes(32, 16))
    ]
    write(
        samples,
        str(tmp_path / "data"),
        source="test",
        license="CC0-1.0",
        made_by="tests",
        group_rows=8,
    )
    system = llava(4, stages__align__data__sources__blip558k__dataset=str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"are bad .*raise max_bad"):
        go(system, home, run)
    go(override(system, {"stages.align.data.max_bad": 0.5}), home, run)
    assert steps(home, run) == [0, 1, 2, 3]


def test_a_run_of_an_older_version_resumes(tmp_path: Path) -> None:
    """Its checkpoints have no signature, its folder no history, its recipe not all current fields."""
    stopped(llava(7), tmp_path, "old")
    folder = tmp_path / "runs" / "old"
    for found in checkpoint.checkpoints(folder / "align"):
        unsigned(found.folder)
    (tmp_path / "checkpoint.key").unlink()
    (folder / "recipes.json").unlink()
    go(llava(7, stages__align__budget__micro=4), tmp_path, "old", checkpoint_every=2)
    assert steps(tmp_path, "old") == [0, 1, 2, 3, 4, 4, 5, 6]


CONSTANT = {"stages__align__optim__decay": "constant", "stages__align__optim__warmup": 0.0}


@pytest.mark.parametrize("more", [5, 24])
def test_steps_may_change_if_past_steps_are_the_same(home: Path, run: str, more: int) -> None:
    """The rate is constant, and both lengths have the same windows of the order."""
    stopped(llava(12, **CONSTANT), home, run)
    go(llava(more, **CONSTANT), home, run, checkpoint_every=2)
    assert steps(home, run) == [0, 1, 2, 3, 4, *range(4, more)]
    go(llava(more, **CONSTANT), home, f"{run}-complete")
    assert same(weights(home, run), weights(home, f"{run}-complete"))


@pytest.mark.parametrize(
    ("changes", "before", "now"),
    [({}, 12, 24), (CONSTANT, 4, 24), (CONSTANT, 12, 4), (CONSTANT, 12, 3)],
)
def test_steps_may_not_change_if_rates_or_order_would(
    home: Path, run: str, changes: dict[str, Any], before: int, now: int
) -> None:
    """A cosine and the last window depend on the number of steps, and steps cannot be undone."""
    stopped(llava(before, **changes), home, run, at=min(5, before - 1))
    with pytest.raises(
        RunError, match=rf"stages\.align\.budget\.steps was {before}, is {now}.*--fork {run}"
    ):
        go(llava(now, **changes), home, run, checkpoint_every=2)


# --- forks -----------------------------------------------------------------------------------------------------------


def test_changed_identity_is_rejected_by_its_path_and_forked_as_the_error_says(
    home: Path, run: str
) -> None:
    tracker = MemoryTracker()
    stopped(llava(7), home, run, tracker=tracker)
    before = checkpoint.checkpoints(home / "runs" / run / "align")
    with pytest.raises(
        RunError, match=rf"stages\.align\.optim\.peak_lr was 0\.003, is 0\.001.*--fork {run}"
    ):
        go(llava(7, **LR), home, run)
    found = go(llava(7, **LR), home, f"{run}-2", tracker=tracker, fork=run, checkpoint_every=2)
    assert steps(home, f"{run}-2") == [4, 5, 6]
    assert dict(losses(home, f"{run}-2"))[4] == dict(losses(home, run))[4]  # of the same weights
    assert losses(home, f"{run}-2", key="lr")[0][1] == pytest.approx(
        losses(home, run, key="lr")[4][1] / 3
    )
    assert checkpoint.checkpoints(home / "runs" / run / "align") == before
    assert artifacts.describe(found["align"].artifact).fingerprint == llava(7, **LR).fingerprint()
    made = Fork.read(home / "runs" / f"{run}-2")
    assert made is not None
    assert (made.run, made.stage, made.step, made.fingerprint) == (
        run,
        "align",
        4,
        llava(7).fingerprint(),
    )
    assert made.changed == ("stages.align.optim.peak_lr was 0.003, is 0.001",)
    forked = [each for each in tracker.runs.values() if "forked_from" in each.tags]
    assert {each.name for each in forked} == {f"{run}-2", "align"}
    assert all(each.tags["forked_from"] == f"{run}/align@4" for each in forked)


def test_a_fork_is_resumed_by_the_same_command(home: Path, run: str) -> None:
    stopped(llava(9), home, run)
    stopped(llava(9, **LR), home, f"{run}-2", at=7, fork=run)
    go(llava(9, **LR), home, f"{run}-2", fork=run, checkpoint_every=2)
    assert steps(home, f"{run}-2") == [4, 5, 6, 6, 7, 8]
    go(llava(9, **LR), home, f"{run}-2", checkpoint_every=2)


CHANGES: dict[str, dict[str, Any]] = {
    "seed": {"stages__align__seed": 7},
    "batch": {"stages__align__budget__batch": 16},
    "steps": {"stages__align__budget__steps": 12},
    "data": {"stages__align__data__sources__blip558k__factor": 2.0},
    "betas": {"stages__align__optim__betas": (0.5, 0.6)},
    "a later stage": {"stages__instruct__optim__peak_lr": 1e-3},
}


@pytest.mark.parametrize("what", CHANGES)
def test_any_change_of_the_training_result_can_be_forked(home: Path, run: str, what: str) -> None:
    stopped(llava(7), home, run)
    changed = llava(7, **CHANGES[what])
    with pytest.raises(RunError, match="exists with another recipe"):
        go(changed, home, run)
    go(changed, home, f"{run}-2", fork=run)
    assert steps(home, f"{run}-2")[0] == 4


def test_fork_from_an_older_checkpoint(home: Path, run: str) -> None:
    stopped(llava(7), home, run)
    go(llava(7, **LR), home, f"{run}-2", fork=f"{run}@2")
    assert steps(home, f"{run}-2") == [2, 3, 4, 5, 6]


def test_a_run_that_stops_at_a_step_resumes_and_is_forked_there(home: Path, run: str) -> None:
    go(llava(7), home, f"{run}-complete")
    with pytest.raises(Paused, match="align: stopped at step 3, as requested; a checkpoint"):
        go(llava(7), home, run, until=3)
    assert steps(home, run) == [0, 1, 2]
    with pytest.raises(Paused, match="stopped at step 3"):
        go(llava(7), home, run, until=3)
    assert steps(home, run) == [0, 1, 2], "it has stopped already"
    go(llava(7, **LR), home, f"{run}-fork", fork=f"{run}@3")
    assert steps(home, f"{run}-fork") == [3, 4, 5, 6]
    go(llava(7), home, run)
    assert losses(home, run) == losses(home, f"{run}-complete")
    assert same(weights(home, run), weights(home, f"{run}-complete"))
    with pytest.raises(
        SpecError, match=r"--until: stage align ends before it\. Got 7; expected less"
    ):
        go(llava(7), home, f"{run}-late", until=7)


def test_only_the_last_of_the_stages_stops_at_the_step(home: Path, run: str) -> None:
    with pytest.raises(Paused, match="instruct: stopped at step 2"):
        go(llava(4), home, run, stages=("align", "instruct"), until=2)
    assert steps(home, run) == [0, 1, 2, 3]
    assert steps(home, run, "instruct") == [0, 1]


def test_unchanged_finished_stages_are_copied(home: Path, run: str) -> None:
    system = llava(6)
    first = go(system, home, run)["align"]
    stopped(system, home, run, stages=["instruct"])
    changed = llava(6, stages__instruct__optim__peak_lr=1e-4)
    found = go(changed, home, f"{run}-2", stages=None, fork=run)
    assert steps(home, f"{run}-2") == []
    assert steps(home, f"{run}-2", "instruct") == [4, 5]
    assert same(weights(home, f"{run}-2"), weights(home, run))
    assert found["align"].metrics == first.metrics


def test_fork_of_one_stage_needs_no_other_stage(home: Path, run: str) -> None:
    """The second stage of a run started from another run's artifact."""
    parent = go(llava(2), home, f"{run}-parent")["align"].artifact
    system = llava(6, stages__instruct__starts_from=str(parent))
    stopped(system, home, run, stages=["instruct"])
    changed = override(system, {"stages.instruct.seed": 5})
    go(changed, home, f"{run}-2", stages=["instruct"], fork=run)
    assert steps(home, f"{run}-2", "instruct") == [4, 5]


def test_evaluation_added_after_the_end_is_reported(home: Path, run: str) -> None:
    go(llava(2), home, run)
    console = Console(record=True, width=300)
    later = llava(2, **OPTIONS["evaluations"])
    train(
        later, home=home, run=run, options=RunOptions(workers=0), stages=["align"], console=console
    )
    assert "align: later was not evaluated; `bridgework eval` does it" in console.export_text()


REFUSED: dict[str, tuple[Callable[[str], dict[str, Any]], str, str]] = {
    "nothing": (
        lambda run: {},
        "{run}",
        r"the recipe is that of run '.*'\. Fix: resume it with --run",
    ),
    "an option": (
        lambda run: {"stages__align__budget__micro": 2},
        "{run}",
        "the recipe is that of run",
    ),
    "what trains": (
        lambda run: {"stages__align__trains": {"language.*": 1.0}},
        "{run}",
        r"stages\.align\.trains.* was 1\.0, is None.*expected the same model, trains, zero",
    ),
    "weight decay": (
        lambda run: {"stages__align__optim__weight_decay": 0.1},
        "{run}",
        r"weight_decay was 0\.0, is 0\.1.*a weight decay that is 0 in both or in neither",
    ),
    "the model": (
        lambda run: {"stages__align__model__bridge": "linear"},
        "{run}",
        r"stages\.align\.model\.bridge",
    ),
    "ZeRO": (
        lambda run: {"stages__align__zero__stage": 3},
        "{run}",
        r"stages\.align\.zero\.stage was 2, is 3",
    ),
    "too few steps": (
        lambda run: {"stages__align__budget__steps": 4},
        "{run}",
        r"budget\.steps is too small\. Got 4; expected more than .* 4",
    ),
    "a step": (
        lambda run: LR,
        "{run}@3",
        r"has no checkpoint of step 3 of stage 'align'\. Got 3; expected one of 4, 2",
    ),
    "another run": (lambda run: LR, "{run}x", "there is no run '.*did you mean"),
    "no name": (lambda run: LR, "", "Got ''; expected the name of a run"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_invalid_fork_is_rejected_in_one_line(home: Path, run: str, what: str) -> None:
    stopped(llava(7), home, run)
    changes, source, said = REFUSED[what]
    with pytest.raises(Exception, match=said) as refused:
        go(llava(7, **changes(run)), home, f"{run}-2", fork=source.format(run=run))
    assert "\n" not in str(refused.value)
    assert not (home / "runs" / f"{run}-2" / "fork.json").exists()


def test_existing_run_is_not_turned_into_a_fork(home: Path, run: str) -> None:
    stopped(llava(7), home, run)
    go(llava(2), home, f"{run}-2")
    for name in (run, f"{run}-2"):
        with pytest.raises(RunError, match="exists already"):
            go(llava(7, **LR), home, name, fork=run)


def test_a_damaged_checkpoint_is_not_forked(home: Path, run: str) -> None:
    stopped(llava(7), home, run)
    newest, older = checkpoint.checkpoints(home / "runs" / run / "align")
    file = next((newest.folder / "state").glob("*optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RunError, match="the checkpoint is damaged"):
        go(llava(7, **LR), home, f"{run}-2", fork=f"{run}@4")
    go(llava(7, **LR), home, f"{run}-3", fork=run)
    assert steps(home, f"{run}-3")[0] == older.step == 2


def test_new_stage_of_the_recipe_has_no_checkpoint_to_fork(home: Path, run: str) -> None:
    stopped(llava(7), home, run)
    align, instruct = llava(7).stages
    renamed = replace(
        llava(7), stages=(replace(align, name="adapt"), replace(instruct, starts_from="adapt"))
    )
    with pytest.raises(RunError, match="no checkpoint of stage 'adapt'"):
        go(renamed, home, f"{run}-2", stages=["adapt"], fork=run)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.usefixtures("process_group")
def test_fork_uses_its_own_optimizer_settings(tmp_path: Path, zero: int) -> None:
    """DeepSpeed's state restores the settings with which it was saved."""
    first = llava(stages__align__zero__stage=zero, stages__align__optim__weight_decay=0.1)["align"]
    other = replace(first, optim=replace(first.optim, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2))
    engine(first).save(tmp_path, {"step": 1})
    loaded = engine(other)
    loaded.load(tmp_path)
    groups = loaded._backend.optimizer.param_groups
    assert {(tuple(group["betas"]), group["eps"]) for group in groups} == {((0.5, 0.6), 1e-3)}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.2}
