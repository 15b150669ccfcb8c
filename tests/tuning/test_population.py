"""Population based training: who continues whom, with which values, and the same after a kill."""

import random
import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from ray import tune

from bridgework import artifacts
from bridgework.errors import RunError, SpecError
from bridgework.system import System, load
from bridgework.tracking.tracker import MemoryTracker
from bridgework.training.fork import Fork
from bridgework.tuning import report, search
from bridgework.tuning.population import (
    Origin,
    Schedule,
    check_population,
    choose_origin,
    perturb,
)
from bridgework.tuning.space import Metric, Space, SweepBudget, check, with_trials
from bridgework.tuning.space import load as load_space
from bridgework.tuning.study import TrialRow, Trials
from tests.tuning.test_resume import complete, finished, kill_when, losses, reports, results

RATE, FACTOR = "stages.instruct.optim.peak_lr", "stages.instruct.data.sources.llava.factor"
SPACE = load_space("tiny_population")
WIDE = replace(
    SPACE,
    budget=replace(SPACE.budget, population=8, judgments=3, concurrent=3, seed=5),
)


@pytest.fixture(scope="module")
def base() -> System:
    return SPACE.base()


# --- decisions ---------------------------------------------------------------------------------

EIGHT = Schedule(population=8, ends=(10, 20, 25))


def test_the_worst_quarter_continues_the_best_quarter() -> None:
    scores = dict(zip(range(8), [5.0, 1.0, 8.0, 3.0, 7.0, 2.0, 6.0, 4.0], strict=True))
    for higher, best, worst in ((False, {1, 5}, {2, 4}), (True, {2, 4}, {1, 5})):
        for number in range(8, 16):
            origin, copied = choose_origin(number, EIGHT, scores, higher=higher, seed=0)
            assert copied == (number - 8 in worst)
            assert origin in best if copied else origin == number - 8
    several = {choose_origin(10, EIGHT, scores, higher=False, seed=s)[0] for s in range(20)}
    assert several == {1, 5}, "the seed decides which of the best one"


def test_a_failed_trial_is_replaced_and_never_continued() -> None:
    scores = {0: 1.0, 3: 2.0, 5: 3.0}  # five of eight failed
    for number in range(8, 16):
        origin, copied = choose_origin(number, EIGHT, scores, higher=False, seed=number)
        assert (origin, copied) == (number - 8, False) if number - 8 in scores else copied
        assert origin in scores
    assert choose_origin(9, EIGHT, {4: 1.0}, higher=False, seed=0) == (4, True)
    assert choose_origin(12, EIGHT, {4: 1.0}, higher=False, seed=0) == (4, False)


@pytest.mark.parametrize(
    ("value", "distribution", "up", "down"),
    [
        (1e-3, FloatDistribution(1e-4, 1e-2, log=True), 1.2e-3, 0.8e-3),
        (9e-3, FloatDistribution(1e-4, 1e-2, log=True), 1e-2, 7.2e-3),
        (1e-2, FloatDistribution(1e-4, 1e-2, log=True), 0.8e-2, 0.8e-2),  # at the bound: down
        (0.0, FloatDistribution(0.0, 1.0), 0.2, 0.2),
        (0.5, FloatDistribution(0.0, 1.0), 0.7, 0.3),
        (0.5, FloatDistribution(0.0, 1.0, step=0.5), 1.0, 0.0),
        (4, IntDistribution(1, 6), 5, 3),
        (2, IntDistribution(1, 64, log=True), 3, 1),
        ("b", CategoricalDistribution(["a", "b", "c"]), "c", "a"),
        ("c", CategoricalDistribution(["a", "b", "c"]), "b", "b"),
        (1.0, FloatDistribution(1.0, 1.0), 1.0, 1.0),
    ],
)
def test_a_perturbed_value_is_another_one_of_its_range(
    value: Any, distribution: BaseDistribution, up: Any, down: Any
) -> None:
    moved = [perturb(value, distribution, up=way) for way in (True, False)]
    assert moved == [pytest.approx(up), pytest.approx(down)] or moved == [up, down]
    for new in moved:
        assert type(new) is type(value)
        assert distribution._contains(distribution.to_internal_repr(new))


