"""Results of an evaluation, and which way each of its figures is better.

The rows that an evaluation is run on: drawn by a seed, and only those that the model can read.

What a model writes when an evaluation asks it: the same on every rank, and without dropout while it trains.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bridgework.config import added, config_class
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.images import load_image
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Part, Sample
from bridgework.data.templates import unanswered
from bridgework.errors import DataError, SpecError
from bridgework.models.base import eval_no_grad
from bridgework.system import Better as Better

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline


@dataclass(frozen=True)
class Result:
    """Metrics and pictures, all under the evaluation's name."""

    metrics: dict[str, float]
    pictures: dict[str, Image.Image] = field(default_factory=dict)


class _Evaluation(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def better(self) -> Better: ...


def named(evaluation: _Evaluation, values: Mapping[str, float]) -> dict[str, float]:
    """Return {"ranking.accuracy": 0.4} for an evaluation called "ranking" and {"accuracy": 0.4}.

    Raises ValueError for figures other than those that `evaluation.better` declares: sweeps and promotion rely on it.
    """
    if values.keys() != evaluation.better.keys():
        raise ValueError(
            f"{type(evaluation).__name__}.better declares {sorted(evaluation.better)}. Got {sorted(values)}"
        )
    return {f"{evaluation.name}.{key}": float(value) for key, value in values.items()}


TRIES = 10  # rows looked at for every one that is wanted


class EvalRows(Protocol):
    """What an evaluation says of its rows."""

    @property
    def name(self) -> str: ...
    @property
    def dataset(self) -> str: ...
    @property
    def rows(self) -> int: ...
    @property
    def prompts(self) -> tuple[str, ...]: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class EvalExample:
    """One row, ready to be judged."""

    sample: Sample
    conversation: list[Part]
    squares: list[NDArray[np.uint8]]  # (3, S, S) each, S pixels a side

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.sample.parts if part.text is not None]


def draw(
    spec: EvalRows,
    pipeline: "Pipeline",
    home: Path,
    wanted: Callable[[Sample], bool] = lambda sample: True,
    needed: str = "can be read by this model",
) -> list[EvalExample]:
    """Up to `spec.rows` rows that are `wanted`, in an order given by its seed.

    Raises DataError, which says what is `needed`, when none of them can be read.
    """
    items = list(islice(_items(spec, pipeline, home, wanted), spec.rows))
    if not items:
        raise DataError(
            f"{spec.name}: none of the rows of {spec.dataset} {needed}; see its quarantine"
        )
    return items


def draw_pairs(
    spec: EvalRows, pipeline: "Pipeline", home: Path, *, at_least: int, several: bool = False
) -> list[EvalExample]:
    """Rows of one image and one text, no text twice: what is right for one image is then wrong for the others.

    With `several`, rows with more than one caption too. Raises DataError when there are fewer than `at_least`.
    """
    seen: set[str] = set()

    def new_pair(sample: Sample) -> bool:
        said = [part for part in sample.parts if part.text is not None]
        texts = {part.text for part in said if part.text is not None}
        captions = several and bool(said) and all(part.role == "caption" for part in said)
        new = len(sample.images) == 1 and (len(said) == 1 or captions) and not texts & seen
        if new:
            seen.update(texts)
        return new

    pairs = list(islice(_items(spec, pipeline, home, new_pair), spec.rows))
    if len(pairs) < at_least:
        raise DataError(
            f"{spec.name}: found {len(pairs)} pairs of an image and a text of its own in {spec.dataset}, and needs "
            f"{at_least}; give a larger dataset, or fewer candidates"
        )
    return pairs


def draw_images(
    spec: EvalRows,
    pipeline: "Pipeline",
    home: Path,
    wanted: Callable[[Sample], bool] = lambda sample: True,
) -> list[EvalExample]:
    """Up to `spec.rows` rows of one image each that are `wanted`, whatever is said of it: without a conversation.

    Raises DataError when there is none.
    """
    pixels, found = pipeline.stage.model.pixels, list[EvalExample]()
    for sample in _shuffled(resolve(spec.dataset, home), spec):
        if len(found) == spec.rows:
            break
        if len(sample.images) == 1 and wanted(sample):
            try:
                found.append(EvalExample(sample, [], [load_image(sample.images[0], pixels)]))
            except BadSample:
                continue
    if not found:
        raise DataError(
            f"{spec.name}: no row of {spec.dataset} has one image, and what this evaluation needs of it"
        )
    return found


