"""Captions ranked by a contrastive model (BLIP-2, arXiv:2301.12597, 3.4): the best two of ten, and of the web's text.

A captioner writes `captions` texts for every image by nucleus sampling; they stand beside the row's own and are ranked
by the cosine of image and text. Each text that stays is a pair of its own. Rows that hold the same picture, byte by
byte, are one image, wherever they lie; without a captioner only what they say of it competes. Texts that are equal but
for blanks count once, for the row and the place where they stand first.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from bridgework.config import config_class
from bridgework.curation.capfilt import readable
from bridgework.curation.llm import drawn
from bridgework.curation.runner import Annotator, Decision, Fact, Model, Rows, bad
from bridgework.data.images import decode
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Part, Sample, pair
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from torch import Tensor

    from bridgework.inference.pipeline import Pipeline

# N images  T texts  D width, of a Q-Former after its queries
DIGITS = 4  # of a cosine, so that a file and memory agree on it


@config_class
class Rank:
    """Who writes, who judges, and how many texts of an image stay."""

    model: Model  # embeds images and texts: a trained CLIP
    captioner: Model | None = None  # asked as it was trained
    captions: int = 10  # that it writes for every row
    keep: int = 2  # texts of an image
    top_p: float = 0.9
    temperature: float = 1.0
    min_tokens: int = 5  # as CapFilt's
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
                f"rank: captions and keep are at least 1; got {self.captions} and {self.keep}"
            )
        if not 0 < self.top_p <= 1 or self.temperature < 0:
            given = f"{self.top_p:g} and {self.temperature:g}"
            raise SpecError(
                f"rank: top_p lies in (0, 1] and temperature is at least 0; got {given}"
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            lengths = f"{self.min_tokens} to max_tokens {self.max_tokens}"
            raise SpecError(
                f"rank: a caption has min_tokens {lengths}; give 0 <= min_tokens <= max_tokens"
            )

    def models(self, home: Path) -> Mapping[str, str]:
        from bridgework import artifacts

        given = {"model": self.model, "captioner": self.captioner}
        return {
            role: artifacts.describe(folder).digest
            for role, folder in given.items()
            if folder is not None
        }

    def judge(self, home: Path) -> Annotator:
        """Tells the picture's digest and the row's texts, own and written, each with its cosine."""
        return _Judge(self)

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Two passes: the best texts of every picture, then for every row those of them that it was first to bring."""
        best = _best((fact for _, fact in rows()), self.keep)
        for number, (sample, fact) in enumerate(rows()):
            yield _verdict(sample, number, fact["texts"], best[fact["image"]])


class _Text(NamedTuple):
    """A text of a picture: its cosine, where it stood first, and what tells it from others."""

    score: float
    row: int
    place: int  # among the row's texts
    digest: str


def _best(facts: Iterable[Fact], keep: int) -> dict[str, list[_Text]]:
    """The best `keep` texts of every picture, the best first; of equal scores the earlier leads."""
    best = defaultdict[str, list[_Text]](list)
    for row, fact in enumerate(facts):
        texts = best[fact["image"]]
        for place, (_, words, score) in enumerate(fact["texts"]):
            digest = _same(words)
            if score is not None and all(digest != text.digest for text in texts):
                texts.append(_Text(score, row, place, digest))
                texts.sort(key=lambda text: -text.score)
                del texts[keep:]
    return best


def _verdict(
    sample: Sample, row: int, own: Sequence[tuple[str, str, float | None]], best: Sequence[_Text]
) -> Decision:
    made, notes = list[Sample](), list[str]()
    for rank, text in enumerate(best, 1):
        if text.row == row:
            origin, words, _ = own[text.place]
            told = {"rank.origin": origin, "rank.score": f"{text.score:g}", "rank.rank": str(rank)}
            made.append(_pair(sample, origin, words, told))
            notes.append(f"{rank}. {words} ({text.score:g})")
    if made:
        return Decision("kept", tuple(made), ", ".join(notes))
    read = [(score, words) for _, words, score in own if score is not None]
    if not read:
        return Decision("no text that the model reads")
    again = {text.digest for text in best} & {_same(words) for _, words in read}
    why = (
        "a text of an earlier row of its picture"
        if again
        else "other texts of its picture fit better"
    )
    return Decision(why, note="{1} ({0:g})".format(*max(read)))


