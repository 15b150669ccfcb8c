"""Projectors against torch's own layers."""

import pytest
import torch
from torch import nn

from bridgework.errors import SpecError
from bridgework.models import LinearConfig, MLPConfig


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_an_mlp_is_linears_with_gelus_between(depth: int) -> None:
    ours = MLPConfig(depth=depth).build(6, 4)
    layers: list[nn.Module] = [nn.Linear(6, 4)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(4, 4)]
    theirs = nn.Sequential(*layers)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values(), strict=True)))
    patches = torch.randn(2, 5, 6)
    torch.testing.assert_close(ours(patches), theirs(patches))


def test_the_names_are_those_of_transformers_llava() -> None:
    assert list(MLPConfig().build(6, 4).state_dict()) == [
        "linear_1.weight",
        "linear_1.bias",
        "linear_2.weight",
        "linear_2.bias",
    ]


def test_linear_is_an_mlp_of_depth_one() -> None:
    assert list(LinearConfig().build(6, 4).state_dict()) == list(
        MLPConfig(depth=1).build(6, 4).state_dict()
    )


def test_every_patch_becomes_one_token() -> None:
    assert LinearConfig().tokens(576) == MLPConfig().tokens(576) == 576


def test_a_depth_below_one_is_refused() -> None:
    with pytest.raises(SpecError, match="at least 1"):
        MLPConfig(depth=0)