def test_generations_end_at_the_judgments(base: System) -> None:
    def ends(steps: int, judgments: int) -> tuple[int, ...]:
        fixed = {**SPACE.fixed, "stages.instruct.budget.steps": steps}
        budget = replace(SPACE.budget, judgments=judgments)
        space = replace(SPACE, fixed=fixed, budget=budget)
        schedule = Schedule.of(space, space.base())
        assert schedule is not None
        return schedule.ends

    assert ends(24, 3) == (8, 16, 24)
    assert ends(25, 3) == (9, 18, 25)
    assert ends(4, 3) == (2, 4)
    other = replace(SPACE, budget=replace(SPACE.budget, stopper="asha"))
    assert Schedule.of(other, base) is None


# --- the study ---------------------------------------------------------------------------------


def opened(folder: Path, base: System, space: Space = WIDE) -> Trials:
    folder.mkdir(exist_ok=True)
    return Trials.open(folder, space, base, "population")


def score(changes: Mapping[str, Any], judgment: int) -> float:
    """A loss that is best at a rate near 1e-3."""
    return abs(float(changes[RATE]) - 1e-3) ** 0.25 + 1 / judgment


def drive(trials: Trials, order: random.Random, events: int = 10**9) -> bool:
    """Run the population in a random order of events; returns True if it is complete.

    Stops after `events`, as a killed driver would. Members with a high rate fail.
    """
    schedule = trials.schedule
    assert schedule is not None
    running = trials.unfinished()
    for number in [n for n in running if trials.stops(n)]:
        trials.stop(number)
        running.remove(number)
    while True:
        while trials.count() < trials.size and trials.ready():
            proposal = trials.propose()
            assert proposal is not None
            running.append(proposal.number)
        assert len(running) <= trials.space.budget.concurrent
        if not running:
            return trials.count() == trials.size
        if events == 0:
            return False
        events -= 1
        number = order.choice(running)
        running.remove(number)
        changes, judgment = trials.changes(number), schedule.generation(number) + 1
        value = score(changes, judgment)
        if changes[RATE] > 5e-3:
            trials.fail(number, "the loss is not finite")
        elif schedule.is_last(number):
            trials.finish(number, [value], [{trials.space.metric.name: value}])
        elif trials.report(number, judgment, value):
            if order.random() < 0.8:  # else the driver is killed before it records the decision
                trials.stop(number)
            else:
                return False
        else:
            raise AssertionError("a member is paused at its judgment")


def rows(trials: Trials) -> list[Any]:
    return [
        (r.trial, dict(r.changes), r.status, r.score, dict(r.curve), r.origin)
        for r in trials.rows()
    ]


def test_order_of_events_and_interruptions_change_no_member(tmp_path: Path, base: System) -> None:
    found = []
    for seed in range(3):
        order, folder = random.Random(seed), tmp_path / str(seed)
        while not drive(opened(folder, base), order, order.randrange(1, 9)):
            pass
        found.append(rows(opened(folder, base)))
    assert found[1:] == found[:1] * 2
    states = Counter(row[2] for row in found[0])
    assert states["failed"] and states["paused"] and states["finished"], states
    origins: list[Origin | None] = [row[5] for row in found[0]]
    assert not any(origins[:8]) and all(origins[8:])
    assert {o.step for o in origins if o} == {8, 16}
    for row in found[0][8:]:
        before = found[0][int(row[5].trial)]
        assert (row[1] != before[1]) == row[5].copied
        assert before[2] == "paused"


