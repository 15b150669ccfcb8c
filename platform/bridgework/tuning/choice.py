"""Choice of a sweep's winner: by one metric, or by a stated rule among several objectives.

A rule is for example `heldout.loss <= best + 0.01, then cost.tokens`: the trials whose loss is
within 0.01 of the best one, and among these the fewest tokens.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bridgework.errors import SpecError, suggest
from bridgework.tuning.space import Metric
from bridgework.tuning.study import TrialRow

QUALITY = "quality"  # another name of the first metric in a rule
EXAMPLE = "quality >= best - 0.01, then tokens"
_LIMIT = re.compile(
    r"(?P<name>\S+)\s*(?P<sign>>=|<=)\s*best\s*(?:(?P<way>[+-])\s*(?P<margin>[\d.eE+-]+)\s*(?P<share>%)?)?"
)


@dataclass(frozen=True)
class Limit:
    """A condition of a rule: a metric within `margin` of its best value."""

    metric: Metric
    margin: float  # of the metric's unit, or a share of the best value
    relative: bool

    def allows(self, value: float, best: float) -> bool:
        margin = abs(best) * self.margin if self.relative else self.margin
        if self.metric.mode == "max":
            return value >= best - margin
        return value <= best + margin


@dataclass(frozen=True)
class Rule:
    """Limits in order, then the metrics that decide."""

    limits: tuple[Limit, ...]
    order: tuple[Metric, ...]

    @classmethod
    def parse(cls, text: str, metrics: Sequence[Metric]) -> "Rule":
        """Parse a rule. Raises SpecError for another form and for an unknown metric."""
        limits, order = list[Limit](), list[Metric]()
        for part in re.split(r"\s*,\s*then\s+|\s*,\s*", text.strip()):
            found = _LIMIT.fullmatch(part)
            if found is None and re.search(r"[<>=\s]", part):
                raise SpecError(f"--prefer: cannot read {part!r}. Fix: write it like {EXAMPLE!r}")
            metric = _named(found["name"] if found else part, metrics)
            if found is None:
                order.append(metric)
                continue
            sign = ">=" if metric.mode == "max" else "<="
            way = "-" if metric.mode == "max" else "+"
            if found["sign"] != sign or found["way"] not in (None, way):
                raise SpecError(
                    f"--prefer: {part!r} has the wrong direction, because "
                    f"{'higher' if metric.mode == 'max' else 'lower'} {metric.name} is better. "
                    f"Fix: write {metric.name} {sign} best {way} MARGIN"
                )
            try:
                margin = float(found["margin"] or 0)
            except ValueError:
                raise SpecError(f"--prefer: {found['margin']!r} is not a number") from None
            share = found["share"] is not None
            limits.append(Limit(metric, margin / 100 if share else margin, share))
        order += [metric for metric in metrics if metric not in order]
        return cls(tuple(limits), tuple(order))


def _named(name: str, metrics: Sequence[Metric]) -> Metric:
    """Return the metric of a complete or short name, or `quality` for the first one."""
    if name == QUALITY:
        return metrics[0]
    for metric in metrics:
        if name in (metric.name, metric.name.rpartition(".")[2]):
            return metric
    known = [QUALITY, *(metric.name for metric in metrics)]
    raise SpecError(f"--prefer: {name!r} is not an objective of this sweep{suggest(name, known)}")


def front(rows: Sequence[TrialRow], metrics: Sequence[Metric]) -> list[TrialRow]:
    """Return the finished trials that no other one surpasses in every objective."""
    finished = [row for row in rows if row.finished]
    return [row for row in finished if not any(_dominates(o, row, metrics) for o in finished)]


def _dominates(one: TrialRow, other: TrialRow, metrics: Sequence[Metric]) -> bool:
    pairs = list(zip(metrics, one.scores, other.scores, strict=True))
    return all(not m.better(b, a) for m, a, b in pairs) and any(m.better(a, b) for m, a, b in pairs)


def ranked(rows: Sequence[TrialRow], metrics: Sequence[Metric], prefer: str) -> list[TrialRow]:
    """Sort trials, best first: a trial without a score never wins.

    Of several objectives without a rule, the trials of the Pareto front are before the others.
    """
    rule = Rule.parse(prefer, metrics) if prefer else Rule((), tuple(metrics))
    finished = [row for row in rows if row.finished and row.scores]
    place = {metric: number for number, metric in enumerate(metrics)}
    best = {
        metric: (max if metric.mode == "max" else min)(row.scores[number] for row in finished)
        for metric, number in place.items()
        if finished
    }
    optimal = {row.trial for row in front(finished, metrics)}

    def key(row: TrialRow) -> tuple[object, ...]:
        if row not in finished:
            running = {"stopped": 0, "paused": 0, "running": 1, "failed": 2}.get(row.status, 3)
            judged = -max(row.curve, default=0) if row.status == "paused" else 0
            return (1, running, judged, _signed(metrics[0], row.score), row.trial)
        missed = [
            not limit.allows(row.scores[place[limit.metric]], best[limit.metric])
            for limit in rule.limits
        ]
        dominated = not prefer and row.trial not in optimal
        return (
            0,
            *missed,
            dominated,
            *(_signed(metric, row.scores[place[metric]]) for metric in rule.order),
            row.trial,
        )

    return sorted(rows, key=key)


def _signed(metric: Metric, value: float | None) -> float:
    """Return a number that is smaller for better values."""
    if value is None:
        return float("inf")
    return -value if metric.mode == "max" else value
