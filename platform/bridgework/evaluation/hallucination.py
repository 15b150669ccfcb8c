"""Object hallucination: yes/no questions about objects, and objects in generated captions.

POPE   Li et al. 2023, arXiv:2305.10355: "Is there a ... in the image?", half of them with answer no
CHAIR  Rohrbach et al. 2018, arXiv:1809.02156: share of objects in captions that are not in the
image
"""

import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from itertools import permutations
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from bridgework.config import config_class
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError, SpecError
from bridgework.evaluation.base import (
    Better,
    Result,
    Writing,
    about_image,
    answers_of,
    build_result,
    draw_images,
    question_of,
)
from bridgework.evaluation.statistics import EvaluatedRows, RowValues

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

NO = {"no", "not", "n't"}


class YesNoQuestion(NamedTuple):
    """Yes/no question about one image, with its right answer."""

    sample: Sample
    conversation: list[Part]
    truth: bool
    asked: str  # the object, or the row's own question


@config_class
class POPE:
    """`accuracy`, and `precision`, `recall` and `f1` of yes; `yes` is the share of yes answers.

    A row that is a yes/no question is asked as it is. For a row with labels or boxes, `objects`
    objects in the image are asked for, and as many that are not in it. The latter are `random`, the
    most frequent in the rows (`popular`), or those that occur most often together with the objects
    of the image (`adversarial`). `always_yes` is the accuracy of always answering yes.
    """

    better: ClassVar[Better] = {
        **dict.fromkeys(("accuracy", "precision", "recall", "f1"), "higher"),
        **dict.fromkeys(("yes", "always_yes"), None),
    }
    name: str = "pope"
    dataset: str
    rows: int = 500  # images, or questions
    objects: int = 3  # asked per image, and as many that are not in it
    negatives: Literal["random", "popular", "adversarial"] = "random"
    question: str = "Is there a {} in the image?"
    writing: Writing = Writing(beams=1, most=10)
    # around the question, e.g. "{} Short answer:"; empty: only the question
    prompts: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.objects < 1 or self.question.count("{}") != 1:
            raise SpecError(
                f"{self.name}: rows and objects are at least 1, and the question holds {{}} once. "
                f"Got {self.rows}, {self.objects} and {self.question!r}"
            )

    def tiny(self) -> "POPE":
        """Return a copy with at most 4 synthetic rows."""
        return replace(
            self, dataset="synthetic:shapes", rows=min(self.rows, 4), writing=self.writing.tiny()
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Ask the questions.

        Raises DataError for a dataset without yes/no questions, labels or boxes.
        """
        examples = draw_images(
            self, pipeline, home, lambda s: truth_of(s) is not None or bool(objects_in(s))
        )
        questions = list(self._questions(pipeline, [example.sample for example in examples]))
        if len({question.truth for question in questions}) < 2:
            raise DataError(
                f"{self.name}: the rows of {self.dataset} do not give questions of both yes and "
                "no. Fix: give a dataset with several labels or boxes, or questions of both kinds"
            )
        conversations = [question.conversation for question in questions]
        images = [question.sample.images for question in questions]
        texts = self.writing.run(pipeline, conversations, images, self.seed)
        answers = [parse_yes_no(text) for text in texts]
        truth = [question.truth for question in questions]
        rows = EvaluatedRows.of(
            [question.sample for question in questions], [question.asked for question in questions]
        )
        targets = [("yes",) if right else ("no",) for right in truth]
        return build_result(
            self,
            binary_metrics(rows, answers, truth),
            answers=answers_of(rows, conversations, targets, texts),
        )

    def _questions(
        self, pipeline: "Pipeline", samples: Sequence[Sample]
    ) -> Iterator[YesNoQuestion]:
        objects = [objects_in(sample) for sample in samples]
        for row, sample in enumerate(samples):
            if (truth := truth_of(sample)) is not None:
                conversation = question_of(pipeline, sample, self.prompts)
                yield YesNoQuestion(sample, conversation, truth, "question")
                continue
            draw = random.Random(f"{self.seed}:{row}")
            present = draw.sample(objects[row], min(self.objects, len(objects[row])))
            for name in present:
                yield YesNoQuestion(sample, self._ask(name), True, name)
            for name in absent(objects, row, self.negatives, draw)[: len(present)]:
                yield YesNoQuestion(sample, self._ask(name), False, name)

    def _ask(self, name: str) -> list[Part]:
        text, prompts = self.question.replace("{}", name), self.prompts[:1] or ("{}",)
        return [Part("user", image=0), Part("user", text="\n" + prompts[0].replace("{}", text))]


@config_class
class CHAIR:
    """Share of hallucinated objects in captions.

    `instances` is the share of objects in the captions that are not in the image; `captions` is the
    share of captions with such an object; `recall` is the share of objects in the images that the
    captions contain. The objects are the rows' labels and the labels of boxes, with their
    `synonyms`. A caption without any object counts as right, therefore read `recall` as well.
    """

    better: ClassVar[Better] = {"instances": "lower", "captions": "lower", "recall": "higher"}
    name: str = "chair"
    dataset: str
    rows: int = 500
    writing: Writing = Writing(beams=3, least=5, most=64)
    # label -> other words for it
    synonyms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()  # questions about an image; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows: got {self.rows}; expected at least 1")

    def tiny(self) -> "CHAIR":
        """Return a copy with at most 4 synthetic rows."""
        return replace(
            self, dataset="synthetic:shapes", rows=min(self.rows, 4), writing=self.writing.tiny()
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Caption the images.

        Raises DataError for a dataset whose rows have neither labels nor boxes.
        """
        examples = draw_images(self, pipeline, home, lambda sample: bool(objects_in(sample)))
        truth = [set(objects_in(example.sample)) for example in examples]
        conversations = [about_image(pipeline, self.prompts or None)] * len(examples)
        images = [example.sample.images for example in examples]
        texts = self.writing.run(pipeline, conversations, images, self.seed)
        words = {name: (name, *self.synonyms.get(name, ())) for name in set[str]().union(*truth)}
        rows = EvaluatedRows.of([example.sample for example in examples])
        return build_result(
            self,
            chair_metrics(rows, [mentioned(text, words) for text in texts], truth),
            answers=answers_of(rows, conversations, map(sorted, truth), texts),
        )


def chair_metrics(
    rows: EvaluatedRows, predicted: Sequence[set[str]], truth: Sequence[set[str]]
) -> dict[str, RowValues]:
    """Return the metrics of CHAIR from the objects in each caption and in each image."""
    wrong = [names - own for names, own in zip(predicted, truth, strict=True)]
    right = [names & own for names, own in zip(predicted, truth, strict=True)]
    return {
        "instances": rows.values(map(_share, wrong, predicted), map(len, predicted)),
        "captions": rows.values(map(bool, wrong)),
        "recall": rows.values(map(_share, right, truth), map(len, truth)),
    }


def _share(part: set[str], total: set[str]) -> float:
    return len(part) / len(total) if total else 0.0


def binary_metrics(
    rows: EvaluatedRows, predicted: Sequence[bool], truth: Sequence[bool]
) -> dict[str, RowValues]:
    """Return the metrics of POPE from answers; True is yes."""
    pairs = list(zip(predicted, truth, strict=True))
    both = [p and t for p, t in pairs]
    return {
        "accuracy": rows.values(p == t for p, t in pairs),
        "precision": rows.values(both, predicted),
        "recall": rows.values(both, truth),
        "f1": rows.values(both, [p + t for p, t in pairs]),  # 2 tp / (2 tp + fp + fn)
        "yes": rows.values(predicted),
        "always_yes": rows.values(truth),
    }


def parse_yes_no(text: str) -> bool:
    """Return False if the first sentence contains a negation, otherwise True, as in POPE."""
    words = re.findall(r"n't|\w+?(?=n't)|\w+", text.partition(".")[0].lower())
    return not NO & set(words)


def truth_of(sample: Sample) -> bool | None:
    """Return True if the row's answer is yes; None for a row that is not a yes/no question."""
    texts = [part for part in sample.parts if part.text is not None]
    if [part.role for part in texts[-2:]] != ["user", "assistant"]:
        return None
    first = re.match(r"\W*(yes|no)\b", texts[-1].text or "", re.IGNORECASE)
    return None if first is None else first[1].lower() == "yes"


def objects_in(sample: Sample) -> list[str]:
    """Return the labels of a sample and of its boxes, each once, in order."""
    return list(dict.fromkeys([*sample.labels, *(box.label for box in sample.boxes if box.label)]))


def absent(objects: Sequence[Sequence[str]], row: int, how: str, draw: random.Random) -> list[str]:
    """Return the objects of other rows that this row does not have, in the order of asking.

    `how` is "random", "popular" or "adversarial", see `POPE`.
    """
    others = sorted({name for names in objects for name in names} - set(objects[row]))
    draw.shuffle(others)
    if how == "random":
        return others
    if how == "popular":
        counts = Counter(name for names in objects for name in names)
    else:
        pairs = Counter(pair for names in objects for pair in permutations(names, 2))
        counts = Counter({name: sum(pairs[own, name] for own in objects[row]) for name in others})
    return sorted(others, key=lambda name: -counts[name])


def mentioned(text: str, words: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the objects in a text, by any of their words, in singular or plural."""

    def contains(word: str) -> bool:
        return bool(re.search(rf"\b{re.escape(word.lower())}(?:e?s)?\b", text.lower()))

    return {name for name, synonyms in words.items() if any(map(contains, synonyms))}
