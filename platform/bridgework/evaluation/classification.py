"""Classification accuracy of a stage's trained head, or of a linear probe on the tower's features.

CLIP, arXiv:2103.00020: linear probes in 3.2 and appendix A.3; robustness to natural distribution
shift in 3.3.
"""

# R rows (an image and its labels)  C classes  F width of the tower's features

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
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, EvalExample, Result, build_result, draw_images
from bridgework.evaluation.calibration import calibration_gaps
from bridgework.evaluation.retrieval import within
from bridgework.evaluation.statistics import EvaluatedRows, RowValues

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

    from bridgework.inference.pipeline import Pipeline

CUTS = (1, 5)  # k of top-k
CHUNK = 64  # images at a time


@config_class
class Classification:
    """Accuracy of a classification head: `top1` and `top5`.

    A prediction is right if it is one of the image's labels. Rows without a label that is a class
    of the head are skipped; `unknown` is their share. `ece` is the expected calibration error of the
    softmax. `most_common` is the accuracy of always
    predicting the most frequent class.
    """

    better: ClassVar[Better] = {
        "top1": "higher", "top5": "higher", "ece": "lower", "most_common": None, "unknown": None,
    }  # fmt: skip
    name: str = "classification"
    dataset: str
    rows: int = 1_000
    prompts: tuple[str, ...] = ()  # not used; every evaluation has the field
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows: got {self.rows}; expected at least 1")

    def tiny(self) -> "Classification":
        """Return a copy with at most 16 synthetic rows."""
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 16))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Classify the images.

        Raises DataError if no row has a label that is one of the classes.
        """
        items = draw_images(self, pipeline, home, lambda sample: bool(sample.labels))
        classes = pipeline.classes
        known = [item for item in items if set(item.sample.labels) & set(classes)]
        if not known:
            label = items[0].sample.labels[0]
            raise DataError(
                f"{self.name}: no row of {self.dataset} has a label that is one of the stage's "
                f"classes. Got {label!r}; expected one of {', '.join(classes[:8])}"
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
        rows = EvaluatedRows.of([item.sample for item in known])
        values: dict[str, float | RowValues] = {
            f"top{cut}": rows.values(within(logits_RC, cut, right_RC)) for cut in CUTS
        }
        values["most_common"] = rows.values(right_RC[:, right_RC.sum(0).argmax()])
        confidence_R, chosen_R = logits_RC.double().softmax(1).max(1)
        hit_R = right_RC.gather(1, chosen_R.unsqueeze(1)).squeeze(1)
        values["ece"] = rows.values(calibration_gaps(confidence_R.tolist(), hit_R.tolist()))
        values["unknown"] = EvaluatedRows.of([item.sample for item in items]).values(
            not set(item.sample.labels) & set(classes) for item in items
        )
        return build_result(self, values)


@config_class
class LinearProbe:
    """Accuracy (`top1`) of a logistic regression on the vision tower's features.

    It is fitted to rows of `train` by L-BFGS with at most 1,000 iterations, as in the paper. The L2
    penalty `strength` is chosen on a part of the training rows (`validation`); then all training
    rows are fitted with it. `most_common` is the accuracy of always predicting the most frequent
    class. The features are the mean over the tower's tokens, before any projection.
    """

    better: ClassVar[Better] = {"top1": "higher", "most_common": None, "strength": None}
    name: str = "linear_probe"
    dataset: str
    train: str | None = None  # None: other rows of `dataset`
    rows: int = 1_000
    train_rows: int = 4_000
    validation: float = 0.2  # share of the training rows
    # the paper's search begins with these (A.3)
    strengths: tuple[float, ...] = (1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6)
    iterations: int = 1_000
    prompts: tuple[str, ...] = ()  # not used; every evaluation has the field
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.train_rows < 2 or self.iterations < 1:
            raise SpecError(
                f"{self.name}: rows and iterations are at least 1, and train_rows at least 2. "
                f"Got {self.rows}, {self.iterations} and {self.train_rows}"
            )
        if not 0 < self.validation < 1:
            raise SpecError(
                f"{self.name}.validation is a share of the training rows. "
                f"Got {self.validation:g}; expected a number in (0, 1)"
            )
        if not self.strengths or min(self.strengths) <= 0:
            raise SpecError(
                f"{self.name}.strengths: got {self.strengths}; expected one or more numbers above 0"
            )

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that the evaluation reads."""
        return (self.dataset,) if self.train is None else (self.dataset, self.train)

    def tiny(self) -> "LinearProbe":
        """Return a copy with at most 16 test rows and 48 training rows, all synthetic."""
        return replace(
            self,
            dataset="synthetic:shapes",
            train=None if self.train is None else "synthetic:shapes",
            rows=min(self.rows, 16),
            train_rows=min(self.train_rows, 48),
            strengths=self.strengths[:2],
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Fit and evaluate the probe.

        Raises DataError for rows without labels, and for training rows of one class.
        """
        test, train = self._split(pipeline, home)
        labels = [example.sample.labels[0] for example in train]
        if len(set(labels)) < 2:
            raise DataError(
                f"{self.name}: the training rows have one class, {labels[0]!r}. "
                "Expected at least 2. Fix: give more training rows, or another dataset"
            )
        train_RF, test_RF = (_features(pipeline, rows) for rows in (train, test))
        order = random.Random(self.seed).sample(range(len(train)), len(train))
        count = max(1, round(self.validation * len(train)))
        held_out, rest = order[:count], order[count:]
        scores = dict[float, float]()
        for strength in self.strengths:
            if len({labels[i] for i in rest}) > 1:
                probe = self._fit(train_RF[rest], [labels[i] for i in rest], strength)
                predicted = probe.predict(train_RF[held_out])
                scores[strength] = fmean(
                    name == labels[i] for name, i in zip(predicted, held_out, strict=True)
                )
        best = max(self.strengths, key=lambda strength: scores.get(strength, 0.0))
        predicted = self._fit(train_RF, labels, best).predict(test_RF)
        ((usual, _),) = Counter(labels).most_common(1)
        right = [name in one.sample.labels for name, one in zip(predicted, test, strict=True)]
        common = [usual in example.sample.labels for example in test]
        rows = EvaluatedRows.of([example.sample for example in test])
        values: dict[str, float | RowValues] = {
            "top1": rows.values(right),
            "most_common": rows.values(common),
            "strength": best,
        }
        return build_result(self, values)

    def _split(
        self, pipeline: "Pipeline", home: Path
    ) -> tuple[list[EvalExample], list[EvalExample]]:
        """Return test rows and training rows."""
        if self.train is not None:
            train = replace(self, dataset=self.train, rows=self.train_rows)
            return _draw_labeled(self, pipeline, home), _draw_labeled(train, pipeline, home)
        examples = _draw_labeled(replace(self, rows=self.rows + self.train_rows), pipeline, home)
        count = min(self.rows, len(examples) // 2)
        if count < 1:
            raise DataError(
                f"{self.name}: {self.dataset} has too few rows with an image and a label. "
                f"Got {len(examples)}; expected at least 2, to train and to test"
            )
        return examples[:count], examples[count:]

    def _fit(
        self, features_RF: NDArray[np.float64], labels: Sequence[str], strength: float
    ) -> "LogisticRegression":
        """Fit the regression.

        The objective of sklearn is C times the sum of the losses plus |w|^2 / 2; `strength` is 1 /
        C.
        """
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression

        probe = LogisticRegression(C=1 / strength, max_iter=self.iterations)
        with warnings.catch_warnings():
            # the paper limits the number of iterations too
            warnings.simplefilter("ignore", ConvergenceWarning)
            # sklearn warns if most labels are different, as if they were numbers
            warnings.filterwarnings("ignore", "The number of unique classes")
            return probe.fit(features_RF, labels)


def _draw_labeled(spec: LinearProbe, pipeline: "Pipeline", home: Path) -> list[EvalExample]:
    return draw_images(spec, pipeline, home, lambda sample: bool(sample.labels))


def _features(pipeline: "Pipeline", examples: Sequence[EvalExample]) -> NDArray[np.float64]:
    """Return (R, F) float64 features: the mean over the tokens of each image."""
    parts = []
    for start in range(0, len(examples), CHUNK):
        squares = [example.squares[0] for example in examples[start : start + CHUNK]]
        parts.append(pipeline.inputs.features(squares).double().mean(1).cpu())
    return np.asarray(torch.cat(parts))
