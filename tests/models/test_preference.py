"""Preference learning against a frozen copy, compared with two models in plain torch."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridgework.errors import SpecError
from bridgework.losses import DPO
from bridgework.models import (
    LanguageConfig,
    LoRAConfig,
    MLPConfig,
    PrefixVLMConfig,
    ViTConfig,
    base,
)
from bridgework.models.prefix_vlm import PrefixVLM
from bridgework.system import IGNORE
from tests.models.examples import LLAMA_7B, OPT_2_7B, PICTURE, ids, pixels, stirred

BETA = 0.5
WANTS = frozenset({"preference"})
ALL = {"bridge.*": 1.0, "language.*": 1.0}


def wiring(language: LanguageConfig = LLAMA_7B, **fields: Any) -> PrefixVLM:
    torch.manual_seed(0)
    spec = PrefixVLMConfig(
        vision=ViTConfig(),
        bridge=MLPConfig(),
        language=language,
        **{"reference": "frozen_copy"} | fields,
    )
    return stirred(spec.tiny().build())


def pairs() -> dict[str, Any]:
    """Two questions about an image each, with two better answers, then two worse."""
    rows = torch.cat(
        [ids(PICTURE, 5, 6, *answer) for answer in ((7, 8), (9, 4), (10, 11), (3, 12))]
    )
    labels_BT = rows.clone()
    labels_BT[:, :-2] = IGNORE
    shown = pixels(2)
    attention = torch.ones_like(rows, dtype=torch.bool)
    return {
        "ids": rows,
        "attention": attention,
        "labels": labels_BT,
        "pixels": torch.cat([shown, shown]),
    }


def answer_nats(model: nn.Module, given: dict[str, Any]) -> Tensor:
    logits_BTV = model(**given).logits_BTV
    log_BTV = torch.log_softmax(logits_BTV[:, -3:-1].double(), dim=-1)
    return log_BTV.gather(-1, given["labels"][:, -2:, None]).sum((1, 2))


def two_models(model: nn.Module, reference: nn.Module, given: dict[str, Any]) -> Tensor:
    """(B,) the paper's equation 7, with the reference as a model of its own."""
    with torch.no_grad():
        expected_B = answer_nats(reference, given)
    better_B, worse_B = (answer_nats(model, given) - expected_B).chunk(2)
    return torch.log1p(torch.exp(-BETA * (better_B - worse_B)))


def learner(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)


def test_losses_gradients_and_steps_are_those_of_two_models() -> None:
    ours, given = wiring(), pairs()
    base.set_trainable(ours.train(), ALL)
    plain = copy.deepcopy(ours)
    reference = copy.deepcopy(ours).eval()
    optimizers = learner(ours), learner(plain)
    for step in range(3):
        loss_B, expected_B = (
            DPO(beta=BETA)(ours(**given, requested=WANTS)),
            two_models(plain, reference, given),
        )
        torch.testing.assert_close(loss_B.double(), expected_B, atol=1e-5, rtol=1e-5)
        assert (loss_B.detach().sub(torch.tensor(2.0).log()).abs().max() < 1e-6) == (step == 0)
        for optimizer, loss in zip(optimizers, (loss_B, expected_B), strict=True):
            optimizer.zero_grad()
            loss.mean().backward()
        for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4, msg=name)
        for optimizer in optimizers:
            optimizer.step()


def test_reference_stays_the_start_of_the_stage() -> None:
    model, given = wiring(), pairs()
    base.set_trainable(model.train(), ALL)
    expected_B = answer_nats(copy.deepcopy(model).eval(), given).float()
    optimizer = learner(model)
    for _ in range(3):
        outputs = model(**given, requested=WANTS)
        references_B = torch.cat([outputs.chosen_reference_B, outputs.rejected_reference_B])
        torch.testing.assert_close(references_B, expected_B, atol=1e-5, rtol=1e-5)
        assert not references_B.requires_grad
        DPO(beta=BETA)(outputs).mean().backward()
        optimizer.step()
    moved_B = torch.cat([outputs.chosen_B, outputs.rejected_B])
    assert not torch.allclose(moved_B, expected_B, atol=1e-2)


def test_the_reference_has_no_dropout_and_the_model_keeps_its_modes() -> None:
    model, given = wiring(OPT_2_7B), pairs()  # OPT drops a tenth
    base.set_trainable(model.train(), ALL)
    expected_B = answer_nats(copy.deepcopy(model).eval(), given).float()
    modes = [module.training for module in model.modules()]
    outputs = model(**given, requested=WANTS)
    torch.testing.assert_close(
        torch.cat([outputs.chosen_reference_B, outputs.rejected_reference_B]),
        expected_B,
        atol=1e-5,
        rtol=1e-5,
    )
    assert not torch.allclose(
        torch.cat([outputs.chosen_B, outputs.rejected_B]), expected_B, atol=1e-3
    )
    assert (
        [module.training for module in model.modules()] == modes
        and True in modes
        and False in modes
    )


def test_copy_has_the_trainable_parameters_and_is_neither_parameter_nor_buffer() -> None:
    model = wiring()
    learning = base.set_trainable(model.train(), {"language.lm_head.*": 1.0})
    names = {name for name, _ in model.named_parameters()} | {
        name for name, _ in model.named_buffers()
    }
    model(**pairs(), requested=WANTS)
    assert model.reference is not None
    assert model.reference.state_dict().keys() == learning.keys()
    assert {name for name, _ in model.named_parameters()} | {
        name for name, _ in model.named_buffers()
    } == names


def test_adapters_may_have_a_frozen_copy_too() -> None:
    """In a second round the reference is the first round's model, not the one before both."""
    model, given = wiring(replace(LLAMA_7B, lora=LoRAConfig(dropout=0.0))), pairs()
    base.set_trainable(model.train(), {"language.*lora_*": 1.0})
    expected_B = answer_nats(copy.deepcopy(model).eval(), given).float()
    outputs = model(**given, requested=WANTS)
    assert torch.equal(outputs.chosen_B, outputs.chosen_reference_B)
    torch.testing.assert_close(outputs.chosen_reference_B, expected_B[:2], atol=1e-5, rtol=1e-5)


def test_adapters_off_are_refused_as_reference_while_anything_else_trains() -> None:
    model = wiring(replace(LLAMA_7B, lora=LoRAConfig()), reference="adapters_off")
    base.set_trainable(model.train(), {"bridge.*": 1.0, "language.*lora_*": 1.0})
    with pytest.raises(
        SpecError, match=r'bridge\.\S+ does, with 3 more.*model\.reference="frozen_copy"'
    ):
        model(**pairs(), requested=WANTS)


def test_without_adapters_the_error_names_both_ways_out() -> None:
    model = wiring(reference="adapters_off")
    with pytest.raises(SpecError, match=r'language\.lora, or set model\.reference="frozen_copy"'):
        model(**pairs(), requested=WANTS)


def test_a_model_that_is_not_training_has_no_start_to_be_compared_with() -> None:
    with pytest.raises(SpecError, match="in training alone"):
        wiring().eval()(**pairs(), requested=WANTS)
