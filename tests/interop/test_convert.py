"""Folders of transformers in and out: bit-equal tensors, a certificate, and one line for what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bridgework.errors import SpecError, WeightsError
from bridgework.interop.convert import CERTIFICATE, certify, export_hf, families, import_hf
from bridgework.training import artefact
from tests.interop.test_clip import SHAPES, theirs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs("small").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_in_and_out_again_gives_the_same_bits(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    model = theirs(shape).to(dtype)
    model.save_pretrained(tmp_path / "in")
    import_hf(tmp_path / "in", tmp_path / "artefact")
    export_hf(tmp_path / "artefact", tmp_path / "out")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype for name, tensor in before.items()
    )
    again = transformers.CLIPModel.from_pretrained(str(tmp_path / "out"), dtype="auto")
    assert again.dtype == dtype


def test_the_certificate_says_what_was_compared(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "artefact")
    said = json.loads((tmp_path / "artefact" / CERTIFICATE).read_text())
    assert said["architecture"] == "CLIPModel"
    assert said["differences"].keys() == {"image", "text", "logits"}
    assert all(difference <= 1e-5 for difference in said["differences"].values())
    assert said["parameters"] == sum(p.numel() for p in theirs("small").parameters())
    assert artefact.load(tmp_path / "artefact").stage.name == "contrast"


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds no config\.json"):
        import_hf(tmp_path, tmp_path / "out")


def test_an_unknown_architecture_is_refused_with_a_suggestion(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPModle"]}))
    with pytest.raises(WeightsError, match="'CLIPModle' is not known here; did you mean 'CLIPModel'"):
        import_hf(folder, tmp_path / "out")


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_keys_too_few_or_too_many_are_listed(folder: Path, tmp_path: Path, change: str) -> None:
    state = load_file(folder / "model.safetensors")
    if change == "missing":
        del state["text_projection.weight"]
    else:
        state["stray.weight"] = torch.zeros(2)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"missing": "missing text_projection.weight", "extra": "unexpected stray.weight"}[change]
    with pytest.raises(WeightsError, match=said):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_outputs_that_disagree_are_no_certificate() -> None:
    family, model = families()["CLIPModel"], theirs("small")
    other: Any = family.spec(model.config).build()
    with pytest.raises(WeightsError, match="disagree"):
        certify(family, "CLIPModel", other, model)


def test_what_is_there_is_not_written_over(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match="exists; remove it first"):
        import_hf(folder, tmp_path / "out")


def test_an_artefact_is_not_exported_as_another_architecture(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "artefact")
    with pytest.raises(SpecError, match="is no BlipModel"):
        export_hf(tmp_path / "artefact", tmp_path / "out", "BlipModel")


def test_every_architecture_names_a_class_of_transformers() -> None:
    assert all(hasattr(transformers, architecture) for architecture in families())
