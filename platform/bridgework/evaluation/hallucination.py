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
    draw_images,
    prefix_metrics,
    question_of,
)

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

NO = {"no", "not", "n't"}


class YesNoQuestion(NamedTuple):
    """Yes/no question about one image, with its right answer."""

    sample: Sample
    conversation: list[Part]
    truth: bool


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
        return Result(prefix_metrics(self, binary_metrics(answers, truth)))

    def _questions(
        self, pipeline: "Pipeline", samples: Sequence[Sample]
    ) -> Iterator[YesNoQuestion]:
        objects = [objects_in(sample) for sample in samples]
        for row, sample in enumerate(samples):
            if (truth := truth_of(sample)) is not None:
                yield YesNoQuestion(sample, question_of(pipeline, sample, self.prompts), truth)
                continue
            draw = random.Random(f"{self.seed}:{row}")
            present = draw.sample(objects[row], min(self.objects, len(objects[row])))
            for name in present:
                yield YesNoQuestion(sample, self._ask(name), True)
            for name in absent(objects, row, self.negatives, draw)[: len(present)]:
                yield YesNoQuestion(sample, self._ask(name), False)

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
        values = chair_metrics([mentioned(text, words) for text in texts], truth)
        return Result(prefix_metrics(self, values))


def chair_metrics(predicted: Sequence[set[str]], truth: Sequence[set[str]]) -> dict[str, float]:
    """Return the metrics of CHAIR from the objects in each caption and in each image."""
    wrong = [names - own for names, own in zip(predicted, truth, strict=True)]
    right = sum(len(names & own) for names, own in zip(predicted, truth, strict=True))
    return {
        "instances": sum(map(len, wrong)) / max(1, sum(map(len, predicted))),
        "captions": sum(map(bool, wrong)) / len(predicted),
        "recall": right / sum(map(len, truth)),
    }


def binary_metrics(predicted: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
    """Return the metrics of POPE from answers; True is yes."""
    both = sum(p and t for p, t in zip(predicted, truth, strict=True))
    precision, recall = both / max(1, sum(predicted)), both / max(1, sum(truth))
    return {
        "accuracy": sum(p == t for p, t in zip(predicted, truth, strict=True)) / len(truth),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes": sum(predicted) / len(predicted),
        "always_yes": sum(truth) / len(truth),
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
