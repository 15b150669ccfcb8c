"""Does the language model use the image? Its loss with the true one, and with another row's."""

# N images of all rows  P patches  F width of the tower's features

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from bridgework.errors import DataError, SpecError
from bridgework.evaluation.result import Better, Result, named
from bridgework.evaluation.rows import draw
from bridgework.spec import spec

if TYPE_CHECKING:
    from bridgework.inference import Pipeline, Score


@spec
class HeldOutLoss:
    """Nats per token with loss: `loss` with the true images, `loss_shuffled` with those of other rows, and the `gap`.

    A model that ignores its images has no gap, however low its loss.
    """

    better: ClassVar[Better] = {"loss": "lower", "loss_shuffled": None, "gap": "higher"}
    name: str = "heldout"
    dataset: str
    rows: int = 256
    prompts: tuple[str, ...] = ()  # what pairs are asked with; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(f"{self.name}.rows must be at least 2, got {self.rows}: images are swapped between rows")

    def tiny(self) -> "HeldOutLoss":
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset without two images."""
        items = draw(self, pipeline, home)
        seen_NPF = pipeline.inputs.features([square for item in items for square in item.squares])
        if len(seen_NPF) < 2:
            raise DataError(
                f"{self.name}: {self.dataset} has {len(seen_NPF)} images to swap between rows; it needs two"
            )
        shift = random.Random(self.seed).randrange(1, len(seen_NPF))
        counts = [len(item.squares) for item in items]
        conversations = [item.conversation for item in items]
        true = pipeline.scores(conversations, torch.split(seen_NPF, counts))
        other = pipeline.scores(conversations, torch.split(seen_NPF.roll(shift, 0), counts))
        loss, shuffled = _mean(true), _mean(other)
        return Result(named(self, {"loss": loss, "loss_shuffled": shuffled, "gap": shuffled - loss}))


def _mean(scores: "Sequence[Score]") -> float:
    return -sum(s.loglik for s in scores) / sum(s.tokens for s in scores)
