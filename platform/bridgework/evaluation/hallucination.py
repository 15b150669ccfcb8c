"""Does the model see what is not there? Questions about objects, and the objects that its captions name.

POPE   Li et al. 2023, arXiv:2305.10355: is there a ... in the image? half of them are, half are not
CHAIR  Rohrbach et al. 2018, arXiv:1809.02156: of what a caption names, how much is not in the image
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
    """A question of yes or no about one image."""

    sample: Sample
    conversation: list[Part]
    truth: bool


@config_class
class POPE:
    """`accuracy`, `precision`, `recall` and `f1` of yes, and `yes`, the share of questions answered so.

    A row that is a question of yes or no is asked as it is. Of a row with labels or boxes, `objects` that are in the
    image are asked for, and as many that are not: `random`, the most `popular` of the rows', or those that are most
    often seen beside what is there (`adversarial`). Beside them stands `always_yes`, its accuracy.
    """

    better: ClassVar[Better] = {
        **dict.fromkeys(("accuracy", "precision", "recall", "f1"), "higher"),
        **dict.fromkeys(("yes", "always_yes"), None),
    }
    name: str = "pope"
    dataset: str
    rows: int = 500  # images, or questions
    objects: int = 3  # in an image, and as many that are not
    negatives: Literal["random", "popular", "adversarial"] = "random"
    question: str = "Is there a {} in the image?"
    writing: Writing = Writing(beams=1, most=10)
    prompts: tuple[
        str, ...
    ] = ()  # around the question, e.g. "{} Short answer:"; empty: the question alone
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.objects < 1 or self.question.count("{}") != 1:
            raise SpecError(
                f"{self.name}: rows and objects are at least 1, and the question holds {{}} once"
            )

    def tiny(self) -> "POPE":
        return replace(
            self, dataset="synthetic:shapes", rows=min(self.rows, 4), writing=self.writing.tiny()
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset without such questions, labels or boxes."""
        items = draw_images(
            self, pipeline, home, lambda s: truth_of(s) is not None or bool(objects_in(s))
        )
        asked = list(self._questions(pipeline, [item.sample for item in items]))
        if len({question.truth for question in asked}) < 2:
            raise DataError(
                f"{self.name}: the rows of {self.dataset} give no questions of both yes and no"
            )
        conversations, images = [a.conversation for a in asked], [a.sample.images for a in asked]
        said = [
            parse_yes_no(text)
            for text in self.writing.run(pipeline, conversations, images, self.seed)
        ]
        return Result(prefix_metrics(self, binary_metrics(said, [a.truth for a in asked])))

    def _questions(
        self, pipeline: "Pipeline", samples: Sequence[Sample]
    ) -> Iterator[YesNoQuestion]:
        known = [objects_in(sample) for sample in samples]
        for row, sample in enumerate(samples):
            if (truth := truth_of(sample)) is not None:
                yield YesNoQuestion(sample, question_of(pipeline, sample, self.prompts), truth)
                continue
            draw = random.Random(f"{self.seed}:{row}")
            here = draw.sample(known[row], min(self.objects, len(known[row])))
            for thing in here:
                yield YesNoQuestion(sample, self._ask(thing), True)
            for thing in absent(known, row, self.negatives, draw)[: len(here)]:
                yield YesNoQuestion(sample, self._ask(thing), False)

    def _ask(self, thing: str) -> list[Part]:
        text, framed = self.question.replace("{}", thing), self.prompts[:1] or ("{}",)
        return [Part("user", image=0), Part("user", text="\n" + framed[0].replace("{}", text))]


