"""Intervals and differences, against the formulas of the paper and against many draws."""

import random

import numpy as np
import pytest
from scipy.stats import norm, t, ttest_1samp, ttest_rel
from sklearn.metrics import f1_score, roc_auc_score

from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError
from bridgework.evaluation.statistics import (
    EvaluatedRows,
    RowValues,
    bootstrap,
    cluster_of,
    difference,
    interval,
    numbered,
    rows_needed,
)
from bridgework.evaluation.yes_no import placements


def rows_of(values: "list[float]", per_image: int = 1) -> RowValues:
    keys = tuple(f"row {i}" for i in range(len(values)))
    images = tuple(f"image {i // per_image}" for i in range(len(values)))
    return EvaluatedRows(keys, images).values(values)


def test_the_interval_of_independent_rows_is_that_of_the_t_distribution() -> None:
    values = np.random.default_rng(0).normal(2.0, 1.0, 40)
    found = interval(rows_of(list(values)))
    low, high = ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.value, found.n, found.clusters) == (pytest.approx(values.mean()), 40, 40)
    assert (found.low, found.high) == pytest.approx((low, high))


def test_the_interval_of_clustered_rows_is_that_of_the_paper() -> None:
    """Miller 2024, equation 4, with the correction for few clusters of Liang & Zeger."""
    draw = np.random.default_rng(1)
    images, each = 30, 4
    values = np.repeat(draw.normal(0.0, 1.0, images), each) + draw.normal(0.0, 0.5, images * each)
    found = interval(rows_of(list(values), each))
    rest = (values - values.mean()).reshape(images, each)
    error = np.sqrt((rest.sum(1) ** 2).sum()) / values.size * np.sqrt(images / (images - 1))
    half = t.ppf(0.975, images - 1) * error
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half))
    alone = interval(rows_of(list(values)))
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


def test_the_interval_holds_the_truth_in_95_of_100_draws() -> None:
    draw, held = np.random.default_rng(2), 0
    for _ in range(400):
        chance = draw.beta(2, 2, 60)  # of an image
        values = draw.random((60, 3)) < chance[:, None]
        found = interval(rows_of([float(v) for v in values.ravel()], 3))
        held += found.low <= 0.5 <= found.high
    assert 0.92 <= held / 400 <= 0.98


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_of_all_or_none_has_an_interval_of_some_width(share: float) -> None:
    found = interval(rows_of([share] * 16))
    assert found.low <= share <= found.high
    assert 0.15 < found.high - found.low < 0.25
    wider = interval(rows_of([share] * 16, per_image=4))
    assert wider.high - wider.low > found.high - found.low


def test_one_image_has_no_interval() -> None:
    found = interval(rows_of([0.0, 1.0, 1.0], per_image=3))
    assert np.isnan(found.low) and "no interval" in str(found)
    assert np.isnan(difference(rows_of([0.0]), rows_of([1.0])).p)


def test_a_share_stays_between_0_and_1() -> None:
    found = interval(rows_of([1.0] * 9 + [0.0]))
    assert 0.0 <= found.low < 0.9 < found.high <= 1.0


def test_a_ratio_of_sums_is_the_weighted_mean_and_its_interval_that_of_the_delta_method() -> None:
    draw = np.random.default_rng(3)
    tokens = draw.integers(1, 20, 200)
    nats = tokens * draw.normal(2.0, 0.5, 200)
    keys = tuple(map(str, range(200)))
    rows = EvaluatedRows(keys, keys).values(nats / tokens, tokens)
    ratio = nats.sum() / tokens.sum()
    spread = (nats - ratio * tokens).std(ddof=1) / tokens.mean() / np.sqrt(200)
    found = interval(rows)
    assert found.value == pytest.approx(ratio)
    assert (found.high - found.low) / 2 == pytest.approx(t.ppf(0.975, 199) * spread, rel=1e-6)
    assert rows.contributions.mean() == pytest.approx(ratio)


def test_f1_as_a_ratio_is_that_of_scikit_learn_and_its_interval_that_of_many_draws() -> None:
    draw = random.Random(4)
    truth = [draw.random() < 0.5 for _ in range(300)]
    said = [right if draw.random() < 0.8 else not right for right in truth]
    keys = tuple(map(str, range(300)))
    rows = EvaluatedRows(keys, keys).values(
        [s and r for s, r in zip(said, truth, strict=True)],
        [s + r for s, r in zip(said, truth, strict=True)],
    )
    found = interval(rows)
    assert found.value == pytest.approx(f1_score(truth, said))
    assert found.n == sum(s or r for s, r in zip(said, truth, strict=True))
    draws = []
    for _ in range(500):
        some = draw.choices(range(300), k=300)
        draws.append(f1_score([truth[i] for i in some], [said[i] for i in some]))
    assert (found.high - found.low) / (2 * norm.ppf(0.975)) == pytest.approx(np.std(draws), rel=0.1)


