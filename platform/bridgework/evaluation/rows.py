"""The rows that an evaluation is run on: drawn by a seed, and only those that the model can read."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from bridgework.data.catalog import resolve
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Part, Sample
from bridgework.data.shards import open_dataset
from bridgework.data.transforms import read_square
from bridgework.errors import DataError

if TYPE_CHECKING:
    from bridgework.inference import Pipeline

TRIES = 10  # rows looked at for every one that is wanted


class Wanted(Protocol):
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
class Item:
    """One row, ready to be judged."""

    sample: Sample
    conversation: list[Part]
    squares: list[NDArray[np.uint8]]  # (3, S, S) each, S pixels a side

    @property
    def texts(self) -> list[str]:
        return [part.text for part in self.sample.parts if part.text is not None]


def draw(
    spec: Wanted,
    pipeline: "Pipeline",
    home: Path,
    wanted: Callable[[Sample], bool] = lambda sample: True,
    needed: str = "can be read by this model",
) -> list[Item]:
    """Up to `spec.rows` rows that are `wanted`, in an order given by its seed.

    Raises DataError, which says what is `needed`, when none of them can be read.
    """
    items = list(islice(_items(spec, pipeline, home, wanted), spec.rows))
    if not items:
        raise DataError(f"{spec.name}: none of the rows of {spec.dataset} {needed}; see its quarantine")
    return items


def draw_pairs(spec: Wanted, pipeline: "Pipeline", home: Path, *, at_least: int, several: bool = False) -> list[Item]:
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
    spec: Wanted, pipeline: "Pipeline", home: Path, wanted: Callable[[Sample], bool] = lambda sample: True
) -> list[Item]:
    """Up to `spec.rows` rows of one image each that are `wanted`, whatever is said of it: without a conversation.

    Raises DataError when there is none.
    """
    pixels, found = pipeline.stage.model.pixels, list[Item]()
    for sample in _shuffled(resolve(spec.dataset, home), spec):
        if len(found) == spec.rows:
            break
        if len(sample.images) == 1 and wanted(sample):
            try:
                found.append(Item(sample, [], [read_square(sample.images[0], pixels)]))
            except BadSample:
                continue
    if not found:
        raise DataError(f"{spec.name}: no row of {spec.dataset} has one image, and what this evaluation needs of it")
    return found


def _items(spec: Wanted, pipeline: "Pipeline", home: Path, wanted: Callable[[Sample], bool]) -> Iterator[Item]:
    for sample in filter(wanted, _shuffled(resolve(spec.dataset, home), spec)):
        try:
            conversation = pipeline.inputs.ask(sample, spec.prompts or None)
            pipeline.inputs.encode(conversation, answer=True, layouts=pipeline.inputs.layouts(sample))
            squares = [read_square(image, pipeline.stage.model.pixels) for image in sample.images]
        except BadSample:  # one bad row must not end a run in its evaluation
            continue
        yield Item(sample, conversation, squares)


def _shuffled(path: str, spec: Wanted) -> Iterator[Sample]:
    dataset = open_dataset(path)
    tries = min(len(dataset), TRIES * spec.rows)
    for row in random.Random(spec.seed).sample(range(len(dataset)), tries):
        shard, group, place = dataset.locate(row)
        yield dataset.read_group(shard, group)[place]
