"""Yes/no questions, answered by likelihood: area under the ROC curve (e.g. Hateful Memes).

InstructBLIP, arXiv:2305.06500, 2.5: each class has several words, its verbalizers.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from bridgework.config import config_class
from bridgework.data.samples import Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, Result, build_result, draw, question_of
from bridgework.evaluation.calibration import calibration_gaps
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline


@config_class
class YesNo:
    """`auc` of yes against no, and `accuracy` of the more likely answer, over `rows` questions.

    The score of a class is that of its best verbalizer. `ece` is the expected calibration error of
    the two scores' softmax. `most_common` is the accuracy of always
    giving the more frequent answer.
    """

    better: ClassVar[Better] = {
        "auc": "higher",
        "accuracy": "higher",
        "ece": "lower",
        "most_common": None,
    }
    name: str = "yes_no"
    dataset: str
    rows: int = 1_000
    yes: tuple[str, ...] = ("yes", "true")
    no: tuple[str, ...] = ("no", "false")
    scoring: Scoring | None = None  # None: the stage's own
    prompts: tuple[str, ...] = ()  # around each question, e.g. "{} Answer:"; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 2:
            raise SpecError(f"{self.name}.rows: got {self.rows}; expected at least 2")
        if not self.yes or not self.no or set(self.yes) & set(self.no):
            raise SpecError(
                f"{self.name}: yes and no are one or more words each, and no word is in both. "
                f"Got {', '.join(self.yes) or 'none'} and {', '.join(self.no) or 'none'}"
            )

    def tiny(self) -> "YesNo":
        """Return a copy with at most 8 synthetic rows."""
        return replace(self, dataset="synthetic:yes-no", rows=min(self.rows, 8))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Score the answers. Raises DataError if the rows do not have answers of both classes."""
        from scipy.special import expit

        words = ", ".join((*self.yes, *self.no))
        examples = draw(
            self,
            pipeline,
            home,
            lambda sample: self._truth(sample) is not None,
            f"is answered with one of {words}, and can be read by this model",
        )
        samples = [example.sample for example in examples]
        truth = [bool(self._truth(sample)) for sample in samples]
        if len(set(truth)) < 2:
            raise DataError(
                f"{self.name}: the rows of {self.dataset} are all answered alike. "
                f"Got {'yes' if truth[0] else 'no'} only; expected yes and no. "
                "Fix: increase rows, or give another dataset"
            )
        margins = [self._margin(pipeline, sample) for sample in samples]
        rows = EvaluatedRows.of(samples)
        usual = fmean(truth) >= 0.5
        right = [(margin > 0) == yes for margin, yes in zip(margins, truth, strict=True)]
        confidences = expit(np.abs(margins))  # of the likelier answer
        values = {
            "auc": rows.values(placements(margins, truth)),
            "accuracy": rows.values(right),
            "ece": rows.values(calibration_gaps(confidences, right)),
            "most_common": rows.values(yes == usual for yes in truth),
        }
        return build_result(self, values)

    def _truth(self, sample: Sample) -> bool | None:
        """Return True if the row's answer is yes, False for no, None for any other answer."""
        answers = [
            part.text for part in sample.parts if part.text is not None and part.role == "assistant"
        ]
        answer = answers[-1].strip().rstrip(".").casefold() if answers else ""
        return None if answer not in (*self.yes, *self.no) else answer in self.yes

    def _margin(self, pipeline: "Pipeline", sample: Sample) -> float:
        """Return the score of the best yes minus the score of the best no."""
        question = question_of(pipeline, sample, self.prompts or None)
        images = pipeline.inputs.pictures(sample)
        candidates = (*self.yes, *self.no)
        ranked = pipeline.rank_answers(question, images, candidates, scoring=self.scoring)
        yes, no = (
            max(one.score for one in ranked if one.candidate in words)
            for words in (self.yes, self.no)
        )
        return yes - no


def placements(scores: Sequence[float], truth: Sequence[bool]) -> NDArray[np.float64]:
    """Return (R,) values with the area under the ROC curve as their mean.

    A row's placement is its share of right comparisons with the rows of the other class; a tie
    counts half. The variance of the values is that of DeLong, DeLong & Clarke-Pearson (1988).
    """
    from scipy.stats import rankdata

    scores_R, yes_R = np.array(scores, dtype=float), np.array(truth, dtype=bool)
    placement_R, ranks_R = np.empty(len(scores_R)), rankdata(scores_R)
    for of, sign in ((yes_R, 1), (~yes_R, -1)):
        own = rankdata(scores_R[of])
        below = (ranks_R[of] - own) / (~of).sum()
        placement_R[of] = below if sign == 1 else 1 - below
    area = placement_R[yes_R].mean()
    scale_R = np.where(yes_R, len(yes_R) / yes_R.sum(), len(yes_R) / (~yes_R).sum())
    return np.asarray(area + scale_R * (placement_R - area))
