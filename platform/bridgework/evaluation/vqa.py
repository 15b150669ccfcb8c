"""Does the model answer as people do? The accuracy of VQA (Antol et al. 2015, arXiv:1505.00468; v2: arXiv:1612.00837).

An answer counts in full if three of ten people gave it, as the mean over leaving each of them out. Answers are compared
as the official evaluation writes them: without articles and punctuation, numbers as digits, contractions with their
apostrophes. It leaves them as they are where all people agree; here they are always written so.
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
from bridgework.evaluation.base import Better, Result, Writing, draw, prefix_metrics, question_of
from bridgework.evaluation.few_shot import Shots
from bridgework.system import Scoring

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

ENOUGH = 3  # people who agree
MARKS = ';/[]"{}()=+\\_-><@`,?!'
ARTICLES = ("a", "an", "the")
COUNTED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(COUNTED)}
ENDINGS = {  # of contractions; to write one without an apostrophe is to say the same
    "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
WHOLE = [f"{word}{ending}" for ending, words in ENDINGS.items() for word in words.split()]
WHOLE += ["ma'am", "o'clock", "'twas", "y'all", "y'all'll", "y'all'd've", "'ow's'at"]
CONTRACTIONS = {
    word[: at.start()] + word[at.end() :]: word for word in WHOLE for at in re.finditer("'", word)
}


@config_class
class VQA:
    """`accuracy` over `rows` questions, whose people's answers are the rows' `labels`; without any, the row's own.

    The model writes, or with a `vocabulary` chooses one of its answers by `scoring` (by default the summed
    log-likelihood, as BLIP and InstructBLIP rank). `most_common` is what the most frequent answer of all would get.
    """

    better: ClassVar[Better] = {"accuracy": "higher", "most_common": None}
    name: str = "vqa"
    dataset: str
    rows: int = 1_000
    vocabulary: tuple[str, ...] = ()
    writing: Writing = Writing(beams=3, most=10)  # BLIP's
    prompts: tuple[
        str, ...
    ] = ()  # around each question, e.g. "Question: {} Short answer:"; empty: the stage's own
    seed: int = 0
    scoring: Scoring = added(default=Scoring(prior=False))  # of the vocabulary
    shots: Shots | None = added(
        default=None
    )  # examples before every question, as Flamingo is asked

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows must be at least 1, got {self.rows}")

    @property
    def datasets(self) -> tuple[str, ...]:
        return (self.dataset,) if self.shots is None else (self.dataset, *self.shots.datasets)

    def tiny(self) -> "VQA":
        few, shots = self.vocabulary[:4], None if self.shots is None else self.shots.tiny()
        return replace(self, dataset="synthetic:shapes", rows=min(self.rows, 4), vocabulary=few,
                       writing=self.writing.tiny(), shots=shots)  # fmt: skip

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError when no row can be read."""
        items = draw(self, pipeline, home)
        samples = [item.sample for item in items]
        if self.shots is None:
            asked = [question_of(pipeline, sample, self.prompts or None) for sample in samples]
            shown = [pipeline.inputs.pictures(sample) for sample in samples]
        else:
            asked, shown = self.shots.ask(pipeline, home, self, samples)
        if self.vocabulary:
            rows = zip(asked, shown, strict=True)
            said = [
                pipeline.rank_answers(*row, self.vocabulary, scoring=self.scoring)[0].candidate
                for row in rows
            ]
        else:
            said = self.writing.run(pipeline, asked, shown, self.seed)
        people = [_people(item.sample) for item in items]
        ((usual, _),) = Counter(
            normalize(answer) for told in people for answer in told
        ).most_common(1)
        values = {
            "accuracy": fmean(
                agreement(answer, told) for answer, told in zip(said, people, strict=True)
            ),
            "most_common": fmean(agreement(usual, told) for told in people),
        }
        return Result(prefix_metrics(self, values))


def agreement(answer: str, people: Sequence[str]) -> float:
    """min(people who say the same / 3, 1), the mean over leaving each of them out; of one, whether he says it."""
    said, told = normalize(answer), [normalize(person) for person in people]
    if len(told) == 1:
        return float(said == told[0])
    same = told.count(said)
    return fmean(min((same - (own == said)) / ENOUGH, 1.0) for own in told)


def normalize(answer: str) -> str:
    """An answer as the official evaluation compares it; what is normal stays."""
    text = " ".join(answer.split())
    written = text
    for mark in MARKS:
        apart = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        written = written.replace(mark, "" if apart else " ")
    words = [NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", written).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _people(sample: Sample) -> tuple[str, ...]:
    own = [
        part.text
        for part in sample.parts
        if part.text is not None and part.role in ("caption", "assistant")
    ]
    return sample.labels or (own[-1],)
