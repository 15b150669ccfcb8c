"""Promotion gate: which figures must improve, which must not get worse, and how that is decided.

A figure improves if the 95 % interval of the paired difference is above 0 (superiority). A guarded
figure passes if the interval is above minus its margin (non-inferiority). Intervals come from a
paired bootstrap that draws images with repetition (Efron 1979, clusters as in Miller 2024,
arXiv:2411.00640). A difference that the rows cannot decide is neither passed nor failed: the check
names the number of rows that would decide it with a power of 80 %.

A gate file is TOML:

    improve = ["ranking.accuracy"]
    parity = true                      # the export to transformers gives equal outputs

    [guard]                            # figure = margin, in the unit of the figure
    "heldout.loss" = 0.02
    "latency.ms" = 50

    [[evaluation]]                     # beyond those of the model's stage
    on = "latency:my-pairs"
    rows = 64
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from pathlib import Path
from typing import Any, Literal

from scipy.stats import norm

from bridgework.config import config_class
from bridgework.errors import SpecError, suggest
from bridgework.evaluation.kinds import Evaluations, of_table
from bridgework.evaluation.results import EvaluationRecord
from bridgework.evaluation.statistics import (
    CONFIDENCE,
    RESAMPLES,
    RowValues,
    bootstrap,
    paired,
    rows_needed,
)
from bridgework.system import Direction, EvalSpec

MARGIN = 0.02  # of guarded figures in the default gate
IMAGES = 20  # fewest images on which a difference is decided
Outcome = Literal["passed", "failed", "undecided"]


@config_class
class Gate:
    """Conditions of a promotion: all of them must pass."""

    improve: tuple[str, ...] = ()  # figures that must be better than the champion's
    guard: Mapping[str, float] = field(default_factory=dict)  # figure -> margin
    parity: bool = False  # the export to transformers must give equal outputs
    evaluations: tuple[
        Any, ...
    ] = ()  # beyond those of the model's stage, or instead of their names
    confidence: float = CONFIDENCE
    resamples: int = RESAMPLES  # of the bootstrap
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.improve or self.guard or self.parity):
            raise SpecError(
                "gate: nothing is required. Got no figure in improve or guard; expected e.g. "
                'improve = ["ranking.accuracy"]'
            )
        if both := set(self.improve) & set(self.guard):
            raise SpecError(
                f"gate: {', '.join(sorted(both))} must improve, so it needs no guard. "
                "Fix: leave it out of guard"
            )
        for figure, margin in self.guard.items():
            if (
                isinstance(margin, bool)
                or not isinstance(margin, int | float)
                or not (0 <= margin < float("inf"))
            ):
                raise SpecError(
                    f"gate: the margin of {figure} is how much worse it may get. "
                    f"Got {margin!r}; expected a number of at least 0"
                )
        if not 0.5 <= self.confidence < 1 or self.resamples < 100:
            raise SpecError(
                "gate: confidence is in [0.5, 1) and resamples at least 100. "
                f"Got {self.confidence:g} and {self.resamples}"
            )

    @property
    def figures(self) -> tuple[str, ...]:
        """All figures that decide."""
        return (*self.improve, *self.guard)

    def evals(self, own: Sequence[EvalSpec]) -> list[EvalSpec]:
        """Return the evaluations to run: of the figures, from the gate and from the `own` ones.

        Raises SpecError, with a suggestion, for a figure that no evaluation returns, and for a
        baseline.
        """
        known = {spec.name: spec for spec in (*own, *self.evaluations)}
        ways = {
            f"{s.name}.{key}": (s, way) for s in known.values() for key, way in s.better.items()
        }
        decisive = [figure for figure, (_, way) in ways.items() if way is not None]
        for figure in self.figures:
            if figure not in ways:
                raise SpecError(
                    f"gate: no evaluation returns {figure!r}"
                    + (suggest(figure, decisive) or ". Fix: add an [[evaluation]] to the gate file")
                )
            if ways[figure][1] is None:
                raise SpecError(
                    f"gate: {figure} is a baseline, so it cannot decide a promotion"
                    + suggest(figure, decisive)
                )
        names = dict.fromkeys(ways[figure][0].name for figure in self.figures)
        return [known[name] for name in names]


def default_gate(own: Sequence[EvalSpec]) -> Gate:
    """Return the gate of a stage without one.

    The first figure of its first evaluation must improve. The first figures of the others must not
    be worse by more than 0.02. Raises SpecError for a stage without evaluations.
    """
    firsts = [
        f"{spec.name}.{key}"
        for spec in own
        for key in [next((k for k, way in spec.better.items() if way is not None), None)]
        if key is not None
    ]
    if not firsts:
        raise SpecError(
            "the model's stage has no evaluations, so nothing can be compared. "
            "Fix: give --gate FILE with an [[evaluation]], or --force REASON"
        )
    return Gate(improve=(firsts[0],), guard=dict.fromkeys(firsts[1:], MARGIN))


def read_gate(file: Path) -> Gate:
    """Read a gate file. Raises SpecError, with a suggestion, for an unknown key."""
    try:
        table = tomllib.loads(file.read_text())
    except FileNotFoundError:
        raise SpecError(f"gate file {file} does not exist. Fix: give the path of a file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"gate file {file} is not TOML: {error}") from None
    known = ("improve", "guard", "parity", "evaluation", "confidence", "resamples", "seed")
    for key in table:
        if key not in known:
            raise SpecError(f"gate file {file}: unknown key {key!r}{suggest(key, known)}")
    expected = {"improve": list, "guard": dict, "parity": bool, "evaluation": list,
                "confidence": float, "resamples": int, "seed": int}  # fmt: skip
    for key, value in table.items():
        if not isinstance(value, expected[key]):
            raise SpecError(
                f"gate file {file}: {key} has another type. Got {value!r}; "
                f"expected {expected[key].__name__}"
            )
    tables = table.pop("evaluation", [])
    where = f"gate file {file}"
    evaluations = tuple(of_table(item, where) for item in tables if isinstance(item, dict))
    if len(evaluations) != len(tables):
        raise SpecError(f"{where}: write each evaluation as a table [[evaluation]]")
    Evaluations(evals=evaluations)
    improve = tuple(map(str, table.pop("improve", ())))
    return Gate(improve=improve, evaluations=evaluations, **table)


@dataclass(frozen=True)
class GateCheck:
    """One condition of a gate, with the figures of both models."""

    figure: str
    rule: Literal["improve", "guard", "parity"]
    outcome: Outcome
    reason: str
    better: Direction | None = None
    new: float | None = None
    old: float | None = None
    difference: float | None = None  # new - old
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    n: int = 0  # rows that both were evaluated on
    images: int = 0
    more_rows: int | None = None  # beyond `n`, that would decide


def judge(
    gate: Gate,
    new: Sequence[EvaluationRecord],
    old: Sequence[EvaluationRecord],
) -> list[GateCheck]:
    """Return the checks of a gate on the evaluations of two models, without that of parity."""
    figures = [(name, None) for name in gate.improve] + list(gate.guard.items())
    rows = [
        {key: r for record in records for key, r in record.rows.items()} for records in (new, old)
    ]
    ways = {key: way for record in new for key, way in record.better.items()}
    checks = []
    for name, margin in figures:
        missing = [who for who, own in zip(("new", "old"), rows, strict=True) if name not in own]
        if missing:
            checks.append(
                GateCheck(
                    name,
                    "improve" if margin is None else "guard",
                    "failed",
                    f"the {missing[0]} model's evaluation has no rows of it, "
                    "so its difference cannot be judged",
                )
            )
        else:
            checks.append(
                check(gate, name, ways[name] or "higher", rows[0][name], rows[1][name], margin)
            )
    return checks


def check(
    gate: Gate,
    figure: str,
    better: Direction,
    new: RowValues,
    old: RowValues,
    margin: float | None = None,
) -> GateCheck:
    """Decide one figure: superiority, or non-inferiority with a `margin`.

    Raises DataError if the two have no row in common.
    """
    old, new = paired(old, new)
    rule: Literal["improve", "guard"] = "improve" if margin is None else "guard"
    images, n, gap = len(set(new.clusters)), len(new.keys), new.mean - old.mean
    sign, needed = (1 if better == "higher" else -1), margin or 0.0

    def decided(
        outcome: Outcome, reason: str, low: float, high: float, more: int | None
    ) -> GateCheck:
        return GateCheck(figure, rule, outcome, reason, better, new.mean, old.mean, gap, low, high,
                     margin, n, images, more)  # fmt: skip

    if not isfinite(gap):
        # a finite figure is better than none
        good = isfinite(new.mean) and isnan(old.mean)
        reason = "the old model's figure is not a number" if good else "it is not a number"
        return decided("passed" if good else "failed", reason, gap, gap, None)
    low, high = bootstrap(old, new, gate.confidence, resamples=gate.resamples, seed=gate.seed)
    worst, best, distance = (
        min(sign * low, sign * high),
        max(sign * low, sign * high),
        sign * gap + needed,
    )
    if images < IMAGES:
        more = -(-IMAGES * n // images) - n if images else IMAGES
        reason = f"it needs {more:,} more rows: at least {IMAGES} images. Got {images}"
        return decided("undecided", reason, low, high, more)
    if worst + needed > 0 or (margin is not None and worst + needed == 0):
        return decided("passed", "better" if margin is None else "not worse", low, high, None)
    if distance <= 0 or best + needed <= 0:
        reason = "it is not better" if margin is None else f"it is worse by more than {margin:g}"
        return decided("failed", reason, low, high, None)
    quantile = float(norm.ppf((1 + gate.confidence) / 2))
    total = rows_needed(distance, (high - low) / (2 * quantile), n, gate.confidence) or n
    more = max(1, total - n)
    return decided("undecided", f"it needs {more:,} more rows", low, high, more)
