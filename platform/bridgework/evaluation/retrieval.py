"""Do the bridge's tokens say what the caption says? Nearest neighbours of pooled vectors, both ways."""

# R rows, each an image and its text

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bridgework.errors import SpecError
from bridgework.evaluation.result import Result, named
from bridgework.evaluation.rows import draw_pairs
from bridgework.spec import spec

if TYPE_CHECKING:
    from bridgework.inference import Pipeline

CUTS = (1, 5)


@spec
class Retrieval:
    """R@1 and R@5 in [0, 1] among all rows: `image_to_text_r1` and so on, beside `chance_r1` and `chance_r5`."""

    name: str = "retrieval"
    dataset: str
    rows: int = 300
    prompts: tuple[str, ...] = ()  # what pairs are asked with; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(f"{self.name}.rows must be at least 2, got {self.rows}: one row is always right")

    def tiny(self) -> "Retrieval":
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset with fewer than two pairs."""
        items = draw_pairs(self, pipeline, home, at_least=2)
        images_RD = pipeline.embed_images([item.squares[0] for item in items])
        texts_RD = pipeline.embed_texts([item.sample.text for item in items])
        alike_RR = images_RD @ texts_RD.T
        values: dict[str, float] = {}
        for cut in CUTS:
            values[f"image_to_text_r{cut}"] = recall(alike_RR, cut)
            values[f"text_to_image_r{cut}"] = recall(alike_RR.T, cut)
            values[f"chance_r{cut}"] = min(1.0, cut / len(items))
        return Result(named(self.name, values))


def recall(alike_RR: Tensor, cut: int) -> float:
    """Share of rows whose own column is among the `cut` largest; a tie counts against it."""
    better_R = (alike_RR >= alike_RR.diagonal().unsqueeze(1)).sum(1) - 1
    return float((better_R < cut).double().mean())
