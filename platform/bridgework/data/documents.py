"""A sample as a source wants it read: asked with its prompts; a document with so many images, before or behind texts.

The latter from Alayrac et al. 2022 (arXiv:2204.14198), 2.4 and A.3.2.
"""

import random
from collections.abc import Sequence

from bridgework.data.samples import Part, Sample
from bridgework.data.templates import conversation
from bridgework.system import Source


def read_as(source: Source, sample: Sample, choice: int, *, video: bool = False) -> list[Part]:
    """The parts of a sample as the stage reads it, of which `choice`, any non-negative draw, decides what is drawn.

    With `video` the frames of a video are one picture, which stands where the first of them stood.
    """
    parts = conversation(sample, source.prompts, choice, prefix=source.prefix)
    if video and sample.times_s:
        parts = whole_videos(parts)
    return arranged(parts, choice, images=source.images, following=source.following)


def whole_videos(parts: Sequence[Part]) -> list[Part]:
    """The parts of a video with one place for all its frames: where the first of them stood."""
    return [part for part in parts if not part.image]


def arranged(parts: Sequence[Part], choice: int, *, images: int | None, following: float) -> list[Part]:
    """The document with at most `images` images; with a chance of `following`, texts belong to the image behind them.

    `choice`, any non-negative draw, decides. What is not a document (a conversation) stays as it is.
    """
    if any(part.role != "caption" for part in parts):
        return list(parts)
    kept = up_to(parts, images) if images is not None else list(parts)
    return turned(kept) if random.Random(choice).random() < following else kept


def up_to(parts: Sequence[Part], images: int) -> list[Part]:
    """The document up to its image number `images` + 1."""
    places = [at for at, part in enumerate(parts) if part.image is not None]
    return list(parts[: places[images]] if len(places) > images else parts)


def turned(parts: Sequence[Part]) -> list[Part]:
    """Every image goes before the texts that lead to it: each of them then sees the image that came behind it."""
    made: list[Part] = []
    texts: list[Part] = []
    for part in parts:
        if part.image is None:
            texts.append(part)
        else:
            made += [part, *texts]
            texts = []
    return [*made, *texts]
