"""Common parts of evaluations: results, drawing of rows, prompts and generated answers.

Rows are drawn by a seed, and only rows that the model can read. Answers are generated without
dropout, also while the model trains, and are the same on every rank.
"""

# S side in pixels

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf, isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

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
from bridgework.evaluation.statistics import EvaluatedRows, Interval, RowValues, interval
from bridgework.models.base import eval_no_grad
from bridgework.system import Better as Better
from bridgework.system import Direction

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

TRIES = 10  # rows read per requested row, at most
ROWS = 16  # answers generated together


# --- results -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluatedAnswer:
    """One generated or chosen answer, for `bridgework eval --samples`."""

    key: str
    question: str
    target: tuple[str, ...]  # right answers
    response: str


@dataclass(frozen=True)
class Figure:
    """A metric with its interval, and which direction of it is better (None: a baseline)."""

    name: str
    value: float
    better: Direction | None
    interval: Interval | None = None  # None for a metric without per-row values

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.interval is None else str(self.interval)


@dataclass(frozen=True)
class Result:
    """Result of an evaluation; all names begin with the evaluation's name."""

    metrics: dict[str, float]
    pictures: dict[str, Image.Image] = field(default_factory=dict)
    rows: dict[str, RowValues] = field(default_factory=dict)  # of every metric that has rows
    better: dict[str, Direction | None] = field(default_factory=dict)
    answers: tuple[EvaluatedAnswer, ...] = ()

    @property
    def figures(self) -> list[Figure]:
        """All metrics with their intervals, in order."""
        return figures_of(self.metrics, self.rows, self.better)


def figures_of(
    metrics: Mapping[str, float],
    rows: Mapping[str, RowValues],
    better: Mapping[str, Direction | None],
) -> list[Figure]:
    """Return metrics as figures, with an interval for those that have rows."""
    return [
        Figure(name, value, better.get(name), interval(rows[name]) if name in rows else None)
        for name, value in metrics.items()
    ]


