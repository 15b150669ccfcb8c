"""MED against transformers' BLIP, which was checked against the release: names, logits, texts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
)

from bridgework.errors import SpecError, WeightsError
from bridgework.hf import blip
from bridgework.hf.common import config_diff
from bridgework.hf.convert import export_hf, import_hf
from bridgework.losses.language_modeling import language_modeling
from bridgework.models import EfficientNetConfig, MomentumConfig
from bridgework.models.blip_med import MED
from bridgework.system import IGNORE
from tests.models.med_examples import CLS, SEP, pairs, spec

DEC, ENC = 260, 261


def config(architecture: str) -> Any:
    """Return a tiny BlipConfig in which every number differs from the defaults."""
    return BlipConfig(
        text_config={
            "vocab_size": 262, "hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 48,
            "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 40, "bos_token_id": DEC,
            "eos_token_id": None, "pad_token_id": 257, "sep_token_id": SEP,
        },
        vision_config={
            "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8, "layer_norm_eps": 1e-5, "initializer_range": 0.2,
        },
        image_text_hidden_size=16,
        architectures=[architecture],
    )  # fmt: skip


def both(architecture: str) -> tuple[MED, Any]:
    """Return our model with the weights of transformers', and the latter, in eval mode."""
    torch.manual_seed(0)
    theirs = getattr(transformers, architecture)(config(architecture)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    wiring = blip.model_config(theirs.config)
    ours = wiring.build().eval()
    parameters = dict(theirs.named_parameters())
    names = blip.tensor_names(wiring)
    ours.load_state_dict({own: parameters[other].detach() for own, other in names.items()})
    return ours, theirs


def normal(model: MED, pixels: Tensor) -> Tensor:
    look = model.config.pixels
    return (pixels / 255 - torch.tensor(look.mean).view(3, 1, 1)) / torch.tensor(look.std).view(
        3, 1, 1
    )


@pytest.mark.parametrize("architecture", blip.ARCHITECTURES)
def test_names_are_one_to_one_and_shapes_agree(architecture: str) -> None:
    wiring = blip.model_config(config(architecture))
    theirs = getattr(transformers, architecture)(config(architecture))
    ours, names = wiring.build(), blip.tensor_names(wiring)
    own, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert set(names) == set(own) and sorted(names.values()) == sorted(other)
    assert all(own[name].shape == other[theirs_].shape for name, theirs_ in names.items())
    assert set(ours.state_dict()) == set(own), "no tensor has two names"


@pytest.mark.parametrize("architecture", blip.ARCHITECTURES)
def test_config_round_trip_is_equal(architecture: str) -> None:
    """Except for special ids, which an import keeps, and the initialization."""
    theirs = config(architecture)
    back = blip.hf_config(blip.model_config(theirs))
    assert back.architectures == [architecture] and back.image_text_hidden_size == 16
    differ = set(config_diff(back, theirs))
    assert differ == {
        "vision_config.initializer_range",
        "text_config.pad_token_id",
        "text_config.sep_token_id",
    }


def test_caption_logits_loss_and_gradients_match_transformers() -> None:
    ours, theirs = both("BlipForConditionalGeneration")
    ids, attention, labels, pixels = pairs(asked=2)
    logits = ours(ids, attention, labels, pixels).logits_BTV
    loss = language_modeling(logits, labels, 0.1).sum() / (labels[:, 1:] != IGNORE).sum()
    theirs.text_decoder.label_smoothing = 0.1
    begun = ids.clone()
    begun[:, 0] = DEC
    expected = theirs(
        pixel_values=normal(ours, pixels),
        input_ids=begun,
        attention_mask=attention.long(),
        labels=labels,
    )
    torch.testing.assert_close(logits[attention], expected.logits[attention], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected.loss.backward()
    other = dict(theirs.named_parameters())
    for name, theirs_ in blip.tensor_names(ours.config).items():
        torch.testing.assert_close(
            ours.get_parameter(name).grad, other[theirs_].grad, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("prompt", [[CLS], [CLS, 97, 98]], ids=["bare", "prompted"])
def test_generated_caption_matches_transformers(prompt: list[int], beams: int) -> None:
    ours, theirs = both("BlipForConditionalGeneration")
    pixels = pairs().pixels
    ids = torch.tensor([prompt] * 4)
    how = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    text = ours.generate(
        ids, torch.ones_like(ids), pixels, eos_token_id=SEP, pad_token_id=257, **how
    )
    # transformers drops the last id of a prompt, where its processor puts [SEP]
    given = torch.cat([ids, torch.full((4, 1), SEP)], dim=1)
    expected = theirs.generate(
        pixel_values=normal(ours, pixels), input_ids=given, suppress_tokens=[DEC, ENC], **how
    )
    assert torch.equal(text, expected[:, len(prompt) :])


def test_matching_and_contrast_match_transformers() -> None:
    ours, theirs = both("BlipForImageTextRetrieval")
    ids, attention, _, pixels = pairs()
    image, text = ours.embed_images(ours.vision(pixels)), ours.embed_texts(ids, attention)
    seen = {"pixel_values": normal(ours, pixels), "attention_mask": attention.long()}
    cosines = theirs(input_ids=ids, use_itm_head=False, **seen).itm_score
    torch.testing.assert_close(image @ text.T, cosines, atol=1e-5, rtol=1e-5)
    begun = ids.clone()
    begun[:, 0] = ENC
    logits = theirs(input_ids=begun, **seen).itm_score
    odds = ours.match(ids, attention, ours.vision(pixels))
    torch.testing.assert_close(odds, logits[:, 1] - logits[:, 0], atol=1e-5, rtol=1e-5)


def test_answer_logits_match_transformers() -> None:
    """Old versions shift the labels twice (transformers#23000), so logits are compared, not the loss."""
    ours, theirs = both("BlipForQuestionAnswering")
    ids, attention, labels, pixels = pairs((7, 7), asked=3)
    logits = ours(ids, attention, labels, pixels).logits_BTV
    asked = ids[:, :4].clone()
    asked[:, 0] = ENC
    answer = torch.cat([torch.full((2, 1), DEC), ids[:, 4:]], dim=1)
    seen = theirs.vision_model(normal(ours, pixels)).last_hidden_state
    read = theirs.text_encoder(input_ids=asked, encoder_hidden_states=seen).last_hidden_state
    expected = theirs.text_decoder(input_ids=answer, encoder_hidden_states=read).logits
    torch.testing.assert_close(logits[:, 3:-1], expected[:, :-1], atol=1e-5, rtol=1e-5)


def test_generated_answer_matches_transformers() -> None:
    ours, theirs = both("BlipForQuestionAnswering")
    ids, attention, _, pixels = pairs((5, 5, 5))
    how = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3}
    answer = ours.generate(ids, attention, pixels, eos_token_id=SEP, pad_token_id=257, **how)
    begun = ids.clone()
    begun[:, 0] = ENC
    expected = theirs.generate(
        input_ids=begun,
        attention_mask=attention.long(),
        pixel_values=normal(ours, pixels),
        suppress_tokens=[DEC, ENC],
        **how,
    )
    assert torch.equal(answer, expected[:, 1:])


@pytest.mark.parametrize("architecture", blip.ARCHITECTURES)
def test_stage_has_the_imported_config(architecture: str) -> None:
    stage = blip.stage(blip.model_config(config(architecture)))
    with torch.device("meta"):
        assert isinstance(stage.model.build(), MED)
    assert (
        all(loss.requires in {"logits", "pooled", "match"} for loss in stage.losses)
        and not stage.evals
    )


@pytest.mark.parametrize("architecture", blip.ARCHITECTURES)
def test_checkpoint_round_trip_is_bit_equal(architecture: str, tmp_path: Path) -> None:
    _, theirs = both(architecture)
    theirs.save_pretrained(tmp_path / "in")
    came = import_hf(tmp_path / "in", tmp_path / "artifact")
    assert came.holds and came.architecture == architecture
    went = export_hf(tmp_path / "artifact", tmp_path / "out")
    assert went.holds and went.digest == came.digest
    back = type(theirs).from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, back[name]) for name, tensor in theirs.state_dict().items())


