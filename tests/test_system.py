"""What a system is, changed and named by dotted path; the specs here are a toy's, so that no part is needed."""

import json
import os
import pickle
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from bridgework.errors import SpecError
from bridgework.spec import flat, from_dict, override, spec, to_dict
from bridgework.system import (
    AdamW,
    Budget,
    Mixture,
    Pixels,
    Source,
    Stage,
    System,
    ZeRO,
    load,
    recipes,
    variants,
)


@spec
class Linear:
    pass


@spec
class MLP:
    depth: int = 2
    act: Literal["gelu", "relu"] = "gelu"


@spec
class QFormerConfig:
    queries: int
    width: int = 768


@spec
class Wiring:
    bridge: Linear | MLP | QFormerConfig = MLP()
    name_of_lm: str = "toy"
    layer: int | None = None
    grid: tuple[int, int] = (2, 2)
    tied: bool = False
    cut: int | Literal["auto"] = "auto"

    pixels: ClassVar[Pixels] = Pixels(size=32)
    tokenizer: ClassVar[str] = "bytes"
    context: ClassVar[int] = 128
    image_tokens: ClassVar[int] = 4
    pretrained: ClassVar[tuple[str, ...]] = ()

    def build(self, *, pretrained: bool = True) -> Any:
        return self

    def tiny(self) -> "Wiring":
        return replace(self, name_of_lm="tiny")


@spec
class Captioning:
    weight: float = 1.0
    label_smoothing: float = 0.0

    needs: ClassVar[str] = "logits"
    whole_batch: ClassVar[bool] = False

    def __call__(self, outputs: Any) -> Any:
        return 0.0

    def count(self, labels_BT: Any) -> int:
        return 1


@spec
class Contrastive(Captioning):
    temperature: float = 0.07


@spec
class Eval:
    name: str = "heldout"
    rows: int = 100

    def tiny(self) -> "Eval":
        return replace(self, rows=4)

    def run(self, pipeline: Any, home: Path) -> Any:
        return None


def system() -> System:
    align = Stage(
        name="align",
        model=Wiring(),
        trains={"bridge.*": 1.0},
        losses=(Captioning(), Contrastive(weight=0.5)),
        data=Mixture(
            sources=(
                Source(name="cc", dataset="cc3m", prompts=("What is it?", "Describe it, briefly (please)")),
                Source(name="coco", dataset="s3://b/coco", max_epochs=3.0),
            ),
            lanes=8,
        ),
        budget=Budget(steps=10, batch=16),
        optim=AdamW(peak_lr=1e-3),
        evals=(Eval(),),
    )
    instruct = replace(
        align,
        name="instruct",
        starts_from="align",
        trains={"language.*": 1.0, "language.layers.0.*": 0.0},
        shard=ZeRO(stage=3, config={"zero_optimization.overlap_comm": True}),
    )
    return System(name="toy", paper="none", stages=(align, instruct))


def at(value: Any, path: str) -> Any:
    """A second way to a leaf: attributes, then names."""
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
        ("stages.align.shard.stage", "3", 3),
        ("stages.align.shard.stage", 0, 0),
        ("stages.align.shard.precision", "fp32", "fp32"),
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


def test_star_stands_for_every_element() -> None:
    changed = override(system(), {"stages.*.model.bridge": "linear", "stages.*.data.sources.*.factor": 2})
    assert [s.model for s in changed.stages] == [Wiring(bridge=Linear())] * 2
    assert [source.factor for s in changed.stages for source in s.data.sources] == [2.0] * 4


def test_keys_of_a_mapping_may_hold_dots_and_stars() -> None:
    changed = override(
        system(),
        {
            "stages.align.trains.bridge.*": "0.1",
            "stages.align.trains.language.layers.*": 1,
            "stages.*.shard.config.zero_optimization.overlap_comm": "False",
        },
    )
    assert changed["align"].trains == {"bridge.*": 0.1, "language.layers.*": 1.0}
    assert all(type(v) is float for v in changed["align"].trains.values())
    assert [s.shard.config for s in changed.stages] == [{"zero_optimization.overlap_comm": False}] * 2


def test_a_whole_mapping_is_replaced() -> None:
    for given in ({"vision.*": 1}, "{'vision.*': 1}"):
        assert override(system(), {"stages.align.trains": given})["align"].trains == {"vision.*": 1.0}


def test_override_leaves_the_original_alone() -> None:
    before = system()
    override(before, {"stages.align.trains.bridge.*": 0.5, "stages.*.optim.peak_lr": 1.0})
    assert before == system()


def test_values_that_must_fit_each_other_may_change_together() -> None:
    changes = {"stages.align.budget.batch": 15, "stages.align.data.lanes": 5}
    for order in (changes, dict(reversed(changes.items()))):
        changed = override(system(), order)["align"]
        assert (changed.budget.batch, changed.data.lanes) == (15, 5)
    with pytest.raises(SpecError, match="not a multiple of data"):
        override(system(), {"stages.align.budget.batch": 15})