def test_checkpoints_stay_until_no_member_needs_them(tmp_path: Path, base: System) -> None:
    space = replace(WIDE, budget=replace(WIDE.budget, population=2, concurrent=2))
    trials = opened(tmp_path / "s", base, space)
    removed: list[list[int]] = []
    for number in range(6):
        if number % 2 == 0:
            for _ in range(2):
                assert trials.ready() and trials.propose()
            assert trials.count() == trials.size or not trials.ready()
        if number < 4:
            trials.report(number, number // 2 + 1, 1.0 + number)
            trials.stop(number)
        else:
            trials.finish(number, [1.0], [{}])
        removed.append(trials.disposable(number))
    assert removed == [[], [], [], [0, 1], [], [0, 1, 2, 3, 4, 5]]


def test_a_population_without_a_survivor_is_an_error(tmp_path: Path, base: System) -> None:
    space = replace(WIDE, budget=replace(WIDE.budget, population=2))
    trials = opened(tmp_path / "s", base, space)
    for number in range(2):
        trials.propose()
        trials.fail(number, "out of luck")
    with pytest.raises(RunError, match=r"every trial of judgment 1 failed.* Got out of luck"):
        trials.propose()


def test_another_size_is_another_sweep(tmp_path: Path, base: System) -> None:
    opened(tmp_path / "s", base)
    larger = replace(WIDE, budget=replace(WIDE.budget, population=10))
    with pytest.raises(RunError, match="holds another sweep: its budget differ"):
        opened(tmp_path / "s", base, larger)


# --- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"space": {"stages.instruct.model.bridge": tune.choice(["linear", "mlp"])}},
            r"SPACE\['stages.instruct.model.bridge'\] cannot change in mid-run.*Got model; "
            r"expected a field of optim, data, losses, e.g. optim.peak_lr",
        ),
        (
            {"space": {"stages.instruct.trains.bridge.*": tune.uniform(0.1, 1.0)}},
            "Got trains; expected",
        ),
        ({"space": {"stages.instruct.seed": tune.randint(0, 5)}}, "Got seed; expected"),
        (
            {"space": {"stages.instruct.budget.batch": tune.choice([8, 16])}},
            "Got budget; expected",
        ),
        (
            {"space": {"stages.align.optim.peak_lr": tune.loguniform(1e-4, 1e-2)}},
            "finished before the first judgment. Got align; expected instruct",
        ),
        (
            {"space": {"stages.*.optim.peak_lr": tune.loguniform(1e-4, 1e-2)}},
            r"Got \*; expected instruct",
        ),
        (
            {"space": {"stages.instruct.optim.weight_decay": tune.choice([0.0, 0.1])}},
            r"stages.instruct.optim.weight_decay was 0.0, is 0.1",
        ),
        (
            {
                "metrics": (
                    Metric(name="heldout.loss", mode="min"),
                    Metric(name="cost.tokens", mode="min"),
                )
            },
            "selected by one METRIC. Got 2",
        ),
        ({"budget": replace(SPACE.budget, repeats=3)}, "Got BUDGET.repeats 3; expected 1"),
        (
            {"budget": replace(SPACE.budget, judgments=1)},
            "Got BUDGET.judgments 1 in 24 steps; expected at least 2",
        ),
    ],
)
def test_a_space_that_no_population_can_search_is_rejected(
    base: System, changes: dict[str, Any], expected: str
) -> None:
    space = replace(SPACE, **changes)
    with pytest.raises(SpecError, match=expected):
        check_population(space, base)
        check(space, base)


def test_the_size_of_a_population_is_fixed(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"population is too small\. Got 1; expected at least 2"):
        SweepBudget(stopper="pbt", population=1)
    with pytest.raises(SpecError, match="--trials: sweep tiny_population is a population of 4"):
        with_trials(SPACE, trials=6)
    for options, given in (({"more": 2}, "--trials"), ({"warm_start": ("a",)}, "--warm-start")):
        with pytest.raises(SpecError, match=f"has a fixed size.*Got {given}"):
            search.sweep(SPACE, home=tmp_path, run="s", **options)


def test_the_budgets_of_other_sweeps_keep_their_identity() -> None:
    from bridgework.config import to_dict

    assert "population" not in to_dict(SweepBudget())


# --- the winner's command ----------------------------------------------------------------------


def test_the_commands_repeat_the_course_of_the_winner() -> None:
    def row(number: int, rate: float, origin: Origin | None, status: str) -> TrialRow:
        return TrialRow(f"{number:03d}", {RATE: rate}, 1.0, status, 0.0, origin=origin)

    course = [
        row(9, 3e-3, Origin("006", 16, copied=False), "finished"),
        row(6, 3e-3, Origin("001", 8, copied=True), "paused"),
        row(1, 2e-3, None, "paused"),
    ]
    text = search.commands_of(SPACE, course, "s", None)
    first, second = (shlex.split(part) for part in text.split("&&"))
    rates = [f"{RATE}=0.002", f"{RATE}=0.003"]
    assert rates[0] in first and rates[1] in second
    assert first[-4:] == ["--run", "s-again-1", "--until", "8"]
    assert second[-4:] == ["--run", "s-again-2", "--fork", "s-again-1@8"]


