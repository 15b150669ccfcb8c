"""Filters: drop rows by image size, words, language, image-text similarity or a score.

All limits are off by default. The first limit that a row violates, in the order of the fields, is
counted as the reason; the note contains the value. Rows that lack the measured field (an image, a
text) pass. There is no built-in list of words: give `words=gore,nude pictures`, or
`words_file=LIST` with one word or phrase per line.
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

RANGES = {  # per limit: its unit, its minimum and its maximum
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
    """Limits, in the order in which they are checked."""

    min_side: int | None = None  # pixels, shorter side of the smallest image
    max_aspect: float | None = None  # longer side / shorter side
    max_pixels: int | None = None  # of the largest image
    min_words: int | None = None
    max_words: int | None = None
    max_repetition: float | None = None  # share of the most frequent word
    words: tuple[str, ...] | None = None  # words and phrases that must not occur in the text
    words_file: str | None = None  # more of them, one per line
    languages: tuple[str, ...] | None = None  # ISO 639 codes, as in py3langid
    min_language: float = 0.5  # probability of the detected language
    min_similarity: float | None = None  # cosine of image and text, by `model`
    min_score: float | None = None  # of the worst image, by `probe`
    model: Model | None = None  # embeds images, and texts for min_similarity
    # safetensors: `weight` (D,) or (1, D) and `bias` over the model's image embeddings
    probe: str | None = None

    drawn: ClassVar[tuple[str, ...]] = ("words", "asked")

    def __post_init__(self) -> None:
        off = {"min_language", "model", "probe"}
        if all(value is None for name, value in vars(self).items() if name not in off):
            raise SpecError(
                "filters needs a limit, because it would keep all rows without one. "
                "Fix: set one, e.g. min_side=200 or languages=en"
            )
        if (self.model is not None) != bool({"similarity", "score"} & set(self.asked)):
            raise SpecError(
                "min_similarity and min_score need model=ARTIFACT, and no other limit reads it. "
                f"Got model={self.model}"
            )
        if (self.probe is None) != (self.min_score is None):
            raise SpecError(
                "min_score needs probe=FILE.safetensors, and no other limit reads it. "
                f"Got probe={self.probe}"
            )
        if None not in (self.min_words, self.max_words) and (self.min_words or 0) > (
            self.max_words or 0
        ):
            raise SpecError(
                f"min_words is larger than max_words. Got {self.min_words} and {self.max_words}"
            )
        self._check_ranges()
        self._check_lists()

    def _check_ranges(self) -> None:
        for name, (unit, least, most) in RANGES.items():
            limit = getattr(self, name)
            if limit is not None and not least <= limit <= most:
                allowed = f"at least {least}" if most == inf else f"from {least} to {most}"
                raise SpecError(f"{name} is {unit}, {allowed}; got {limit:g}")

    def _check_lists(self) -> None:
        for name in ("words", "languages"):
            if getattr(self, name) == ():
                raise SpecError(f"{name} is empty. Fix: give one or several, or leave it out")
        for code in self.languages or ():
            if code not in codes():
                raise SpecError(
                    f"languages are ISO 639 codes, e.g. en, and py3langid does not know {code!r}"
                    + suggest(code, codes())
                )

    @property
    def asked(self) -> tuple[str, ...]:
        """Names of the expensive metrics that the limits need."""
        limits = {
            "language": self.languages,
            "similarity": self.min_similarity,
            "score": self.min_score,
        }
        return tuple(name for name, limit in limits.items() if limit is not None)

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digests of the model, the probe and the list of words."""
        files = {"probe": self.probe, "words_file": self.words_file}
        digests = {
            name: hashlib.sha256(content(path)).hexdigest()
            for name, path in files.items()
            if path is not None
        }
        if self.model is None:
            return digests
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest, **digests}

    def judge(self, home: Path) -> RowMetrics:
        """Build the annotator, which measures every row."""
        words = [*(self.words or ()), *(lines(self.words_file) if self.words_file else ())]
        scorer = None
        if self.model is not None:
            texts = "similarity" in self.asked
            scorer = EmbeddingScorer.of(self.model, self.probe, texts=texts)
        return RowMetrics(words, languages="language" in self.asked, scorer=scorer)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep rows within all limits, with the expensive metrics in their provenance. One pass."""
        for sample, annotation in rows():
            values = RowMetricValues(**annotation)
            violation = next(
                ((name, note) for name, note in self._violations(values) if note), None
            )
            if violation is not None:
                yield Decision(violation[0], note=violation[1])
                continue
            measured = {name: getattr(values, name) for name in self.asked}
            texts = {name: str(value) for name, value in measured.items() if value is not None}
            stamp = {f"filters.{name}": text for name, text in texts.items()}
            note = ", ".join(f"{name} {text}" for name, text in texts.items())
            kept = replace(sample, provenance={**sample.provenance, **stamp})
            yield Decision("kept", (kept,), note)

    def _violations(self, values: RowMetricValues) -> Iterator[tuple[str, str | None]]:
        """Yield every limit, with a note if the row violates it, otherwise None."""
        yield "min_side", _below(values.side, self.min_side)
        yield "max_aspect", _above(values.aspect, self.max_aspect)
        yield "max_pixels", _above(values.pixels, self.max_pixels)
        yield "min_words", _below(values.words, self.min_words)
        yield "max_words", _above(values.words, self.max_words)
        yield "max_repetition", _above(values.repetition, self.max_repetition)
        yield "words", None if values.word is None else repr(values.word)
        yield "languages", self._other_language(values)
        yield "min_similarity", _below(values.similarity, self.min_similarity)
        yield "min_score", _below(values.score, self.min_score)

    def _other_language(self, values: RowMetricValues) -> str | None:
        if self.languages is None or values.language is None:
            return None
        certain = (values.probability or 0.0) >= self.min_language
        if certain and values.language in self.languages:
            return None
        return f"{values.language} {values.probability:g}"


def _below(value: float | None, limit: float | None) -> str | None:
    if value is None or limit is None or value >= limit:
        return None
    return f"{value:,}; expected at least {limit:,}"


def _above(value: float | None, limit: float | None) -> str | None:
    if value is None or limit is None or value <= limit:
        return None
    return f"{value:,}; expected at most {limit:,}"
