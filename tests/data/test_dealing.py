"""LaneOrder: every row once per epoch, in few pieces, in another order each epoch."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgework.data.plan.lane_order import LaneOrder

bounded = settings(max_examples=40, deadline=None, derandomize=True)
KEYS = st.integers(0, 2**64 - 1)
LANES = st.sampled_from([1, 2, 3, 4, 8])


def stream(deal: LaneOrder, source: int, lane: int, rows: int) -> tuple[list[int], list[int]]:
    """Return (epoch, row) of the first `rows` rows of a lane."""
    epochs, places = deal.locate(np.full(rows, source), np.full(rows, lane), np.arange(rows))
    return epochs.tolist(), places.tolist()


@bounded
@given(
    rows=st.integers(1, 700),
    group_rows=st.integers(1, 40),
    lanes=LANES,
    key=KEYS,
    laps=st.integers(1, 3),
)
def test_cycle_of_epochs_contains_every_row_once_per_epoch_and_equal_counts_per_lane(
    rows: int, group_rows: int, lanes: int, key: int, laps: int
) -> None:
    deal = LaneOrder([rows], [group_rows], [key], lanes)
    seen = [stream(deal, 0, lane, laps * rows) for lane in range(lanes)]
    pairs = [pair for epochs, places in seen for pair in zip(epochs, places, strict=True)]
    assert sorted(pairs) == [(epoch, row) for epoch in range(laps * lanes) for row in range(rows)]
    assert all(
        max(at) - min(at) <= 1 + lanes // rows
        for at in zip(*(epochs for epochs, _ in seen), strict=True)
    )


@bounded
@given(rows=st.integers(1, 700), group_rows=st.integers(1, 40), lanes=LANES, key=KEYS)
def test_lane_reads_few_pieces_in_sequence(
    rows: int, group_rows: int, lanes: int, key: int
) -> None:
    """It begins and ends inside a piece at most; the short piece may be between."""
    piece = max(1, min(group_rows, rows // (4 * lanes)))
    deal = LaneOrder([rows], [group_rows], [key], lanes)
    for lane in range(lanes):
        epochs, places = stream(deal, 0, lane, 2 * rows)
        for epoch in range(epochs[-1]):
            own = [row // piece for e, row in zip(epochs, places, strict=True) if e == epoch]
            turns = 1 + sum(a != b for a, b in pairwise(own)) if own else 0
            assert turns <= -(-len(own) // piece) + 2


def test_epochs_and_lanes_see_different_orders() -> None:
    deal = LaneOrder([4096], [16], [3], 4)
    epochs, places = stream(deal, 0, 0, 4096)
    cuts = [i for i, (a, b) in enumerate(pairwise(epochs), 1) if a != b]
    orders = [tuple(places[a:b][:32]) for a, b in pairwise([0, *cuts])]
    assert len(set(orders)) == len(orders) == 3
    assert places[:16] != sorted(places[:16])