def test_placements_have_the_area_under_the_curve_as_mean_and_its_spread() -> None:
    draw = np.random.default_rng(5)
    truth = draw.random(400) < 0.4
    scores = np.round(draw.normal(0.0, 1.0, 400) + truth, 1)  # with ties
    values = placements(scores.tolist(), truth.tolist())
    assert values.mean() == pytest.approx(roc_auc_score(truth, scores))
    draws = []
    for _ in range(500):
        some = draw.integers(0, 400, 400)
        draws.append(roc_auc_score(truth[some], scores[some]))
    assert values.std(ddof=1) / np.sqrt(400) == pytest.approx(np.std(draws), rel=0.1)


def test_the_difference_is_paired() -> None:
    draw = np.random.default_rng(6)
    hard = draw.normal(0.0, 2.0, 50)
    first, second = hard + draw.normal(0.0, 0.1, 50), hard + 0.2 + draw.normal(0.0, 0.1, 50)
    found = difference(rows_of(list(first)), rows_of(list(second)))
    test = ttest_rel(second, first)
    low, high = test.confidence_interval(0.95)
    assert (found.low, found.high, found.p) == pytest.approx((low, high, test.pvalue))
    assert found.value == pytest.approx((second - first).mean())


def test_the_rows_that_would_decide_do_decide() -> None:
    """With the number that is named, 8 of 10 repetitions find the difference."""
    needed = rows_needed(0.1, 1 / np.sqrt(50), 50)
    assert needed is not None
    draw, found = np.random.default_rng(7), 0
    for _ in range(300):
        values = draw.normal(0.1, 1.0, needed)
        found += ttest_1samp(values, 0.0).pvalue < 0.05
    assert 0.73 <= found / 300 <= 0.87
    assert rows_needed(0.0, 0.1, 50) is None


def test_rows_are_paired_by_key_and_only_those_that_both_have() -> None:
    keys = ("a", "b", "c", "d")
    first = EvaluatedRows(keys, keys).values([0.0, 0.0, 1.0, 0.0])
    names = ("d", "c", "b")
    second = EvaluatedRows(names, names).values([1.0, 1.0, 0.0])
    found = difference(first, second)
    assert (found.n, found.value) == (3, pytest.approx(2 / 3 - 1 / 3))
    other = EvaluatedRows(("x", "y"), ("x", "y")).values([0.0, 1.0])
    with pytest.raises(DataError, match="no row in common"):
        difference(first, other)


def test_a_gain_on_two_images_is_not_significant_although_its_spread_is_0() -> None:
    assert difference(rows_of([0.0, 0.0]), rows_of([1.0, 1.0])).p == 0.5
    assert difference(rows_of([0.0] * 9), rows_of([1.0] * 9)).p < 0.01
    assert difference(rows_of([0.0, 1.0]), rows_of([0.0, 1.0])).p == 1.0


def test_the_bootstrap_is_paired_and_clustered() -> None:
    draw = np.random.default_rng(8)
    images, each = 120, 3
    shared = np.repeat(draw.normal(0.0, 0.3, images), each)
    first = draw.normal(0.0, 1.0, images * each)
    second = first + 0.1 + shared
    given = rows_of(list(first), each), rows_of(list(second), each)
    low, high = bootstrap(*given, resamples=2_000)
    found = difference(*given)
    assert (low, high) == pytest.approx((found.low, found.high), abs=0.01)
    assert bootstrap(*given, resamples=2_000) == (low, high)


def test_repeated_keys_are_numbered() -> None:
    assert numbered(["a", "b", "a", "a", "a#2"]) == ["a", "b", "a#2", "a#3", "a#2'"]


def test_rows_of_the_same_image_are_one_cluster() -> None:
    def asked(key: str, *images: bytes) -> Sample:
        return Sample(key, images, tuple(Part("user", image=i) for i in range(len(images))))

    rows = EvaluatedRows.of([asked("1", b"cat"), asked("2", b"cat"), asked("3", b"cat", b"dog")])
    assert len(set(rows.clusters)) == 2
    assert cluster_of(asked("1", b"ab", b"c")) != cluster_of(asked("1", b"a", b"bc"))
    assert cluster_of(Sample("t", (), (Part("user", text="hi"),))) == "key:t"


def test_a_value_for_every_row_is_required() -> None:
    with pytest.raises(ValueError, match="a value and a weight for each of 2 rows"):
        EvaluatedRows(("a", "b"), ("a", "b")).values([1.0])
