"""Artifacts: exact, complete weights, without tensors that pretrained weights restore."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bridgework import artifacts
from bridgework.config import override
from bridgework.errors import WeightsError
from bridgework.mixture import DatasetInput
from bridgework.models import EfficientNetConfig, base
from bridgework.system import System
from tests.training.support import fresh, llava, same

SYSTEM = llava()
DATA = (DatasetInput("shapes", "d" * 64, "/data/shapes", 256),)


def bridge() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        n: torch.randn_like(t)
        for n, t in fresh(SYSTEM["align"]).state_dict().items()
        if n.startswith("bridge.")
    }


def saved(tmp_path: Path, state: Mapping[str, Tensor], system: System = SYSTEM) -> Path:
    artifacts.save(
        tmp_path / "artifact", state, system=system, stage="align", datasets=DATA, steps=4
    )
    return tmp_path / "artifact"


def whole(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    state = fresh(SYSTEM["align"]).state_dict()
    return saved(tmp_path, state), state


def test_weights_round_trip_is_exact(tmp_path: Path) -> None:
    folder, state = whole(tmp_path)
    state_back = artifacts.load(folder).model.state_dict()
    assert same(artifacts.weights(folder), state)
    assert same(dict(state_back), state)


def test_loaded_model_is_in_eval_mode(tmp_path: Path) -> None:
    loaded = artifacts.load(whole(tmp_path)[0])
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.stage == SYSTEM["align"]


def test_recipe_round_trip(tmp_path: Path) -> None:
    folder = saved(tmp_path, bridge())
    assert artifacts.recipe(folder) == SYSTEM
    assert (
        artifacts.recipe(folder).fingerprint()
        == artifacts.describe(folder).fingerprint
        == SYSTEM.fingerprint()
    )


def test_artifact_records_its_origin(tmp_path: Path) -> None:
    info = artifacts.describe(saved(tmp_path, bridge()))
    assert (info.system, info.stage, info.steps, info.datasets, info.parent) == (
        SYSTEM.name,
        "align",
        4,
        DATA,
        None,
    )
    assert (info.tensors, info.parameters) == (
        len(bridge()),
        sum(t.numel() for t in bridge().values()),
    )


@pytest.mark.parametrize("at", [0, 200, -1])
def test_edited_weights_are_rejected(tmp_path: Path, at: int) -> None:
    folder, _ = whole(tmp_path)
    content = bytearray((folder / "weights.safetensors").read_bytes())
    content[at] ^= 1
    (folder / "weights.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.safetensors .*sha256 differs"):
        artifacts.load(folder)


@pytest.mark.parametrize("name", ["weights.safetensors", "recipe.json", "artifact.json"])
def test_missing_file_is_in_the_error(tmp_path: Path, name: str) -> None:
    folder, _ = whole(tmp_path)
    (folder / name).unlink()
    with pytest.raises(WeightsError, match=name):
        artifacts.load(folder)


def test_weights_that_are_not_safetensors_are_rejected(tmp_path: Path) -> None:
    folder, _ = whole(tmp_path)
    (folder / "weights.safetensors").write_bytes(b"no weights")
    about = json.loads((folder / "artifact.json").read_text())
    digest = hashlib.sha256(b"no weights").hexdigest()
    (folder / "artifact.json").write_text(json.dumps(about | {"digest": digest}))
    with pytest.raises(WeightsError, match="cannot be read"):
        artifacts.load(folder)


def test_fields_of_another_version_are_rejected(tmp_path: Path) -> None:
    folder, _ = whole(tmp_path)
    (folder / "artifact.json").write_text("{}")
    with pytest.raises(WeightsError, match="does not have the fields of this version"):
        artifacts.describe(folder)


def test_other_shapes_are_in_the_error(tmp_path: Path) -> None:
    state = fresh(SYSTEM["align"]).state_dict() | {"bridge.linear_1.bias": torch.zeros(3)}
    with pytest.raises(
        WeightsError, match=r"shapes differ: bridge\.linear_1\.bias \[3\] against \[32\]"
    ):
        artifacts.load(saved(tmp_path, state))


def test_extra_tensors_are_in_the_error(tmp_path: Path) -> None:
    state = fresh(SYSTEM["align"]).state_dict() | {f"extra.{i}": torch.zeros(1) for i in range(5)}
    with pytest.raises(
        WeightsError, match=r"the model has no extra\.0, extra\.1, extra\.2 and 2 more"
    ):
        artifacts.load(saved(tmp_path, state))


def test_missing_tensors_are_in_the_error(tmp_path: Path) -> None:
    state = fresh(SYSTEM["align"]).state_dict()
    del state["bridge.linear_2.bias"]
    with pytest.raises(WeightsError, match=r"lacks bridge\.linear_2\.bias"):
        artifacts.load(saved(tmp_path, state))


def test_tied_weights_are_saved_once_and_restored(tmp_path: Path) -> None:
    system = override(SYSTEM, {"stages.*.model.language.tied": True})
    model = fresh(system["align"])
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = artifacts.tensors_to_save(system["align"], model.state_dict(), [], [])
    folder = saved(tmp_path, {n: own[n].detach() for n in names if n in own}, system)
    assert "language.lm_head.weight" not in artifacts.weights(folder)
    assert same(dict(artifacts.load(folder).model.state_dict()), dict(model.state_dict()))


def test_artifact_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    one = torch.zeros(4)
    with pytest.raises(RuntimeError):  # safetensors refuses two names for one memory
        saved(tmp_path, {"a": one, "b": one})
    assert list(tmp_path.iterdir()) == []


def test_failed_save_keeps_the_older_artifact(tmp_path: Path) -> None:
    folder, one = saved(tmp_path, bridge()), torch.zeros(4)
    with pytest.raises(RuntimeError):
        saved(tmp_path, {"a": one, "b": one})
    assert same(artifacts.weights(folder), bridge())
    assert list(tmp_path.iterdir()) == [folder]


def test_newer_artifact_replaces_the_older_one(tmp_path: Path) -> None:
    saved(tmp_path, {"old": torch.zeros(1)})
    assert same(artifacts.weights(saved(tmp_path, bridge())), bridge())
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_frozen_pretrained_tensors_are_not_saved() -> None:
    stage = override(SYSTEM, {"stages.*.model.vision": EfficientNetConfig(image_size=64)})["align"]
    model = stage.model.build(pretrained=False)
    kept = artifacts.tensors_to_save(
        stage, model.state_dict(), base.set_trainable(model, stage.trains), []
    )
    assert {name.split(".")[0] for name in kept} == {"bridge", "language"}


def test_trained_or_inherited_pretrained_tensors_are_saved() -> None:
    stage = override(SYSTEM, {"stages.*.model.vision": EfficientNetConfig(image_size=64)})["align"]
    names = ["vision.a", "vision.b", "vision.c", "bridge.d"]
    assert artifacts.tensors_to_save(stage, names, ["vision.a"], ["vision.b"]) == [
        "vision.a",
        "vision.b",
        "bridge.d",
    ]


def test_folder_that_is_not_an_artifact_is_rejected_with_a_fix(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=r"is not an artifact .* give the folder that a finished stage wrote"
    ):
        artifacts.describe(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be read"):
        artifacts.describe(tmp_path / "file")


def test_parent_is_recorded_by_its_digest(tmp_path: Path) -> None:
    parent = artifacts.save(tmp_path / "one", bridge(), system=SYSTEM, stage="align")
    child = artifacts.save(
        tmp_path / "two", bridge(), system=SYSTEM, stage="instruct", parent=parent.digest
    )
    assert artifacts.describe(tmp_path / "two").parent == parent.digest
    assert replace(child, datasets=()) == artifacts.describe(tmp_path / "two")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nonfinite_weights_are_neither_saved_nor_loaded(
    tmp_path: Path, value: float, dtype: torch.dtype
) -> None:
    folder = saved(tmp_path / "sound", bridge())
    state = {name: tensor.to(dtype) for name, tensor in bridge().items()}
    name = sorted(state)[0]
    state[name].view(-1)[0] = value
    with pytest.raises(
        WeightsError, match=f"Got NaN or infinity in 1 of {len(state)} tensors: {name}"
    ):
        saved(tmp_path / "wrong", state)
    assert not (tmp_path / "wrong").exists()
    save_file(state, folder / "weights.safetensors")  # by another program, with the right digest
    said = json.loads((folder / "artifact.json").read_text())
    digest = hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "artifact.json").write_text(json.dumps(said | {"digest": digest}))
    with pytest.raises(WeightsError, match=r"weights\.safetensors: not all numbers are finite"):
        artifacts.weights(folder)


def test_largest_finite_numbers_are_valid_weights(tmp_path: Path) -> None:
    """The difference of the extremes of float16 is not a float16."""
    state = {
        "bridge.x": torch.tensor([65504.0, -65504.0], dtype=torch.float16),
        "bridge.y": torch.zeros(0),
    }
    assert same(artifacts.weights(saved(tmp_path, state)), state)


def test_weights_file_has_the_permissions_of_the_other_files(tmp_path: Path) -> None:
    folder = saved(tmp_path, bridge())
    modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
    assert len(set(modes.values())) == 1, modes
