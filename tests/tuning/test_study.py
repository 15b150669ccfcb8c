"""The study of a sweep: what is tried does not depend on timing, failures or interruptions."""

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from ray import tune

from bridgework.errors import RunError
from bridgework.system import System
from bridgework.tuning.space import Metric, Space, SweepBudget
from bridgework.tuning.space import load as load_space
from bridgework.tuning.study import FILE, TrialRow, Trials, identity, name
from tests.tuning.tiny import system

RATE, BRIDGE = "stages.*.optim.peak_lr", "stages.*.model.bridge"
BUDGET = SweepBudget(trials=14, concurrent=3, judgments=4, seed=7, stopper="asha")
SPACE = replace(
    load_space("tests.tuning.tiny"),
    budget=BUDGET,
    space={BRIDGE: tune.choice(["linear", "mlp"]), RATE: tune.loguniform(1e-5, 1e-1)},
)


@pytest.fixture(scope="module")
def base() -> System:
    return system()


def opened(folder: Path, base: System, space: Space = SPACE) -> Trials:
    folder.mkdir(exist_ok=True)
    return Trials.open(folder, space, base, "sweep")


def score(changes: dict[str, Any], judgment: int) -> float:
    """A loss that falls with training, best at a rate near 1e-3, and not finite above 3e-2."""
    rate = changes[RATE]
    return abs(rate - 1e-3) ** 0.25 + (0.2 if changes[BRIDGE] == "linear" else 0.0) + 1 / judgment


def drive(trials: Trials, target: int, order: random.Random, reports: int = 10**9) -> bool:
    """Run trials in a random order of events; stops after `reports`, as a killed driver would.

    Returns True if the sweep is complete.
    """
    running = {number: len(trials.rows()[number].curve) for number in trials.unfinished()}
    for number in list(running):
        if trials.stops(number):
            trials.stop(number)
            del running[number]
    while True:
        while (
            len(running) < trials.space.budget.concurrent
            and trials.count() < target
            and trials.ready()
        ):
            proposal = trials.propose()
            assert proposal is not None
            running[proposal.number] = 0
        if not running:
            return True
        number = order.choice(sorted(running))
        changes = trials.changes(number)
        running[number] += 1
        if reports == 0:
            return False
        reports -= 1
        if changes[RATE] > 3e-2:
            trials.fail(number, "the loss is not finite")
            del running[number]
        elif running[number] == trials.space.budget.judgments:
            value = score(changes, running[number])
            trials.finish(number, [value], [{trials.space.metric.name: value}])
            del running[number]
        elif trials.report(number, running[number], score(changes, running[number])):
            trials.stop(number)
            del running[number]


def results(rows: Sequence[TrialRow]) -> list[Any]:
    return [(r.trial, dict(r.changes), r.status, r.score, dict(r.curve)) for r in rows]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, base: System) -> list[Any]:
    trials = opened(tmp_path_factory.mktemp("unbroken"), base)
    assert drive(trials, 14, random.Random(0))
    return results(trials.rows())


def test_all_three_ends_occur(unbroken: list[Any]) -> None:
    assert {row[2] for row in unbroken} == {"finished", "stopped", "failed"}


@pytest.mark.parametrize("seed", [1, 2])
def test_order_of_events_and_interruptions_change_no_trial(
    tmp_path: Path, base: System, unbroken: list[Any], seed: int
) -> None:
    order = random.Random(seed)
    for _ in range(200):
        if drive(opened(tmp_path / "s", base), 14, order, reports=order.randrange(6)):
            break
    assert results(opened(tmp_path / "s", base).rows()) == unbroken


def test_more_trials_extend_a_finished_sweep(
    tmp_path: Path, base: System, unbroken: list[Any]
) -> None:
    drive(opened(tmp_path / "s", base), 5, random.Random(0))
    drive(opened(tmp_path / "s", base), 14, random.Random(0))
    assert results(opened(tmp_path / "s", base).rows()) == unbroken


def test_an_interrupted_extension_resumes(tmp_path: Path, base: System) -> None:
    drive(opened(tmp_path / "s", base), 3, random.Random(0))
    assert opened(tmp_path / "s", base).extend(4) == 7
    drive(opened(tmp_path / "s", base), 7, random.Random(0), reports=2)
    assert opened(tmp_path / "s", base).extend(4) == 7
    drive(opened(tmp_path / "s", base), 7, random.Random(0))
    assert opened(tmp_path / "s", base).extend(4) == 11


