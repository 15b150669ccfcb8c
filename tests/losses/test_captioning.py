"""Language modeling loss against torch's cross_entropy."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.errors import DataError, SpecError
from bridgework.losses import LanguageModeling
from bridgework.losses.language_modeling import language_modeling
from bridgework.models.base import Outputs
from bridgework.system import IGNORE


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels_BT = torch.randint(0, 7, (3, 6), generator=generator)
    labels_BT[0, :3], labels_BT[1, 4:], labels_BT[2] = IGNORE, IGNORE, IGNORE
    return torch.randn(3, 6, 7, generator=generator).requires_grad_(), labels_BT


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sum_over_count_is_the_mean_cross_entropy_with_its_gradient(smoothing: float) -> None:
    logits_BTV, labels_BT = example()
    loss = LanguageModeling(label_smoothing=smoothing)
    ours = (
        loss(Outputs(logits_BTV=logits_BTV, labels_BT=labels_BT)).sum()
        / loss.count(labels_BT).sum()
    )
    theirs = cross_entropy(
        logits_BTV[:, :-1].reshape(-1, 7),
        labels_BT[:, 1:].reshape(-1),
        ignore_index=IGNORE,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits_BTV)[0] for x in (ours, theirs)))


def test_every_sample_has_its_own_sum_and_count() -> None:
    logits_BTV, labels_BT = example()
    parts = [
        language_modeling(logits, labels)
        for logits, labels in zip(logits_BTV.split(1), labels_BT.split(1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(parts), language_modeling(logits_BTV, labels_BT))
    assert LanguageModeling().count(labels_BT).tolist() == [
        float((row[1:] != IGNORE).sum()) for row in labels_BT
    ]


def test_a_batch_without_labels_is_zero_and_keeps_its_graph() -> None:
    logits_BTV, labels_BT = example()
    loss = language_modeling(logits_BTV, torch.full_like(labels_BT, IGNORE))
    assert not loss.any() and not torch.autograd.grad(loss.sum(), logits_BTV)[0].any()


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits_BTV, labels_BT = example()
    loss = language_modeling(logits_BTV.bfloat16(), labels_BT)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, language_modeling(logits_BTV.bfloat16().float(), labels_BT))


def test_outputs_without_logits_and_smoothing_out_of_range_are_refused() -> None:
    with pytest.raises(DataError, match="ask the wiring for 'logits', with labels"):
        LanguageModeling()(Outputs())
    with pytest.raises(SpecError, match=r"Got 1; expected a number in \[0, 1\)"):
        LanguageModeling(label_smoothing=1.0)


def test_a_mean_over_samples_is_that_of_each_ones_sum_with_its_gradient() -> None:
    logits_BTV, labels_BT = example()
    loss = LanguageModeling(mean="samples")
    ours = (
        loss(Outputs(logits_BTV=logits_BTV, labels_BT=labels_BT)).sum()
        / loss.count(labels_BT).sum()
    )
    summed = [
        cross_entropy(logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum")
        for logits, labels in zip(logits_BTV, labels_BT, strict=True)
        if (labels[1:] != IGNORE).any()
    ]
    theirs = torch.stack(summed).mean()
    assert len(summed) == 2 and loss.count(labels_BT).tolist() == [1.0, 1.0, 0.0]
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits_BTV)[0] for x in (ours, theirs)))