def test_models_without_a_transformers_class_are_rejected() -> None:
    with pytest.raises(SpecError, match="no BLIP with the tasks contrast, match, caption"):
        blip.hf_config(spec())
    with pytest.raises(SpecError, match="and a momentum encoder"):
        blip.hf_config(spec("contrast", "match", momentum=MomentumConfig(queue=0)))
    with pytest.raises(WeightsError, match=r"not supported\. Got \['BlipModel'\]"):
        blip.model_config(config("BlipModel"))


def test_a_vision_tower_that_transformers_blip_does_not_have_is_not_exported() -> None:
    vision = EfficientNetConfig(grid=1, weights=None)
    with pytest.raises(SpecError, match="has no EfficientNetConfig"):
        blip.hf_config(replace(spec("caption"), vision=vision))


def test_unsupported_blip_config_is_rejected() -> None:
    other = config("BlipForConditionalGeneration")
    other.text_config.bos_token_id = 5
    with pytest.raises(WeightsError, match=r"bos_token_id is not supported\. Got 5; expected 260"):
        blip.model_config(other)


def test_architectures_are_classes_of_transformers() -> None:
    known = (BlipForConditionalGeneration, BlipForQuestionAnswering, BlipForImageTextRetrieval)
    assert tuple(cls.__name__ for cls in known) == blip.ARCHITECTURES
