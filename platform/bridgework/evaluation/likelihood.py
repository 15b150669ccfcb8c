"""Does the language model use the image? Its loss with the true one, and with another row's.

Rank the right caption of an image among those of others, by the language model's likelihood.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgework.config import added, config_class
from bridgework.data.quarantine import BadSample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, EvalExample, Result, draw, draw_pairs, named
from bridgework.evaluation.figures import Choice, FigureTile, grid
from bridgework.system import Layout, Scoring

if TYPE_CHECKING:
    from bridgework.data.samples import Part
    from bridgework.inference.pipeline import Pipeline, Score
    from bridgework.inference.preprocess import Seen


@config_class
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
            raise SpecError(
                f"{self.name}.rows must be at least 2, got {self.rows}: images are swapped between rows"
            )

    def tiny(self) -> "HeldOutLoss":
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset without two images."""
        items = draw(self, pipeline, home)
        shown = [pipeline.inputs.pictures(item.sample) for item in items]
        seen = pipeline.inputs.see([picture for pictures in shown for picture in pictures])
        if len(seen) < 2:
            raise DataError(
                f"{self.name}: {self.dataset} has {len(seen)} images to swap between rows; it needs two"
            )
        shift = random.Random(self.seed).randrange(1, len(seen))
        true, other = _dealt(seen, shown), _dealt([*seen[-shift:], *seen[:-shift]], shown)
        # with tiles, an image of another row may be too long for this one
        fit = [i for i, item in enumerate(items) if _fits(pipeline, item.conversation, other[i])]
        if not fit:
            raise DataError(
                f"{self.name}: no row of {self.dataset} has room for the image of another row"
            )
        conversations = [items[i].conversation for i in fit]
        loss, shuffled = (
            _mean(pipeline.scores(conversations, [images[i] for i in fit]))
            for images in (true, other)
        )
        return Result(
            named(self, {"loss": loss, "loss_shuffled": shuffled, "gap": shuffled - loss})
        )


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


# R rows, each an image and its caption  C candidates, the right one first


SHOWN = 12  # rows in the picture
TOP = 3  # captions shown for each


@config_class
class Ranking:
    """Share of rows whose own caption comes first of `candidates`, the others drawn from the other rows.

    `accuracy` scores a caption by `scoring`, by default less its prior (its log-likelihood given a blank image);
    `accuracy_without_prior` is that of the plain log-likelihood, which favors short and common captions. The picture
    shows the best candidates.
    """

    better: ClassVar[Better] = {
        "accuracy": "higher",
        "accuracy_without_prior": "higher",
        "chance": None,
    }
    name: str = "ranking"
    dataset: str
    rows: int = 100
    candidates: int = 20
    prompts: tuple[str, ...] = ()  # what pairs are asked with; empty: the stage's own
    seed: int = 0
    scoring: Scoring = added(default=Scoring(prior=True))

    def __post_init__(self) -> None:
        if not 2 <= self.candidates <= self.rows:
            raise SpecError(
                f"{self.name}.candidates must lie between 2 and rows ({self.rows}), got {self.candidates}: "
                "the wrong ones are captions of other rows"
            )

    def tiny(self) -> "Ranking":
        rows = min(self.rows, 16)
        return replace(
            self, dataset="synthetic:shapes", rows=rows, candidates=min(self.candidates, 4, rows)
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset with fewer captions than candidates."""
        items = draw_pairs(self, pipeline, home, at_least=self.candidates)
        captions_RC = candidates(len(items), self.candidates, self.seed)
        question = self.prompts[0] if self.prompts else None
        score_RC, loglik_RC = _scores(pipeline, items, captions_RC, question, self.scoring)
        values = {
            "accuracy": first(score_RC),
            "accuracy_without_prior": first(loglik_RC),
            "chance": 1 / self.candidates,
        }
        tiles = [
            _tile(items, row, captions_RC[row], score_RC[row])
            for row in range(min(SHOWN, len(items)))
        ]
        return Result(named(self, values), {self.name: grid(tiles)})


def candidates(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """(R, C): for every row itself, then `count - 1` different others."""
    draw = np.random.default_rng(seed)
    others_RC = np.stack([draw.choice(rows - 1, count - 1, replace=False) for _ in range(rows)])
    own_R1 = np.arange(rows)[:, None]
    return np.concatenate([own_R1, others_RC + (others_RC >= own_R1)], axis=1)


def first(values_RC: Tensor) -> float:
    """Share of rows whose first value is the largest; a tie counts against it."""
    return float((values_RC[:, :1] > values_RC[:, 1:]).all(1).double().mean())


def _scores(
    pipeline: "Pipeline",
    items: list[EvalExample],
    captions_RC: NDArray[np.int64],
    question: str | None,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Return (R, C) scores and (R, C) nats. Every image goes through the vision tower once, and so does a blank one."""
    texts = [item.sample.text for item in items]
    seen = pipeline.inputs.see([pipeline.inputs.pictures(item.sample)[0] for item in items])
    priors = dict[
        Layout | None, Tensor
    ]()  # of all captions, for every way in which the images are cut
    if scoring.prior:
        blanks = {picture.layout: picture for picture in seen}
        nothing = pipeline.inputs.blank(list(blanks.values()))
        priors = {blank.layout: pipeline.prior(texts, question, [blank]) for blank in nothing}
    conversation = pipeline.inputs.about(question)
    scores, nats = [], []
    for picture, own_C in zip(seen, captions_RC, strict=True):
        answers = pipeline.score_answers(conversation, [picture], [texts[c] for c in own_C])
        prior_C = priors[picture.layout][own_C].tolist() if scoring.prior else [0.0] * len(own_C)
        scores.append(
            [scoring(a.loglik, prior, a.tokens) for a, prior in zip(answers, prior_C, strict=True)]
        )
        nats.append([answer.loglik for answer in answers])
    return torch.tensor(scores), torch.tensor(nats)


def _tile(
    items: list[EvalExample], row: int, captions_C: NDArray[np.int64], gain_C: Tensor
) -> FigureTile:
    order = gain_C.argsort(descending=True, stable=True).tolist()
    ranked = [
        Choice(
            rank + 1, items[captions_C[place]].sample.text, float(gain_C[place]), right=place == 0
        )
        for rank, place in enumerate(order)
    ]
    return FigureTile(items[row].squares[0], [c for c in ranked if c.rank <= TOP or c.right])
