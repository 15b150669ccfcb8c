"""Canary: compares a challenger with an equal-sized baseline of the champion's requests.

A hash of the request id puts requests into the group `challenger` (a share) and `baseline` (an
equal share). Three one-sided tests ask whether the challenger is worse by more than a margin:

errors    Fisher's exact test of the two error rates
latency   Mann-Whitney U test of the challenger's seconds against the baseline's times the margin
answers   sign test of the probes that the two answer differently

Each test is repeated while requests arrive, and every repetition could be a false alarm. So the
error probability is spent over the repetitions (alpha spending; Lan and DeMets 1983): look k is
taken after `first` x GROWTH^(k-1) requests at significance alpha/3 x 6 / (pi^2 k^2). The sum over
all k and the three tests is alpha, so a challenger that is within the margins is rolled back with a
probability of at most alpha, however long the comparison runs (union bound).
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy.stats import binomtest, fisher_exact, mannwhitneyu

from bridgework.serving.options import CanaryLimits

Group = Literal["challenger", "baseline"]
Figures = dict[str, float]

GROWTH = 1.5  # requests between two looks grow by this factor
WINDOW = 4096  # the newest latencies of each group that are compared
TESTS = 3


@dataclass
class Outcomes:
    """Outcomes of the requests of one group."""

    requests: int = 0  # with an answer or an error
    errors: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    @property
    def median_s(self) -> float:
        return float(np.median(self.seconds)) if self.seconds else math.nan


@dataclass(frozen=True)
class Verdict:
    """Result of a comparison, with the reason in one sentence and the figures."""

    worse: bool  # False: good enough to be promoted
    reason: str
    figures: Mapping[str, float]


class Canary:
    """The comparison of one challenger with the champion."""

    def __init__(self, limits: CanaryLimits) -> None:
        self._limits = limits
        self.groups: dict[Group, Outcomes] = {"challenger": Outcomes(), "baseline": Outcomes()}
        self.scores: tuple[Sequence[float], Sequence[float]] = ((), ())  # baseline, challenger
        self._looks = {"requests": 0, "probes": 0}
        self._next_look = float(limits.first)
        self._probed = False  # since the last verdict

    def observe(self, group: Group, seconds: float, *, error: bool = False) -> None:
        """Count a request of a group.

        seconds: until the answer was complete, or until its client disconnected. Those of an error
        are not compared, because errors are often fast.
        """
        outcomes = self.groups[group]
        outcomes.requests += 1
        outcomes.errors += error
        if not error:
            outcomes.seconds.append(seconds)

    def observe_probes(self, baseline: Sequence[float], challenger: Sequence[float]) -> None:
        """Replace the scores of the probes, in [0, 1] each, one for each probe."""
        if (list(baseline), list(challenger)) != tuple(map(list, self.scores)):
            self.scores = (baseline, challenger)
            self._looks["probes"] += 1
            self._probed = True

    def verdict(self) -> Verdict | None:
        """Return why the challenger is worse; None if it is not, or if no look is due.

        Call it after every request and every round of probes.
        """
        requests = self.groups["challenger"].requests
        reasons = []
        if requests >= self._next_look:
            while requests >= self._next_look:
                self._next_look *= GROWTH
            self._looks["requests"] += 1
            level = self._level("requests")
            reasons += [self._more_errors(level), self._slower(level)]
        if self._probed:
            self._probed = False
            reasons.append(self._worse_answers(self._level("probes")))
        found = "; ".join(filter(None, reasons))
        return Verdict(True, found, self.figures()) if found else None

    def promotable(self, seconds: float) -> Verdict | None:
        """Return a verdict if the challenger was good for long enough; else None.

        seconds: since the comparison began. Good is: after `promote_requests` requests and
        `promote_s` seconds its error rate is at most `errors` above the baseline's, its latency is
        shown to be within the margin (Mann-Whitney U, at alpha), and its answers to the probes are
        on average as good as the champion's.
        """
        challenger, baseline = self.groups["challenger"], self.groups["baseline"]
        limits = self._limits
        if (
            min(challenger.requests, baseline.requests) < limits.promote_requests
            or seconds < limits.promote_s
            or (limits.probes is not None and not self.scores[1])
            or challenger.error_rate > baseline.error_rate + limits.errors
            or np.mean(self.scores[1] or 0.0) < np.mean(self.scores[0] or 0.0)
            or self._latency_p("less") >= limits.alpha
        ):
            return None
        reason = f"within the margins for {challenger.requests} requests and {seconds:.0f} s"
        return Verdict(False, reason, self.figures())

    def figures(self) -> Figures:
        """Return the compared figures by name."""
        figures = {}
        for name, outcomes in self.groups.items():
            figures[f"{name}.requests"] = float(outcomes.requests)
            figures[f"{name}.error_rate"] = outcomes.error_rate
            figures[f"{name}.median_s"] = outcomes.median_s
        for group, scores in zip(("baseline", "challenger"), self.scores, strict=True):
            if scores:
                figures[f"{group}.probe_score"] = float(np.mean(scores))
        return {name: value for name, value in figures.items() if not math.isnan(value)}

    def _level(self, kind: str) -> float:
        """Return the significance of the current look."""
        return self._limits.alpha / TESTS * 6 / (math.pi * self._looks[kind]) ** 2

    def _more_errors(self, level: float) -> str:
        challenger, baseline = self.groups["challenger"], self.groups["baseline"]
        difference = challenger.error_rate - baseline.error_rate
        if not baseline.requests or difference <= self._limits.errors:
            return ""
        table = [[g.errors, g.requests - g.errors] for g in (challenger, baseline)]
        p = float(fisher_exact(table, alternative="greater").pvalue)
        if p >= level:
            return ""
        return (
            f"error rate {challenger.error_rate:.1%} against {baseline.error_rate:.1%}, more than "
            f"{self._limits.errors:g} above it (Fisher p={p:.1g})"
        )

    def _slower(self, level: float) -> str:
        p = self._latency_p("greater")
        if p >= level:
            return ""
        challenger, baseline = self.groups["challenger"], self.groups["baseline"]
        return (
            f"median latency {challenger.median_s:.3g} s against {baseline.median_s:.3g} s, more "
            f"than {self._limits.latency:g} times (Mann-Whitney p={p:.1g})"
        )

    def _latency_p(self, alternative: Literal["less", "greater"]) -> float:
        challenger, baseline = self.groups["challenger"].seconds, self.groups["baseline"].seconds
        if not challenger or not baseline:
            return 1.0
        limit = np.asarray(baseline) * self._limits.latency
        with np.errstate(all="ignore"):  # all values equal: p is NaN
            p = mannwhitneyu(challenger, limit, alternative=alternative).pvalue
        return 1.0 if math.isnan(p) else float(p)

    def _worse_answers(self, level: float) -> str:
        baseline, challenger = map(np.asarray, self.scores)
        worse, better = int((challenger < baseline).sum()), int((challenger > baseline).sum())
        loss = float(np.mean(baseline - challenger))
        if not worse or loss <= self._limits.answers:
            return ""
        p = float(binomtest(worse, worse + better, alternative="greater").pvalue)
        if p >= level:
            return ""
        return (
            f"{worse} probes answered worse and {better} better of {len(baseline)}, mean score "
            f"{challenger.mean():.3g} against {baseline.mean():.3g} (sign test p={p:.1g})"
        )
