"""Systems: fingerprint, validation, and loading by name."""

import math
import os
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridgework.config import flat, from_dict, override, to_dict
from bridgework.errors import SpecError
from bridgework.system import (
    AdamW,
    Budget,
    Mixture,
    Packing,
    Source,
    System,
    load,
    recipes,
    variants,
)
from tests.toy import Curation, Eval, system

# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_same_in_a_fresh_interpreter() -> None:
    code = "from tests.toy import system; print(system().fingerprint())"
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": path}
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
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
        "warmup": 0.5, "decay": "constant", "init_params": ["x"], "loss_weight": 0.5, "images": 5, "packing": Packing(),
        "curation": Curation(),
    }  # fmt: skip
    seen = {system().fingerprint()}
    leaves = {
        p: v for p, v in flat(system()).items() if p.rpartition(".")[2] not in ("name", "by_image")
    }
    for path, leaf in leaves.items():
        word = path.rpartition(".")[2]
        new = special[word] if word in special else other[type(leaf)](leaf)
        new = "/an/artifact" if path.endswith("starts_from") else new
        extra = {"stages.align.optim.peak_lr": 1.0} if path == "stages.align.optim.final_lr" else {}
        extra = (
            {"stages.instruct.optim.peak_lr": 1.0}
            if path == "stages.instruct.optim.final_lr"
            else extra
        )
        if word == "loss_weight":  # of all sources or of none
            extra = {f"{path.rpartition('.sources.')[0]}.sources.*.loss_weight": 1.0}
        seen.add(override(system(), extra | {path: new}).fingerprint())
    assert len(seen) == len(leaves) + 1


OPTIONS = {"micro", "max_bad", "rows", "paper"}  # and whatever an evaluation has


def test_identity_differs_exactly_if_the_training_result_does() -> None:
    assert system().identity() == from_dict(to_dict(system())).identity()
    for path, leaf in flat(system()).items():
        word, option = path.rpartition(".")[2], ".evals." in path
        changes: dict[str, Any] = {
            "steps": 77,
            "micro": 3,
            "max_bad": 0.25,
            "rows": 7,
            "paper": "x",
            "seed": 9,
            "eps": 1e-3,
        }
        if word in changes or option:
            new = changes.get(word, "x" if isinstance(leaf, str) else 11)
            other = override(system(), {path: new})
            assert other.fingerprint() != system().fingerprint(), path
            assert (other.identity() == system().identity()) == (option or word in OPTIONS), path


def test_fingerprint_depends_on_the_order_of_globs() -> None:
    """The last glob that matches wins, so the order is part of the recipe."""
    stage = system().stages[1]
    turned = replace(stage, trains=dict(reversed(list(stage.trains.items()))))
    assert (
        replace(system(), stages=(system().stages[0], turned)).fingerprint()
        != system().fingerprint()
    )


def test_by_image_is_only_for_losses_that_compare_images() -> None:
    retrieval = load("blip2:retrieval")
    other = override(retrieval, {"stages.retrieval.data.by_image": "false"})
    assert other.fingerprint() != retrieval.fingerprint() and "by_image" not in to_dict(
        other["retrieval"].data
    )
    with pytest.raises(
        SpecError,
        match=r"align\.data\.by_image is for losses that compare images, and none of LanguageModeling",
    ):
        override(load("llava"), {"stages.align.data.by_image": "true"})