# --- real trials -------------------------------------------------------------------------------

SMALL = replace(SPACE, budget=replace(SPACE.budget, population=2, judgments=2))


def test_members_continue_checkpoints_of_others(home: Path, ray_session: None) -> None:
    tracker = MemoryTracker()
    outcome = search.sweep(SMALL, home=home, run="members", tracker=tracker)
    by_name = {row.trial: row for row in outcome.rows}
    assert [by_name[name].status for name in sorted(by_name)] == ["paused"] * 2 + ["finished"] * 2
    best = min(("000", "001"), key=lambda name: by_name[name].curve[1])
    worst = "001" if best == "000" else "000"
    heir = {row.origin.trial: row for row in outcome.rows if row.origin and not row.origin.copied}
    assert list(heir) == [best], "the worst one has no successor of its own"
    folder = home / "runs/members"
    for name in ("002", "003"):
        row, fork = by_name[name], Fork.read(folder / name)
        assert row.origin is not None and fork is not None
        assert (row.origin.trial, row.origin.step) == (best, 12)
        assert (fork.run, fork.stage, fork.step) == (f"members/{best}", "instruct", 12)
        assert row.origin.copied == (row.changes != by_name[best].changes)
        assert list(losses(folder / name / "instruct")) == list(range(12, 24))
        run = next(run for run in tracker.runs.values() if run.name == f"members/{name}")
        assert run.tags["forked_from"] == f"members/{best}/instruct@12"
        assert run.tags["values"] == ("perturbed" if row.origin.copied else "kept")
    assert not (folder / worst / "instruct/artifact").exists()
    assert list(losses(folder / worst / "instruct")) == list(range(12)), "paused at its judgment"
    assert not list(folder.glob("0*/*/checkpoints/*"))
    # the first stage is trained once
    assert len([p for p in (folder / "shared").iterdir() if p.is_dir()]) == 1

    assert outcome.report is not None
    page = outcome.report.read_text()
    for part in ("Values of the population by judgment", f"{best}@12, perturbed", "2 paused"):
        assert part in page, part
    again = search.sweep(SMALL, home=home, run="members")
    assert again.rows == outcome.rows


@pytest.mark.slow
def test_a_killed_population_is_the_unbroken_one(tmp_path: Path) -> None:
    sweep = ["sweep", "tiny_population", "--run", "s"]
    complete(tmp_path / "unbroken", *sweep)
    home, kept = tmp_path / "killed", dict[str, int]()
    for count in (2, 6, 11):
        kill_when(home, lambda count=count: reports(home) >= count, sweep)
        now = finished(home, "instruct")
        assert kept.items() <= now.items()
        kept = now
    output = complete(home, *sweep)
    assert kept.items() <= finished(home, "instruct").items()
    unbroken = [tuple(row[:5]) for row in results(tmp_path / "unbroken")]
    assert [tuple(row[:5]) for row in results(home)] == unbroken
    assert not list((home / "runs/s").glob("0*/*/checkpoints/*"))

    # the winner's commands train the same weights
    line = next(line for line in output.splitlines() if line.startswith("again"))
    for part in line.removeprefix("again").split("&&"):
        complete(home, *shlex.split(part)[1:])
    best = report.load(home, "s").rows[0].trial
    last = max((home / "runs").glob("s-again-*"))
    digests = [
        artifacts.describe(folder / "instruct/artifact").digest
        for folder in (last, home / "runs/s" / best)
    ]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_population_through_ray_train_matches_one_in_process(
    home: Path, ray_session: None
) -> None:
    budget = replace(SMALL.budget, workers=2, gpus=0, concurrent=1)
    spread = search.sweep(replace(SMALL, budget=budget), home=home, run="spread")
    alone = search.sweep(SMALL, home=home, run="alone")
    for one, other in zip(spread.rows, alone.rows, strict=True):
        assert (one.trial, one.status, one.origin) == (other.trial, other.status, other.origin)
        assert one.score == pytest.approx(other.score, rel=1e-4)


def test_the_shipped_population_searches_alpha_and_factors() -> None:
    space = load_space("population")
    check_population(space, space.base())
    assert {path.rpartition(".")[2] for path in space.paths()} == {"peak_lr", "alpha", "factor"}
    assert load(space.system)["warm"].evals[0].name == "retrieval"
