"""Latency of generated answers, e.g. as a guard of a promotion."""

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.evaluation.base import Better, Result, Writing, build_result, draw, question_of
from bridgework.evaluation.statistics import EvaluatedRows

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

WARM_UP = 2  # answers before the clock starts


@config_class
class Latency:
    """Milliseconds from a question to its complete answer, one at a time: `ms` is the mean.

    Answers have a fixed number of tokens. Figures compare only if they were measured on one machine
    at one time, so a promotion measures both models again.
    """

    timed: ClassVar[bool] = True  # never taken from a stored evaluation
    better: ClassVar[Better] = {"ms": "lower"}
    name: str = "latency"
    dataset: str
    rows: int = 32
    tokens: int = 16
    prompts: tuple[str, ...] = ()  # around each question; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.tokens < 1:
            raise SpecError(
                f"{self.name}: rows and tokens are at least 1. Got {self.rows} and {self.tokens}"
            )

    def tiny(self) -> "Latency":
        """Return a copy with at most 4 synthetic rows and 4 tokens."""
        return replace(
            self,
            dataset="synthetic:shapes",
            rows=min(self.rows, 4),
            tokens=min(self.tokens, 4),
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Answer the questions one by one. Raises DataError if no row can be read."""
        samples = [example.sample for example in draw(self, pipeline, home)]
        writing = Writing(beams=1, least=self.tokens, most=self.tokens)
        seconds = []
        for sample in [*samples[:1] * WARM_UP, *samples]:
            question = question_of(pipeline, sample, self.prompts or None)
            start = time.perf_counter()
            writing.run(pipeline, [question], [pipeline.inputs.pictures(sample)], self.seed)
            seconds.append(time.perf_counter() - start)
        rows = EvaluatedRows.of(samples)
        return build_result(self, {"ms": rows.values(1e3 * s for s in seconds[WARM_UP:])})
