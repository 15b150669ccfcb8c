"""Multiple-choice questions, each with candidates of its own: chosen by likelihood, or named in a written answer.

ScienceQA, IconQA and A-OKVQA by accuracy, Visual Dialog by mean reciprocal rank (InstructBLIP,
arXiv:2305.06500, 2.5 and 3.1).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import config_class
from bridgework.data.samples import Sample
from bridgework.data.templates import letter
from bridgework.errors import SpecError
from bridgework.evaluation.base import (
    Better,
    EvalExample,
    EvalRows,
    Result,
    Writing,
    draw,
    prefix_metrics,
    question_of,
)
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline, Ranked

NEEDED = "has candidates and an answer that is one of them, and can be read by this model"


@config_class
class MultipleChoice:
    """Share of questions whose right candidate scores best (`accuracy`), and the mean of 1 / its rank (`mrr`).

    The candidates are the row's own; the model scores each as its answer. `chance` and `chance_mrr` are those of a
    random order.
    """

    better: ClassVar[Better] = {
        "accuracy": "higher",
        "mrr": "higher",
        "chance": None,
        "chance_mrr": None,
    }
    name: str = "multiple_choice"
    dataset: str
    rows: int = 1_000
    scoring: Scoring | None = None  # None: the stage's own
    prompts: tuple[
        str, ...
    ] = ()  # around each question, e.g. "Question: {} Options: {options} Short answer:"
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def tiny(self) -> "MultipleChoice":
        return replace(self, dataset="synthetic:choices", rows=min(self.rows, 4))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError when no row has candidates and can be read."""
        items = _drawn(self, pipeline, home)
        ranks = [self._rank(pipeline, item.sample) for item in items]
        counts = [len(set(item.sample.candidates)) for item in items]
        values = {
            "accuracy": fmean(rank == 1 for rank in ranks),
            "mrr": fmean(1 / rank for rank in ranks),
            "chance": fmean(1 / n for n in counts),
            "chance_mrr": fmean(fmean(1 / (place + 1) for place in range(n)) for n in counts),
        }
        return Result(prefix_metrics(self, values))

    def _rank(self, pipeline: "Pipeline", sample: Sample) -> int:
        asked, shown = (
            question_of(pipeline, sample, self.prompts or None),
            pipeline.inputs.pictures(sample),
        )
        candidates = list(dict.fromkeys(sample.candidates))
        ranked = pipeline.rank_answers(asked, shown, candidates, scoring=self.scoring)
        return rank_of(ranked, sample.candidates[right_of(sample) or 0])


@config_class
class WrittenChoice:
    """Share of questions whose right candidate the written answer names: `accuracy`.

    A candidate is named by its letter or its text, see `named_in`; an answer that names none is wrong, and
    `unanswered` is their share (LLaVA of ScienceQA, arXiv:2304.08485, 5.2).
    """

    better: ClassVar[Better] = {"accuracy": "higher", "unanswered": "lower", "chance": None}
    name: str = "written_choice"
    dataset: str
    rows: int = 1_000
    writing: Writing = Writing(beams=1, most=16)
    prompts: tuple[
        str, ...
    ] = ()  # around each question, e.g. "{}\nOptions: {options}"; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def tiny(self) -> "WrittenChoice":
        return replace(
            self, dataset="synthetic:choices", rows=min(self.rows, 4), writing=self.writing.tiny()
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError when no row has candidates and can be read."""
        samples = [item.sample for item in _drawn(self, pipeline, home)]
        asked = [question_of(pipeline, sample, self.prompts or None) for sample in samples]
        shown = [pipeline.inputs.pictures(sample) for sample in samples]
        said = self.writing.run(pipeline, asked, shown, self.seed)
        found = [
            named_in(text, sample.candidates) for text, sample in zip(said, samples, strict=True)
        ]
        values = {
            "accuracy": fmean(
                place == right_of(sample) for place, sample in zip(found, samples, strict=True)
            ),
            "unanswered": fmean(place is None for place in found),
            "chance": fmean(1 / len(set(sample.candidates)) for sample in samples),
        }
        return Result(prefix_metrics(self, values))


def rank_of(ranked: "Sequence[Ranked]", right: str) -> int:
    """The rank of the right candidate, 1 for the best; a tie counts against it."""
    score = next(one.score for one in ranked if one.candidate == right)
    return 1 + sum(one.score >= score for one in ranked if one.candidate != right)


def right_of(sample: Sample) -> int | None:
    """The place of the row's own answer among its candidates; None where it is none of them."""
    answers = [
        part.text for part in sample.parts if part.text is not None and part.role == "assistant"
    ]
    return named_in(answers[-1], sample.candidates) if answers else None


def named_in(answer: str, candidates: Sequence[str]) -> int | None:
    """The place of the candidate that an answer names, by its text, or by its letter as evaluations of ScienceQA do.

    A letter counts where it is all of the answer ("B", "(b)", "B."), where the answer begins with it ("B. blue"), and
    in "the answer is B". Of several such sentences the last counts.
    """
    said = answer.strip()
    texts = [text.strip().casefold() for text in candidates]
    if said.rstrip(".").casefold() in (text.rstrip(".") for text in texts):
        return [text.rstrip(".") for text in texts].index(said.rstrip(".").casefold())
    letters = {letter(place): place for place in range(len(candidates))}
    one = "|".join(sorted(letters, key=len, reverse=True))
    stated = re.findall(rf"\banswer is:? *\(?({one})\)?(?![\w'])", said, re.IGNORECASE)
    opening = re.match(rf"\(?({one})(?:\)|[.:](?=\s|$)|$)", said, re.IGNORECASE)
    found = stated[-1] if stated else opening[1] if opening else None
    return None if found is None else letters[found.lower()]


def _drawn(spec: EvalRows, pipeline: "Pipeline", home: Path) -> list[EvalExample]:
    return draw(spec, pipeline, home, lambda sample: right_of(sample) is not None, NEEDED)


def _check(spec: EvalRows) -> None:
    if spec.rows < 1:
        raise SpecError(f"{spec.name}.rows must be at least 1, got {spec.rows}")
