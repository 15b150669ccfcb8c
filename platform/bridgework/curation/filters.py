"""Drops rows by limits on pictures, words, language, similarity of image and text, and a score; each is off at None.

The first limit that a row breaks, in the order of the fields, is the reason that is counted; the note tells the
figure. A limit on something that a row does not have (an image, a text) lets it pass. The list of words is the
user's: `words=gore,nude pictures` or `words_file=LIST`, one word or phrase a line; none ships.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import ClassVar

from bridgework.config import config_class
from bridgework.curation.row_metrics import (
    EmbeddingScorer,
    RowMetrics,
    RowMetricValues,
    content,
    lines,
)
from bridgework.curation.runner import Decision, Model, Rows
from bridgework.curation.text import codes
from bridgework.errors import SpecError, suggest

RANGES = {  # of a limit: what it is of, the least and the most that makes sense
    "min_side": ("a number of pixels", 1, inf),
    "max_aspect": ("the longer side by the shorter", 1, inf),
    "max_pixels": ("a number of pixels", 1, inf),
    "min_words": ("a number of words", 0, inf),
    "max_words": ("a number of words", 0, inf),
    "max_repetition": ("a share of the words", 0, 1),
    "min_language": ("a probability", 0, 1),
    "min_similarity": ("a cosine", -1, 1),
}


@config_class
class Filters:
    """The limits, in the order in which they are tried."""

    min_side: int | None = None  # pixels, the shorter side of the smallest image
    max_aspect: float | None = None  # longer side / shorter side
    max_pixels: int | None = None  # of the largest image
    min_words: int | None = None
    max_words: int | None = None
    max_repetition: float | None = None  # share of the words that the most repeated one has
    words: tuple[str, ...] | None = (
        None  # words and phrases that must not stand in the text, as whole words
    )
    words_file: str | None = None  # more of them, one a line
    languages: tuple[str, ...] | None = None  # ISO 639 codes, as py3langid finds them
    min_language: float = 0.5  # probability of the language that was found
    min_similarity: float | None = None  # cosine of image and text, by `model`
    min_score: float | None = None  # of the worst image, by `probe`
    model: Model | None = None  # embeds images, and texts for min_similarity
    probe: str | None = (
        None  # safetensors: `weight` (D,) or (1, D) and `bias` over the model's image embeddings
    )

    drawn: ClassVar[tuple[str, ...]] = ("words", "asked")

    def __post_init__(self) -> None:
        off = {"min_language", "model", "probe"}
        if all(value is None for name, value in vars(self).items() if name not in off):
            raise SpecError(
                "filters needs a limit, e.g. min_side=200 or languages=en; without one all rows stay"
            )
        if (self.model is not None) != bool({"similarity", "score"} & set(self.asked)):
            raise SpecError(
                "min_similarity and min_score need model=ARTIFACT, and nothing else does"
            )
        if (self.probe is None) != (self.min_score is None):
            raise SpecError("min_score needs probe=FILE.safetensors, and nothing else does")
        if None not in (self.min_words, self.max_words) and (self.min_words or 0) > (
            self.max_words or 0
        ):
            raise SpecError(
                f"no text has {self.min_words} words or more and {self.max_words} or less"
            )
        self._check_ranges()
        self._check_lists()

    def _check_ranges(self) -> None:
        for name, (what, least, most) in RANGES.items():
            limit = getattr(self, name)
            if limit is not None and not least <= limit <= most:
                allowed = f"at least {least}" if most == inf else f"from {least} to {most}"
                raise SpecError(f"{name} is {what}, {allowed}; got {limit:g}")

    def _check_lists(self) -> None:
        for name in ("words", "languages"):
            if getattr(self, name) == ():
                raise SpecError(f"{name} names none; give one or several, or leave it out")
        for code in self.languages or ():
            if code not in codes():
                raise SpecError(
                    f"languages are ISO 639 codes such as en, and py3langid finds no {code!r}"
                    + suggest(code, codes())
                )

    @property
    def asked(self) -> tuple[str, ...]:
        """What is measured beside that which costs nothing."""
        limits = {
            "language": self.languages,
            "similarity": self.min_similarity,
            "score": self.min_score,
        }
        return tuple(name for name, limit in limits.items() if limit is not None)

    def models(self, home: Path) -> Mapping[str, str]:
        """The weights of the model and of the probe, and the list of words."""
        files = {"probe": self.probe, "words_file": self.words_file}
        told = {
            name: hashlib.sha256(content(path)).hexdigest()
            for name, path in files.items()
            if path is not None
        }
        if self.model is None:
            return told
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest, **told}

    def judge(self, home: Path) -> RowMetrics:
        listed = [*(self.words or ()), *(lines(self.words_file) if self.words_file else ())]
        eye = (
            None
            if self.model is None
            else EmbeddingScorer.of(self.model, self.probe, texts="similarity" in self.asked)
        )
        return RowMetrics(listed, languages="language" in self.asked, eye=eye)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """One pass. What was measured at a price goes on with the row."""
        for sample, fact in rows():
            told = RowMetricValues(**fact)
            broken = next(((limit, note) for limit, note in self._broken(told) if note), None)
            if broken is not None:
                yield Decision(broken[0], note=broken[1])
                continue
            figures = {
                name: str(getattr(told, name))
                for name in self.asked
                if getattr(told, name) is not None
            }
            stamp = {f"filters.{name}": figure for name, figure in figures.items()}
            note = ", ".join(f"{name} {figure}" for name, figure in figures.items())
            yield Decision(
                "kept", (replace(sample, provenance={**sample.provenance, **stamp}),), note
            )

    def _broken(self, told: RowMetricValues) -> Iterator[tuple[str, str | None]]:
        """Every limit, with the figure that breaks it, if it does."""
        yield "min_side", _under(told.side, self.min_side)
        yield "max_aspect", _over(told.aspect, self.max_aspect)
        yield "max_pixels", _over(told.pixels, self.max_pixels)
        yield "min_words", _under(told.words, self.min_words)
        yield "max_words", _over(told.words, self.max_words)
        yield "max_repetition", _over(told.repetition, self.max_repetition)
        yield "words", None if told.word is None else repr(told.word)
        yield "languages", self._foreign(told)
        yield "min_similarity", _under(told.similarity, self.min_similarity)
        yield "min_score", _under(told.score, self.min_score)

    def _foreign(self, told: RowMetricValues) -> str | None:
        if self.languages is None or told.language is None:
            return None
        sure = (told.probability or 0.0) >= self.min_language
        return (
            None
            if sure and told.language in self.languages
            else f"{told.language} {told.probability:g}"
        )


def _under(figure: float | None, limit: float | None) -> str | None:
    return (
        None
        if figure is None or limit is None or figure >= limit
        else f"{figure:,}, and at least {limit:,} is asked"
    )


def _over(figure: float | None, limit: float | None) -> str | None:
    return (
        None
        if figure is None or limit is None or figure <= limit
        else f"{figure:,}, and at most {limit:,} is asked"
    )
