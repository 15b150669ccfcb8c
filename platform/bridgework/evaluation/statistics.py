"""Intervals of evaluation figures and paired differences between two models, clustered by image.

Several questions about one image are not independent, so all rows of an image are one cluster
(Miller 2024, "Adding Error Bars to Evals", arXiv:2411.00640, 2.2). Two models are compared on the
same rows, because the paired difference has a smaller standard error (4.2). The number of rows that
would decide a difference is that of a test with a power of 80 % (5).
"""

# R rows  G clusters

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, fsum, isfinite, nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridgework.data.samples import Sample
from bridgework.errors import DataError

CONFIDENCE = 0.95  # of intervals, two-sided
POWER = 0.8  # of the number of rows that would decide
RESAMPLES = 9_999  # of the bootstrap
BATCH = 4_000_000  # numbers that the bootstrap draws at a time


@dataclass(frozen=True)
class RowValues:
    """Per-row values of one figure; the figure is their mean, weighted by `weights`.

    A ratio of sums, e.g. nats per token, has the row's ratio as its value and the row's divisor as
    its weight. A row of weight 0 is not part of the figure, e.g. a "no" in the precision of "yes".
    """

    keys: tuple[str, ...]  # different from each other
    clusters: tuple[str, ...]  # digest of the row's images
    values: NDArray[np.float64]  # (R,)
    weights: NDArray[np.float64]  # (R,)

    @property
    def mean(self) -> float:
        """The figure: the weighted mean; 0 if all weights are 0."""
        total = fsum(self.weights)
        return fsum(self.weights * self.values) / total if total else 0.0

    @property
    def contributions(self) -> NDArray[np.float64]:
        """(R,) numbers with the figure as their plain mean: the ratio's linear approximation."""
        mean, scale = self.mean, float(self.weights.mean()) if len(self.weights) else 0.0
        if not scale:
            return np.full(len(self.values), mean)
        return mean + self.weights * (self.values - mean) / scale

    def take(self, rows: Sequence[int]) -> "RowValues":
        """Return the rows with these indices."""
        return RowValues(
            tuple(self.keys[i] for i in rows),
            tuple(self.clusters[i] for i in rows),
            self.values[list(rows)],
            self.weights[list(rows)],
        )


@dataclass(frozen=True)
class EvaluatedRows:
    """Keys and clusters of the rows that an evaluation read, in order."""

    keys: tuple[str, ...]
    clusters: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], parts: Sequence[str] = ()) -> "EvaluatedRows":
        """Return the rows of these samples.

        parts: per row, the part of the sample that is evaluated, e.g. the object asked for. A
        repeated key gets a number.
        """
        keys = [sample.key for sample in samples]
        if parts:
            keys = [f"{key}/{part}" for key, part in zip(keys, parts, strict=True)]
        return cls(tuple(numbered(keys)), tuple(map(cluster_of, samples)))

    def values(self, values: Iterable[float], weights: Iterable[float] | None = None) -> RowValues:
        """Return a figure of these rows; weights are 1 by default.

        Raises ValueError if there is not one value and one weight per row.
        """
        values_R = np.array([float(value) for value in values])
        weights_R = (
            np.ones_like(values_R) if weights is None else np.array([float(w) for w in weights])
        )
        if not len(self.keys) == len(values_R) == len(weights_R):
            raise ValueError(
                "EvaluatedRows.values: expected a value and a weight for each of "
                f"{len(self.keys)} rows. Got {len(values_R)} and {len(weights_R)}"
            )
        return RowValues(self.keys, self.clusters, values_R, weights_R)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval; `low` and `high` are NaN for fewer than two clusters."""

    value: float
    low: float
    high: float
    n: int  # rows
    clusters: int

    def __str__(self) -> str:
        if not isfinite(self.low):
            return f"{self.value:.4g} (n={self.n:,}, no interval: {self.clusters} image)"
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n={self.n:,})"


@dataclass(frozen=True)
class Difference:
    """Paired difference of a figure between two models, the second minus the first."""

    value: float
    low: float
    high: float
    p: float  # two-sided, of a difference of 0; NaN for fewer than two clusters
    n: int  # rows that both have
    clusters: int
    rows_needed: int | None  # to decide a difference of this size; None for a difference of 0


def cluster_of(sample: Sample) -> str:
    """Return the cluster of a sample: sha256 of its images' files, or its key without an image."""
    digests = [hashlib.sha256(image).hexdigest() for image in sample.images]
    if len(digests) > 1:
        return hashlib.sha256("".join(digests).encode()).hexdigest()
    return digests[0] if digests else f"key:{sample.key}"


def numbered(keys: Iterable[str]) -> list[str]:
    """Return the keys; the second `a` becomes `a#2`, so that all are different."""
    seen, taken, unique = Counter[str](), set[str](), []
    for key in keys:
        seen[key] += 1
        new = key if seen[key] == 1 else f"{key}#{seen[key]}"
        while new in taken:
            new += "'"
        taken.add(new)
        unique.append(new)
    return unique