@pytest.mark.parametrize("sampler", ["tpe", "gp", "nsga2", "random"])
@pytest.mark.parametrize("stopper", ["median", "hyperband", "none"])
def test_samplers_and_stoppers_propose_by_number(
    tmp_path: Path, base: System, sampler: Any, stopper: Any
) -> None:
    if sampler == "gp" and stopper != "none":
        pytest.skip("the sampler with the slowest fit is tried once")
    budget = replace(BUDGET, sampler=sampler, stopper=stopper)
    found = []
    for seed in (1, 2):
        trials = opened(tmp_path / str(seed), base, replace(SPACE, budget=budget))
        drive(trials, 8, random.Random(seed))
        found.append(results(trials.rows()))
    assert found[0] == found[1]


def test_failed_values_are_not_drawn_again(tmp_path: Path, base: System) -> None:
    small = replace(SPACE, space={BRIDGE: tune.choice(["linear", "mlp", "mlp(depth=3)"])})
    trials = opened(tmp_path / "s", base, small)
    drawn = []
    while (proposal := trials.propose()) is not None:
        drawn.append(proposal.changes[BRIDGE])
        trials.fail(proposal.number, "it does not fit")
    assert sorted(drawn) == ["linear", "mlp", "mlp(depth=3)"]
    assert [row.score for row in trials.rows()] == [None] * 3


def test_asha_stops_the_worse_half_at_every_rung(tmp_path: Path, base: System) -> None:
    budget = replace(BUDGET, concurrent=1, stopper="asha", judgments=4)
    trials = opened(tmp_path / "s", base, replace(SPACE, budget=budget))
    stopped = []
    for value in (5.0, 4.0, 3.0, 6.0, 3.5):
        proposal = trials.propose()
        assert proposal is not None
        stopped.append(trials.report(proposal.number, 1, value))
        if stopped[-1]:
            trials.stop(proposal.number)
        else:
            trials.finish(proposal.number, [value], [{}])
    # the better half of all values so far goes on: of 5, 4, 3, 6 and 3.5 the best two
    assert stopped == [False, False, False, True, False]


def test_another_sweep_of_the_same_name_is_rejected(tmp_path: Path, base: System) -> None:
    opened(tmp_path / "s", base)
    other = replace(SPACE, space={**SPACE.space, RATE: tune.uniform(1e-5, 1e-1)})
    with pytest.raises(RunError, match="holds another sweep: its space differ"):
        opened(tmp_path / "s", base, other)
    opened(tmp_path / "s", base, replace(SPACE, budget=replace(BUDGET, trials=30, workers=2)))


def test_distributions_over_one_range_are_different_spaces(base: System) -> None:
    spaces = (
        tune.uniform(0.01, 0.1),
        tune.loguniform(0.01, 0.1),
        tune.quniform(0.01, 0.1, 0.01),
        tune.choice([0.01, 0.1]),
    )
    found = [identity(replace(SPACE, space={RATE: one}), base)["space"] for one in spaces]
    assert len({repr(one) for one in found}) == len(spaces)


def test_optuna_opens_the_study(tmp_path: Path, base: System) -> None:
    trials = opened(tmp_path / "s", base)
    drive(trials, 6, random.Random(0))
    storage = f"sqlite:///{tmp_path / 's' / FILE}"
    study = optuna.load_study(study_name="sweep", storage=storage)
    assert [name(trial.number) for trial in study.trials] == [row.trial for row in trials.rows()]


def test_warm_start_knows_the_trials_of_an_earlier_sweep(tmp_path: Path, base: System) -> None:
    earlier = opened(tmp_path / "sweep", base)
    drive(earlier, 10, random.Random(0))
    finished = sum(row.finished for row in earlier.rows())
    new = replace(SPACE, space={RATE: tune.loguniform(1e-5, 1e-1), BRIDGE: SPACE.space[BRIDGE]})
    (tmp_path / "warm").mkdir()
    trials = Trials.open(tmp_path / "warm", new, base, "warm")
    assert trials.warm_start(tmp_path / "sweep", "sweep") == finished
    assert trials.count() == 0 and trials.rows() == []
    proposal = trials.propose()
    assert proposal is not None and proposal.number == finished
    with pytest.raises(RunError, match=r"no sweep 'swep'; did you mean 'sweep'"):
        trials.warm_start(tmp_path / "swep", "swep")
    other = replace(SPACE, metrics=(Metric(name="heldout.gap", mode="max"),))
    (tmp_path / "other").mkdir()
    with pytest.raises(RunError, match="not comparable, because its metrics differ"):
        Trials.open(tmp_path / "other", other, base, "other").warm_start(
            tmp_path / "sweep", "sweep"
        )
