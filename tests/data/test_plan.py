import random
import tracemalloc
from collections import Counter
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bridgework.data.plan.plan import OWN_ROWS, Plan, Rows, SourceRows
from bridgework.data.plan.shares import ShareSchedule, divide
from bridgework.errors import DataError, SpecError
from bridgework.system import Mixture, Source

bounded = settings(max_examples=40, deadline=None, derandomize=True)
KEYS = st.integers(0, 2**64 - 1)
LANES = st.sampled_from([1, 2, 3, 4, 8])
PINNED = [
    (0, 0, 934),
    (0, 0, 168),
    (1, 0, 55),
    (0, 0, 704),
    (0, 0, 74),
    (1, 0, 2),
    (1, 0, 59),
    (1, 0, 57),
]  # of test_plan_matches_pinned_batch


def make(
    sizes: list[int],
    *,
    group_rows: int = 8,
    alpha: float = 1.0,
    caps: dict[int, float] | None = None,
    lanes: int = 4,
    step_rows: int = 2,
    window: int = 8,
    steps: int = 64,
    seed: int = 0,
) -> Plan:
    names = [f"s{d}" for d in range(len(sizes))]
    sources = [
        SourceRows(name, f"digest of {name}", n, group_rows)
        for name, n in zip(names, sizes, strict=True)
    ]
    mixed = tuple(
        Source(name=name, dataset=name, max_epochs=(caps or {}).get(d))
        for d, name in enumerate(names)
    )
    mixture = Mixture(sources=mixed, alpha=alpha, lanes=lanes, window=window)
    return Plan(sources, mixture, batch=lanes * step_rows, steps=steps, seed=seed)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    return make(
        draw(st.lists(st.integers(1, 300), min_size=1, max_size=5)),
        group_rows=draw(st.integers(1, 40)),
        alpha=draw(st.sampled_from([0.0, 0.5, 1.0])),
        lanes=draw(LANES),
        step_rows=draw(st.integers(1, 3)),
        window=draw(st.integers(1, 8)),
        steps=10**6,
        seed=draw(st.integers(0, 99)),
    )


def triples(rows: Rows) -> list[tuple[int, int, int]]:
    return list(zip(rows.source.tolist(), rows.epoch.tolist(), rows.row.tolist(), strict=True))


def step(plan: Plan, s: int) -> list[tuple[int, int, int]]:
    """Return the rows of step `s` before balancing: lane after lane, its part of the window."""
    size = plan.step_rows
    t, k = divmod(s, plan.window_rows // size)
    return [
        row
        for lane in plan.lanes_of(0, 1)
        for row in triples(plan.window(lane, t))[k * size : (k + 1) * size]
    ]


# --- shares ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, [1 / 3] * 3), (0.5, [10 / 13, 2 / 13, 1 / 13]), (1.0, None)]
)
def test_alpha_0_half_and_1_give_equal_square_root_and_size_shares(
    alpha: float, expected: list[float] | None
) -> None:
    plan = make([10_000, 400, 100], alpha=alpha)
    assert [s.requested for s in plan.shares] == pytest.approx(
        expected or [100 / 105, 4 / 105, 1 / 105]
    )
    assert [s.weight for s in plan.shares] == [s.requested for s in plan.shares]
    assert [s.epochs for s in plan.shares] == pytest.approx(
        [s.weight * 64 * 8 / n for s, n in zip(plan.shares, [10_000, 400, 100], strict=True)]
    )


def test_factor_multiplies_a_weight() -> None:
    sources = [SourceRows(name, "d", 100, 8) for name in "ab"]
    mixture = Mixture(
        sources=(Source(name="a", dataset="a", factor=3.0), Source(name="b", dataset="b")), lanes=4
    )
    assert [s.weight for s in Plan(sources, mixture, batch=4, steps=1, seed=0).shares] == [
        0.75,
        0.25,
    ]


@bounded
@given(data=st.data(), sizes=st.lists(st.integers(1, 10**6), min_size=2, max_size=6))
def test_capped_shares_match_bisected_water_level(data: st.DataObject, sizes: list[int]) -> None:
    caps = [data.draw(st.floats(0.1, 4.0)) for _ in sizes[1:]]
    mixed = tuple(
        Source(name=f"s{d}", dataset="x", max_epochs=cap) for d, cap in enumerate([None, *caps])
    )
    budget = sum(sizes) * data.draw(st.integers(1, 9))
    shares, capped = divide(Mixture(sources=mixed, alpha=0.5), sizes, steps=budget, batch=1)

    weights = np.sqrt(sizes)
    most = np.array([np.inf, *(cap * n / budget for cap, n in zip(caps, sizes[1:], strict=True))])
    low, high = 0.0, 1.0
    for _ in range(100):
        level = (low + high) / 2
        low, high = (level, high) if np.minimum(level * weights, most).sum() < 1 else (low, level)
    assert sum(shares) == 1
    np.testing.assert_allclose(
        [float(s) for s in shares], np.minimum(low * weights, most), rtol=1e-9
    )
    assert capped == {
        d for d, cap in enumerate(caps, 1) if shares[d] * budget == Fraction(cap) * sizes[d]
    }