class _Evaluation(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def better(self) -> Better: ...


def build_result(
    evaluation: _Evaluation,
    values: Mapping[str, float | RowValues],
    *,
    pictures: Mapping[str, Image.Image] | None = None,
    answers: Iterable[EvaluatedAnswer] = (),
) -> Result:
    """Return the result with the evaluation's name in front: `accuracy` -> `ranking.accuracy`.

    values: a metric with per-row values is their mean, and gets an interval. Raises ValueError if
    `evaluation.better` declares other metrics, because sweeps and promotion rely on it.
    """
    if values.keys() != evaluation.better.keys():
        raise ValueError(
            f"{type(evaluation).__name__}.run: metrics differ from `better`. "
            f"Got {sorted(values)}; expected {sorted(evaluation.better)}. "
            "Fix: declare them in `better`"
        )
    named = {f"{evaluation.name}.{key}": value for key, value in values.items()}
    return Result(
        {
            key: value.mean if isinstance(value, RowValues) else float(value)
            for key, value in named.items()
        },
        dict(pictures or {}),
        {key: value for key, value in named.items() if isinstance(value, RowValues)},
        {f"{evaluation.name}.{key}": way for key, way in evaluation.better.items()},
        tuple(answers),
    )


def answers_of(
    rows: EvaluatedRows,
    conversations: Sequence[Sequence[Part]],
    targets: Iterable[Sequence[str]],
    responses: Iterable[str],
) -> list[EvaluatedAnswer]:
    """Return an answer per row, with the texts of its conversation as the question."""
    return [
        EvaluatedAnswer(
            key, "".join(part.text for part in parts if part.text), tuple(target), response
        )
        for key, parts, target, response in zip(
            rows.keys, conversations, targets, responses, strict=True
        )
    ]


# --- rows --------------------------------------------------------------------------------------


class EvalRows(Protocol):
    """Fields of an evaluation that define its rows."""

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


class RowsOf(NamedTuple):
    """Rows of a second dataset of an evaluation, as `EvalRows`."""

    name: str
    dataset: str
    rows: int
    prompts: tuple[str, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class EvalExample:
    """One row of an evaluation: sample, conversation and decoded images."""

    sample: Sample
    conversation: list[Part]
    squares: list[NDArray[np.uint8]]  # (3, S, S) each

    @property
    def texts(self) -> list[str]:
        """Texts of the sample's parts, in order."""
        return [part.text for part in self.sample.parts if part.text is not None]


def draw(
    spec: EvalRows,
    pipeline: "Pipeline",
    home: Path,
    condition: Callable[[Sample], bool] = lambda sample: True,
    requirement: str = "can be read by this model",
) -> list[EvalExample]:
    """Return up to `spec.rows` rows that meet the condition, in an order given by the seed.

    Raises DataError if there is none; its message contains the `requirement`.
    """
    examples = list(islice(_examples(spec, pipeline, home, condition), spec.rows))
    if not examples:
        raise DataError(
            f"{spec.name}: none of the rows of {spec.dataset} {requirement}. "
            "Fix: see the quarantine of the dataset, or evaluate on another one"
        )
    return examples


def draw_pairs(
    spec: EvalRows, pipeline: "Pipeline", home: Path, *, at_least: int, several: bool = False
) -> list[EvalExample]:
    """Return up to `spec.rows` rows of one image and one text, without repeated texts.

    A text that is right for one image is therefore wrong for all others. With `several`, rows with
    several captions are included. Raises DataError if there are fewer than `at_least` rows.
    """
    seen: set[str] = set()

    def is_new_pair(sample: Sample) -> bool:
        parts = [part for part in sample.parts if part.text is not None]
        texts = {part.text for part in parts if part.text is not None}
        captions = several and bool(parts) and all(part.role == "caption" for part in parts)
        new = len(sample.images) == 1 and (len(parts) == 1 or captions) and not texts & seen
        if new:
            seen.update(texts)
        return new

    pairs = list(islice(_examples(spec, pipeline, home, is_new_pair), spec.rows))
    if len(pairs) < at_least:
        raise DataError(
            f"{spec.name}: {spec.dataset} has too few pairs of an image and a text of its own. "
            f"Got {len(pairs)}; expected at least {at_least}. "
            "Fix: give a larger dataset, or fewer candidates"
        )
    return pairs


def draw_images(
    spec: EvalRows,
    pipeline: "Pipeline",
    home: Path,
    condition: Callable[[Sample], bool] = lambda sample: True,
) -> list[EvalExample]:
    """Return up to `spec.rows` rows of one image that meet the condition, without conversations.

    Raises DataError if there is none.
    """
    pixels, examples = pipeline.stage.model.pixels, list[EvalExample]()
    for sample in _shuffled(resolve(spec.dataset, home), spec):
        if len(examples) == spec.rows:
            break
        if len(sample.images) == 1 and condition(sample):
            try:
                square = load_image(sample.images[0], pixels)
            except BadSample:
                continue
            examples.append(EvalExample(sample, [], [square]))
    if not examples:
        raise DataError(
            f"{spec.name}: no row of {spec.dataset} has one image and the fields that this "
            "evaluation reads. Fix: see the quarantine of the dataset, or evaluate on another one"
        )
    return examples


def _examples(
    spec: EvalRows, pipeline: "Pipeline", home: Path, condition: Callable[[Sample], bool]
) -> Iterator[EvalExample]:
    for sample in filter(condition, _shuffled(resolve(spec.dataset, home), spec)):
        try:
            conversation = pipeline.inputs.ask(sample, spec.prompts or None)
            pipeline.inputs.encode(
                conversation, answer=True, layouts=pipeline.inputs.layouts(sample)
            )
            squares = [load_image(image, pipeline.stage.model.pixels) for image in sample.images]
        except BadSample:  # a bad row must not end a run in its evaluation
            continue
        yield EvalExample(sample, conversation, squares)


def _shuffled(path: str, spec: EvalRows) -> Iterator[Sample]:
    dataset = open_dataset(path)
    tries = min(len(dataset), TRIES * spec.rows)
    for row in random.Random(spec.seed).sample(range(len(dataset)), tries):
        shard, group, place = dataset.locate(row)
        yield dataset.read_group(shard, group)[place]


# --- prompts and generated answers -------------------------------------------------------------


def question_of(pipeline: "Pipeline", sample: Sample, prompts: Sequence[str] | None) -> list[Part]:
    """Return the sample as a conversation without its last answer."""
    return unanswered(pipeline.inputs.ask(sample, prompts))


def about_image(pipeline: "Pipeline", prompts: Sequence[str] | None) -> list[Part]:
    """Return a conversation that asks for a caption of one image (default: as in training)."""
    return pipeline.inputs.about(prompts[0] if prompts else None)


@config_class
class Writing:
    """Generation of answers: beam search, greedy (`beams=1`) or nucleus sampling (`top_p`)."""

    beams: int = 3
    # nucleus sampling (Holtzman et al. 2020, arXiv:1904.09751), without beams
    top_p: float | None = None
    least: int = 1  # tokens
    most: int = 20
    length_penalty: float = added(default=1.0)  # of beams: below 0 prefers short answers
    # above 1: tokens that occurred before become less likely
    repetition_penalty: float = added(default=1.0)

    def __post_init__(self) -> None:
        if (
            self.beams < 1
            or not (self.top_p is None or 0 < self.top_p <= 1)
            or not 0 <= self.least <= self.most
        ):
            raise SpecError(
                "writing: beams is at least 1, top_p in (0, 1] and least from 0 to most. "
                f"Got {self.beams}, {self.top_p}, {self.least} and {self.most}"
            )
        if not (isfinite(self.length_penalty) and 0 < self.repetition_penalty < inf):
            raise SpecError(
                "writing: length_penalty is a finite number and repetition_penalty is above 0. "
                f"Got {self.length_penalty:g} and {self.repetition_penalty:g}"
            )
        if self.length_penalty != 1 and (self.beams == 1 or self.top_p is not None):
            raise SpecError(
                f"writing.length_penalty {self.length_penalty:g} ranks the beams of a search. "
                "Fix: set writing.beams above 1, and leave out writing.top_p"
            )

    def tiny(self) -> "Writing":
        """Return a copy with at most 2 beams and 4 tokens."""
        return replace(
            self, beams=min(self.beams, 2), least=min(self.least, 1), most=min(self.most, 4)
        )

    def run(
        self,
        pipeline: "Pipeline",
        conversations: Sequence[Sequence[Part]],
        images: Any,
        seed: int = 0,
    ) -> list[str]:
        """Return the answer to each conversation about its images `images[i]`.

        Sampled answers depend on the row number and `seed` only.
        """

        options: dict[str, Any] = {
            "min_new_tokens": self.least,
            "max_new_tokens": self.most,
            "repetition_penalty": self.repetition_penalty,
        }
        if self.top_p is not None:
            options |= {"temperature": 1.0, "top_p": self.top_p}
        texts: list[str] = []
        with eval_no_grad(pipeline.model):
            if self.top_p is None and self.beams > 1:  # beam search takes one prompt at a time
                options |= {"beams": self.beams, "length_penalty": self.length_penalty}
                rows = zip(conversations, images, strict=True)
                return [
                    pipeline.generate(conversation, shown, **options).text
                    for conversation, shown in rows
                ]
            for start in range(0, len(conversations), ROWS):
                batch = slice(start, start + ROWS)
                seeds = [seed * 1_000_003 + row for row in range(len(conversations))[batch]]
                texts += pipeline.generate_batch(
                    conversations[batch], images[batch], seeds, **options
                )
        return texts
