"""Packing keeps its limits, and steps and ranks have similar costs."""

from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.balance import ratios
from bridgework.data.packing import BinLimits, balance, first_fit

LENGTHS = st.lists(st.integers(1, 120), min_size=1, max_size=80)


@given(tokens=LENGTHS, samples=st.integers(1, 9), images=st.integers(1, 4), data=st.data())
def test_sequences_keep_their_limits_and_contain_every_row(
    tokens: list[int], samples: int, images: int, data: st.DataObject
) -> None:
    shown = data.draw(st.lists(st.integers(0, 3), min_size=len(tokens), max_size=len(tokens)))
    packed = first_fit(tokens, shown, BinLimits(100, samples, images))
    assert sorted(row for sequence in packed for row in sequence) == list(range(len(tokens)))
    for sequence in packed:
        assert len(sequence) <= samples
        assert sum(tokens[row] for row in sequence) <= 100 or len(sequence) == 1
        assert sum(shown[row] for row in sequence) <= images or len(sequence) == 1


def test_two_rows_that_fit_together_never_have_a_sequence_each() -> None:
    packed = first_fit([60, 50, 40, 30, 10], [0] * 5, BinLimits(100, 8))
    assert packed == [[0, 2], [1, 3, 4]]


@given(costs=LENGTHS, steps=st.integers(1, 12))
def test_every_item_has_one_step_and_steps_have_equal_counts(costs: list[int], steps: int) -> None:
    laid = balance(costs, steps)
    assert sorted(item for items in laid for item in items) == list(range(len(costs)))
    counts = [len(items) for items in laid]
    assert len(laid) == steps and max(counts) - min(counts) <= 1
    sums = [sum(costs[item] for item in items) for items in laid]
    assert sums == sorted(sums, reverse=True)


@pytest.mark.parametrize(
    ("world", "mean_bound", "worst_bound"), [(2, 1.02, 1.06), (4, 1.04, 1.1), (8, 1.08, 1.26)]
)
def test_ranks_have_similar_costs_at_every_step_of_a_skewed_mixture(
    world: int, mean_bound: float, worst_bound: float
) -> None:
    balanced, plain = ratios(world, window=16)
    assert mean(balanced) <= mean_bound and max(balanced) <= worst_bound
    assert mean(plain) - 1 > 3 * (mean(balanced) - 1)


def test_larger_windows_balance_better() -> None:
    assert max(ratios(8, window=64)[0]) < max(ratios(8, window=16)[0])
