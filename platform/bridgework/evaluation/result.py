"""Results of an evaluation, and which way each of its figures is better."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image

from bridgework.system import Better as Better


@dataclass(frozen=True)
class Result:
    """Metrics and pictures, all under the evaluation's name."""

    metrics: dict[str, float]
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class _Evaluation(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def better(self) -> Better: ...


def named(evaluation: _Evaluation, values: Mapping[str, float]) -> dict[str, float]:
    """Return {"ranking.accuracy": 0.4} for an evaluation called "ranking" and {"accuracy": 0.4}.

    Raises ValueError for figures other than those that `evaluation.better` declares: sweeps and promotion rely on it.
    """
    if values.keys() != evaluation.better.keys():
        raise ValueError(
            f"{type(evaluation).__name__}.better declares {sorted(evaluation.better)}. Got {sorted(values)}"
        )
    return {f"{evaluation.name}.{key}": float(value) for key, value in values.items()}
