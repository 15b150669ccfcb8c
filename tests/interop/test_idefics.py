"""Idefics against transformers: names, logits, loss, gradients, generation, round trips."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from bridgework.errors import SpecError, WeightsError
from bridgework.hf import idefics
from bridgework.hf.convert import export_hf, import_hf
from bridgework.models import GatesConfig, ViTConfig
from bridgework.models.cross_attention_vlm import CrossAttentionVLM
from bridgework.system import END, IGNORE, IMAGE
from bridgework.training.step import TrainingModule

VOCAB = 100
SHAPES: dict[str, dict[str, Any]] = {
    "small": {"cross_layer_interval": 1},
    "9b": {
        "qk_layer_norms": True,
        "cross_layer_interval": 2,
        "perceiver": {"qk_layer_norms_perceiver": True},
    },
    "vector": {"alpha_type": "vector", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
}
TOWER = {"embed_dim": 24, "image_size": 32, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 40}  # fmt: skip
PERCEIVER = {
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 2,
    "resampler_head_dim": 8,
}


def theirs(shape: str) -> Any:
    given = dict(SHAPES[shape])
    config = transformers.IdeficsConfig(
        vision_config=TOWER, perceiver_config=PERCEIVER | given.pop("perceiver", {}), use_resampler=True,
        vocab_size=VOCAB, additional_vocab_size=2, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        **given,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.IdeficsForVisionText2Text(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(True).add_(
                (0.5 if "alpha" in name else 0.1) * torch.randn_like(parameter)
            )
    return model.eval()


def ours(model: Any) -> CrossAttentionVLM:
    spec = idefics.model_config(model.config)
    state, built = model.state_dict(), spec.build()
    built.load_state_dict(
        {own: state[name] for own, name in idefics.tensor_names(spec).items()}, strict=False
    )
    return built.eval()


def examples() -> tuple[Tensor, Tensor, Tensor]:
    """Return ids, attention and uint8 images: text before the first image, two images in a row, and padding."""
    ids = torch.tensor(
        [[5, 6, IMAGE, 7, 8, END, IMAGE, 9, 10], [IMAGE, 11, 12, 13, END, 0, 0, 0, 0]]
    )
    attention = torch.ones(2, 9, dtype=torch.bool)
    attention[1, 5:] = False
    generator = torch.Generator().manual_seed(1)
    return (
        ids,
        attention,
        torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=generator),
    )


def inputs_of_theirs(
    spec: Any, ids: Tensor, attention: Tensor, images: Tensor
) -> dict[str, Tensor]:
    look, places = spec.pixels, ids == IMAGE
    normal = (images / 255 - torch.tensor(look.mean).view(3, 1, 1)) / torch.tensor(look.std).view(
        3, 1, 1
    )
    rows = torch.zeros(2, 2, 3, 32, 32)
    rows[0, 0], rows[0, 1], rows[1, 0] = normal
    return {
        "input_ids": ids.masked_fill(ids == END, VOCAB).masked_fill(places, VOCAB + 1),
        "attention_mask": attention.long(),
        "pixel_values": rows,
        "image_attention_mask": (places.cumsum(-1).unsqueeze(-1) == torch.arange(1, 3)).long(),
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_names_are_a_bijection_on_all_parameters(shape: str) -> None:
    model = theirs(shape)
    names = idefics.tensor_names(idefics.model_config(model.config))
    assert set(names.values()) == {name for name, _ in model.named_parameters()}
    assert len(set(names.values())) == len(names)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_agree(shape: str) -> None:
    model = theirs(shape)
    built, spec, (ids, attention, images) = (
        ours(model),
        idefics.model_config(model.config),
        examples(),
    )
    labels = ids.masked_fill(~attention | (ids == IMAGE), IGNORE)
    outputs, loss = built(ids, attention, labels, images), idefics.stage(spec).losses[0]
    mean = loss(outputs).sum() / loss.count(labels).sum()
    mean.backward()
    given = inputs_of_theirs(spec, ids, attention, images)
    expected = model(**given)
    targets = labels.masked_fill(labels == END, VOCAB)[:, 1:]
    their_mean = torch.nn.functional.cross_entropy(
        expected.logits[:, :-1].flatten(0, 1), targets.flatten()
    )
    their_mean.backward()
    torch.testing.assert_close(
        outputs.logits_BTV[attention], expected.logits[attention], atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(mean, their_mean, atol=1e-5, rtol=1e-5)
    for own, name in idefics.tensor_names(spec).items():
        grads = built.get_parameter(own).grad, model.get_parameter(name).grad
        if grads[0] is not None or grads[1] is not None:  # CLIP's last norm is read by neither
            torch.testing.assert_close(
                *grads, atol=1e-4, rtol=1e-3, msg=lambda m, own=own: f"{own}: {m}"
            )


def test_greedy_text_agrees() -> None:
    model = theirs("9b")
    built, spec, (ids, attention, images) = (
        ours(model),
        idefics.model_config(model.config),
        examples(),
    )
    new = built.generate(ids[:1], attention[:1], images[:2], max_new_tokens=5, do_sample=False)
    given = {
        name: value[:1] for name, value in inputs_of_theirs(spec, ids, attention, images).items()
    }
    expected = model.generate(
        **given, max_new_tokens=5, do_sample=False, suppress_tokens=[VOCAB + 1]
    )
    assert torch.equal(new, expected[:, ids.shape[1] :])


@pytest.mark.parametrize("shape", SHAPES)
def test_config_round_trip_is_equal(shape: str, tmp_path: Path) -> None:
    spec = idefics.model_config(theirs(shape).config)
    again = idefics.hf_config(spec)
    assert idefics.model_config(again) == spec
    model: Any = transformers.IdeficsForVisionText2Text(again)
    names = idefics.tensor_names(spec)
    state = {names[name]: parameter for name, parameter in spec.build().named_parameters()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and (not missing or spec.language.tied)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert loaded.architectures == list(idefics.ARCHITECTURES)
    assert idefics.model_config(loaded).language.tokenizer == str(tmp_path)


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip_is_bit_equal_with_a_certificate(shape: str, tmp_path: Path) -> None:
    theirs(shape).save_pretrained(tmp_path / "in")
    assert import_hf(tmp_path / "in", tmp_path / "artifact").differences["logits"] <= 1e-5
    assert export_hf(tmp_path / "artifact", tmp_path / "out").holds
    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_stage_has_the_config_and_computes_its_loss() -> None:
    stage = idefics.stage(idefics.model_config(theirs("small").config))
    assert (stage.data.template, stage.evals, stage.budget.steps) == ("interleaved", (), 1)
    assert TrainingModule(stage.model.build(), stage.losses).requested == {"logits"}


def test_models_that_transformers_lacks_are_rejected() -> None:
    config = theirs("small").config
    spec = idefics.model_config(config)
    with pytest.raises(SpecError, match="Got gates"):
        idefics.hf_config(replace(spec, gates=GatesConfig()))
    with pytest.raises(SpecError, match=r"which gates\.every must divide"):
        idefics.hf_config(replace(spec, gates=replace(spec.gates, every=3)))
    with pytest.raises(SpecError, match="CLIP ViT"):
        idefics.hf_config(replace(spec, vision=ViTConfig(kind="siglip", layer=-1)))
    config.use_resampler = False
    with pytest.raises(WeightsError, match=r"use_resampler is not supported\. Got False"):
        idefics.model_config(config)
