"""VQA accuracy (Antol et al. 2015, arXiv:1505.00468; v2: arXiv:1612.00837).

An answer counts in full if at least three of ten annotators gave it: the mean over leaving out each
of them. Answers are normalized as in the official evaluation: without articles and punctuation,
numbers as digits, contractions with apostrophes. The official evaluation skips the normalization if
all annotators agree; here it is always applied.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from bridgework.config import added, config_class
from bridgework.data.samples import Sample
from bridgework.errors import SpecError
from bridgework.evaluation.base import (
    Better,
    Result,
    Writing,
    answers_of,
    build_result,
    draw,
    question_of,
)
from bridgework.evaluation.few_shot import Shots
from bridgework.evaluation.statistics import EvaluatedRows
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

ENOUGH = 3  # annotators who agree
MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED)}
ENDINGS = {  # of contractions, which mean the same without the apostrophe
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were "
    "wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
FULL_FORMS = [f"{word}{ending}" for ending, words in ENDINGS.items() for word in words.split()]
FULL_FORMS += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
CONTRACTIONS = {  # with one apostrophe missing -> with all of them
    word[: at.start()] + word[at.end() :]: word
    for word in FULL_FORMS
    for at in re.finditer("'", word)
}


@config_class
class VQA:
    """`accuracy` over `rows` questions.

    The annotators' answers are the rows' `labels`, or the row's own answer if there are none. The
    model generates its answer; with a `vocabulary`, it chooses the best of these answers by
    `scoring`, by default the summed log-likelihood as in BLIP and InstructBLIP. `most_common` is
    the accuracy of always giving the most frequent answer.
    """

    better: ClassVar[Better] = {"accuracy": "higher", "most_common": None}
    name: str = "vqa"
    dataset: str
    rows: int = 1_000
    vocabulary: tuple[str, ...] = ()
    writing: Writing = Writing(beams=3, most=10)  # BLIP's
    # around each question, e.g. "Question: {} Short answer:"; empty: the stage's own
    prompts: tuple[str, ...] = ()
    seed: int = 0
    scoring: Scoring = added(default=Scoring(prior=False))  # of the vocabulary
    shots: Shots | None = added(default=None)  # examples before every question, as in Flamingo

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows: got {self.rows}; expected at least 1")

    @property
    def datasets(self) -> tuple[str, ...]:
        """Datasets that the evaluation reads."""
        return (self.dataset,) if self.shots is None else (self.dataset, *self.shots.datasets)

    def tiny(self) -> "VQA":
        """Return a copy with at most 4 synthetic rows and 4 answers in the vocabulary."""
        return replace(
            self,
            dataset="synthetic:shapes",
            rows=min(self.rows, 4),
            vocabulary=self.vocabulary[:4],
            writing=self.writing.tiny(),
            shots=None if self.shots is None else self.shots.tiny(),
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Answer the questions. Raises DataError if no row can be read."""
        samples = [example.sample for example in draw(self, pipeline, home)]
        if self.shots is None:
            questions = [question_of(pipeline, sample, self.prompts or None) for sample in samples]
            images = [pipeline.inputs.pictures(sample) for sample in samples]
        else:
            questions, images = self.shots.ask(pipeline, home, self, samples)
        if self.vocabulary:
            answers = [
                pipeline.rank_answers(*row, self.vocabulary, scoring=self.scoring)[0].candidate
                for row in zip(questions, images, strict=True)
            ]
        else:
            answers = self.writing.run(pipeline, questions, images, self.seed)
        references = [_references(sample) for sample in samples]
        counts = Counter(normalize(text) for texts in references for text in texts)
        ((usual, _),) = counts.most_common(1)
        rows = EvaluatedRows.of(samples)
        values = {
            "accuracy": rows.values(map(agreement, answers, references)),
            "most_common": rows.values(agreement(usual, texts) for texts in references),
        }
        return build_result(self, values, answers=answers_of(rows, questions, references, answers))


def agreement(answer: str, references: Sequence[str]) -> float:
    """Return min(equal references / 3, 1), the mean over leaving out each reference.

    With a single reference, return 1.0 if it is equal, otherwise 0.0.
    """
    normal, others = normalize(answer), [normalize(reference) for reference in references]
    if len(others) == 1:
        return float(normal == others[0])
    same = others.count(normal)
    return fmean(min((same - (other == normal)) / ENOUGH, 1.0) for other in others)


def normalize(answer: str) -> str:
    """Normalize an answer as in the official evaluation; a normalized answer stays the same."""
    text = " ".join(answer.split())
    result = text
    for mark in MARKS:
        separate = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        result = result.replace(mark, "" if separate else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", result).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _references(sample: Sample) -> tuple[str, ...]:
    own = [
        part.text
        for part in sample.parts
        if part.text is not None and part.role in ("caption", "assistant")
    ]
    return sample.labels or (own[-1],)
