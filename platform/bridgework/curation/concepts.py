"""Concept balance (LLaVA, arXiv:2304.08485, appendix): of every noun phrase enough rows, of none too many.

Phrases that fewer than three rows name contribute nothing. From the rarest phrase up, the rows that name it are added,
a random hundred where there are more. A row stays if any of its phrases adds it, so a common phrase may stand in more
than a hundred rows: rarer ones brought the others.
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
from bridgework.curation.runner import Annotator, Decision, Fact, Rows
from bridgework.data.samples import Sample
from bridgework.errors import SpecError

DRAW_BYTES = 7  # of a hash: as exact as a float, and small in memory


@config_class
class Concepts:
    """How rare a noun phrase may be, and how many rows it brings."""

    rarest: int = 3  # rows; phrases that fewer name are mostly combinations that other rows cover
    most: int = 100  # rows that one phrase adds
    seed: int = 0

    drawn: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.rarest < 1 or self.most < 1:
            raise SpecError(
                f"concepts: rarest and most count rows and are at least 1; got {self.rarest} and {self.most}"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        return {
            "tagger": f"textblob {version('textblob')}"
        }  # its lexicon and its rules lie in the package

    def judge(self, home: Path) -> Annotator:
        return _phrases

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Two passes: what each phrase would add, then the rows that were added."""
        tally = Tally(self.most, self.seed)
        for sample, fact in rows():
            tally.add(sample.key, fact["phrases"])
        for sample, fact in rows():
            yield self._verdict(sample, fact["phrases"], tally)

    def _verdict(self, sample: Sample, found: Sequence[str], tally: "Tally") -> Decision:
        common = [phrase for phrase in found if tally.rows[phrase] >= self.rarest]
        if not common:
            return Decision(
                "only rare phrases" if found else "no noun phrase", note=", ".join(found)
            )
        adding = [phrase for phrase in common if tally.adds(phrase, sample.key)]
        rarest = min(adding or common, key=lambda phrase: (tally.rows[phrase], phrase))
        note = f"{rarest} ({tally.rows[rarest]} rows)"
        if not adding:
            return Decision("enough rows of its phrases", note=note)
        told = {"concepts.phrase": rarest, "concepts.rows": str(tally.rows[rarest])}
        return Decision("kept", (replace(sample, provenance={**sample.provenance, **told}),), note)


class Tally:
    """How many rows name each phrase, and which of them, `most` at the most, the phrase adds.

    Those are the rows of the smallest hashes of (seed, phrase, key): a random subset that is the same in any order of
    the rows, and that one pass finds.
    """

    def __init__(self, most: int, seed: int) -> None:
        self.rows: Counter[str] = Counter()
        self._most, self._seed = most, seed
        self._smallest: defaultdict[str, list[int]] = defaultdict(
            list
        )  # negative: the largest is popped first

    def add(self, key: str, phrases: Iterable[str]) -> None:
        """One row and its phrases, each named once."""
        for phrase in phrases:
            self.rows[phrase] += 1
            smallest, draw = self._smallest[phrase], -self._draw(phrase, key)
            if len(smallest) < self._most:
                heapq.heappush(smallest, draw)
            else:
                heapq.heappushpop(smallest, draw)

    def adds(self, phrase: str, key: str) -> bool:
        """Whether the phrase adds a row that was counted."""
        return self._draw(phrase, key) <= -self._smallest[phrase][0]

    def _draw(self, phrase: str, key: str) -> int:
        return int.from_bytes(
            hashlib.sha256(f"{self._seed}/{phrase}/{key}".encode()).digest()[:DRAW_BYTES]
        )


def phrases(text: str) -> list[str]:
    """The noun phrases of an English text, in lower case, in order, each once: adjectives and nouns, a noun last.

    "A young boy near the New York skyline" has `young boy` and `new york skyline`; articles and numbers are no part.
    """
    found: dict[str, None] = {}
    words: list[
        tuple[str, bool]
    ] = []  # of the phrase that is being read: a word, and whether it is a noun
    tagged = [
        pair for line in text.splitlines() for pair in [*_tagger()(line), ("", "")]
    ]  # no phrase goes over its line
    for word, part_of_speech in tagged:
        if (
            part_of_speech[:2] in ("NN", "JJ") and sum(map(str.isalnum, word)) > 1
        ):  # not the `t` of `isn't`
            words.append((word.lower(), part_of_speech[:2] == "NN"))
            continue
        while words and not words[-1][1]:
            words.pop()
        if words:
            found[" ".join(word for word, _ in words)] = None
        words = []
    return list(found)


@cache
def _tagger() -> Callable[[str], list[tuple[str, str]]]:
    """(word, part of speech) of every word of a text; its lexicon lies in the package, and nothing is fetched."""
    from textblob.en import tag  # brings NLTK, seconds

    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ResourceWarning
        )  # it leaves the closing of its files to the collector
        tag("Ada Lovelace saw an unheardof dog")  # reads them all
    return cast(Callable[[str], list[tuple[str, str]]], tag)


def _phrases(samples: Sequence[Sample]) -> list[Fact]:
    return [{"phrases": phrases(sample.text)} for sample in samples]
