"""Import and export of transformers checkpoints: bit-equal tensors, certificate, one-line errors."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridgework import artifacts
from bridgework.errors import SpecError, WeightsError
from bridgework.hf.common import GREEDY_TOKENS
from bridgework.hf.convert import CERTIFICATE, certify, export_hf, families, import_hf
from bridgework.models.origin import Origin
from tests.interop.parity import models
from tests.interop.test_blip2 import theirs as blip2_theirs
from tests.interop.test_clip import SHAPES, theirs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    theirs("small").save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_bit_equal(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    model = theirs(shape).to(dtype)
    model.save_pretrained(tmp_path / "in")
    import_hf(tmp_path / "in", tmp_path / "artifact")
    export_hf(tmp_path / "artifact", tmp_path / "out")
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(
        torch.equal(tensor, after[name]) and tensor.dtype == after[name].dtype
        for name, tensor in before.items()
    )
    again = transformers.CLIPModel.from_pretrained(str(tmp_path / "out"), dtype="auto")
    assert again.dtype == dtype


def test_certificate_lists_the_compared_outputs(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "artifact")
    said = json.loads((tmp_path / "artifact" / CERTIFICATE).read_text())
    assert said["architecture"] == "CLIPModel"
    assert said["differences"].keys() == {"image", "text", "logits"}
    assert all(difference <= 1e-5 for difference in said["differences"].values())
    assert said["parameters"] == sum(p.numel() for p in theirs("small").parameters())
    assert artifacts.load(tmp_path / "artifact").stage.name == "contrast"


def test_folder_without_a_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no config\.json"):
        import_hf(tmp_path, tmp_path / "out")


def test_unknown_architecture_is_rejected_with_a_suggestion(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["CLIPModle"]}))
    with pytest.raises(
        WeightsError, match="'CLIPModle' is not supported; did you mean 'CLIPModel'"
    ):
        import_hf(folder, tmp_path / "out")


def test_config_without_architecture_is_rejected_with_the_supported_ones(
    folder: Path, tmp_path: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        WeightsError, match=r"no architecture. Expected one of Blip2For.*, CLIPModel, Idefics"
    ):
        import_hf(folder, tmp_path / "out")


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def dropped(state: dict[str, Tensor]) -> None:
    for name in sorted(state)[:12]:
        del state[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("text_projection.weight"), "missing text_projection.weight$"),
        (lambda state: state.update({"stray.weight": torch.zeros(2)}), "unexpected stray.weight$"),
        (
            lambda state: state.update({"logit_scale": torch.zeros(2)}),
            r"of another shape logit_scale \[2\] against",
        ),
        (dropped, r"missing logit_scale, text_model\.\S+, .* and 2 more$"),
    ],
    ids=["missing", "extra", "shape", "many"],
)
def test_mismatched_tensors_are_listed(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    rewritten(folder, change)
    with pytest.raises(WeightsError, match=f"is not a complete CLIPModel: {said}"):
        import_hf(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_truncated_file_is_rejected(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(WeightsError, match="cannot be read"):
        import_hf(folder, tmp_path / "out")


def test_pickled_weights_are_rejected(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"holds no \*\.safetensors\. Got pytorch_model\.bin"):
        import_hf(folder, tmp_path / "out")


def test_different_outputs_are_an_error() -> None:
    family, model = families()["CLIPModel"], theirs("small")
    other: Any = family.model_config(model.config).build()
    with pytest.raises(WeightsError, match="disagree"):
        certify(family, "CLIPModel", other, model, Origin())


@dataclass
class Writes:
    """A fake family whose models generate `ours` and `theirs`."""

    ours: list[list[int]]
    theirs: list[list[int]]

    def outputs(self, ours: Any, theirs: Any, said: Origin) -> dict[str, tuple[Tensor, Tensor]]:
        one = torch.ones(1)
        return {
            "logits": (one, one),
            "greedy": (torch.tensor(self.ours), torch.tensor(self.theirs)),
        }


def test_one_different_token_is_an_error() -> None:
    model = theirs("small")
    same: Any = Writes([[1, 2, 3]], [[1, 2, 3]])
    assert certify(same, "CLIPModel", model, model, Origin()).texts["greedy"].equal
    for other in ([[1, 2, 4]], [[1, 2]]):
        differs: Any = Writes([[1, 2, 3]], other)
        with pytest.raises(WeightsError, match=r"Got greedy \[\[1, 2, 3\]\] against"):
            certify(differs, "CLIPModel", model, model, Origin())


@pytest.mark.parametrize("architecture", sorted(families()))
def test_generated_texts_are_compared_for_every_architecture(
    architecture: str, tmp_path: Path
) -> None:
    """Compare features or vectors and logits for all, and texts for all that generate."""
    make = {type(model()).__name__: model for _, model in models()}[architecture]
    make().save_pretrained(tmp_path / "in")
    certificate = import_hf(tmp_path / "in", tmp_path / "artifact")
    said = json.loads((tmp_path / "artifact" / CERTIFICATE).read_text())
    assert certificate.differences.keys() & {"features", "image"}
    assert certificate.differences.keys() & {"logits", "match"}
    writes = architecture.endswith(
        ("ForConditionalGeneration", "ForQuestionAnswering", "ForVisionText2Text")
    )
    assert set(certificate.texts) == ({"greedy", "until_end"} if writes else set())
    assert all(text["equal"] and text["ours"] == text["theirs"] for text in said["texts"].values())
    assert not writes or {len(row) for row in said["texts"]["greedy"]["ours"]} == {GREEDY_TOKENS}


def test_generation_settings_do_not_change_the_comparison(tmp_path: Path) -> None:
    """Beams, penalties and end tokens of a released folder do not change the greedy text, and are kept."""
    model = blip2_theirs("llava")
    model.save_pretrained(tmp_path / "plain")
    model.generation_config.update(
        num_beams=3, do_sample=True, eos_token_id=list(range(60)), repetition_penalty=9.0
    )
    model.save_pretrained(tmp_path / "other")
    plain, other = (
        import_hf(tmp_path / name, tmp_path / f"{name}-artifact") for name in ("plain", "other")
    )
    assert plain.texts["greedy"] == other.texts["greedy"]
    assert {
        "num_beams": 3,
        "do_sample": True,
        "repetition_penalty": 9.0,
    }.items() <= other.generation.items()


def test_existing_folder_is_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(WeightsError, match=r"exists\. Fix: remove it first"):
        import_hf(folder, tmp_path / "out")


def test_export_as_another_architecture_is_rejected(folder: Path, tmp_path: Path) -> None:
    import_hf(folder, tmp_path / "artifact")
    with pytest.raises(SpecError, match="does not fit BlipModel"):
        export_hf(tmp_path / "artifact", tmp_path / "out", "BlipModel")


def test_every_architecture_names_a_class_of_transformers() -> None:
    assert all(hasattr(transformers, architecture) for architecture in families())
