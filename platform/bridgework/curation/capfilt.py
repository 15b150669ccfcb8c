"""CapFilt (BLIP, arXiv:2201.12086, 3.3): a captioner writes a text for every web image, a filter drops what is wrong.

Every image gets a caption, or several, by nucleus sampling (4.3: more diverse than a beam's, and better to learn
from); its web text and the written ones stay if the filter's matching head finds that they fit the image. Each text
that stays is a pair of its own, as in the authors' release: a mixture by size then counts pairs, as it does for human
captions.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from bridgework.config import config_class
from bridgework.curation.runner import Decision, Fact, Model, Rows, bad, make
from bridgework.data.images import decode
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError

if TYPE_CHECKING:  # a recipe does without the models
    from torch import Tensor

    from bridgework.inference.pipeline import Pipeline

KEEPS_ALL = -1e4  # below every logit
DIGITS = 4  # of a score

Origin = Literal["web", "written"]


@config_class
class CapFilt:
    """Which models write and judge, what they read, and how texts are drawn; a system.CurationSpec as well."""

    captioner: Model  # it is asked as it was trained; in a recipe, an earlier stage
    filter: Model  # likewise, with a matching head
    sources: tuple[
        str, ...
    ]  # datasets of images and what the web says of them, not of human captions
    makes: str = "capfilt"
    captions: int = 1  # written for every image, each with a seed of its own
    top_p: float = 0.9  # 4.3
    temperature: float = 1.0
    min_tokens: int = 5  # the authors' release, models/blip.py: 5 to 20 tokens
    max_tokens: int = 20
    threshold: float = (
        0.0  # of the filter's logit: 0 is where match and mismatch are equally likely
    )
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
            raise SpecError(
                f"capfilt writes at least one caption an image; got captions {self.captions}"
            )
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            raise SpecError(
                f"capfilt: top_p lies in (0, 1] and temperature is at least 0; got {self.top_p:g} and "
                f"{self.temperature:g}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise SpecError(
                f"capfilt: a caption has min_tokens {self.min_tokens} to max_tokens {self.max_tokens}; "
                "give 0 <= min_tokens <= max_tokens"
            )

    # --- between stages ----------------------------------------------------------------------------------------------

    @property
    def uses(self) -> tuple[str, ...]:
        return (self.captioner, self.filter)

    def tiny(self) -> "CapFilt":
        """Everything is kept: a filter of a few steps judges by chance, and may leave nothing to learn from."""
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
        """See flow.make. `artifacts` are the folders of those of the stages that it `uses`."""
        captioner, filter_ = (str(artifacts[name]) for name in self.uses)
        return make(
            replace(self, captioner=captioner, filter=filter_),
            self.sources,
            dest,
            home=home,
            workers=workers,
            say=say,
        )

    # --- as a curation -----------------------------------------------------------------------------------------------

    def models(self, home: Path) -> dict[str, str]:
        """Digests of the weights of the two. Raises WeightsError for what is no artifact."""
        from bridgework import artifacts

        return {
            name: artifacts.describe(getattr(self, name)).digest for name in ("captioner", "filter")
        }

    def judge(self, home: Path) -> "CapFiltJudge":
        from bridgework.inference.pipeline import Pipeline

        return CapFiltJudge(self, Pipeline.load(self.captioner), Pipeline.load(self.filter))

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """A pair for every text that the filter finds matched: the web's, the written ones, and one text once (3.3)."""
        for sample, fact in rows():
            scores = Scores(**fact)
            kept, why = scores.kept(sample.text, self.threshold)
            written = "; ".join(
                f"written {_told(score)}: {text}"
                for text, score in zip(scores.written, scores.written_scores, strict=True)
            )
            yield Decision(
                why,
                tuple(_pair(sample, each, scores) for each in kept),
                f"web {_told(scores.web_score)}, {written}",
            )


class Kept(NamedTuple):
    """A text that goes on."""

    origin: Origin
    number: int  # of the written texts
    text: str


