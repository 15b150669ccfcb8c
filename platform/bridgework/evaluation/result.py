"""What an evaluation gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image


@dataclass(frozen=True)
class Result:
    """Metrics and pictures, all under the evaluation's name."""

    metrics: dict[str, float]
    pictures: dict[str, Image.Image] = field(default_factory=dict)


def named(name: str, values: Mapping[str, float]) -> dict[str, float]:
    """{"ranking.accuracy": 0.4} of "ranking" and {"accuracy": 0.4}."""
    return {f"{name}.{key}": float(value) for key, value in values.items()}
