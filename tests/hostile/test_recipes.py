"""Recipes and specs from outside: a right value, or one line; nothing is imported, called or unpickled for them."""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgework import artifacts
from bridgework.config import flat, from_dict, override, to_dict
from bridgework.data.importers import load as load_format
from bridgework.errors import BridgeworkError, DataError, SpecError, WeightsError
from bridgework.models import base
from bridgework.system import System, load
from tests import toy
from tests.hostile import recipes
from tests.training.support import fresh, llava


def line(read: Callable[[], object], kind: type[BridgeworkError] = SpecError) -> str:
    """The one line with which it is refused."""
    with pytest.raises(kind) as caught:
        read()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tiny() -> System:
    return llava()


# --- the command line ------------------------------------------------------------------------------------------------


def test_a_value_is_a_value_and_never_code(tmp_path: Path) -> None:
    system, mark = toy.system(), tmp_path / "harm"
    kept = 0
    for path in flat(system):
        for code in recipes.CODE:
            try:
                word = code.format(mark=str(mark))
                kept += word in flat(override(system, {path: word})).values()
            except SpecError as error:
                assert "\n" not in str(error).replace(word, "")
    assert not mark.exists()
    assert kept > 10  # as the text of a name, a dataset or a prompt


def test_any_value_at_any_path_is_taken_or_refused(tiny: System) -> None:
    outcomes = {"taken": 0, "refused": 0}
    for system, paths in ((toy.system(), "stages."), (tiny, "stages.align.model.")):
        for path in (path for path in flat(system) if path.startswith(paths)):
            for value in recipes.ODD:
                try:
                    override(system, {path: value})
                    outcomes["taken"] += 1
                except SpecError:
                    outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize("path", recipes.DEEP, ids=lambda path: repr(path[:40]))
def test_a_path_that_leads_nowhere_is_refused(path: str) -> None:
    line(lambda: override(toy.system(), {path: "1"}))


@pytest.mark.parametrize("what", recipes.NEARLY)
def test_what_was_meant_is_said(what: str) -> None:
    path, value, meant = recipes.NEARLY[what]
    assert f"did you mean {meant!r}?" in line(lambda: override(toy.system(), {path: value}))


@pytest.mark.parametrize(("path", "value"), recipes.OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(path: str, value: str) -> None:
    line(lambda: override(toy.system(), {path: value}))


@pytest.mark.parametrize("value", ["0", "-1"])
@pytest.mark.parametrize(
    "path",
    [
        f"model.{part}"
        for part in ("vision.heads", "vision.width", "vision.depth", "vision.patch_size")
    ]
    + [
        f"model.language.{part}"
        for part in ("heads", "kv_heads", "width", "depth", "ffn", "vocab", "context")
    ],
)
def test_a_tower_of_no_size_is_refused(path: str, value: str, tiny: System) -> None:
    line(lambda: override(tiny, {f"stages.align.{path}": value}))


def test_unknown_names_are_answered_with_known_ones() -> None:
    assert "did you mean 'llava'?" in line(lambda: load("lava"))
    assert "known: " in line(lambda: load("llava:v2"))
    assert "did you mean 'align'?" in line(lambda: llava()["allign"])
    assert "did you mean 'llava-json'?" in line(lambda: load_format("lava-json"), DataError)


# --- parts that do not fit -------------------------------------------------------------------------------------------


def test_a_glob_that_matches_nothing_is_refused(tiny: System) -> None:
    for globs in (
        {"brige.*": 1.0},
        {"bridge": 1.0},
        {"": 1.0},
        {"[": 1.0},
        {"bridge.*": 1.0, "x" * 10_000: 1.0},
    ):
        assert "matches no parameter" in line(
            partial(base.set_trainable, fresh(tiny["align"]), globs)
        )
    line(lambda: base.set_trainable(fresh(tiny["align"]), {"bridge.*": 0.0}))
    line(lambda: base.set_trainable(fresh(tiny["align"]), {"bridge.*": -1.0}))


def test_groups_that_do_not_divide_the_patches_are_refused(tiny: System) -> None:
    patches = tiny["align"].model.image_tokens
    assert str(patches) in line(
        lambda: override(tiny, {"stages.align.model.bridge": f"concat(group={patches - 1})"})
    )


def test_tiles_on_a_bridge_that_keeps_no_grid_are_refused(tiny: System) -> None:
    tiled = {"bridge": "qformer(queries=7)", "grids": "((1, 2),)", "tiles": "unpad"}
    line(
        lambda: override(
            tiny, {f"stages.align.model.{field}": value for field, value in tiled.items()}
        )
    )


def test_a_stage_does_not_start_from_another_shape(tiny: System, tmp_path: Path) -> None:
    wider = override(
        tiny, {"stages.*.model.language.width": "128", "stages.*.model.language.heads": "4"}
    )
    state = {n: t for n, t in fresh(tiny["align"]).state_dict().items() if n.startswith("bridge.")}
    artifacts.save(tmp_path / "artifact", state, system=tiny, stage="align")
    model = fresh(wider["instruct"])
    said = line(
        lambda: artifacts.load_into(model, artifacts.weights(tmp_path / "artifact"), "artifact"),
        WeightsError,
    )
    assert "bridge." in said and "shapes differ" in said


# --- recipe.json -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipes.NAMES, ids=lambda name: repr(name)[:40])
def test_a_recipe_names_specs_and_nothing_else(name: Any, tiny: System) -> None:
    whole = json.loads(json.dumps(to_dict(tiny)))
    for path in [(), ("stages", 0), ("stages", 0, "model"), ("stages", 0, "model", "bridge")]:
        line(partial(from_dict, recipes.put(whole, (*path, "_"), name)))
        line(
            partial(from_dict, recipes.put({"a": whole}, ("a", *path), {"_": name, "path": "harm"}))
        )


def test_a_recipe_imports_nothing_from_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "harmful_module.py").write_text(
        f"from bridgework.config import spec\nopen({str(tmp_path / 'harm')!r}, 'w').close()\n@spec\nclass Spec: ...\n"
    )
    assert "harmful_module" in line(lambda: from_dict({"_": "harmful_module:Spec"}))
    assert not (tmp_path / "harm").exists() and "harmful_module" not in sys.modules
    before = set(sys.modules)
    for name in ("antigravity:x", "this:s", "idlelib.idle:x", "turtledemo.__main__:x"):
        line(partial(from_dict, {"_": name}))
    assert set(sys.modules) == before


