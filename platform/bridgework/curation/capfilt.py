"""CapFilt (BLIP, arXiv:2201.12086, 3.3): captioning and filtering of web images.

A captioner generates one or several captions per image by nucleus sampling, which are more diverse
than those of beam search and give better training data (4.3). The web text and the captions are
kept if the matching head of the filter scores them above a threshold. Each kept text becomes its
own pair, as in the authors' release; therefore a mixture by size counts pairs, as for human
captions.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from bridgework.config import config_class
from bridgework.curation.runner import Annotation, Decision, Model, Rows, bad, make
from bridgework.data.images import decode
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError

if TYPE_CHECKING:  # recipes import this module without the models
    from torch import Tensor

    from bridgework.inference.pipeline import Pipeline

KEEPS_ALL = -1e4  # below every logit
DIGITS = 4  # of a score

Origin = Literal["web", "written"]


@config_class
class CapFilt:
    """Models, sources and sampling options; implements `system.CurationSpec` as well."""

    captioner: Model  # with the prompt of its training; in a recipe, an earlier stage
    filter: Model  # a model with a matching head; in a recipe, an earlier stage
    sources: tuple[str, ...]  # datasets of images with web texts, not with human captions
    makes: str = "capfilt"
    captions: int = 1  # generated per image, each with its own seed
    top_p: float = 0.9  # 4.3
    temperature: float = 1.0
    min_tokens: int = 5  # the authors' release, models/blip.py: 5 to 20 tokens
    max_tokens: int = 20
    threshold: float = 0.0  # of the filter's logit; at 0, match and mismatch are equally likely
    seed: int = 0

    drawn: ClassVar[tuple[str, ...]] = (
        "captions",
        "top_p",
        "temperature",
        "min_tokens",
        "max_tokens",
        "seed",
    )

    def __post_init__(self) -> None:
        if not self.sources:
            raise SpecError("capfilt needs at least one source to caption and to filter")
        if self.captions < 1:
            raise SpecError(f"capfilt: got captions {self.captions}; expected at least 1")
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            raise SpecError(
                "capfilt: top_p is in (0, 1] and temperature is at least 0. "
                f"Got {self.top_p:g} and {self.temperature:g}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise SpecError(
                f"capfilt: got min_tokens {self.min_tokens} and max_tokens {self.max_tokens}; "
                "expected 0 <= min_tokens <= max_tokens, and max_tokens at least 1"
            )

    # --- between stages ------------------------------------------------------------------------

    @property
    def uses(self) -> tuple[str, ...]:
        """Stages whose models are used."""
        return (self.captioner, self.filter)

    def tiny(self) -> "CapFilt":
        """Return a copy on synthetic data that keeps every text.

        A filter after a few steps is random, and could drop everything.
        """
        return replace(
            self, sources=("synthetic:shapes",), min_tokens=2, max_tokens=8, threshold=KEEPS_ALL
        )

    def run(
        self,
        artifacts: Mapping[str, Path],
        dest: str,
        *,
        home: Path,
        workers: int = 0,
        say: Callable[[str], object] = print,
    ) -> Manifest:
        """Write the dataset, see `runner.make`.

        `artifacts` are the folders of the stages in `uses`.
        """
        captioner, filter_ = (str(artifacts[name]) for name in self.uses)
        return make(
            replace(self, captioner=captioner, filter=filter_),
            self.sources,
            dest,
            home=home,
            workers=workers,
            say=say,
        )

    # --- as a curation -------------------------------------------------------------------------

    def models(self, home: Path) -> dict[str, str]:
        """Return the digests of both models. Raises WeightsError if one is not an artifact."""
        from bridgework import artifacts

        return {
            name: artifacts.describe(getattr(self, name)).digest for name in ("captioner", "filter")
        }

    def judge(self, home: Path) -> "CapFiltAnnotator":
        """Build the annotator: generated captions, and the filter's logits of all texts."""
        from bridgework.inference.pipeline import Pipeline

        return CapFiltAnnotator(self, Pipeline.load(self.captioner), Pipeline.load(self.filter))

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep a pair for every text above the threshold; equal texts are kept once (3.3)."""
        for sample, annotation in rows():
            scores = Scores(**annotation)
            kept, why = scores.select(sample.text, self.threshold)
            written = "; ".join(
                f"written {_format(score)}: {text}"
                for text, score in zip(scores.written, scores.written_scores, strict=True)
            )
            yield Decision(
                why,
                tuple(_pair(sample, each, scores) for each in kept),
                f"web {_format(scores.web_score)}, {written}",
            )


class KeptText(NamedTuple):
    """Text that is kept, with its origin."""

    origin: Origin
    number: int  # among the generated texts
    text: str


class Scores(NamedTuple):
    """Annotation: generated captions, and the filter's logits that each text matches the image."""

    written: Sequence[str]
    web_score: float | None  # None: the text has no token for the filter
    written_scores: Sequence[float | None]

    def select(self, web: str, threshold: float) -> tuple[list[KeptText], str]:
        """Return the kept texts, and the reason of the decision."""
        kept: list[KeptText] = []
        if self.web_score is not None and self.web_score > threshold:
            kept.append(KeptText("web", 0, web))
        repeated = False
        for number, (text, score) in enumerate(zip(self.written, self.written_scores, strict=True)):
            if score is None or score <= threshold:
                continue
            if any(text.strip() == other.text.strip() for other in kept):
                repeated = True
            else:
                kept.append(KeptText("written", number, text))
        origins = {text.origin for text in kept}
        why = REASONS["web" in origins, "written" in origins]
        if None in self.written_scores:
            why += ", nothing to read in the written one"
        elif repeated:
            why += ", which was written again"
        return kept, why


