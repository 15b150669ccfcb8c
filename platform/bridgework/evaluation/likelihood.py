"""Evaluations by the language model's likelihood: held-out loss, and ranking of captions."""

# R rows, each an image and its caption  C candidates, the right one first

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgework.config import added, config_class
from bridgework.data.quarantine import BadSample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import (
    Better,
    EvalExample,
    Result,
    RowsOf,
    build_result,
    draw,
    draw_images,
    draw_pairs,
)
from bridgework.evaluation.figures import Choice, FigureTile, grid
from bridgework.evaluation.statistics import EvaluatedRows, RowValues
from bridgework.system import Layout, Scoring

if TYPE_CHECKING:
    from bridgework.data.samples import Part
    from bridgework.inference.pipeline import Pipeline, Score
    from bridgework.inference.preprocess import EncodedImage, ImageFile, ImageInput

FIGURE_ROWS = 12
FIGURE_CAPTIONS = 3  # per row, and the right caption


@config_class
class HeldOutLoss:
    """Loss on held-out rows, in nats per token with loss.

    `loss` is computed with the true images, `loss_shuffled` with images of other rows, and `gap` is
    their difference. A model that ignores its images has a gap of 0, however low its loss.
    `perplexity` is exp(loss).
    """

    better: ClassVar[Better] = {
        "loss": "lower",
        "loss_shuffled": None,
        "gap": "higher",
        "perplexity": "lower",
    }
    name: str = "heldout"
    dataset: str
    rows: int = 256
    prompts: tuple[str, ...] = ()  # questions for pairs; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(
                f"{self.name}.rows: images are swapped between rows. "
                f"Got {self.rows}; expected at least 2"
            )

    def tiny(self) -> "HeldOutLoss":
        """Return a copy with at most 16 synthetic rows."""
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Compute the losses. Raises DataError for a dataset without two images."""
        examples = draw(self, pipeline, home)
        pictures = [pipeline.inputs.pictures(example.sample) for example in examples]
        encoded = pipeline.inputs.encode_images([image for row in pictures for image in row])
        if len(encoded) < 2:
            raise DataError(
                f"{self.name}: images are swapped between rows. "
                f"Got {len(encoded)} images in {self.dataset}; expected at least 2"
            )
        shift = random.Random(self.seed).randrange(1, len(encoded))
        true = _split_like(encoded, pictures)
        other = _split_like([*encoded[-shift:], *encoded[:-shift]], pictures)
        # with tiles, the image of another row may not fit into the context
        fit = [i for i, e in enumerate(examples) if _fits(pipeline, e.conversation, other[i])]
        if not fit:
            raise DataError(
                f"{self.name}: the image of another row fits into no row of {self.dataset}. "
                "Fix: increase the context or rows, or use fewer tiles"
            )
        conversations = [examples[i].conversation for i in fit]
        scores, shuffled = (
            pipeline.scores(conversations, [images[i] for i in fit]) for images in (true, other)
        )
        rows = EvaluatedRows.of([examples[i].sample for i in fit])
        loss = _loss(rows, scores)
        values = {
            "loss": loss,
            "loss_shuffled": _loss(rows, shuffled),
            "gap": rows.values(
                (
                    (true.loglik - other.loglik) / max(1, true.tokens)
                    for true, other in zip(scores, shuffled, strict=True)
                ),
                loss.weights,
            ),
            "perplexity": rows.values(exp(loss.mean) * (1 + loss.contributions - loss.mean)),
        }
        return build_result(self, values)


@config_class
class Ranking:
    """Share of rows whose own caption is ranked first of `candidates` captions.

    The other candidates are captions of other rows. `accuracy` ranks by `scoring`: by default the
    log-likelihood minus the prior. The prior is the log-likelihood given a blank image, or its mean
    over `prior_rows` images of the dataset `prior_images`, for example of training images: they are
    of the kind that the model knows. `accuracy_without_prior` ranks by the plain log-likelihood,
    which favors short and common captions. The figure shows the best candidates.
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
    prompts: tuple[str, ...] = ()  # questions for pairs; empty: the stage's own
    seed: int = 0
    scoring: Scoring = added(default=Scoring(prior=True))
    prior_images: str | None = added(default=None)  # a dataset; None: a blank image
    prior_rows: int = added(default=4)

    def __post_init__(self) -> None:
        if self.prior_rows < 1:
            raise SpecError(
                f"{self.name}.prior_rows: the prior is a mean over images. Got {self.prior_rows}; "
                "expected at least 1"
            )
        if not 2 <= self.candidates <= self.rows:
            raise SpecError(
                f"{self.name}.candidates: the wrong ones are captions of other rows. "
                f"Got {self.candidates}; expected 2 to rows ({self.rows})"
            )

    def tiny(self) -> "Ranking":
        """Return a copy with at most 16 synthetic rows and 4 candidates."""
        rows = min(self.rows, 16)
        return replace(
            self,
            dataset="synthetic:shapes",
            rows=rows,
            candidates=min(self.candidates, 4, rows),
            prior_images=None if self.prior_images is None else "synthetic:shapes",
        )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that the evaluation reads."""
        return (self.dataset,) if self.prior_images is None else (self.dataset, self.prior_images)

    def references(self, pipeline: "Pipeline", home: Path) -> "list[ImageFile]":
        """Return the images whose mean likelihood is the prior; none: it is that of a blank image.

        Raises DataError if the dataset has no row of one image.
        """
        if self.prior_images is None:
            return []
        drawn = RowsOf(self.name, self.prior_images, self.prior_rows, seed=self.seed)
        return [row.sample.images[0] for row in draw_images(drawn, pipeline, home)]

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Rank the captions. Raises DataError for a dataset with fewer captions than candidates."""
        examples = draw_pairs(self, pipeline, home, at_least=self.candidates)
        captions_RC = draw_candidates(len(examples), self.candidates, self.seed)
        question = self.prompts[0] if self.prompts else None
        references = self.references(pipeline, home) if self.scoring.prior else []
        score_RC, loglik_RC = _score(
            pipeline, examples, captions_RC, question, self.scoring, references
        )
        rows = EvaluatedRows.of([example.sample for example in examples])
        values: dict[str, float | RowValues] = {
            "accuracy": rows.values(first_is_best(score_RC)),
            "accuracy_without_prior": rows.values(first_is_best(loglik_RC)),
            "chance": 1 / self.candidates,
        }
        tiles = [
            _tile(examples, row, captions_RC[row], score_RC[row])
            for row in range(min(FIGURE_ROWS, len(examples)))
        ]
        return build_result(self, values, pictures={self.name: grid(tiles)})