# --- what cannot be a system -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trains": {}}, "align.trains is empty"),
        ({"losses": ()}, "align.losses is empty"),
        ({"budget": Budget(steps=1, batch=12)}, "batch 12 is not a multiple of data.lanes 8"),
        ({"evals": (Eval(), Eval())}, "the name 'heldout' is used twice"),
        ({"evals": (Eval(name="a.b"),)}, "'a.b' cannot be a name"),
    ],
)
def test_invalid_stage_is_rejected(change: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        replace(system()["align"], **change)


def test_a_stage_starts_from_an_earlier_stage_or_a_path() -> None:
    align, instruct = system().stages
    with pytest.raises(
        SpecError, match="neither an earlier stage nor a path; did you mean 'align'"
    ):
        System(name="toy", paper="", stages=(align, replace(instruct, starts_from="allign")))
    with pytest.raises(SpecError, match="starts from 'align'"):
        System(name="toy", paper="", stages=(instruct, align))
    System(name="toy", paper="", stages=(replace(instruct, starts_from="runs/a/align/artifact"),))


def test_a_curation_uses_earlier_stages_and_makes_what_its_stage_reads() -> None:
    align, instruct = system().stages
    with pytest.raises(
        SpecError, match="makes 'cc3', which none of the stage's sources reads; did you mean 'cc3m'"
    ):
        replace(instruct, curation=Curation(makes="cc3"))
    with pytest.raises(
        SpecError, match="uses 'allign', which is not an earlier stage; did you mean 'align'"
    ):
        System(
            name="toy",
            paper="",
            stages=(align, replace(instruct, curation=Curation(stage="allign"))),
        )
    with pytest.raises(SpecError, match="uses 'instruct', which is not an earlier stage"):
        System(
            name="toy",
            paper="",
            stages=(align, replace(instruct, curation=Curation(stage="instruct"))),
        )
    System(
        name="toy", paper="", stages=(align, replace(instruct, curation=Curation(stage="align")))
    )


def test_tiny_keeps_the_curated_dataset_and_shrinks_its_sources() -> None:
    tiny = replace(system()["align"], curation=Curation()).tiny()
    assert [source.dataset for source in tiny.data.sources] == ["cc3m", "synthetic:shapes"]
    assert tiny.curation is not None and tiny.curation.sources == ("synthetic:shapes",)


def test_curation_is_overridden_and_serialized() -> None:
    align, instruct = system().stages
    toy = System(
        name="toy", paper="", stages=(align, replace(instruct, curation=Curation(stage="align")))
    )
    assert from_dict(to_dict(toy)) == toy and flat(toy)["stages.instruct.curation.sources"] == [
        "raw"
    ]
    changed = override(toy, {"stages.instruct.curation.sources": "a,b"})
    assert changed["instruct"].curation == Curation(stage="align", sources=("a", "b"))
    assert override(toy, {"stages.instruct.curation": "none"})["instruct"].curation is None
    with pytest.raises(SpecError, match="no field 'source'; did you mean 'sources'"):
        override(toy, {"stages.instruct.curation.source": "a"})


def test_a_stage_is_found_by_name() -> None:
    assert system()["instruct"].starts_from == "align"
    with pytest.raises(SpecError, match="no stage 'instrct'; did you mean 'instruct'"):
        system()["instrct"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mixture(sources=()), "at least one source"),
        (
            lambda: Mixture(sources=(Source(name="a", dataset="x"),), alpha=3.0),
            r"alpha is out of range",
        ),
        (
            lambda: Mixture(sources=(Source(name="a", dataset="x"),), lanes=0),
            "lanes must be at least 1",
        ),
        (
            lambda: Mixture(sources=(Source(name="a", dataset="x", factor=0.0),)),
            "drop the source instead",
        ),
        (
            lambda: Mixture(sources=(Source(name="a", dataset="x", max_epochs=0.0),)),
            "max_epochs must be above 0",
        ),
        (lambda: Budget(steps=0, batch=1), "budget.steps must be at least 1"),
        *[
            (
                lambda name=name, value=value: AdamW(**{"peak_lr": 1e-3, name: value}),
                rf"optim\.{name}\S* must be .*got",
            )
            for name, values in {
                "peak_lr": (0.0, -1.0, 1e39, math.inf, math.nan),
                "final_lr": (-1e-9, math.nan, -math.inf),
                "eps": (0.0, -1e-8, 1e-40, math.nan, math.inf),
                "clip": (-1.0, math.nan, math.inf),
                "weight_decay": (-0.1, math.nan, math.inf, 1e39),
                "betas": ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), (0.9, 2.0)),
            }.items()
            for value in values
        ],
        (lambda: AdamW(peak_lr=1e-3, warmup=math.nan), "warmup is a share"),
        (
            lambda: Source(name="a", dataset="x", factor=math.inf),
            "factor must be above 0 and finite",
        ),
        (
            lambda: Source(name="a", dataset="x", factor=math.nan),
            "factor must be above 0 and finite",
        ),
        (lambda: Source(name="a", dataset="x", max_epochs=math.nan), "max_epochs must be above 0"),
        (
            lambda: Source(name="a", dataset="x", loss_weight=math.nan),
            "loss_weight must be at least 0",
        ),
        (
            lambda: replace(system()["align"], trains={"bridge.*": math.inf}),
            r"align\.trains\['bridge\.\*'\] must be",
        ),
        (
            lambda: replace(system()["align"], trains={"bridge.*": -1.0}),
            r"align\.trains\['bridge\.\*'\] must be",
        ),
        (lambda: AdamW(peak_lr=0.0), "peak_lr must be above 0"),
        (lambda: AdamW(peak_lr=1e-3, final_lr=1e-2), "the rate only decays"),
        (lambda: AdamW(peak_lr=1e-3, warmup=1.0), "warmup is a share"),
    ],
)
def test_numbers_out_of_range_are_rejected(make: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make()


def test_tiny_shrinks_budgets_and_keeps_choices() -> None:
    tiny = system().tiny()
    assert [s.name for s in tiny.stages] == ["align", "instruct"]
    for before, after in zip(system().stages, tiny.stages, strict=True):
        assert (after.trains, after.losses, after.optim) == (
            before.trains,
            before.losses,
            before.optim,
        )
        assert {s.dataset for s in after.data.sources} == {"synthetic:shapes"}
        assert after.budget.steps < before.budget.steps
        assert after.evals == (Eval(rows=4),)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Create a user's recipe module `lab.toy` with two variants and other functions."""
    code = """
from tests.toy import system
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
def test_user_recipe_loads_by_import_path() -> None:
    assert variants("lab.toy") == ["system", "small"]
    assert load("lab.toy") == load("lab.toy:system") == system()
    assert load("lab.toy:small") == system().tiny()
    with pytest.raises(SpecError, match="no variant 'smal'; did you mean 'small'"):
        load("lab.toy:smal")


@pytest.mark.parametrize("name", ["lava", "lab.nothing", "", ".", "../x", "llava/v1", ".llava"])
def test_unknown_system_is_rejected(name: str) -> None:
    with pytest.raises(SpecError, match="there is no system"):
        load(name)


def test_a_misspelt_system_gets_a_suggestion() -> None:
    with pytest.raises(SpecError, match="there is no system 'lava'; did you mean 'llava'"):
        load("lava")
    assert "llava" in recipes()


def test_failed_import_of_a_recipe_reports_the_missing_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "broken_lab"
    package.mkdir()
    (package / "recipe.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        SpecError,
        match=r"broken_lab\.recipe: the system exists, but its import failed in .*recipe\.py, line 1\. "
        "Got ModuleNotFoundError: No module named 'no_such_package'",
    ) as caught:
        load("broken_lab.recipe")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)