REASONS = {  # (web text kept, a generated text kept)
    (True, True): "both texts",
    (True, False): "web text",
    (False, True): "written text",
    (False, False): "no text fits",
}


class CapFiltAnnotator:
    """Generates captions for every image, and scores them and the web text with the filter."""

    def __init__(self, spec: CapFilt, captioner: "Pipeline", filter_: "Pipeline") -> None:
        self._spec = spec
        self._captioner, self._filter = captioner, filter_

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        """Annotate every sample; a row that is not one image and one caption is bad."""
        texts = [_web_text(sample) for sample in samples]
        usable = [
            (sample, text)
            for sample, text in zip(samples, texts, strict=True)
            if isinstance(text, str)
        ]
        new = iter(self._annotate([s for s, _ in usable], [t for _, t in usable]) if usable else ())
        return [bad(t) if isinstance(t, BadSample) else next(new)._asdict() for t in texts]

    def _annotate(self, samples: Sequence[Sample], web: Sequence[str]) -> list[Scores]:
        written = [self._generate(samples, number) for number in range(self._spec.captions)]
        features_NPF = self._filter.inputs.features([sample.images[0] for sample in samples])
        web_scores, *scores = [self._score(features_NPF, texts) for texts in (web, *written)]
        return [
            Scores([texts[i] for texts in written], web_scores[i], [of[i] for of in scores])
            for i in range(len(samples))
        ]

    def _generate(self, samples: Sequence[Sample], number: int) -> list[str]:
        """Return the caption with this number of each sample."""
        spec = self._spec
        return self._captioner.generate_batch(
            [self._captioner.inputs.ask(sample) for sample in samples],
            [[sample.images[0]] for sample in samples],
            [_seed(spec.seed, sample.key, number) for sample in samples],
            max_new_tokens=spec.max_tokens,
            min_new_tokens=spec.min_tokens,
            temperature=spec.temperature,
            top_p=spec.top_p,
        )

    def _score(self, features_NPF: "Tensor", texts: Sequence[str]) -> list[float | None]:
        """Return the filter's logits; None for a text without tokens."""
        scores: list[float | None] = [None] * len(texts)
        if read := [i for i, text in enumerate(texts) if readable(self._filter, text)]:
            logits = self._filter.match(features_NPF[read], [texts[i] for i in read])
            for i, logit in zip(read, logits.tolist(), strict=True):
                scores[i] = round(logit, DIGITS)
        return scores


def readable(pipeline: "Pipeline", text: str) -> bool:
    """Return True if a text has at least one token for the model."""
    try:
        pipeline.inputs.encode(pipeline.inputs.ask(pair("text", b"", text)), answer=True)
    except BadSample:
        return False
    return True


def _web_text(sample: Sample) -> str | BadSample:
    """Return the web text of a pair, or the reason to quarantine the row."""
    texts = [part for part in sample.parts if part.text is not None]
    if len(sample.images) != 1 or [part.role for part in texts] != ["caption"]:
        return BadSample(Reason.BAD_ROW, "CapFilt reads pairs: one image and one caption a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return texts[0].text or ""


def _seed(seed: int, key: str, number: int) -> int:
    text = f"{seed}/{key}/{number}" if number else f"{seed}/{key}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7])


def _format(score: float | None) -> str:
    return "" if score is None else f"{score:g}"


def _pair(sample: Sample, kept: KeptText, scores: Scores) -> Sample:
    stamp = {
        "capfilt.kept": kept.origin,
        "capfilt.web_score": _format(scores.web_score),
        "capfilt.written_score": _format(scores.written_scores[kept.number]),
    }
    return Sample(
        key=f"{sample.key}/{kept.origin}{f'-{kept.number + 1}' if kept.number else ''}",
        images=sample.images,
        parts=(Part("caption", image=0), Part("caption", text=kept.text)),
        language=sample.language if kept.origin == "web" else None,
        license=sample.license,
        provenance={**sample.provenance, **stamp},
    )
