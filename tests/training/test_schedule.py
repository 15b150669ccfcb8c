"""The learning rate against torch's own schedulers."""

import warnings
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from bridgework.system import AdamW
from bridgework.training.engine import learning_rate


def rates(scheduler: LRScheduler, steps: int) -> list[float]:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that no optimizer stepped
        for _ in range(steps):
            found.append(scheduler.get_last_lr()[0])
            scheduler.step()
    return found


def sgd(lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


@pytest.mark.parametrize(("steps", "warmup"), [(100, 10), (37, 5), (2_180, 66)])
def test_rate_matches_torch_linear_warmup_and_cosine(steps: int, warmup: int) -> None:
    optim = AdamW(peak_lr=1e-3, final_lr=1e-5, warmup=(warmup - 0.5) / steps)
    rising = rates(LinearLR(sgd(1e-3), start_factor=1 / warmup, total_iters=warmup - 1), warmup)
    falling = rates(
        CosineAnnealingLR(sgd(1e-3), T_max=steps - warmup, eta_min=1e-5), steps - warmup
    )
    assert [learning_rate(optim, s, steps) for s in range(steps)] == pytest.approx(rising + falling)


def test_first_step_moves_and_warmup_ends_at_the_peak() -> None:
    optim = AdamW(peak_lr=1.0, warmup=0.1)
    assert learning_rate(optim, 0, 100) == pytest.approx(0.1)
    assert learning_rate(optim, 9, 100) == learning_rate(optim, 10, 100) == 1.0


def test_without_warmup_the_rate_begins_at_the_peak_and_only_falls() -> None:
    optim = AdamW(peak_lr=1.0, final_lr=0.1, warmup=0.0)
    found = [learning_rate(optim, s, 50) for s in range(50)]
    assert found[0] == 1.0
    assert all(a > b > 0.1 for a, b in pairwise(found))


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_stages_have_a_rate(steps: int) -> None:
    assert all(0 < learning_rate(AdamW(peak_lr=1e-3), s, steps) <= 1e-3 for s in range(steps))