@config_class
class CHAIR:
    """`instances`: the share of objects named in captions that are not in the image; `captions`: of captions with one.

    The objects are those that the rows' labels and boxes name, and what `synonyms` says of them; `recall` is the share
    of those in the images that the captions name. A caption without an object is right, and says little: read both.
    """

    better: ClassVar[Better] = {"instances": "lower", "captions": "lower", "recall": "higher"}
    name: str = "chair"
    dataset: str
    rows: int = 500
    writing: Writing = Writing(beams=3, least=5, most=64)
    synonyms: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # label -> other words for it
    prompts: tuple[str, ...] = ()  # what an image is asked with; empty: the stage's own
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise SpecError(f"{self.name}.rows must be at least 1, got {self.rows}")

    def tiny(self) -> "CHAIR":
        return replace(
            self, dataset="synthetic:shapes", rows=min(self.rows, 4), writing=self.writing.tiny()
        )

    def run(self, pipeline: "Pipeline", home: Path) -> Result:
        """Raises DataError for a dataset whose rows have neither labels nor boxes."""
        items = draw_images(self, pipeline, home, lambda sample: bool(objects_in(sample)))
        here = [set(objects_in(item.sample)) for item in items]
        asked = about_image(pipeline, self.prompts or None)
        texts = self.writing.run(
            pipeline, [asked] * len(items), [item.sample.images for item in items], self.seed
        )
        words = {name: (name, *self.synonyms.get(name, ())) for name in set[str]().union(*here)}
        return Result(
            prefix_metrics(self, chair_metrics([mentioned(text, words) for text in texts], here))
        )


def chair_metrics(said: Sequence[set[str]], here: Sequence[set[str]]) -> dict[str, float]:
    """CHAIR of the objects that captions name, given those that the images have."""
    wrong = [names - own for names, own in zip(said, here, strict=True)]
    found = sum(len(names & own) for names, own in zip(said, here, strict=True))
    return {
        "instances": sum(map(len, wrong)) / max(1, sum(map(len, said))),
        "captions": sum(map(bool, wrong)) / len(said),
        "recall": found / sum(map(len, here)),
    }


def binary_metrics(said: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
    """What answers of yes (True) and no are worth."""
    both = sum(s and t for s, t in zip(said, truth, strict=True))
    precision, recall = both / max(1, sum(said)), both / max(1, sum(truth))
    return {
        "accuracy": sum(s == t for s, t in zip(said, truth, strict=True)) / len(truth),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if both else 0.0,
        "yes": sum(said) / len(said),
        "always_yes": sum(truth) / len(truth),
    }


def parse_yes_no(text: str) -> bool:
    """Whatever does not say no in its first sentence, as POPE reads it."""
    words = re.findall(r"n't|\w+?(?=n't)|\w+", text.partition(".")[0].lower())
    return not NO & set(words)


def truth_of(sample: Sample) -> bool | None:
    """Whether the answer of the row is yes; None for a row that is no question of yes or no."""
    texts = [part for part in sample.parts if part.text is not None]
    if [part.role for part in texts[-2:]] != ["user", "assistant"]:
        return None
    first = re.match(r"\W*(yes|no)\b", texts[-1].text or "", re.IGNORECASE)
    return None if first is None else first[1].lower() == "yes"


def objects_in(sample: Sample) -> list[str]:
    """The names of its labels and boxes, each once, in order."""
    return list(dict.fromkeys([*sample.labels, *(box.label for box in sample.boxes if box.label)]))


def absent(known: Sequence[Sequence[str]], row: int, how: str, draw: random.Random) -> list[str]:
    """Objects of other rows that this one does not have, those to be asked for first at the front."""
    others = sorted({name for names in known for name in names} - set(known[row]))
    draw.shuffle(others)
    if how == "random":
        return others
    if how == "popular":
        counts = Counter(name for names in known for name in names)
    else:
        pairs = Counter(pair for names in known for pair in permutations(names, 2))
        counts = Counter({name: sum(pairs[own, name] for own in known[row]) for name in others})
    return sorted(others, key=lambda name: -counts[name])


def mentioned(text: str, words: Mapping[str, Sequence[str]]) -> set[str]:
    """The objects that a text names, by any of their words, one or several of them."""
    return {
        name
        for name, alike in words.items()
        if any(re.search(rf"\b{re.escape(word.lower())}(?:e?s)?\b", text.lower()) for word in alike)
    }
