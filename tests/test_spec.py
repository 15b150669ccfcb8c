"""Specs: read, changed and written by dotted path."""

import json
import pickle
from collections.abc import Mapping
from typing import Any

import pytest

from bridgework.config import flat, from_dict, override, to_dict
from bridgework.errors import SpecError
from tests.toy import MLP, Linear, QFormerConfig, Wiring, system


def at(value: Any, path: str) -> Any:
    """Return a leaf by a second implementation: attributes, then names."""
    for word in path.split("."):
        if isinstance(value, tuple):
            value = next(v for v in value if getattr(v, "name", type(v).__name__.lower()) == word)
        else:
            value = getattr(value, word)
    return value


# --- override --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "given", "expected"),
    [
        ("stages.align.optim.peak_lr", "3e-5", 3e-5),
        ("stages.align.optim.peak_lr", 1, 1.0),
        ("stages.align.budget.steps", "20", 20),
        ("stages.align.budget.steps", 20.0, 20),
        ("stages.align.optim.betas", "0.9,0.95", (0.9, 0.95)),
        ("stages.align.optim.betas", "(0.9, 0.95)", (0.9, 0.95)),
        ("stages.align.optim.betas", [0.9, 0.95], (0.9, 0.95)),
        ("stages.align.model.grid", "3,4", (3, 4)),
        ("stages.align.model.tied", "on", True),
        ("stages.align.model.tied", False, False),
        ("stages.align.model.layer", "-2", -2),
        ("stages.align.model.layer", "none", None),
        ("stages.align.model.layer", None, None),
        ("stages.align.model.cut", "7", 7),
        ("stages.align.model.cut", "auto", "auto"),
        ("stages.align.model.name_of_lm", "none", "none"),
        ("stages.align.model.bridge", "linear", Linear()),
        ("stages.align.model.bridge", "mlp(depth=3, act=relu)", MLP(depth=3, act="relu")),
        ("stages.align.model.bridge", "qformer(queries=32)", QFormerConfig(queries=32)),
        ("stages.align.model.bridge", QFormerConfig(queries=8), QFormerConfig(queries=8)),
        ("stages.align.model.bridge.depth", "4", MLP(depth=4)),
        ("stages.align.zero.stage", "3", 3),
        ("stages.align.zero.stage", 0, 0),
        ("stages.align.zero.precision", "fp32", "fp32"),
        ("stages.align.data.sources.cc.prompts", "What?", ("What?",)),
        ("stages.align.data.sources.cc.prompts", "'Who, me?','Why?'", ("Who, me?", "Why?")),
        ("stages.align.data.sources.cc.prompts", "[]", ()),
        ("stages.align.data.sources.coco.max_epochs", "none", None),
        ("stages.align.losses.contrastive.temperature", "0.1", 0.1),
        ("stages.align.evals.heldout.rows", "7", 7),
    ],
)
def test_each_kind_of_value_reaches_its_field(path: str, given: Any, expected: Any) -> None:
    changed = at(override(system(), {path: given}), path.removesuffix(".depth"))
    assert changed == expected
    assert type(changed) is type(expected)


def test_star_means_every_element() -> None:
    changed = override(
        system(), {"stages.*.model.bridge": "linear", "stages.*.data.sources.*.factor": 2}
    )
    assert [s.model for s in changed.stages] == [Wiring(bridge=Linear())] * 2
    assert [source.factor for s in changed.stages for source in s.data.sources] == [2.0] * 4


def test_mapping_keys_may_have_dots_and_stars() -> None:
    changed = override(
        system(),
        {
            "stages.align.trains.bridge.*": "0.1",
            "stages.align.trains.language.layers.*": 1,
            "stages.*.zero.config.zero_optimization.overlap_comm": "False",
        },
    )
    assert changed["align"].trains == {"bridge.*": 0.1, "language.layers.*": 1.0}
    assert all(type(v) is float for v in changed["align"].trains.values())
    assert [s.zero.config for s in changed.stages] == [
        {"zero_optimization.overlap_comm": False}
    ] * 2


def test_complete_mapping_is_replaced() -> None:
    for given in ({"vision.*": 1}, "{'vision.*': 1}"):
        assert override(system(), {"stages.align.trains": given})["align"].trains == {
            "vision.*": 1.0
        }


def test_override_does_not_change_the_original() -> None:
    before = system()
    override(before, {"stages.align.trains.bridge.*": 0.5, "stages.*.optim.peak_lr": 1.0})
    assert before == system()


def test_dependent_values_may_change_together() -> None:
    changes = {"stages.align.budget.batch": 15, "stages.align.data.lanes": 5}
    for order in (changes, dict(reversed(changes.items()))):
        changed = override(system(), order)["align"]
        assert (changed.budget.batch, changed.data.lanes) == (15, 5)
    with pytest.raises(SpecError, match="not a multiple of data"):
        override(system(), {"stages.align.budget.batch": 15})