def test_any_value_anywhere_in_a_recipe_is_taken_or_refused(tiny: System) -> None:
    one = System(name="one", paper="none", stages=tiny.stages[:1])
    whole = json.loads(json.dumps(to_dict(one)))
    outcomes = {"taken": 0, "refused": 0}
    for path in recipes.places(whole):
        for value in recipes.VALUES:
            try:
                assert isinstance(from_dict(recipes.put(whole, path, value)), System)
                outcomes["taken"] += 1
            except SpecError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 100, outcomes


# --- an artifact's folder --------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tiny: System, tmp_path: Path) -> Path:
    state = {n: t for n, t in fresh(tiny["align"]).state_dict().items() if n.startswith("bridge.")}
    artifacts.save(tmp_path / "artifact", state, system=tiny, stage="align")
    return tmp_path / "artifact"


@pytest.mark.parametrize("name", recipes.NOT_JSON)
@pytest.mark.parametrize("file", ["artifact.json", "recipe.json"])
def test_an_artifact_that_says_nothing_sensible_is_refused(
    file: str, name: str, folder: Path
) -> None:
    (folder / file).write_bytes(recipes.NOT_JSON[name])
    line(lambda: artifacts.load(folder), BridgeworkError)


def test_weights_that_mean_harm_are_refused_and_not_unpickled(folder: Path, tmp_path: Path) -> None:
    info, mark = json.loads((folder / "artifact.json").read_text()), tmp_path / "harm"
    for data in recipes.weights(mark).values():
        (folder / "weights.safetensors").write_bytes(data)
        (folder / "artifact.json").write_text(
            json.dumps(info | {"digest": hashlib.sha256(data).hexdigest()})
        )
        line(lambda: artifacts.load(folder), WeightsError)
    assert not mark.exists()


@pytest.mark.parametrize("field", ["stage", "digest", "datasets", "parameters", "fingerprint"])
def test_an_artifact_with_odd_fields_is_read_or_refused(field: str, folder: Path) -> None:
    info = json.loads((folder / "artifact.json").read_text())
    for value in recipes.VALUES:
        (folder / "artifact.json").write_text(json.dumps(info | {field: value}))
        try:
            assert isinstance(artifacts.load(folder).model, torch.nn.Module)
        except BridgeworkError as error:
            assert re.search(r"\S", str(error)) and "\n" not in str(error)
