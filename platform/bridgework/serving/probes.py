"""Probes: questions with known answers that a gateway asks both models of a comparison."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Sample
from bridgework.errors import SpecError

TOKENS = 64  # of a generated answer
GREEDY = {"max_new_tokens": TOKENS, "temperature": 0.0}
CANDIDATES = 4  # captions from which the embed app chooses


@dataclass(frozen=True)
class Probe:
    """A call of a replica (`Model`), and the right answer."""

    method: str
    arguments: tuple[Any, ...]
    answer: str

    def score(self, given: Any) -> float:
        """Return the score in [0, 1] of a replica's answer to this probe."""
        if self.method == "rank":  # (candidate, score) pairs, best first
            return float(given[0][0] == self.answer)
        if self.method == "choose":
            return float(given.text == self.answer)
        return overlap(given.text, self.answer)


def read_probes(app: str, dataset: str, home: Path, rows: int) -> list[Probe]:
    """Return probes for `app` from the first rows of a dataset that it can be asked.

    chat: conversations (the last answer is the right one) and captions; caption: captions; embed:
    the caption among those of other rows. Raises SpecError if there is no such row, DataError for
    an unknown dataset.
    """
    samples = open_dataset(resolve(dataset, home)).samples()
    if app == "embed":
        found = _ranked([s for s in islice(samples, 4 * rows) if _caption(s)], rows)
    else:
        found = list(islice(_asked(samples, conversations=app == "chat"), rows))
    if not found:
        kind = "conversations that end with an answer, or captions" if app == "chat" else "captions"
        raise SpecError(
            f"probes: no row of {dataset} can be asked in the app {app!r}. Expected {kind} of one "
            "image. Fix: name another dataset"
        )
    return found


def overlap(given: str, expected: str) -> float:
    """Return the F1 score of the words of two texts; without words, 1 if they are equal."""
    words, right = (Counter(re.findall(r"\w+", text.lower())) for text in (given, expected))
    if not right:
        return float(given.strip() == expected.strip())
    shared = (words & right).total()
    return 2 * shared / (words.total() + right.total())


def _asked(samples: Iterator[Sample], conversations: bool) -> Iterator[Probe]:
    for sample in samples:
        last = sample.parts[-1]
        if caption := _caption(sample):
            yield Probe("caption", (sample.images[0], None, GREEDY), caption)
        elif conversations and last.role == "assistant" and last.text:
            question, images = list(sample.parts[:-1]), list(sample.images)
            if sample.candidates:
                yield Probe("choose", (question, images, list(sample.candidates)), last.text)
            else:
                yield Probe("generate", (question, images, GREEDY), last.text)


def _ranked(samples: Sequence[Sample], rows: int) -> list[Probe]:
    captions = [_caption(sample) for sample in samples]
    others = list(dict.fromkeys(captions))
    probes = []
    for sample, caption in zip(samples[:rows], captions, strict=False):
        at = others.index(caption)
        candidates = sorted(dict.fromkeys((others * 2)[at : at + CANDIDATES]))
        if len(candidates) > 1:
            probes.append(Probe("rank", (sample.images[0], candidates, None), caption))
    return probes


def _caption(sample: Sample) -> str:
    """Return the caption of a pair of one image and one text, else an empty string."""
    texts = [part.text for part in sample.parts if part.text is not None]
    pair = all(part.role == "caption" for part in sample.parts)
    return texts[0] if pair and len(texts) == len(sample.images) == 1 else ""