def test_caps_hold_in_the_drawn_rows() -> None:
    steps = 512
    plan = make([100, 64, 4000], alpha=0.0, caps={0: 2.0, 1: 1.5}, steps=steps)
    assert [s.capped for s in plan.shares] == [True, True, False]
    assert [s.epochs for s in plan.shares][:2] == [2.0, 1.5]
    taken = plan.realized(steps)
    assert taken["s0"] <= 2.0 * 100 + 1 and taken["s1"] <= 1.5 * 64 + 1
    assert sum(taken.values()) == steps * 8


def test_budget_above_all_caps_is_an_error_with_the_missing_rows() -> None:
    with pytest.raises(
        SpecError,
        match=r"Got 300; 64 steps of 8 need 512, 212 more. Fix: raise max_epochs.*37",
    ):
        make([100, 100], caps={0: 1.0, 1: 2.0})
    assert make([256, 256], caps={0: 1.0, 1: 1.0}).realized(64) == {"s0": 256, "s1": 256}


PARTS = st.lists(st.integers(1, 10**6), min_size=1, max_size=40)
SKEWED = st.lists(st.floats(0, 12).map(lambda power: int(10**power)), min_size=2, max_size=40)
EQUAL = st.tuples(st.just(10**6), st.integers(1, 40)).map(lambda pair: [pair[0]] * pair[1])
HEAVY = st.lists(st.integers(1, 1000), min_size=1, max_size=40).map(lambda light: [60_000, *light])


@bounded
@given(
    parts=st.one_of(PARTS, SKEWED, EQUAL, HEAVY),
    lanes=st.sampled_from([1, 2, 3, 5, 8, 64]),
    rows=st.integers(1, 100),
    start=st.one_of(st.integers(0, 50), st.integers(10**9, 10**10)),
    cut=st.integers(1, 99),
)
def test_every_source_is_within_one_row_of_its_share_and_even_over_lanes(
    parts: list[int], lanes: int, rows: int, start: int, cut: int
) -> None:
    shares = [Fraction(p, sum(parts)) for p in parts]
    ledger = ShareSchedule(shares, lanes, rows)
    assert ledger.period % rows == 0 and ledger.period < 4 * len(parts) + rows
    before = ledger.counts(start * ledger.period)
    for n in range(1, 8):
        at = (start + n) * ledger.period
        rows_in_all = at - ledger.period + min(cut, ledger.period)
        last = ledger.end(rows_in_all)
        if (
            rows_in_all - ledger.last(rows_in_all) > ledger.period
        ):  # a short remainder is not a period
            assert (last >= ledger.counts(ledger.last(rows_in_all))).all()
        for after in (ledger.counts(at), last):
            at = int(after[0].sum())
            assert (after.sum(1) == at).all()  # a lane has exactly its rows
            if after is not last:
                assert (after >= before).all()  # and no count decreases
            wanted = [share * at * lanes for share in shares]
            off = [abs(t - w) for t, w in zip(after.sum(0).tolist(), wanted, strict=True)]
            assert max(off) <= 1.1  # nearly always at most 1
            assert int((after.max(0) - after.min(0)).max()) <= 4  # most often 1
        before = ledger.counts((start + n) * ledger.period)


