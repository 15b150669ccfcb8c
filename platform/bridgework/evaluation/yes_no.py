"""Questions of yes or no, by the likelihood of either: the area under the ROC curve (Hateful Memes).

InstructBLIP, arXiv:2305.06500, 2.5: each class is spelled by several words, its verbalizers.
"""

from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import config_class
from bridgework.data.samples import Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import Better, Result, draw, prefix_metrics, question_of
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline


@config_class
class YesNo:
    """`auc` of yes against no, and `accuracy` of the likelier, over `rows` questions that the dataset answers so.

    A class scores as the best of its verbalizers. `most_common` is the accuracy of always giving the commoner answer.
    """

    better: ClassVar[Better] = {"auc": "higher", "accuracy": "higher", "most_common": None}
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
            raise SpecError(f"{self.name}.rows must be at least 2, got {self.rows}")
        if not self.yes or not self.no or set(self.yes) & set(self.no):
            raise SpecError(
                f"{self.name}: yes and no are one or more words each, and no word is in both"
            )

    def tiny(self) -> "YesNo":
        return replace(self, dataset="synthetic:yes-no", rows=min(self.rows, 8))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError where the rows' answers are not of both kinds."""
        from sklearn.metrics import roc_auc_score  # takes a second

        needed = f"is answered with one of {', '.join((*self.yes, *self.no))}, and can be read by this model"
        samples = [
            item.sample
            for item in draw(self, pipeline, home, lambda s: self._truth(s) is not None, needed)
        ]
        truth = [bool(self._truth(sample)) for sample in samples]
        if len(set(truth)) < 2:
            raise DataError(
                f"{self.name}: the rows of {self.dataset} are all answered alike; it needs yes and no"
            )
        margins = [self._margin(pipeline, sample) for sample in samples]
        values = {
            "auc": float(roc_auc_score(truth, margins)),
            "accuracy": fmean(
                (margin > 0) == right for margin, right in zip(margins, truth, strict=True)
            ),
            "most_common": max(fmean(truth), 1 - fmean(truth)),
        }
        return Result(prefix_metrics(self, values))

    def _truth(self, sample: Sample) -> bool | None:
        """Whether the row's answer is a yes; None where it is neither."""
        answers = [
            part.text for part in sample.parts if part.text is not None and part.role == "assistant"
        ]
        said = answers[-1].strip().rstrip(".").casefold() if answers else ""
        return None if said not in (*self.yes, *self.no) else said in self.yes

    def _margin(self, pipeline: "Pipeline", sample: Sample) -> float:
        """By how much the best yes scores above the best no."""
        asked, shown = (
            question_of(pipeline, sample, self.prompts or None),
            pipeline.inputs.pictures(sample),
        )
        ranked = pipeline.rank_answers(asked, shown, (*self.yes, *self.no), scoring=self.scoring)
        yes, no = (
            max(one.score for one in ranked if one.candidate in words)
            for words in (self.yes, self.no)
        )
        return yes - no