def draw_candidates(rows: int, count: int, seed: int) -> NDArray[np.int64]:
    """Return (R, C) row numbers: the row's own number, then `count - 1` different others."""
    draw = np.random.default_rng(seed)
    others_RC = np.stack([draw.choice(rows - 1, count - 1, replace=False) for _ in range(rows)])
    own_R1 = np.arange(rows)[:, None]
    return np.concatenate([own_R1, others_RC + (others_RC >= own_R1)], axis=1)


def first_is_best(values_RC: Tensor) -> Tensor:
    """Return (R,) bool: rows whose first value is larger than all others. A tie does not count."""
    return (values_RC[:, :1] > values_RC[:, 1:]).all(1)


def _split_like(
    encoded: "Sequence[EncodedImage]", rows: Sequence[Sequence[object]]
) -> "list[list[EncodedImage]]":
    """Split the images into rows of the given lengths, in order."""
    rest = iter(encoded)
    return [list(islice(rest, len(row))) for row in rows]


def _fits(
    pipeline: "Pipeline", conversation: "Sequence[Part]", images: "Sequence[EncodedImage]"
) -> bool:
    layouts = [image.layout for image in images if image.layout is not None]
    try:
        pipeline.inputs.encode(conversation, answer=True, layouts=layouts)
    except BadSample:
        return False
    return True


def _loss(rows: EvaluatedRows, scores: "Sequence[Score]") -> RowValues:
    """Return the nats per token of each row, weighted by its tokens."""
    tokens = [score.tokens for score in scores]
    return rows.values((-score.loglik / max(1, score.tokens) for score in scores), tokens)


def _score(
    pipeline: "Pipeline",
    examples: list[EvalExample],
    captions_RC: NDArray[np.int64],
    question: str | None,
    scoring: Scoring,
    references: "Sequence[ImageInput]",
) -> tuple[Tensor, Tensor]:
    """Return (R, C) scores and (R, C) nats; without `references`, the prior is of a blank image.

    Every image goes through the vision tower once, and so does the blank image.
    """
    texts = [example.sample.text for example in examples]
    pictures = [pipeline.inputs.pictures(example.sample)[0] for example in examples]
    images = pipeline.inputs.encode_images(pictures)
    priors = dict[Layout | None, Tensor]()  # of all captions, per layout of the images
    like = {image.layout: image for image in images}
    if scoring.prior and references:
        priors = dict.fromkeys(like, pipeline.log_prior(texts, question, references))
    elif scoring.prior:
        blanks = pipeline.inputs.blank_images(list(like.values()))
        priors = {blank.layout: pipeline.log_prior(texts, question, [blank]) for blank in blanks}
    conversation = pipeline.inputs.about(question)
    scores, nats = [], []
    for image, own_C in zip(images, captions_RC, strict=True):
        answers = pipeline.score_answers(conversation, [image], [texts[c] for c in own_C])
        prior_C = priors[image.layout][own_C].tolist() if scoring.prior else [0.0] * len(own_C)
        scores.append(
            [scoring(a.loglik, prior, a.tokens) for a, prior in zip(answers, prior_C, strict=True)]
        )
        nats.append([answer.loglik for answer in answers])
    return torch.tensor(scores), torch.tensor(nats)


def _tile(
    examples: list[EvalExample], row: int, captions_C: NDArray[np.int64], score_C: Tensor
) -> FigureTile:
    order = score_C.argsort(descending=True, stable=True).tolist()
    ranked = [
        Choice(
            rank,
            examples[captions_C[place]].sample.text,
            float(score_C[place]),
            right=place == 0,
        )
        for rank, place in enumerate(order, 1)
    ]
    best = [choice for choice in ranked if choice.rank <= FIGURE_CAPTIONS or choice.right]
    return FigureTile(examples[row].squares[0], best)
