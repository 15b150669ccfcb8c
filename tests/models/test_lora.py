"""Adapters: no effect at first, the same when merged, and weights without them fit."""

import copy
from typing import Any

import pytest
import torch

from bridgework.errors import SpecError
from bridgework.models import base as freezing
from bridgework.models.lora import (
    LoRAConfig,
    adapter_layers,
    disable_adapters,
    merge,
    remap_adapters,
)
from tests.models.examples import LLAMA_7B

IDS = torch.tensor([[5, 6, 7, 8]])
SPEC = LoRAConfig(rank=4, alpha=16)


def base() -> Any:
    torch.manual_seed(0)
    return LLAMA_7B.tiny().build().eval()


def with_adapters(*, trained: bool) -> Any:
    model: Any = SPEC.add(base()).eval()
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def test_new_adapters_change_nothing() -> None:
    assert torch.equal(with_adapters(trained=False)(IDS).logits, base()(IDS).logits)


def test_every_linear_layer_but_the_output_has_adapters() -> None:
    names = {name.rpartition(".")[2] for name, _ in adapter_layers(with_adapters(trained=False))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_the_adapted_layer_is_the_papers_formula() -> None:
    _, layer = adapter_layers(with_adapters(trained=True))[0]
    given = torch.randn(3, layer.in_features)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = given @ (layer.base_layer.weight + SPEC.alpha / SPEC.rank * b @ a).T
    torch.testing.assert_close(layer(given), expected, atol=1e-5, rtol=1e-5)


def test_merged_adapters_are_the_adapter_forward_under_the_names_of_the_base() -> None:
    model = with_adapters(trained=True)
    before = model(IDS).logits
    assert not torch.allclose(before, base()(IDS).logits)
    merge(model)
    assert list(model.state_dict()) == list(base().state_dict())
    torch.testing.assert_close(model(IDS).logits, before, atol=1e-5, rtol=1e-5)


def test_model_with_adapters_off_is_bitwise_its_base_and_restored_afterwards() -> None:
    model = with_adapters(trained=True)
    before = model(IDS).logits
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with disable_adapters(model):
        assert torch.equal(model(IDS).logits, base()(IDS).logits)
        assert trains == {name: p.requires_grad for name, p in model.named_parameters()}
    assert torch.equal(model(IDS).logits, before)


def test_one_glob_trains_the_adapters_and_nothing_else_moves() -> None:
    model = torch.nn.ModuleDict({"language": with_adapters(trained=True)})
    learning = freezing.set_trainable(model, {"language.*lora_*": 1.0})
    assert learning and all("lora_" in name for name in learning)
    before = copy.deepcopy(model.state_dict())
    model["language"](IDS, labels=IDS).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    moved = {
        name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert moved == set(learning)


def test_weights_from_before_the_adapters_fit_and_give_the_same_model() -> None:
    model, state = with_adapters(trained=False), base().state_dict()
    names = remap_adapters(model, state)
    assert len(names) == len(state)
    missing, unexpected = model.load_state_dict(names, strict=False)
    assert not unexpected and all("lora_" in name for name in missing)
    assert remap_adapters(base(), state).keys() == state.keys()


def test_adapters_go_on_where_the_ones_before_stopped() -> None:
    trained, fresh = with_adapters(trained=True), with_adapters(trained=False)
    fresh.load_state_dict(remap_adapters(fresh, trained.state_dict()))
    assert torch.equal(fresh(IDS).logits, trained(IDS).logits)


def test_a_model_without_adapters_has_no_reference() -> None:
    with (
        pytest.raises(SpecError, match=r"give the stage's model a language\.lora"),
        disable_adapters(base()),
    ):
        pass


def test_numbers_and_targets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="rank"):
        LoRAConfig(rank=0)
    with pytest.raises(SpecError, match="dropout"):
        LoRAConfig(dropout=1.0)
    with pytest.raises(SpecError, match="targets"):
        LoRAConfig(targets=("no_such_layer",)).add(base())


def test_adapters_cost_no_memory_before_they_are_needed() -> None:
    with torch.device("meta"):
        model = SPEC.add(LLAMA_7B.tiny().build())
    assert all(p.is_meta for p in model.parameters())
