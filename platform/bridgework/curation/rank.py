"""Caption ranking by a contrastive model (BLIP-2, arXiv:2301.12597, 3.4).

BLIP-2 keeps the best two of ten generated captions and the web text. A captioner generates
`captions` texts for every image by nucleus sampling; these and the row's own texts are ranked by
the cosine of image and text. Each kept text becomes its own pair. Rows with the same image bytes
are one image, at any positions; without a captioner, only their own texts are ranked. Texts that
differ only in blanks count once, at their first position.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from bridgework.config import config_class
from bridgework.curation.capfilt import readable
from bridgework.curation.llm import seed_of
from bridgework.curation.runner import Annotation, Annotator, Decision, Model, Rows, bad
from bridgework.data.images import decode
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from bridgework.inference.pipeline import Pipeline

# N images  T texts  D width; a Q-Former has several vectors per image before it
DIGITS = 4  # of a cosine, so that file and memory are equal


@config_class
class Rank:
    """Ranking model, captioner with its sampling options, and number of kept texts."""

    model: Model  # embeds images and texts, e.g. a trained CLIP
    captioner: Model | None = None  # with the prompt of its training
    captions: int = 10  # generated per row
    keep: int = 2  # texts per image
    top_p: float = 0.9
    temperature: float = 1.0
    min_tokens: int = 5  # as in CapFilt
    max_tokens: int = 20
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
        if self.captions < 1 or self.keep < 1:
            raise SpecError(
                f"rank: captions and keep are at least 1. Got {self.captions} and {self.keep}"
            )
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            raise SpecError(
                "rank: top_p is in (0, 1] and temperature is at least 0. "
                f"Got {self.top_p:g} and {self.temperature:g}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise SpecError(
                f"rank: got min_tokens {self.min_tokens} and max_tokens {self.max_tokens}; "
                "expected 0 <= min_tokens <= max_tokens, and max_tokens at least 1"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digests of both models. Raises WeightsError if one is not an artifact."""
        from bridgework import artifacts

        given = {"model": self.model, "captioner": self.captioner}
        return {
            role: artifacts.describe(folder).digest
            for role, folder in given.items()
            if folder is not None
        }

    def judge(self, home: Path) -> Annotator:
        """Build the annotator: image digest, and the row's own and generated texts with cosines."""
        return _RankAnnotator(self)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep the best texts of every image, each in the row where it occurs first. Two passes."""
        best = _best((annotation for _, annotation in rows()), self.keep)
        for number, (sample, annotation) in enumerate(rows()):
            yield _decision(sample, number, annotation["texts"], best[annotation["image"]])


class _Text(NamedTuple):
    """Text of an image with its score and first position."""

    score: float  # cosine
    row: int
    place: int  # among the row's texts
    digest: str


def _best(annotations: Iterable[Annotation], keep: int) -> dict[str, list[_Text]]:
    """Return the best `keep` texts of every image, best first.

    Of equal scores, the earlier first.
    """
    best = defaultdict[str, list[_Text]](list)
    for row, annotation in enumerate(annotations):
        texts = best[annotation["image"]]
        for place, (_, words, score) in enumerate(annotation["texts"]):
            digest = _text_digest(words)
            if score is not None and all(digest != text.digest for text in texts):
                texts.append(_Text(score, row, place, digest))
                texts.sort(key=lambda text: -text.score)
                del texts[keep:]
    return best


def _decision(
    sample: Sample, row: int, own: Sequence[tuple[str, str, float | None]], best: Sequence[_Text]
) -> Decision:
    pairs, notes = list[Sample](), list[str]()
    for rank, text in enumerate(best, 1):
        if text.row == row:
            origin, words, _ = own[text.place]
            stamp = {"rank.origin": origin, "rank.score": f"{text.score:g}", "rank.rank": str(rank)}
            pairs.append(_pair(sample, origin, words, stamp))
            notes.append(f"{rank}. {words} ({text.score:g})")
    if pairs:
        return Decision("kept", tuple(pairs), ", ".join(notes))
    scored = [(score, words) for _, words, score in own if score is not None]
    if not scored:
        return Decision("no text that the model reads")
    repeated = {text.digest for text in best} & {_text_digest(words) for _, words in scored}
    why = (
        "a text of an earlier row of its picture"
        if repeated
        else "other texts of its picture fit better"
    )
    return Decision(why, note="{1} ({0:g})".format(*max(scored)))


def _pair(sample: Sample, origin: str, words: str, stamp: Mapping[str, str]) -> Sample:
    return replace(
        sample,
        key=f"{sample.key}/{origin}",
        parts=(Part("caption", image=0), Part("caption", text=words)),
        language=sample.language if origin.startswith("web") else None,
        provenance={**sample.provenance, **stamp},
    )


class _RankAnnotator:
    """Generates captions and scores all texts of an image."""

    def __init__(self, spec: Rank) -> None:
        from bridgework.inference.pipeline import Pipeline

        self._spec = spec
        self._model = Pipeline.load(spec.model)
        self._captioner = None if spec.captioner is None else Pipeline.load(spec.captioner)

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        own = [_captions(sample) for sample in samples]
        usable = [
            (sample, texts)
            for sample, texts in zip(samples, own, strict=True)
            if not isinstance(texts, BadSample)
        ]
        new = iter(self._annotate([s for s, _ in usable], [t for _, t in usable]) if usable else ())
        return [bad(texts) if isinstance(texts, BadSample) else next(new) for texts in own]

    def _annotate(
        self, samples: Sequence[Sample], own: Sequence[Sequence[str]]
    ) -> Iterator[Annotation]:
        generated = self._generate(samples)
        images_ND = self._model.embed_images([sample.images[0] for sample in samples])
        for at, sample in enumerate(samples):
            named = {f"web-{n}" if n > 1 else "web": text for n, text in enumerate(own[at], 1)}
            named |= {f"written-{n}": text for n, text in enumerate(generated[at], 1)}
            (scores,) = cosines(self._model, images_ND[at : at + 1], list(named.values()))
            texts = [
                [origin, text, score]
                for (origin, text), score in zip(named.items(), scores, strict=True)
            ]
            yield {"image": _digest(sample.images[0]), "texts": texts}

    def _generate(self, samples: Sequence[Sample]) -> list[list[str]]:
        """Return the generated captions of each sample; the n-th captions of all form one batch."""
        if self._captioner is None:
            return [[] for _ in samples]
        spec, captioner = self._spec, self._captioner
        images = [sample.images[0] for sample in samples]
        conversations = [
            captioner.inputs.ask(pair(s.key, s.images[0], "a caption")) for s in samples
        ]
        encoded = [[image] for image in captioner.inputs.encode_images(images)]
        rounds = [
            captioner.generate_batch(
                conversations,
                encoded,
                [seed_of(spec.seed, sample.key, n) for sample in samples],
                temperature=spec.temperature,
                min_new_tokens=spec.min_tokens,
                max_new_tokens=spec.max_tokens,
                top_p=spec.top_p,
            )
            for n in range(spec.captions)
        ]
        return [list(texts) for texts in zip(*rounds, strict=True)]


def cosines(
    model: "Pipeline", images_ND: "Tensor", texts: Sequence[str]
) -> list[list[float | None]]:
    """Return the cosine of every embedded image with every text; None for a text without tokens."""
    from bridgework.evaluation.retrieval import similarity

    read = [at for at, text in enumerate(texts) if readable(model, text)]
    result: list[list[float | None]] = [[None] * len(texts) for _ in images_ND]
    if read:
        cosine_NT = similarity(images_ND, model.embed_texts([texts[at] for at in read])).tolist()
        for row, cosine_T in zip(result, cosine_NT, strict=True):
            for at, cosine in zip(read, cosine_T, strict=True):
                row[at] = round(cosine, DIGITS)
    return result


def _captions(sample: Sample) -> list[str] | BadSample:
    """Return the captions of a row of one image, or the reason to quarantine the row."""
    if len(sample.images) != 1 or any(part.role != "caption" for part in sample.parts):
        return BadSample(Reason.BAD_ROW, "rank reads one image and its captions a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return [part.text for part in sample.parts if part.text is not None]


def _text_digest(words: str) -> str:
    """Return a digest that is equal for texts that differ only in blanks."""
    return _digest(" ".join(words.split()).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