def test_a_kind_goes_before_its_fields_and_keeps_them_when_it_is_the_same() -> None:
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
        ("stages.align", 1, "'align' is a whole Stage; name one of its fields"),
        ("stages.align.losses.matching.weight", 1, "no element 'matching'"),
        ("stages.align.name.x", 1, "plain str, which has no fields"),
        ("stages.align.optim.peak_lr", "fast", "peak_lr must be float, got 'fast'"),
        ("stages.align.budget.steps", 1.5, "steps must be int, got 1.5"),
        ("stages.align.budget.steps", True, "steps must be int, got True"),
        ("stages.align.model.tied", "maybe", "tied must be bool, got 'maybe'"),
        ("stages.align.model.name_of_lm", 3, "name_of_lm must be str, got 3"),
        ("stages.align.optim.betas", "0.9", "betas takes 2 values"),
        ("stages.align.optim.betas", 0.9, "betas takes a list of values"),
        ("stages.align.shard.precision", "bf61", "did you mean 'bf16'"),
        ("stages.align.model.bridge", "qformer", "qformer needs queries"),
        ("stages.align.model.bridge", "mpl", "no kind 'mpl'; did you mean 'mlp'"),
        ("stages.align.model.bridge", "mlp(deep=3)", "mlp has no field 'deep'; did you mean 'depth'"),
        ("stages.align.model.bridge", "mlp(3)", "cannot read 'mlp\\(3\\)'; write it like"),
        ("stages.align.model.bridge", "mlp(depth=3", "cannot read"),
        ("stages.align.model.bridge", "mlp(depth=3) + 1", "cannot read"),
        ("stages.align.model.bridge", 3, "3 is not one of linear, mlp, qformer"),
        ("stages.align.model.cut", "never", "none of int"),
        ("stages.align.model", "other", "holds a whole ModelSpec; name one of its fields"),
        ("stages.align.trains", "bridge", "takes a mapping such as"),
        ("stages.align.trains.bridge.*", "much", "must be float"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_hint(path: str, given: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        override(system(), {path: given})


# --- flat, to_dict, from_dict ----------------------------------------------------------------------------------------


def test_flat_gives_what_override_takes() -> None:
    assert override(system(), flat(system())) == system()
    for path, leaf in flat(system()).items():
        assert override(system(), {path: leaf}) == system(), path


def test_flat_of_a_variant_turns_the_system_into_it() -> None:
    changes = {"stages.*.model.bridge": "linear", "stages.align.optim.clip": 0.5, "stages.align.trains.x": 2.0}
    variant = override(system(), changes)
    assert override(system(), flat(variant)) == variant


def test_flat_as_words_of_a_command_line_gives_the_same_system() -> None:
    assert override(system(), {path: str(leaf) for path, leaf in flat(system()).items()}) == system()


def test_flat_names_kinds_and_leaves() -> None:
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
def test_a_recipe_of_another_version_is_refused(change: Mapping[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        from_dict(change)


def test_a_system_can_be_sent_to_another_process() -> None:
    assert pickle.loads(pickle.dumps(system())) == system()


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_in_a_fresh_interpreter() -> None:
    code = f"from {__name__} import system; print(system().fingerprint())"
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert run.stdout.strip() == system().fingerprint()


def test_fingerprint_differs_when_any_leaf_differs() -> None:
    other: dict[type, Callable[[Any], Any]] = {
        bool: lambda v: not v,
        int: lambda v: v + 8,
        float: lambda v: v + 0.25,
        str: lambda v: v + "x",
    }
    special: dict[str, Any] = {
        "bridge": "linear", "act": "relu", "cut": 3, "layer": 3, "grid": [3, 3], "rows": 9, "max_epochs": 2.0,
        "fit": "pad", "betas": [0.5, 0.5], "stage": 1, "precision": "fp32", "prompts": ["x"], "starts_from": None,
        "warmup": 0.5,
    }  # fmt: skip
    seen = {system().fingerprint()}
    leaves = {p: v for p, v in flat(system()).items() if p.rpartition(".")[2] != "name"}
    for path, leaf in leaves.items():
        word = path.rpartition(".")[2]
        new = special[word] if word in special else other[type(leaf)](leaf)
        new = "/an/artefact" if path.endswith("starts_from") else new
        extra = {"stages.align.optim.peak_lr": 1.0} if path == "stages.align.optim.final_lr" else {}
        extra = {"stages.instruct.optim.peak_lr": 1.0} if path == "stages.instruct.optim.final_lr" else extra
        seen.add(override(system(), {path: new} | extra).fingerprint())
    assert len(seen) == len(leaves) + 1


def test_fingerprint_tells_the_order_of_the_globs_apart() -> None:
    """The last glob that matches wins, so the order is part of the recipe."""
    stage = system().stages[1]
    turned = replace(stage, trains=dict(reversed(list(stage.trains.items()))))
    assert replace(system(), stages=(system().stages[0], turned)).fingerprint() != system().fingerprint()


# --- what cannot be a system -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trains": {}}, "align.trains is empty"),
        ({"losses": ()}, "align.losses is empty"),
        ({"budget": Budget(steps=1, batch=12)}, "batch 12 is not a multiple of data.lanes 8"),
        ({"evals": (Eval(), Eval())}, "the name 'heldout' stands twice"),
        ({"evals": (Eval(name="a.b"),)}, "'a.b' cannot be a name"),
    ],
)
def test_a_stage_that_cannot_run_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        replace(system()["align"], **change)


def test_a_stage_starts_from_an_earlier_stage_or_a_path() -> None:
    align, instruct = system().stages
    with pytest.raises(SpecError, match="neither an earlier stage nor a path; did you mean 'align'"):
        System(name="toy", paper="", stages=(align, replace(instruct, starts_from="allign")))
    with pytest.raises(SpecError, match="starts from 'align'"):
        System(name="toy", paper="", stages=(instruct, align))
    System(name="toy", paper="", stages=(replace(instruct, starts_from="runs/a/align/artefact"),))


def test_a_stage_is_found_by_name() -> None:
    assert system()["instruct"].starts_from == "align"
    with pytest.raises(SpecError, match="no stage 'instrct'; did you mean 'instruct'"):
        system()["instrct"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mixture(sources=()), "at least one source"),
        (lambda: Mixture(sources=(Source(name="a", dataset="x"),), alpha=3.0), r"alpha must lie in \[0, 2\]"),
        (lambda: Mixture(sources=(Source(name="a", dataset="x"),), lanes=0), "lanes must be at least 1"),
        (lambda: Mixture(sources=(Source(name="a", dataset="x", factor=0.0),)), "drop the source instead"),
        (lambda: Mixture(sources=(Source(name="a", dataset="x", max_epochs=0.0),)), "max_epochs must be above 0"),
        (lambda: Budget(steps=0, batch=1), "budget.steps must be at least 1"),
        (lambda: AdamW(peak_lr=0.0), "peak_lr must be above 0"),
        (lambda: AdamW(peak_lr=1e-3, final_lr=1e-2), "the cosine only decays"),
        (lambda: AdamW(peak_lr=1e-3, warmup=1.0), "warmup is a share"),
    ],
)
def test_numbers_out_of_range_are_refused(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


def test_tiny_shrinks_budgets_and_keeps_choices() -> None:
    tiny = system().tiny()
    assert [s.name for s in tiny.stages] == ["align", "instruct"]
    for before, after in zip(system().stages, tiny.stages, strict=True):
        assert (after.trains, after.losses, after.optim) == (before.trains, before.losses, before.optim)
        assert {s.dataset for s in after.data.sources} == {"synthetic:shapes"}
        assert after.budget.steps < before.budget.steps
        assert after.evals == (Eval(rows=4),)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A user's own recipe module, `lab.toy`, with two variants and things that are none."""
    code = f"""
from {__name__} import system
from bridgework.system import System, load
def small() -> System: return _part().tiny()
def _part() -> System: return system()
def of(steps: int) -> System: return system()
def helper(): return 1
"""
    module = types.ModuleType("lab.toy")
    exec(code, vars(module))
    monkeypatch.setitem(sys.modules, "lab", types.ModuleType("lab"))
    monkeypatch.setitem(sys.modules, "lab.toy", module)
    return module


@pytest.mark.usefixtures("lab")
def test_a_recipe_of_ones_own_loads_by_import_path() -> None:
    assert variants("lab.toy") == ["system", "small"]
    assert load("lab.toy") == load("lab.toy:system") == system()
    assert load("lab.toy:small") == system().tiny()
    with pytest.raises(SpecError, match="no variant 'smal'; did you mean 'small'"):
        load("lab.toy:smal")


@pytest.mark.parametrize("name", ["lava", "lab.nothing", "", ".", "../x", "llava/v1", ".llava"])
def test_an_unknown_system_is_refused(name: str) -> None:
    with pytest.raises(SpecError, match="there is no system"):
        load(name)


def test_a_misspelt_system_gets_a_suggestion() -> None:
    with pytest.raises(SpecError, match="there is no system 'lava'; did you mean 'llava'"):
        load("lava")
    assert "llava" in recipes()


def test_a_recipe_whose_import_fails_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "broken_lab"
    package.mkdir()
    (package / "recipe.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        load("broken_lab.recipe")