@bounded
@given(
    sizes=st.lists(st.integers(20, 500), min_size=2, max_size=3),
    cap=st.sampled_from([0.5, 1.0, 1.5]),
    steps=st.integers(1, 60),
    step_rows=st.integers(1, 4),
    window=st.integers(1, 16),
)
def test_shares_and_caps_are_exact_at_any_end_of_a_stage(
    sizes: list[int], cap: float, steps: int, step_rows: int, window: int
) -> None:
    rest = steps * step_rows % (window * step_rows)
    assume(
        window * step_rows >= (enough := len(sizes) * (len(sizes) - 1))
        and (rest == 0 or rest >= enough)
    )
    try:
        plan = make(
            sizes, alpha=0.0, caps={1: cap}, step_rows=step_rows, window=window, steps=steps
        )
    except SpecError:
        assume(False)
    windows = [plan.window(lane, t) for lane in range(4) for t in range(-(-steps // window))]
    assert sum(len(rows.row) for rows in windows) == steps * 4 * step_rows
    drawn = sum(np.bincount(rows.source, minlength=len(sizes)) for rows in windows)
    assert plan.realized(steps) == {f"s{d}": int(count) for d, count in enumerate(drawn)}
    wanted = np.array([share.weight for share in plan.shares]) * steps * 4 * step_rows
    assert np.abs(drawn - wanted).max() <= 1 + 1e-9
    if plan.shares[1].capped and plan.shares[1].weight < max(share.weight for share in plan.shares):
        assert drawn[1] <= cap * sizes[1] + 0.5


@bounded
@given(plan=plans(), steps=st.integers(0, 40))
def test_realized_counts_are_the_rows_of_the_steps(plan: Plan, steps: int) -> None:
    drawn = Counter(int(d) for s in range(steps) for d, _, _ in step(plan, s))
    assert plan.realized(steps) == {share.name: drawn[d] for d, share in enumerate(plan.shares)}


@bounded
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=3),
    lanes=LANES,
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_realized_share_is_within_one_row_at_every_window(
    sizes: list[int], lanes: int, alpha: float
) -> None:
    plan = make(sizes, alpha=alpha, lanes=lanes, window=6)
    drawn = np.zeros(len(sizes))
    for t in range(6):
        for lane in range(lanes):
            drawn += np.bincount(plan.window(lane, t).source, minlength=len(sizes))
        requested = np.array([share.requested for share in plan.shares]) * drawn.sum()
        assert np.abs(drawn - requested).max() <= 1 + 1e-9


# --- order ----------------------------------------------------------------------------------------


def test_plan_matches_pinned_batch() -> None:
    """A version of this code, numpy or Python with other rows would break every resume."""
    plan = make([1000, 70, 3], alpha=0.5, seed=7)
    assert step(plan, 9) == PINNED
    assert step(make([1000, 70, 3], alpha=0.5, seed=8), 9) != PINNED


@bounded
@given(
    sizes=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    lanes=LANES,
    windows=st.integers(1, 24),
)
def test_no_row_repeats_in_an_epoch_and_complete_epochs_contain_every_row(
    sizes: list[int], alpha: float, lanes: int, windows: int
) -> None:
    plan = make(sizes, alpha=alpha, lanes=lanes, steps=10**6)
    taken = [
        [row for t in range(windows) for row in triples(plan.window(lane, t))]
        for lane in range(lanes)
    ]
    seen = [row for rows in taken for row in rows]
    assert len(set(seen)) == len(seen)
    held = Counter((source, epoch) for source, epoch, _ in seen)
    for source, size in enumerate(sizes):
        assert all(0 <= row < size for s, _, row in seen if s == source)
        passed = min(max((e for s, e, _ in rows if s == source), default=0) for rows in taken)
        assert all(
            held[source, epoch] == size for epoch in range(passed)
        )  # no lane reads these again


@bounded
@given(
    rows=st.integers(1, 400),
    lanes=LANES,
    each=st.integers(1, 3),
    window=st.integers(1, 8),
    epoch=st.integers(0, 3),
)
def test_n_consecutive_rows_of_a_single_source_contain_every_row_once(
    rows: int, lanes: int, each: int, window: int, epoch: int
) -> None:
    """The epoch begins and ends with a batch, at any position of the windows."""
    batch = lanes * each
    rows *= batch
    plan = make([rows], lanes=lanes, step_rows=each, window=window, steps=10**6)
    taken = [
        row
        for s in range(epoch * rows // batch, (epoch + 1) * rows // batch)
        for row in step(plan, s)
    ]
    assert sorted(taken) == [(0, epoch, row) for row in range(rows)]


@bounded
@given(plan=plans(), lane=st.integers(0, 7), t=st.integers(0, 12))
def test_lane_never_returns_to_an_earlier_epoch(plan: Plan, lane: int, t: int) -> None:
    rows = [
        row for u in (t, t + 1) for row in triples(plan.window(lane % len(plan.lanes_of(0, 1)), u))
    ]
    newest: dict[int, int] = {}
    for source, epoch, _ in rows:
        assert epoch >= newest.get(source, 0)
        newest[source] = epoch


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 33, 65])
def test_small_sources_reach_every_lane(rows: int) -> None:
    lanes = 8
    plan = make([5000, rows], alpha=0.0, lanes=lanes, step_rows=4, steps=10**6)
    for lane in range(lanes):
        seen = {
            row
            for t in range(40)
            for source, _, row in triples(plan.window(lane, t))
            if source == 1
        }
        assert seen == set(range(rows))


@bounded
@given(
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=4),
    extra=st.sampled_from([0, 2000]),
    seed=st.integers(0, 99),
)
def test_another_source_does_not_change_the_order_of_the_others(
    sizes: list[int], extra: int, seed: int
) -> None:
    """The rows of a source are a prefix of one sequence: there may be fewer, but not others."""
    sizes = [size + extra for size in sizes]
    names = [f"s{d}" for d in range(len(sizes))]
    sources = [SourceRows(name, "d", n, 8) for name, n in zip(names, sizes, strict=True)]

    def drawn(picked: list[int], lanes: range) -> dict[str, set[tuple[int, int]]]:
        mixed = tuple(Source(name=names[d], dataset="x") for d in picked)
        mixture = Mixture(sources=mixed, lanes=4, window=32)
        plan = Plan([sources[d] for d in picked], mixture, batch=8, steps=64, seed=seed)
        rows = [row for lane in lanes for row in triples(plan.window(lane, 0))]
        return {names[d]: {(e, r) for s, e, r in rows if s == i} for i, d in enumerate(picked)}

    everyone = list(range(len(sizes)))
    small = any(size < 4 * OWN_ROWS for size in sizes)  # lanes share the streams of these
    for lanes in [range(4)] if small else [range(lane, lane + 1) for lane in range(4)]:
        more, fewer = drawn(everyone[1:], lanes), drawn(everyone[::-1], lanes)
        for name in names[1:]:
            few, many = sorted((more[name], fewer[name]), key=len)
            assert few <= many