def interval(rows: RowValues, confidence: float = CONFIDENCE) -> Interval:
    """Return the figure of the rows with its interval, by cluster-robust standard errors.

    The quantiles are those of t with one degree of freedom fewer than clusters. If all clusters
    agree on a share of 0 or 1, the interval is Wilson's for as many independent rows as there are
    clusters, because their spread is 0.
    """
    value, rows = rows.mean, rows.take(np.flatnonzero(rows.weights).tolist())
    n, clusters = len(rows.keys), len(set(rows.clusters))
    if clusters < 2:
        return Interval(value, nan, nan, n, clusters)
    share = bool(((rows.values >= 0) & (rows.values <= 1)).all())
    contributions = rows.contributions
    if share and np.ptp(contributions) == 0 and value in (0.0, 1.0):
        from scipy.stats import binomtest

        found = binomtest(round(value * clusters), clusters)
        low, high = found.proportion_ci(confidence, method="wilson")
    else:
        low, high = _fit(contributions, rows.clusters).conf_int(1 - confidence)[0]
    if share:
        low, high = max(0.0, low), min(1.0, high)
    return Interval(value, float(low), float(high), n, clusters)


def difference(first: RowValues, second: RowValues, confidence: float = CONFIDENCE) -> Difference:
    """Return the paired difference of a figure, on the rows that both have.

    Raises DataError if they have no row in common.
    """
    first, second = paired(first, second)
    value = second.mean - first.mean
    clusters, n = len(set(first.clusters)), len(first.keys)
    if clusters < 2:
        return Difference(value, nan, nan, nan, n, clusters, None)
    deltas = second.contributions - first.contributions
    if np.ptp(deltas) <= 1e-12 * max(1.0, float(np.abs(deltas).max())):  # no spread: a sign test
        from scipy.stats import binomtest

        p = binomtest(clusters, clusters).pvalue if abs(value) > 1e-12 else 1.0
        return Difference(value, value, value, float(p), n, clusters, None)
    fit = _fit(deltas, first.clusters)
    low, high = fit.conf_int(1 - confidence)[0]
    needed = rows_needed(value, float(fit.bse[0]), n)
    return Difference(value, float(low), float(high), float(fit.pvalues[0]), n, clusters, needed)


def rows_needed(gap: float, error: float, n: int, confidence: float = CONFIDENCE) -> int | None:
    """Return the rows with which a gap of this size is found with a power of 80 %.

    error: standard error of the gap with `n` rows. None for a gap of 0, which no number decides.
    """
    from scipy.stats import norm

    if not gap:
        return None
    quantiles = norm.ppf((1 + confidence) / 2) + norm.ppf(POWER)
    return ceil(n * (float(quantiles) * error / gap) ** 2)


def bootstrap(
    first: RowValues,
    second: RowValues,
    confidence: float = CONFIDENCE,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile interval of the paired difference: clusters are drawn with repetition.

    Raises DataError if the two have no row in common.
    """
    from scipy import stats

    first, second = paired(first, second)
    deltas = second.contributions - first.contributions
    _, group_R = np.unique(np.array(first.clusters), return_inverse=True)
    sums_G, sizes_G = np.bincount(group_R, weights=deltas), np.bincount(group_R).astype(float)
    if len(sums_G) < 2:
        return nan, nan

    def mean(sums: Any, sizes: Any, axis: int = -1) -> Any:
        return sums.sum(axis) / sizes.sum(axis)

    found = stats.bootstrap(
        (sums_G, sizes_G),
        mean,
        paired=True,
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        batch=max(1, BATCH // len(sums_G)),
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def paired(first: RowValues, second: RowValues) -> tuple[RowValues, RowValues]:
    """Return both reduced to their common keys, in the order of the first.

    Rows that are part of neither figure (weight 0) are left out.

    Raises DataError if they have no key in common.
    """
    place = {key: i for i, key in enumerate(second.keys)}
    common = [i for i, key in enumerate(first.keys) if key in place]
    if not common:
        raise DataError(
            "the two evaluations have no row in common, so they cannot be compared. Got keys like "
            f"{', '.join(map(repr, first.keys[:1]))} and {', '.join(map(repr, second.keys[:1]))}. "
            "Fix: evaluate both on the same dataset with the same seed"
        )
    counted = [i for i in common if first.weights[i] or second.weights[place[first.keys[i]]]]
    return first.take(counted), second.take([place[first.keys[i]] for i in counted])


def _fit(values: NDArray[np.float64], clusters: Sequence[str]) -> Any:
    """Return the mean of the values as a regression on a constant, with clustered errors."""
    from statsmodels.regression.linear_model import OLS  # the import takes a second

    _, groups = np.unique(np.array(clusters), return_inverse=True)
    model = OLS(values, np.ones(len(values)))
    return model.fit(cov_type="cluster", cov_kwds={"groups": groups}, use_t=True)
