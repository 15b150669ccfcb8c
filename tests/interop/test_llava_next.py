"""LLaVA-NeXT against transformers: names, logits, loss, gradients over tiles, round trips."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from bridgework import artifacts
from bridgework.data.tiling import tile_image
from bridgework.errors import SpecError, WeightsError
from bridgework.hf import llava_next
from bridgework.hf.convert import export_hf, import_hf
from bridgework.models import LinearConfig, LoRAConfig, PrefixVLMConfig
from bridgework.models.origin import Origin
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE, IMAGE, Layout, System
from bridgework.training.step import TrainingModule
from tests.models.examples import stirred

WORD = 99  # the image token of transformers
SHAPES: dict[str, dict[str, Any]] = {
    "small": {},
    "mistral": {
        "text": {"model_type": "mistral", "num_key_value_heads": 2},
        "image_grid_pinpoints": [[64, 32], [32, 64], [64, 64]],
    },
    "deeper": {
        "vision": {"num_hidden_layers": 3, "hidden_act": "gelu"},
        "vision_feature_layer": -1,
    },
}
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]  # high, wide
TOWER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
}


def theirs(shape: str) -> Any:
    given = {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -2} | SHAPES[shape]
    vision = (
        TOWER
        | {"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8}
        | given.pop("vision", {})
    )
    text = TOWER | {
        "model_type": "llama",
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "num_key_value_heads": 4,
    }
    text |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | given.pop(
        "text", {}
    )
    config = transformers.LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=WORD, **given
    )
    torch.manual_seed(0)
    model: Any = transformers.LlavaNextForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def ours(model: Any) -> PrefixVLM:
    spec = llava_next.model_config(model.config)
    state, names = model.state_dict(), llava_next.tensor_names(spec)
    built = spec.build()
    built.load_state_dict({own: state[name] for own, name in names.items()})
    return built.eval()


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def examples(spec: PrefixVLMConfig) -> tuple[Tensor, Tensor, list[Tensor], list[Layout]]:
    """Return ids and attention of two rows with three images of different shapes, and their layouts."""
    cut = [tile_image(picture(*size), spec.pixels) for size in ((64, 64), (90, 33), (31, 80))]
    places = [[IMAGE] * spec.num_image_tokens(layout) for _, layout in cut]
    rows = [[5, *places[0], 6, *places[1], 7], [8, *places[2], 9, 10]]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    attention = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return (
        ids,
        attention,
        [torch.from_numpy(tiles) for tiles, _ in cut],
        [layout for _, layout in cut],
    )


def inputs_of_theirs(
    spec: PrefixVLMConfig, ids: Tensor, tiles: list[Tensor], layouts: list[Layout]
) -> dict[str, Tensor]:
    look, most = spec.pixels, max(map(len, tiles))
    mean, std = torch.tensor(look.mean).view(3, 1, 1), torch.tensor(look.std).view(3, 1, 1)
    normal = [(t / 255 - mean) / std for t in tiles]
    together = torch.stack(
        [torch.cat([t, torch.zeros(most - len(t), *t.shape[1:])]) for t in normal]
    )
    return {
        "input_ids": ids.masked_fill(ids == IMAGE, WORD),
        "pixel_values": together,
        "image_sizes": torch.tensor([[layout.height, layout.width] for layout in layouts]),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_a_bijection_on_all_keys(shape: str) -> None:
    model = theirs(shape)
    names = llava_next.tensor_names(llava_next.model_config(model.config))
    assert set(names.values()) == model.state_dict().keys()
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_agree_over_images_of_any_shape(shape: str) -> None:
    model = theirs(shape)
    built, spec = ours(model), llava_next.model_config(model.config)
    ids, attention, tiles, layouts = examples(spec)
    labels = ids.masked_fill(~attention | (ids == IMAGE), IGNORE)
    outputs = built(ids, attention, labels, torch.cat(tiles), layouts=torch.tensor(layouts))
    loss = llava_next.stage(spec).losses[0]
    mean = loss(outputs).sum() / loss.count(labels).sum()
    mean.backward()
    expected = model(
        **inputs_of_theirs(spec, ids, tiles, layouts),
        attention_mask=attention.long(),
        labels=labels,
    )
    expected.loss.backward()
    torch.testing.assert_close(
        outputs.logits_BTV[attention], expected.logits[attention], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(mean, expected.loss, atol=1e-5, rtol=1e-5)
    for own, name in llava_next.tensor_names(spec).items():
        if own.startswith(("tiles.", "bridge.")):
            grads = built.get_parameter(own).grad, model.get_parameter(name).grad
            torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-3)


def test_greedy_text_agrees() -> None:
    model = theirs("small")
    built, spec = ours(model), llava_next.model_config(model.config)
    ids, attention, tiles, layouts = examples(spec)
    given = inputs_of_theirs(spec, ids[:1], tiles[:2], layouts[:2])
    how: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    cut = torch.tensor(layouts[:2])
    new = built.generate(ids[:1], attention[:1], torch.cat(tiles[:2]), layouts=cut, **how)
    expected = model.generate(**given, attention_mask=attention[:1].long(), **how)
    assert torch.equal(new, expected[:, ids.shape[1] :])


@pytest.mark.parametrize("shape", SHAPES)
def test_config_round_trip_is_equal(shape: str, tmp_path: Path) -> None:
    spec = llava_next.model_config(theirs(shape).config)
    again = llava_next.hf_config(spec)
    assert llava_next.model_config(again) == spec
    model: Any = transformers.LlavaNextForConditionalGeneration(again)
    names = llava_next.tensor_names(spec)
    model.load_state_dict(
        {names[name]: tensor for name, tensor in spec.build().state_dict().items()}
    )
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures == list(llava_next.ARCHITECTURES)
    assert llava_next.model_config(loaded).language.tokenizer == str(tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_equal_with_a_certificate(shape: str, tmp_path: Path) -> None:
    theirs(shape).save_pretrained(tmp_path / "in")
    assert import_hf(tmp_path / "in", tmp_path / "artifact").differences["logits"] <= 1e-5
    assert export_hf(tmp_path / "artifact", tmp_path / "out").holds
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_adapters_are_exported_merged(tmp_path: Path) -> None:
    spec = llava_next.model_config(theirs("small").config)
    adapted = replace(spec, language=replace(spec.language, lora=LoRAConfig(rank=2, alpha=8)))
    torch.manual_seed(0)
    model = stirred(adapted.build()).eval()
    stage = llava_next.stage(adapted)
    system = System(name="s", paper="", stages=(stage,))
    artifacts.save(tmp_path / "artifact", model.state_dict(), system=system, stage=stage.name)
    assert export_hf(tmp_path / "artifact", tmp_path / "out").holds
    out: Any = transformers.LlavaNextForConditionalGeneration.from_pretrained(
        str(tmp_path / "out")
    ).eval()
    pair = llava_next.outputs(model, out, Origin())["logits"]
    torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in out.state_dict())


def test_stage_has_the_config_and_computes_its_loss() -> None:
    stage = llava_next.stage(llava_next.model_config(theirs("small").config))
    assert (stage.data.template, stage.evals, stage.budget.steps) == ("v1", (), 1)
    assert TrainingModule(stage.model.build(), stage.losses).requested == {"logits"}


def test_models_that_transformers_lacks_are_rejected() -> None:
    config = theirs("small").config
    spec = llava_next.model_config(config)
    for changed in (
        replace(spec, bridge=LinearConfig()),
        replace(spec, tiles="resample"),
        replace(spec, grids=()),
    ):
        with pytest.raises(SpecError, match="Expected a CLIP ViT, an MLP of two matrices"):
            llava_next.hf_config(changed)
    config.projector_hidden_act = "relu"
    with pytest.raises(WeightsError, match=r"projector_hidden_act is not supported\. Got relu"):
        llava_next.model_config(config)
