"""Concept balance (LLaVA, arXiv:2304.08485, appendix): limit the number of rows per noun phrase.

Phrases in fewer than three rows add no rows. From the rarest phrase up, the rows with the phrase
are added, at most a random hundred of them. A row is kept if any of its phrases adds it. Therefore
a common phrase can occur in more than a hundred kept rows, because rarer phrases added the others.
"""

import hashlib
import heapq
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, cast

from bridgework.config import config_class
from bridgework.curation.runner import Annotation, Annotator, Decision, Rows
from bridgework.data.samples import Sample
from bridgework.errors import SpecError

DRAW_BYTES = 7  # of a hash: as exact as a float, and small in memory
PhraseTagger = Callable[[str], list[tuple[str, str]]]  # (word, part of speech) of every word


@config_class
class Concepts:
    """Minimum frequency of a noun phrase, and maximum number of rows that it adds."""

    rarest: int = 3  # rows; rarer phrases are mostly combinations that other rows cover
    most: int = 100  # rows added per phrase
    seed: int = 0

    drawn: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.rarest < 1 or self.most < 1:
            raise SpecError(
                "concepts: rarest and most are numbers of rows, at least 1. "
                f"Got {self.rarest} and {self.most}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the version of the tagger, whose package contains its lexicon and rules."""
        return {"tagger": f"textblob {version('textblob')}"}

    def judge(self, home: Path) -> Annotator:
        """Build the annotator, which finds the noun phrases of a row."""
        return _annotate

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep the rows that their phrases add. Two passes: count phrases, then decide."""
        counts = PhraseCounts(self.most, self.seed)
        for sample, annotation in rows():
            counts.add(sample.key, annotation["phrases"])
        for sample, annotation in rows():
            yield self._decision(sample, annotation["phrases"], counts)

    def _decision(self, sample: Sample, phrases: Sequence[str], counts: "PhraseCounts") -> Decision:
        common = [phrase for phrase in phrases if counts.rows[phrase] >= self.rarest]
        if not common:
            why = "only rare phrases" if phrases else "no noun phrase"
            return Decision(why, note=", ".join(phrases))
        adding = [phrase for phrase in common if counts.adds(phrase, sample.key)]
        rarest = min(adding or common, key=lambda phrase: (counts.rows[phrase], phrase))
        note = f"{rarest} ({counts.rows[rarest]} rows)"
        if not adding:
            return Decision("enough rows of its phrases", note=note)
        stamp = {"concepts.phrase": rarest, "concepts.rows": str(counts.rows[rarest])}
        kept = replace(sample, provenance={**sample.provenance, **stamp})
        return Decision("kept", (kept,), note)


class PhraseCounts:
    """Number of rows per phrase, and the at most `most` rows that each phrase adds.

    A phrase adds the rows with the smallest hashes of (seed, phrase, key): a random subset that
    does not depend on the order of the rows and needs one pass.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.rows: Counter[str] = Counter()
        self._most, self._seed = most, seed
        # negative, so that the heap pops the largest hash first
        self._smallest: defaultdict[str, list[int]] = defaultdict(list)

    def add(self, key: str, phrases: Iterable[str]) -> None:
        """Count one row and its phrases, without repetitions."""
        for phrase in phrases:
            self.rows[phrase] += 1
            smallest, draw = self._smallest[phrase], -self._draw(phrase, key)
            if len(smallest) < self._most:
                heapq.heappush(smallest, draw)
            else:
                heapq.heappushpop(smallest, draw)

    def adds(self, phrase: str, key: str) -> bool:
        """Return True if the phrase adds the row, which must have been counted."""
        return self._draw(phrase, key) <= -self._smallest[phrase][0]

    def _draw(self, phrase: str, key: str) -> int:
        digest = hashlib.sha256(f"{self._seed}/{phrase}/{key}".encode()).digest()
        return int.from_bytes(digest[:DRAW_BYTES])


def phrases(text: str) -> list[str]:
    """Return the noun phrases of an English text, in lower case and in order, without repetitions.

    A phrase is a sequence of adjectives and nouns that ends in a noun, without articles and
    numbers. For example, "A young boy near the New York skyline" has `young boy` and `new york
    skyline`.
    """
    found: dict[str, None] = {}
    phrase: list[tuple[str, bool]] = []  # words of the current phrase, True for a noun
    # the empty word after every line ends a phrase
    tagged = [pair for line in text.splitlines() for pair in [*_tagger()(line), ("", "")]]
    for word, part_of_speech in tagged:
        # more than one letter, which excludes the `t` of `isn't`
        if part_of_speech[:2] in ("NN", "JJ") and sum(map(str.isalnum, word)) > 1:
            phrase.append((word.lower(), part_of_speech[:2] == "NN"))
            continue
        while phrase and not phrase[-1][1]:
            phrase.pop()
        if phrase:
            found[" ".join(word for word, _ in phrase)] = None
        phrase = []
    return list(found)


@cache
def _tagger() -> PhraseTagger:
    """Return the tagger of textblob. Its package contains the lexicon; nothing is downloaded."""
    from textblob.en import tag  # imports NLTK, which takes seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it does not close its files
        tag("Ada Lovelace saw an unheardof dog")  # reads all of them
    return cast(PhraseTagger, tag)


def _annotate(samples: Sequence[Sample]) -> list[Annotation]:
    return [{"phrases": phrases(sample.text)} for sample in samples]