class Scores(NamedTuple):
    """A fact: what was written, and the filter's logits that each text and the image belong together."""

    written: Sequence[str]
    web_score: float | None  # None: nothing in the text that the filter can read
    written_scores: Sequence[float | None]

    def kept(self, web: str, threshold: float) -> tuple[list[Kept], str]:
        """Which of the texts stay, and in words why no other does."""
        kept: list[Kept] = []
        if self.web_score is not None and self.web_score > threshold:
            kept.append(Kept("web", 0, web))
        again = False
        for number, (text, score) in enumerate(zip(self.written, self.written_scores, strict=True)):
            if score is None or score <= threshold:
                continue
            if any(text.strip() == other.text.strip() for other in kept):
                again = True
            else:
                kept.append(Kept("written", number, text))
        why = WHYS["web" in {k.origin for k in kept}, "written" in {k.origin for k in kept}]
        if None in self.written_scores:
            why += ", nothing to read in the written one"
        elif again:
            why += ", which was written again"
        return kept, why


WHYS = {  # (web text kept, a written one kept)
    (True, True): "both texts",
    (True, False): "web text",
    (False, True): "written text",
    (False, False): "no text fits",
}


class CapFiltJudge:
    """Holds the two models; writes a text for every image and judges both."""

    def __init__(self, spec: CapFilt, captioner: "Pipeline", filter_: "Pipeline") -> None:
        self._spec = spec
        self._captioner, self._filter = captioner, filter_

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        """A fact for each sample; what is no pair with an image says so."""
        texts = [_checked(sample) for sample in samples]
        good = [
            (sample, text)
            for sample, text in zip(samples, texts, strict=True)
            if isinstance(text, str)
        ]
        judged = iter(self._judge([s for s, _ in good], [text for _, text in good]) if good else [])
        return [
            bad(text) if isinstance(text, BadSample) else next(judged)._asdict() for text in texts
        ]

    def _judge(self, samples: Sequence[Sample], web: Sequence[str]) -> list[Scores]:
        spec, pictures = self._spec, [sample.images[0] for sample in samples]
        written = [self._write(samples, number) for number in range(spec.captions)]
        seen_NPF = self._filter.inputs.features(pictures)
        web_scores, *scores = [self._scores(seen_NPF, texts) for texts in (web, *written)]
        return [
            Scores([texts[i] for texts in written], web_scores[i], [of[i] for of in scores])
            for i in range(len(samples))
        ]

    def _write(self, samples: Sequence[Sample], number: int) -> list[str]:
        """The text of that number for each sample."""
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

    def _scores(self, seen_NPF: "Tensor", texts: Sequence[str]) -> list[float | None]:
        """The filter's logits; None for a text that it cannot read."""
        scores: list[float | None] = [None] * len(texts)
        if read := [i for i, text in enumerate(texts) if readable(self._filter, text)]:
            logits = self._filter.match(seen_NPF[read], [texts[i] for i in read])
            for i, logit in zip(read, logits.tolist(), strict=True):
                scores[i] = round(logit, DIGITS)
        return scores


def readable(pipeline: "Pipeline", text: str) -> bool:
    """Whether the model finds anything to read in a text."""
    try:
        pipeline.inputs.encode(pipeline.inputs.ask(pair("text", b"", text)), answer=True)
    except BadSample:
        return False
    return True


def _checked(sample: Sample) -> str | BadSample:
    """The web's text of a pair whose image can be decoded, else what is wrong with it."""
    texts = [part for part in sample.parts if part.text is not None]
    if len(sample.images) != 1 or [part.role for part in texts] != ["caption"]:
        return BadSample(Reason.BAD_ROW, "CapFilt reads pairs: one image and one caption a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return texts[0].text or ""


def _seed(seed: int, key: str, number: int) -> int:
    words = f"{seed}/{key}/{number}" if number else f"{seed}/{key}"
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:7])


def _told(score: float | None) -> str:
    return "" if score is None else f"{score:g}"


def _pair(sample: Sample, kept: Kept, scores: Scores) -> Sample:
    told = {
        "kept": kept.origin,
        "web_score": _told(scores.web_score),
        "written_score": _told(scores.written_scores[kept.number]),
    }
    return Sample(
        key=f"{sample.key}/{kept.origin}{f'-{kept.number + 1}' if kept.number else ''}",
        images=sample.images,
        parts=(Part("caption", image=0), Part("caption", text=kept.text)),
        language=sample.language if kept.origin == "web" else None,
        license=sample.license,
        provenance={
            **sample.provenance,
            **{f"capfilt.{name}": value for name, value in told.items()},
        },
    )
