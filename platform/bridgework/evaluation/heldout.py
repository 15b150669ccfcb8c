"""Does the language model use the image? Its loss with the true one, and with another row's."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bridgework.data.quarantine import BadSample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.result import Better, Result, named
from bridgework.evaluation.rows import draw
from bridgework.spec import spec

if TYPE_CHECKING:
    from bridgework.data.samples import Part
    from bridgework.inference import Pipeline, Score
    from bridgework.inputs import Seen


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
        shown = [pipeline.inputs.pictures(item.sample) for item in items]
        seen = pipeline.inputs.see([picture for pictures in shown for picture in pictures])
        if len(seen) < 2:
            raise DataError(f"{self.name}: {self.dataset} has {len(seen)} images to swap between rows; it needs two")
        shift = random.Random(self.seed).randrange(1, len(seen))
        true, other = _dealt(seen, shown), _dealt([*seen[-shift:], *seen[:-shift]], shown)
        # with tiles, an image of another row may be too long for this one
        fit = [i for i, item in enumerate(items) if _fits(pipeline, item.conversation, other[i])]
        if not fit:
            raise DataError(f"{self.name}: no row of {self.dataset} has room for the image of another row")
        conversations = [items[i].conversation for i in fit]
        loss, shuffled = (_mean(pipeline.scores(conversations, [images[i] for i in fit])) for images in (true, other))
        return Result(named(self, {"loss": loss, "loss_shuffled": shuffled, "gap": shuffled - loss}))


def _dealt(seen: "Sequence[Seen]", shown: Sequence[Sequence[object]]) -> "list[list[Seen]]":
    """As many of `seen` to each row as it shows, in order."""
    rest = iter(seen)
    return [list(islice(rest, len(pictures))) for pictures in shown]


def _fits(pipeline: "Pipeline", conversation: "Sequence[Part]", seen: "Sequence[Seen]") -> bool:
    layouts = [picture.layout for picture in seen if picture.layout is not None]
    try:
        pipeline.inputs.encode(conversation, answer=True, layouts=layouts)
    except BadSample:
        return False
    return True


def _mean(scores: "Sequence[Score]") -> float:
    return -sum(s.loglik for s in scores) / sum(s.tokens for s in scores)