def test_kind_is_set_before_its_fields_and_an_equal_kind_keeps_them() -> None:
    path = "stages.align.model.bridge"
    deep = override(system(), {path: "mlp(depth=5)"})
    assert override(deep, {path: "mlp"}) == deep
    switched = override(override(deep, {path: "linear"}), {f"{path}.depth": 3, path: "mlp"})
    assert switched["align"].model == Wiring(bridge=MLP(depth=3))


@pytest.mark.parametrize(
    ("path", "given", "words"),
    [
        ("stages.align.optim.peek_lr", 1, "no field 'peek_lr'; did you mean 'peak_lr'"),
        ("stages.algin.optim.peak_lr", 1, "no element 'algin'; did you mean 'align'"),
        ("stages.align", 1, "'align' is a complete Stage. Fix: name one of its fields"),
        ("stages.align.losses.matching.weight", 1, "no element 'matching'"),
        ("stages.align.name.x", 1, "a plain str, which has no fields"),
        ("stages.align.optim.peak_lr", "fast", "peak_lr must be float, got 'fast'"),
        ("stages.align.budget.steps", 1.5, "steps must be int, got 1.5"),
        ("stages.align.budget.steps", True, "steps must be int, got True"),
        ("stages.align.model.tied", "maybe", "tied must be bool, got 'maybe'"),
        ("stages.align.model.name_of_lm", 3, "name_of_lm must be str, got 3"),
        ("stages.align.optim.betas", "0.9", "betas takes 2 values"),
        ("stages.align.optim.betas", 0.9, "betas takes a list of values"),
        ("stages.align.zero.precision", "bf61", "did you mean 'bf16'"),
        ("stages.align.model.bridge", "qformer", "qformer needs queries"),
        ("stages.align.model.bridge", "mpl", "no kind 'mpl'; did you mean 'mlp'"),
        (
            "stages.align.model.bridge",
            "mlp(deep=3)",
            "mlp has no field 'deep'; did you mean 'depth'",
        ),
        ("stages.align.model.bridge", "mlp(3)", "cannot read 'mlp\\(3\\)'. Fix: write it like"),
        ("stages.align.model.bridge", "mlp(depth=3", "cannot read"),
        ("stages.align.model.bridge", "mlp(depth=3) + 1", "cannot read"),
        ("stages.align.model.bridge", 3, "3 is not one of linear, mlp, qformer"),
        ("stages.align.model.cut", "never", "none of int"),
        ("stages.align.model", "other", "holds a complete ModelSpec. Fix: name one of its fields"),
        ("stages.align.trains", "bridge", "takes a mapping such as"),
        ("stages.align.trains.bridge.*", "much", "must be float"),
    ],
)
def test_invalid_change_is_rejected_with_a_suggestion(path: str, given: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        override(system(), {path: given})


# --- flat, to_dict, from_dict ----------------------------------------------------------------------------------------


def test_override_accepts_the_output_of_flat() -> None:
    assert override(system(), flat(system())) == system()
    for path, leaf in flat(system()).items():
        assert override(system(), {path: leaf}) == system(), path


def test_flat_of_a_variant_recreates_it() -> None:
    changes = {
        "stages.*.model.bridge": "linear",
        "stages.align.optim.clip": 0.5,
        "stages.align.trains.x": 2.0,
    }
    variant = override(system(), changes)
    assert override(system(), flat(variant)) == variant


def test_flat_as_command_line_strings_recreates_the_system() -> None:
    assert (
        override(system(), {path: str(leaf) for path, leaf in flat(system()).items()}) == system()
    )


def test_flat_yields_kinds_and_leaves() -> None:
    leaves = flat(system())
    assert leaves["stages.align.model.bridge"] == "mlp"
    assert leaves["stages.align.model.bridge.depth"] == 2
    assert leaves["stages.align.trains.bridge.*"] == 1.0
    assert leaves["stages.align.losses.contrastive.weight"] == 0.5
    assert leaves["stages.align.optim.betas"] == [0.9, 0.999]


def test_dict_round_trip_through_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(system())))) == system()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_": "bridgework.system:Stagecoach"}, "does not have"),
        ({"_": "bridgework.gone:Stage"}, "does not have"),
        ({"_": "os:getcwd"}, "is not a spec"),
        ({"_": "bridgework.system:Pixels", "sise": 3}, "does not fit bridgework.system:Pixels"),
    ],
)
def test_recipe_of_another_version_is_rejected(change: Mapping[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        from_dict(change)


def test_system_can_be_pickled() -> None:
    assert pickle.loads(pickle.dumps(system())) == system()