def _items(
    spec: EvalRows, pipeline: "Pipeline", home: Path, wanted: Callable[[Sample], bool]
) -> Iterator[EvalExample]:
    for sample in filter(wanted, _shuffled(resolve(spec.dataset, home), spec)):
        try:
            conversation = pipeline.inputs.ask(sample, spec.prompts or None)
            pipeline.inputs.encode(
                conversation, answer=True, layouts=pipeline.inputs.layouts(sample)
            )
            squares = [load_image(image, pipeline.stage.model.pixels) for image in sample.images]
        except BadSample:  # one bad row must not end a run in its evaluation
            continue
        yield EvalExample(sample, conversation, squares)


def _shuffled(path: str, spec: EvalRows) -> Iterator[Sample]:
    dataset = open_dataset(path)
    tries = min(len(dataset), TRIES * spec.rows)
    for row in random.Random(spec.seed).sample(range(len(dataset)), tries):
        shard, group, place = dataset.locate(row)
        yield dataset.read_group(shard, group)[place]


ROWS = 16  # written side by side


@config_class
class Writing:
    """By beam search, greedily (`beams=1`), or drawn from the likeliest tokens that have `top_p` of the probability."""

    beams: int = 3
    top_p: float | None = (
        None  # nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751); beams are then none
    )
    least: int = 1  # tokens
    most: int = 20
    length_penalty: float = added(default=1.0)  # of beams: below 0 prefers short answers
    repetition_penalty: float = added(
        default=1.0
    )  # above 1: what was written before gets less likely

    def __post_init__(self) -> None:
        if (
            self.beams < 1
            or not (self.top_p is None or 0 < self.top_p <= 1)
            or not 0 <= self.least <= self.most
        ):
            raise SpecError(
                "writing: beams is at least 1, top_p in (0, 1] and least at most most; "
                f"got {self.beams}, {self.top_p}, {self.least} and {self.most}"
            )
        if not (isfinite(self.length_penalty) and 0 < self.repetition_penalty < inf):
            raise SpecError(
                "writing: length_penalty is a finite number and repetition_penalty is above 0; "
                f"got {self.length_penalty:g} and {self.repetition_penalty:g}"
            )
        if self.length_penalty != 1 and (self.beams == 1 or self.top_p is not None):
            raise SpecError(
                f"writing.length_penalty {self.length_penalty:g} ranks the beams of a search; set writing.beams above 1"
            )

    def tiny(self) -> "Writing":
        return replace(
            self, beams=min(self.beams, 2), least=min(self.least, 1), most=min(self.most, 4)
        )

    def run(
        self, pipeline: "Pipeline", asked: Sequence[Sequence[Part]], shown: Any, seed: int = 0
    ) -> list[str]:
        """An answer to each conversation about its images `shown[i]`; what is drawn depends on the row and `seed`."""
        how: dict[str, Any] = {"min_new_tokens": self.least, "max_new_tokens": self.most,
                               "repetition_penalty": self.repetition_penalty}  # fmt: skip
        if self.top_p is not None:
            how |= {"temperature": 1.0, "top_p": self.top_p}
        texts: list[str] = []
        with eval_no_grad(pipeline.model):
            if self.top_p is None and self.beams > 1:  # a beam search holds one prompt at a time
                how |= {"beams": self.beams, "length_penalty": self.length_penalty}
                rows = zip(asked, shown, strict=True)
                return [
                    pipeline.generate(conversation, images, **how).text
                    for conversation, images in rows
                ]
            for start in range(0, len(asked), ROWS):
                part = slice(start, start + ROWS)
                seeds = [seed * 1_000_003 + row for row in range(len(asked))[part]]
                texts += pipeline.generate_batch(asked[part], shown[part], seeds, **how)
        return texts


def question_of(pipeline: "Pipeline", sample: Sample, prompts: Sequence[str] | None) -> list[Part]:
    """The sample as a conversation that ends where its last answer is due."""
    return unanswered(pipeline.inputs.ask(sample, prompts))


def about_image(pipeline: "Pipeline", prompts: Sequence[str] | None) -> list[Part]:
    """A conversation that asks for a caption of one image, as the stage's training asked (or with `prompts`)."""
    return pipeline.inputs.about(prompts[0] if prompts else None)
