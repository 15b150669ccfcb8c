"""Search spaces, and their errors before a sweep runs."""

from dataclasses import replace
from typing import Any

import pytest
from ray import tune

from bridgework.config import override
from bridgework.errors import SpecError
from bridgework.system import System
from bridgework.training.estimate import parameter_counts
from bridgework.tuning.space import Metric, Space, SweepBudget, check, load, spaces, with_trials

TINY = load("tests.tuning.tiny")
RATE, BRIDGE, DEPTH = (
    "stages.*.optim.peak_lr",
    "stages.*.model.bridge",
    "stages.*.model.bridge.depth",
)


@pytest.fixture(scope="module")
def base() -> System:
    return TINY.base()


@pytest.mark.parametrize("name", spaces())
def test_shipped_spaces_are_valid(name: str) -> None:
    space = load(name)
    check(space, space.base())


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


def with_space(space: Any, **changes: Any) -> Space:
    return replace(TINY, space=space, **changes)


BAD: list[tuple[str, Space]] = [
    ("SPACE is empty", with_space({})),
    ("no free parameter", with_space({RATE: tune.choice([1e-3])})),
    ("a choice twice", with_space({BRIDGE: tune.choice(["mlp", "mlp"])})),
    ("peak_lr must be above 0", with_space({RATE: tune.uniform(-1.0, 1.0)})),
    (r"low.*high|larger", with_space({RATE: tune.uniform(2.0, 1.0)})),
    ("must be int", with_space({"stages.*.budget.steps": tune.uniform(1, 3)})),
    ("has no field 'depth'", with_space({BRIDGE: tune.choice(["linear", "mlp"]), DEPTH: tune.randint(2, 4)})),
    ("changes a stage that no trial trains; did you mean 'instruct'",
     with_space({"stages.instruc.optim.peak_lr": tune.uniform(1e-3, 1e-2)})),
    ("is not a field of a stage", with_space({"name": tune.choice(["a", "b"])})),
    ("searched and fixed at the same time",
     with_space({RATE: tune.uniform(1e-3, 1e-2)}, fixed={"stages.align.optim.peak_lr": 1e-3})),
    ("cannot be searched.*expected tune.choice", with_space({RATE: tune.qloguniform(1e-3, 1e-1, 1e-3)})),
    ("cannot be searched", with_space({BRIDGE: {"linear": tune.choice([1, 2])}})),
    ("STAGES is empty", replace(TINY, stages=())),
    ("not in the order of the system. Got instruct, align", replace(TINY, stages=("instruct", "align"))),
    ("stage instruct starts from align, which STAGES does not train", replace(TINY, stages=("instruct",))),
    ("the first METRIC is a cost", replace(TINY, metrics=(Metric(name="cost.tokens", mode="min"),))),
    ("lower cost.tokens is better",
     replace(TINY, metrics=(*TINY.metrics, Metric(name="cost.tokens", mode="max")))),
    ("'cost.token' is not a metric.*did you mean 'cost.tokens'",
     replace(TINY, metrics=(*TINY.metrics, Metric(name="cost.token", mode="min")))),
    ("names an objective twice", replace(TINY, metrics=TINY.metrics * 2)),
]  # fmt: skip


@pytest.mark.parametrize(("said", "space"), BAD, ids=[said[:30] for said, _ in BAD])
def test_a_mistake_is_refused_before_anything_starts(said: str, space: Space, base: System) -> None:
    with pytest.raises(SpecError, match=said) as error:
        check(space, base)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cpus": -1.0}, "cpus is out of range. Got -1.0; expected above 0"),
        ({"cpus": float("nan")}, "cpus is out of range"),
        ({"gpus": -0.5}, "gpus is out of range"),
        ({"workers": -1}, "workers is too small. Got -1"),
        ({"repeats": 0}, "repeats of at least 1"),
        ({"reduction": 1}, "reduction is too small"),
        ({"sampler": "tpa"}, "Got 'tpa'; did you mean 'tpe'"),
        ({"stopper": "ashа"}, "BUDGET.stopper is unknown"),  # noqa: RUF001
    ],
)
def test_an_impossible_budget_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        SweepBudget(**changes)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(SpecError, match="Got 'minimum'; expected 'max' or 'min'"):
        Metric(name="heldout.loss", mode="minimum")


def conditional(trial: Any) -> dict[str, Any]:
    bridge = trial.suggest_categorical(BRIDGE, ["linear", "mlp"])
    if bridge == "mlp":
        trial.suggest_int(DEPTH, 2, 3)
    return {"stages.*.optim.weight_decay": 0.1}


NESTED = {BRIDGE: {"linear": {}, "mlp": {DEPTH: tune.randint(2, 4)}}}


@pytest.mark.parametrize("space", [conditional, NESTED], ids=["function", "nested"])
def test_conditional_spaces_hold_every_branch(space: Any, base: System) -> None:
    found = with_space(space)
    check(found, base)
    configurations = found.combinations()
    assert configurations is not None
    bridges = [(p.changes[BRIDGE], p.changes.get(DEPTH)) for p in configurations]
    assert bridges == [("linear", None), ("mlp", 2), ("mlp", 3)]


def test_a_mistake_in_a_branch_is_found(base: System) -> None:
    space = {BRIDGE: {"linear": {}, "mlp": {"stages.*.model.bridge.dept": tune.randint(2, 4)}}}
    with pytest.raises(SpecError, match="no field 'dept'; did you mean 'depth'"):
        check(with_space(space), base)


def test_a_function_that_fails_is_one_line(base: System) -> None:
    def space(trial: Any) -> None:
        trial.suggest_uniform(RATE, 0, 1)

    with pytest.raises(SpecError, match=r"SPACE cannot be searched\. Got AttributeError"):
        check(with_space(space), base)


def test_ranges_are_tried_at_both_ends_and_inside() -> None:
    probes = with_space({RATE: tune.loguniform(1e-4, 1e-2)}).explore()
    assert sorted(p.changes[RATE] for p in probes) == pytest.approx(
        [1e-4, 1.7226e-3, 1e-2], rel=1e-3
    )


def test_a_quantized_range_holds_every_step() -> None:
    probes = with_space({RATE: tune.quniform(0.1, 0.3, 0.1)}).combinations()
    assert probes is not None
    assert [p.changes[RATE] for p in probes] == pytest.approx([0.1, 0.2, 0.3])


def test_bridges_are_compared_at_equal_trainable_parameters() -> None:
    space = load("bridge_kinds")
    counts = {
        str(p.changes[BRIDGE]).partition("(")[0]: parameter_counts(
            override(space.base(), p.changes)["align"]
        ).trainable
        for p in space.explore()
    }
    equal = [counts[kind] for kind in ("mlp", "resampler", "qformer")]
    assert max(equal) / min(equal) < 1.06
    assert {"linear", "concat"} < counts.keys()
