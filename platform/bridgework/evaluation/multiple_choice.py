"""Multiple-choice questions with their own candidates, answered by likelihood or by generation.

ScienceQA, IconQA and A-OKVQA are scored by accuracy, Visual Dialog by mean reciprocal rank
(InstructBLIP, arXiv:2305.06500, 2.5 and 3.1).
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from math import exp, fsum
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import config_class
from bridgework.data.samples import Sample
from bridgework.data.templates import letter
from bridgework.errors import SpecError
from bridgework.evaluation.base import (
    Better,
    EvalRows,
    Result,
    Writing,
    answers_of,
    build_result,
    draw,
    question_of,
)
from bridgework.evaluation.calibration import calibration_gaps
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline, Ranked

REQUIREMENT = "has candidates and an answer that is one of them, and can be read by this model"


@config_class
class MultipleChoice:
    """`accuracy`, the share of questions whose right candidate scores best, and `mrr`.

    `mrr` is the mean of 1 / rank of the right candidate, `ece` the expected calibration error of the
    softmax of the scores. The model scores each of the row's
    candidates as its answer. `chance` and `chance_mrr` are the values of a random order.
    """

    better: ClassVar[Better] = {
        "accuracy": "higher",
        "mrr": "higher",
        "ece": "lower",
        "chance": None,
        "chance_mrr": None,
    }
    name: str = "multiple_choice"
    dataset: str
    rows: int = 1_000
    scoring: Scoring | None = None  # None: the stage's own
    # around each question, e.g. "Question: {} Options: {options} Short answer:"
    prompts: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def tiny(self) -> "MultipleChoice":
        """Return a copy with at most 4 synthetic rows."""
        return replace(self, dataset="synthetic:choices", rows=min(self.rows, 4))

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Rank the candidates. Raises DataError if no readable row has candidates."""
        samples = _draw_questions(self, pipeline, home)
        ranked = [self._ranked(pipeline, sample) for sample in samples]
        ranks = [
            rank_of(one, sample.candidates[right_of(sample) or 0])
            for one, sample in zip(ranked, samples, strict=True)
        ]
        counts = [len(set(sample.candidates)) for sample in samples]
        rows = EvaluatedRows.of(samples)
        values = {
            "accuracy": rows.values(rank == 1 for rank in ranks),
            "mrr": rows.values(1 / rank for rank in ranks),
            "ece": rows.values(
                calibration_gaps(map(_confidence, ranked), [rank == 1 for rank in ranks])
            ),
            "chance": rows.values(1 / n for n in counts),
            "chance_mrr": rows.values(fmean(1 / (place + 1) for place in range(n)) for n in counts),
        }
        targets = [(sample.candidates[right_of(sample) or 0],) for sample in samples]
        questions = [question_of(pipeline, sample, self.prompts or None) for sample in samples]
        best = [one[0].candidate for one in ranked]
        return build_result(self, values, answers=answers_of(rows, questions, targets, best))

    def _ranked(self, pipeline: "Pipeline", sample: Sample) -> "Sequence[Ranked]":
        conversation = question_of(pipeline, sample, self.prompts or None)
        images = pipeline.inputs.pictures(sample)
        candidates = list(dict.fromkeys(sample.candidates))
        return pipeline.rank_answers(conversation, images, candidates, scoring=self.scoring)


@config_class
class WrittenChoice:
    """Share of questions whose right candidate is the one in the generated answer: `accuracy`.

    The answer contains the letter or the text of a candidate, see `parse_choice`. An answer without
    a candidate is wrong; `unanswered` is their share (LLaVA on ScienceQA, arXiv:2304.08485, 5.2).
    """

    better: ClassVar[Better] = {"accuracy": "higher", "unanswered": "lower", "chance": None}
    name: str = "written_choice"
    dataset: str
    rows: int = 1_000
    writing: Writing = Writing(beams=1, most=16)
    # around each question, e.g. "{}\nOptions: {options}"; empty: the stage's own
    prompts: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self)

    def tiny(self) -> "WrittenChoice":
        """Return a copy with at most 4 synthetic rows."""
        return replace(
            self, dataset="synthetic:choices", rows=min(self.rows, 4), writing=self.writing.tiny()
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Generate the answers. Raises DataError if no readable row has candidates."""
        samples = _draw_questions(self, pipeline, home)
        conversations = [question_of(pipeline, sample, self.prompts or None) for sample in samples]
        images = [pipeline.inputs.pictures(sample) for sample in samples]
        texts = self.writing.run(pipeline, conversations, images, self.seed)
        chosen = [
            parse_choice(text, sample.candidates)
            for text, sample in zip(texts, samples, strict=True)
        ]
        rows = EvaluatedRows.of(samples)
        values = {
            "accuracy": rows.values(
                choice == right_of(sample) for choice, sample in zip(chosen, samples, strict=True)
            ),
            "unanswered": rows.values(choice is None for choice in chosen),
            "chance": rows.values(1 / len(set(sample.candidates)) for sample in samples),
        }
        targets = [(sample.candidates[right_of(sample) or 0],) for sample in samples]
        return build_result(self, values, answers=answers_of(rows, conversations, targets, texts))


def _confidence(ranked: "Sequence[Ranked]") -> float:
    """Return the softmax of the best score."""
    best = max(one.score for one in ranked)
    return 1 / fsum(exp(one.score - best) for one in ranked)


def rank_of(ranked: "Sequence[Ranked]", right: str) -> int:
    """Return the rank of the right candidate; 1 is best, and a tie counts against it."""
    score = next(one.score for one in ranked if one.candidate == right)
    return 1 + sum(one.score >= score for one in ranked if one.candidate != right)


def right_of(sample: Sample) -> int | None:
    """Return the index of the row's own answer among its candidates.

    None if it is not one of them.
    """
    answers = [
        part.text for part in sample.parts if part.text is not None and part.role == "assistant"
    ]
    return parse_choice(answers[-1], sample.candidates) if answers else None


def parse_choice(answer: str, candidates: Sequence[str]) -> int | None:
    """Return the index of the candidate in an answer, by its text or its letter.

    None if there is none. A letter counts if it is the complete answer ("B", "(b)", "B."), if the
    answer begins with it ("B. blue"), and in "the answer is B", of which the last one counts, as in
    evaluations of ScienceQA.
    """
    text = answer.strip()
    options = [option.strip().casefold().rstrip(".") for option in candidates]
    if text.rstrip(".").casefold() in options:
        return options.index(text.rstrip(".").casefold())
    letters = {letter(index): index for index in range(len(candidates))}
    pattern = "|".join(sorted(letters, key=len, reverse=True))
    stated = re.findall(rf"\banswer is:? *\(?({pattern})\)?(?![\w'])", text, re.IGNORECASE)
    opening = re.match(rf"\(?({pattern})(?:\)|[.:](?=\s|$)|$)", text, re.IGNORECASE)
    chosen = stated[-1] if stated else opening[1] if opening else None
    return None if chosen is None else letters[chosen.lower()]


def _draw_questions(spec: EvalRows, pipeline: "Pipeline", home: Path) -> list[Sample]:
    """Return the samples of rows whose answer is one of their candidates."""
    rows = draw(spec, pipeline, home, lambda sample: right_of(sample) is not None, REQUIREMENT)
    return [row.sample for row in rows]


def _check(spec: EvalRows) -> None:
    if spec.rows < 1:
        raise SpecError(f"{spec.name}.rows: got {spec.rows}; expected at least 1")
