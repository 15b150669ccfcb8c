"""Classification: by the head that a stage trained, or by a logistic regression on the frozen tower's features.

CLIP, arXiv:2103.00020: linear probes, 3.2 and appendix A.3; the same under a natural shift of the distribution, 3.3.
"""

# R rows, each an image and its labels  C classes  F width of the tower's features

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from bridgework.config import config_class
from bridgework.data.samples import Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, EvalExample, Result, draw_images, named
from bridgework.evaluation.retrieval import recall

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

    from bridgework.inference.pipeline import Pipeline

CUTS = (1, 5)
CHUNK = 64  # images at a time


@config_class
class Classification:
    """Share of images one of whose labels is the class of the largest logit (`top1`), or of the largest five (`top5`).

    Of a stage with a classification head. Rows whose labels the head does not know are left out and counted in
    `unknown`; `most_common` is the accuracy of always naming the most frequent class.
    """

    better: ClassVar[Better] = {
        "top1": "higher", "top5": "higher", "most_common": None, "unknown": None,
    }  # fmt: skip
    name: str = "classification"
    dataset: str
    rows: int = 1_000
    prompts: tuple[str, ...] = ()  # of the stage; a class is not asked for
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows must be at least 1, got {self.rows}")

    def tiny(self) -> "Classification":
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError where no row has an image and a label that is one of the stage's classes."""
        items = draw_images(self, pipeline, home, lambda sample: bool(sample.labels))
        classes = pipeline.classes
        known = [item for item in items if set(item.sample.labels) & set(classes)]
        if not known:
            label = items[0].sample.labels[0]
            raise DataError(
                f"{self.name}: no row of {self.dataset} has a label that is one of the stage's classes. "
                f"Got {label!r}; expected one of {', '.join(classes[:8])}"
            )
        logits_RC = torch.cat(
            [
                pipeline.classify([item.squares[0] for item in known[start : start + CHUNK]])
                for start in range(0, len(known), CHUNK)
            ]
        ).cpu()
        right_RC = torch.tensor(
            [[name in item.sample.labels for name in classes] for item in known]
        )
        values = {f"top{cut}": recall(logits_RC, cut, right_RC) for cut in CUTS}
        values["most_common"] = float(right_RC.double().mean(0).max())
        values["unknown"] = 1 - len(known) / len(items)
        return Result(named(self, values))


@config_class
class LinearProbe:
    """Accuracy (`top1`) of a logistic regression on the vision tower's features, learned from rows of `train`.

    L-BFGS, at most 1,000 iterations, as in the paper; `strength` is the L2 penalty that does best on a part of the
    training rows (`validation`), by which all of them are then learned. `most_common` is the accuracy of always
    naming the most frequent class. The features are those before any projection, the mean over a tower's tokens.
    """

    better: ClassVar[Better] = {"top1": "higher", "most_common": None, "strength": None}
    name: str = "linear_probe"
    dataset: str
    train: str | None = None  # None: `dataset`, of which no row is in both
    rows: int = 1_000
    train_rows: int = 4_000
    validation: float = 0.2  # share of the training rows
    strengths: tuple[float, ...] = (
        1e-6,
        1e-4,
        1e-2,
        1.0,
        1e2,
        1e4,
        1e6,
    )  # where the paper's search begins (A.3)
    iterations: int = 1_000
    prompts: tuple[str, ...] = ()  # of the stage; nothing is asked
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.train_rows < 2 or self.iterations < 1:
            raise SpecError(
                f"{self.name}: rows and iterations are at least 1, and train_rows at least 2"
            )
        if not 0 < self.validation < 1:
            raise SpecError(
                f"{self.name}.validation is a share of the training rows in (0, 1), got {self.validation:g}"
            )
        if not self.strengths or min(self.strengths) <= 0:
            raise SpecError(
                f"{self.name}.strengths are one or more numbers above 0, got {self.strengths}"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,) if self.train is None else (self.dataset, self.train)

    def tiny(self) -> "LinearProbe":
        train = None if self.train is None else "synthetic:shapes"
        return replace(self, dataset="synthetic:shapes", train=train, rows=min(self.rows, 16),
                       train_rows=min(self.train_rows, 48), strengths=self.strengths[:2])  # fmt: skip

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for rows without labels, and for training rows of one class."""
        judged, learned = self._items(pipeline, home)
        labels = [_label(item.sample) for item in learned]
        if len(set(labels)) < 2:
            raise DataError(
                f"{self.name}: the training rows have one class, {labels[0]!r}; a probe needs two"
            )
        seen_RF, seen_judged_RF = (_features(pipeline, rows) for rows in (learned, judged))
        order = random.Random(self.seed).sample(range(len(learned)), len(learned))
        held = max(1, round(self.validation * len(learned)))
        held_out, rest = order[:held], order[held:]
        scores = dict[float, float]()
        for strength in self.strengths:
            if len({labels[i] for i in rest}) > 1:
                probe = self._fit(seen_RF[rest], [labels[i] for i in rest], strength)
                found = probe.predict(seen_RF[held_out])
                scores[strength] = fmean(
                    name == labels[i] for name, i in zip(found, held_out, strict=True)
                )
        best = max(self.strengths, key=lambda strength: scores.get(strength, 0.0))
        said = self._fit(seen_RF, labels, best).predict(seen_judged_RF)
        ((usual, _),) = Counter(labels).most_common(1)
        right = [name in item.sample.labels for name, item in zip(said, judged, strict=True)]
        common = [usual in item.sample.labels for item in judged]
        values = {
            "top1": sum(right) / len(right),
            "most_common": sum(common) / len(common),
            "strength": best,
        }
        return Result(named(self, values))

    def _items(
        self, pipeline: "Pipeline", home: Path
    ) -> tuple[list[EvalExample], list[EvalExample]]:
        """Rows to judge, and others to learn from."""
        if self.train is not None:
            wanted = replace(self, dataset=self.train, rows=self.train_rows)
            return _labeled(self, pipeline, home), _labeled(wanted, pipeline, home)
        items = _labeled(replace(self, rows=self.rows + self.train_rows), pipeline, home)
        judged = min(self.rows, len(items) // 2)
        if judged < 1:
            raise DataError(
                f"{self.name}: {self.dataset} has too few rows with an image and a label to learn and judge"
            )
        return items[:judged], items[judged:]

    def _fit(
        self, seen_RF: NDArray[np.float64], labels: Sequence[str], strength: float
    ) -> "LogisticRegression":
        """sklearn's objective is C times the sum of the losses plus |w|^2 / 2; `strength` is 1 / C."""
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        probe = LogisticRegression(C=1 / strength, max_iter=self.iterations)
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", ConvergenceWarning
            )  # a bound on the iterations is the paper's protocol
            warnings.filterwarnings(
                "ignore", "The number of unique classes"
            )  # names of classes are no numbers
            return probe.fit(seen_RF, labels)


def _labeled(spec: LinearProbe, pipeline: "Pipeline", home: Path) -> list[EvalExample]:
    return draw_images(spec, pipeline, home, lambda sample: bool(sample.labels))


def _label(sample: Sample) -> str:
    return sample.labels[0]


def _features(pipeline: "Pipeline", items: Sequence[EvalExample]) -> NDArray[np.float64]:
    """(R, F) float64: the mean over the tokens of each image."""
    parts = [
        pipeline.inputs.features([item.squares[0] for item in items[start : start + CHUNK]])
        .double()
        .mean(1)
        .cpu()
        for start in range(0, len(items), CHUNK)
    ]
    return np.asarray(torch.cat(parts))