def _pair(sample: Sample, origin: str, words: str, told: Mapping[str, str]) -> Sample:
    return replace(
        sample,
        key=f"{sample.key}/{origin}",
        parts=(Part("caption", image=0), Part("caption", text=words)),
        language=sample.language if origin.startswith("web") else None,
        provenance={**sample.provenance, **told},
    )


class _Judge:
    """Holds the models."""

    def __init__(self, spec: Rank) -> None:
        from bridgework.inference.pipeline import Pipeline

        self._spec = spec
        self._model = Pipeline.load(spec.model)
        self._captioner = None if spec.captioner is None else Pipeline.load(spec.captioner)

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        own = [_own(sample) for sample in samples]
        good = [
            sample
            for sample, texts in zip(samples, own, strict=True)
            if not isinstance(texts, BadSample)
        ]
        told = iter(
            self._told(good, [texts for texts in own if not isinstance(texts, BadSample)])
            if good
            else ()
        )
        return [bad(texts) if isinstance(texts, BadSample) else next(told) for texts in own]

    def _told(self, samples: Sequence[Sample], own: Sequence[Sequence[str]]) -> Iterator[Fact]:
        written = self._written(samples)
        images_ND = self._model.embed_images([sample.images[0] for sample in samples])
        for at, sample in enumerate(samples):
            named = {f"web-{n}" if n > 1 else "web": text for n, text in enumerate(own[at], 1)}
            named |= {f"written-{n}": text for n, text in enumerate(written[at], 1)}
            (scores,) = near(self._model, images_ND[at : at + 1], list(named.values()))
            texts = [
                [origin, text, score]
                for (origin, text), score in zip(named.items(), scores, strict=True)
            ]
            yield {"image": _digest(sample.images[0]), "texts": texts}

    def _written(self, samples: Sequence[Sample]) -> list[list[str]]:
        """What the captioner writes for each: all first texts side by side, then all second ones."""
        if self._captioner is None:
            return [[] for _ in samples]
        spec, captioner = self._spec, self._captioner
        how = {
            "min_new_tokens": spec.min_tokens,
            "max_new_tokens": spec.max_tokens,
            "top_p": spec.top_p,
        }
        asked = [
            captioner.inputs.ask(pair(sample.key, sample.images[0], "a caption"))
            for sample in samples
        ]
        pictures = [
            [seen]
            for seen in captioner.inputs.encode_images([sample.images[0] for sample in samples])
        ]
        seeds = [
            [drawn(spec.seed, sample.key, n) for sample in samples] for n in range(spec.captions)
        ]
        rounds = [
            captioner.generate_batch(asked, pictures, each, temperature=spec.temperature, **how)
            for each in seeds
        ]
        return [list(texts) for texts in zip(*rounds, strict=True)]


def near(model: "Pipeline", images_ND: "Tensor", texts: Sequence[str]) -> list[list[float | None]]:
    """The cosine of every image, as the model embedded it, and every text; None for a text that it cannot read."""
    from bridgework.evaluation.retrieval import similarity

    read = [at for at, text in enumerate(texts) if readable(model, text)]
    told: list[list[float | None]] = [[None] * len(texts) for _ in images_ND]
    if read:
        alike_NT = similarity(images_ND, model.embed_texts([texts[at] for at in read])).tolist()
        for row, alike in zip(told, alike_NT, strict=True):
            for at, cosine in zip(read, alike, strict=True):
                row[at] = round(cosine, DIGITS)
    return told


def _own(sample: Sample) -> list[str] | BadSample:
    """The captions of a row whose image can be decoded, else what is wrong with it."""
    if len(sample.images) != 1 or any(part.role != "caption" for part in sample.parts):
        return BadSample(Reason.BAD_ROW, "rank reads one image and its captions a row")
    try:
        decode(sample.images[0])
    except BadSample as error:
        return error
    return [part.text for part in sample.parts if part.text is not None]


def _same(words: str) -> str:
    """What texts share that are equal but for blanks."""
    return _digest(" ".join(words.split()).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]
