"""Keyed permutations: bijective, without collisions in large domains, uniform."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgework.data.plan.permutation import permute, side_of

bounded = settings(max_examples=40, deadline=None, derandomize=True)
KEYS = st.integers(0, 2**64 - 1)


def permuted(places: np.ndarray, size: int, key: int) -> np.ndarray:
    sizes, sides, keys = (
        np.full(len(places), x, dtype=np.uint64) for x in (size, side_of(size), key)
    )
    return permute(places.astype(np.uint64), sizes, sides, keys)


@bounded
@given(size=st.integers(1, 3000), key=KEYS)
def test_keyed_permutation_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


@bounded
@given(size=st.integers(10**6, 10**12), key=KEYS)
def test_keyed_permutation_has_no_collisions_in_large_domains(size: int, key: int) -> None:
    places = np.unique(
        np.concatenate([np.arange(500), size - 1 - np.arange(500), np.arange(500) * (size // 500)])
    )
    goes = permuted(places, size, key)
    assert len(np.unique(goes)) == len(places) and goes.max() < size
    assert 0.4 < (goes / size).mean() < 0.6


@pytest.mark.parametrize("size", [2, 3, 5, 8, 32])
def test_every_place_maps_to_all_places_uniformly(size: int) -> None:
    keys = np.arange(4000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    sizes, sides = np.full_like(keys, size), np.full_like(keys, side_of(size))
    for place in {0, size // 2, size - 1}:
        counts = np.bincount(
            permute(np.full_like(keys, place), sizes, sides, keys).astype(int), minlength=size
        )
        expected = len(keys) / size
        assert ((counts - expected) ** 2 / expected).sum() < size + 5 * (
            2 * size
        ) ** 0.5  # chi-square, 5 sigma