@bounded
@given(
    sizes=st.lists(st.integers(1, 250), min_size=2, max_size=12),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    lanes=st.sampled_from([4, 8, 64]),
    windows=st.integers(1, 12),
)
def test_rows_of_a_small_source_are_drawn_equally_often(
    sizes: list[int], alpha: float, lanes: int, windows: int
) -> None:
    """Counts over all windows so far differ by at most one, so N draws contain all N rows."""
    plan = make(sizes, alpha=alpha, lanes=lanes, window=32, steps=10**6)
    rows = [plan.window(lane, t) for lane in range(lanes) for t in range(windows)]
    for source, size in enumerate(sizes):
        drawn = np.concatenate([each.row[each.source == source] for each in rows])
        times = np.bincount(drawn, minlength=size)
        assert times.max() - times.min() <= 1


def test_fifty_draws_of_the_heaviest_source_contain_each_of_its_rows() -> None:
    sizes = [32, *[3] * 6]
    for seed in range(8):
        plan = make(sizes, lanes=64, step_rows=1, window=1, steps=2, seed=seed)
        rows = [plan.window(lane, t) for lane in range(64) for t in range(2)]
        drawn = np.concatenate([each.row[each.source == 0] for each in rows])
        assert len(drawn) >= 50 and set(drawn.tolist()) == set(range(32))


def test_heaviest_source_is_drawn_evenly_over_the_lanes() -> None:
    plan = make([6000, *[1000] * 7], lanes=64, step_rows=4, window=16, steps=160)
    drawn = np.array(
        [
            sum(int((plan.window(lane, t).source == 0).sum()) for t in range(10))
            for lane in range(64)
        ]
    )
    assert drawn.max() - drawn.min() <= 2


def test_order_depends_on_seed_name_and_digest() -> None:
    def first(name: str, digest: str, seed: int) -> list[tuple[int, int, int]]:
        mixture = Mixture(sources=(Source(name=name, dataset="x"),), lanes=4)
        return triples(
            Plan([SourceRows(name, digest, 999, 8)], mixture, batch=4, steps=9, seed=seed).window(
                0, 0
            )
        )

    orders = [first("a", "d", 0), first("b", "d", 0), first("a", "e", 0), first("a", "d", 1)]
    assert all(orders[i] != orders[j] for i in range(4) for j in range(i))


@pytest.mark.parametrize(
    ("sources", "window", "steps"), [(20, 16, 1162), (20, 16, 3120), (8, 4, 1252), (12, 1, 2030)]
)
def test_caps_hold_at_the_end_of_a_run_of_many_small_sources(
    sources: int, window: int, steps: int
) -> None:
    for seed in range(12):
        draw = random.Random(seed)
        sizes = [10**6, *(draw.randint(300, 3000) for _ in range(sources - 1))]
        capped = [
            Source(name=f"s{n}", dataset="x", max_epochs=1 if n else None) for n in range(sources)
        ]
        mixture = Mixture(sources=tuple(capped), lanes=64, window=window, alpha=0.0)
        rows = [
            SourceRows(source.name, "d", size, 32)
            for source, size in zip(capped, sizes, strict=True)
        ]
        drawn = Plan(rows, mixture, batch=64, steps=steps + seed, seed=seed).realized(steps + seed)
        assert all(drawn[f"s{n}"] <= size for n, size in enumerate(sizes)), (seed, drawn)


