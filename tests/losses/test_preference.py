"""DPO against its definition, and its invariances."""

from dataclasses import dataclass, replace
from math import log

import pytest
import torch
from torch import Tensor

from bridgework.errors import DataError, SpecError
from bridgework.losses import DPO
from bridgework.system import IGNORE

B = 4


@dataclass
class Answers:
    chosen_B: Tensor | None
    rejected_B: Tensor | None
    chosen_reference_B: Tensor | None
    rejected_reference_B: Tensor | None
    labels_BT: Tensor | None


def example() -> Answers:
    generator = torch.Generator().manual_seed(0)
    four = [-10 * torch.rand(B, generator=generator) for _ in range(4)]
    return Answers(
        *(t.requires_grad_() for t in four), labels_BT=torch.ones(2 * B, 5, dtype=torch.int64)
    )


def test_a_model_that_is_its_own_reference_costs_ln_two() -> None:
    answers = example()
    same = replace(
        answers, chosen_reference_B=answers.chosen_B, rejected_reference_B=answers.rejected_B
    )
    torch.testing.assert_close(DPO()(same), torch.full((B,), log(2)))


def test_the_loss_and_its_gradient_are_the_papers() -> None:
    answers, beta = example(), 0.3
    assert answers.chosen_B is not None and answers.rejected_B is not None
    assert answers.chosen_reference_B is not None and answers.rejected_reference_B is not None
    losses_B = DPO(beta=beta)(answers)
    margin_B = (answers.chosen_B - answers.chosen_reference_B) - (
        answers.rejected_B - answers.rejected_reference_B
    )
    torch.testing.assert_close(losses_B, torch.log1p(torch.exp(-beta * margin_B)))
    losses_B.sum().backward()
    expected_B = (-beta * torch.sigmoid(-beta * margin_B)).detach()
    torch.testing.assert_close(answers.chosen_B.grad, expected_B)
    torch.testing.assert_close(answers.rejected_B.grad, -expected_B)


def test_a_gain_of_the_better_answer_costs_less_and_one_of_both_costs_the_same() -> None:
    answers = example()
    assert answers.chosen_B is not None and answers.rejected_B is not None
    before_B, better = DPO()(answers), replace(answers, chosen_B=answers.chosen_B + 1)
    assert bool((DPO()(better) < before_B).all())
    both = replace(better, rejected_B=answers.rejected_B + 1)
    torch.testing.assert_close(DPO()(both), before_B)


def test_a_sample_without_labels_costs_and_counts_nothing() -> None:
    answers, loss = example(), DPO()
    assert answers.labels_BT is not None
    answers.labels_BT[1] = IGNORE
    losses_B, counts_B = loss(answers), loss.count(answers.labels_BT)
    assert (
        counts_B.tolist() == [1, 0, 1, 1]
        and losses_B[1] == 0
        and bool((losses_B[[0, 2, 3]] > 0).all())
    )


def test_answers_that_are_missing_and_a_beta_of_zero_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'preference'"):
        DPO()(replace(example(), rejected_B=None))
    with pytest.raises(SpecError, match="above 0"):
        DPO(beta=0.0)
