"""Parameters are frozen unless a glob names them."""

import pytest
import torch
from torch import nn

from bridgework.errors import SpecError
from bridgework.models import base
from tests.models.examples import LLAVA, build


class Net(base.VLMModule):
    """A body with dropout and batch statistics, and a head whose weight is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embed.weight


def test_only_named_parameters_train() -> None:
    net = Net()
    assert base.set_trainable(net, {"body.0.*": 1.0}) == {"body.0.weight": 1.0, "body.0.bias": 1.0}
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {
        "body.0.weight",
        "body.0.bias",
    }


def test_the_last_glob_that_matches_wins_and_zero_freezes() -> None:
    net = Net()
    assert base.set_trainable(net, {"*": 1.0, "body.*": 0.1, "body.1.*": 0.0}) == {
        "embed.weight": 1.0,
        "body.0.weight": 0.1,
        "body.0.bias": 0.1,
        "head.bias": 1.0,
    }
    assert not net.body[1].weight.requires_grad


def test_tied_parameter_matches_both_names_and_is_returned_once() -> None:
    assert base.set_trainable(Net(), {"head.weight": 0.5}) == {"embed.weight": 0.5}


def test_a_glob_that_matches_nothing_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(
        SpecError, match=r"'bodi.\*'.* matches no parameter; did you mean 'body.\*'"
    ):
        base.set_trainable(Net(), {"bodi.*": 1.0})


@pytest.mark.parametrize("trains", [{"*": 0.0}, {"*": -1.0}])
def test_a_stage_in_which_nothing_trains_is_refused(trains: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        base.set_trainable(Net(), trains)


def test_matching_is_by_case() -> None:
    with pytest.raises(SpecError):
        base.set_trainable(Net(), {"BODY.*": 1.0})


def test_frozen_parts_stay_in_eval_mode_whoever_calls_train() -> None:
    net = Net()
    holder = nn.ModuleList([net])
    base.set_trainable(net, {"head.*": 1.0})
    holder.train()
    assert net.training and net.head.training
    assert not net.body.training and not net.body[1].training and not net.body[2].training
    before = net.body.state_dict()["1.running_mean"].clone()
    net.body(torch.randn(8, 4))
    assert torch.equal(net.body.state_dict()["1.running_mean"], before)


def test_a_part_that_trains_again_leaves_eval_mode() -> None:
    net = Net()
    base.set_trainable(net, {"head.*": 1.0})
    base.set_trainable(net, {"body.*": 1.0})
    assert net.train().body[2].training
    assert not net.eval().body[2].training


def test_counts_take_a_tied_parameter_once() -> None:
    net = Net()
    base.set_trainable(net, {"body.0.*": 1.0})
    assert base.count(net) == (20, 20 + 8 + 5)


def test_stages_of_llava_train_the_papers_parameters() -> None:
    with torch.device("meta"):
        model = LLAVA.build(pretrained=False)
    base.set_trainable(model, {"bridge.*": 1.0})
    assert base.count(model) == (20_979_712, 303_507_456 + 6_738_415_616)
    base.set_trainable(model, {"bridge.*": 1.0, "language.*": 1.0})
    assert base.count(model).frozen == 303_507_456


def test_aligning_keeps_both_towers_in_eval_mode() -> None:
    model = build()
    base.set_trainable(model, {"bridge.*": 1.0})
    model.train()
    assert model.bridge.training and not model.vision.training and not model.language.training