# --- substitutes ----------------------------------------------------------------------------------


@bounded
@given(plan=plans(), lane=st.integers(0, 7), t=st.integers(0, 5), data=st.data())
def test_substitutes_come_from_the_window_then_from_the_next_rows_of_the_lane(
    plan: Plan, lane: int, t: int, data: st.DataObject
) -> None:
    lane %= len(plan.lanes_of(0, 1))
    window = triples(plan.window(lane, t))
    place = data.draw(st.integers(0, len(window) - 1))
    source, _, bad = window[place]
    near = [x for x in window[place:] + window[:place] if x[0] == source and x[2] != bad]
    given_ = list(plan.substitutes(lane, t, place))
    assert given_[: len(near)] == near
    assert all(s == source and row != bad for s, _, row in given_)
    assert given_ == list(plan.substitutes(lane, t, place))


def test_substitutes_after_the_window_are_the_next_rows_of_the_source() -> None:
    plan = make([400, 300], alpha=0.0)
    here, after = triples(plan.window(1, 2)), triples(plan.window(1, 3))
    source = here[0][0]
    near = sum(x[0] == source for x in here) - 1
    follow = sum(x[0] == source for x in after)
    spare = list(islice(plan.substitutes(1, 2, 0), near, near + follow))
    assert sorted(spare) == sorted(x for x in after if x[0] == source)


@bounded
@given(plan=plans(), lane=st.integers(0, 7), t=st.integers(0, 5), data=st.data())
def test_every_other_row_of_a_source_is_tried(
    plan: Plan, lane: int, t: int, data: st.DataObject
) -> None:
    lane %= len(plan.lanes_of(0, 1))
    window = triples(plan.window(lane, t))
    place = data.draw(st.integers(0, len(window) - 1))
    source, _, bad = window[place]
    assert {row for _, _, row in plan.substitutes(lane, t, place)} == set(
        range(plan._sizes[source])
    ) - {bad}


def test_source_of_one_bad_row_has_no_substitute() -> None:
    assert list(make([1], steps=4).substitutes(0, 0, 0)) == []


# --- limits ---------------------------------------------------------------------------------------


def test_billion_rows_need_no_large_array() -> None:
    tracemalloc.start()
    plan = make(
        [10**9, 3 * 10**8, 10**12],
        alpha=0.5,
        group_rows=32,
        lanes=64,
        step_rows=4,
        window=64,
        steps=10**7,
    )
    rows = plan.window(63, 10**5)
    assert sum(plan.realized(10**7).values()) == 256 * 10**7 and next(
        plan.substitutes(63, 10**5, 0)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20
    assert len(rows.row) == plan.window_rows == 256
    assert rows.source.dtype == rows.epoch.dtype == np.int32 and rows.row.dtype == np.int64


def test_invalid_plans_are_rejected_with_a_message() -> None:
    one = Mixture(sources=(Source(name="a", dataset="a"),), lanes=4)
    fine = SourceRows("a", "d", 10, 8)
    for batch in (0, 6):
        with pytest.raises(SpecError, match=rf"not a multiple of data.lanes. Got batch {batch}, 4"):
            Plan([fine], one, batch=batch, steps=1, seed=0)
    with pytest.raises(DataError, match=r"sources.a: 0 rows.*import its data again"):
        Plan([SourceRows("a", "d", 0, 8)], one, batch=4, steps=1, seed=0)
    with pytest.raises(SpecError, match="'a' is used twice"):
        Plan([fine, fine], one, batch=4, steps=1, seed=0)
    with pytest.raises(SpecError, match="Got b; expected a"):
        Plan([SourceRows("b", "d", 10, 8)], one, batch=4, steps=1, seed=0)


def test_lanes_are_distributed_and_a_rank_without_one_is_rejected() -> None:
    plan = make([50])
    assert [list(plan.lanes_of(rank, 3)) for rank in range(3)] == [[0, 3], [1], [2]]
    with pytest.raises(SpecError, match=r"rank 4 of 5 has no lane. Got 4 lanes"):
        plan.lanes_of(4, 5)
    with pytest.raises(SpecError, match="lane 4, row 0 is not in the plan"):
        plan.window(4, 0)
