"""What can be measured of a row: its pictures' sizes, its words, its language, how a model sees image and text."""

# N images  Q queries  D width of an embedding

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bridgework.curation.capfilt import readable
from bridgework.curation.runner import Fact, bad
from bridgework.curation.text import language, tokenize_words
from bridgework.data.images import load_image, size_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample
from bridgework.errors import DataError, WeightsError
from bridgework.storage import find_store

if TYPE_CHECKING:
    from torch import Tensor

    from bridgework.inference.pipeline import Pipeline

DIGITS = 4  # of a share, a probability, a cosine and a score


class RowMetricValues(NamedTuple):
    """A fact. None: the row has no such thing, or nobody asked."""

    side: int | None = None  # pixels, the shortest of all images
    aspect: float | None = None  # of the longest image
    pixels: int | None = None  # of the largest image
    words: int | None = None
    repetition: float | None = None  # share of the words that the most repeated one has
    word: str | None = None  # of the list, one that stands in the text
    language: str | None = None
    probability: float | None = None
    similarity: float | None = None  # cosine of the text and the image that fits it best
    score: float | None = None  # of the worst image


class RowMetrics:
    """Measures rows; holds the list of words and, where they are asked, the models."""

    def __init__(
        self,
        listed: Iterable[str] = (),
        *,
        languages: bool = False,
        eye: "EmbeddingScorer | None" = None,
    ) -> None:
        phrases = [" ".join(tokenize_words(entry)) for entry in listed]
        self._phrases = [phrase for phrase in phrases if " " in phrase]
        self._words = frozenset(phrases) - {""}
        self._languages = languages
        self._eye = eye

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        """A fact for each sample; one with an image that cannot be read is bad."""
        told = [self._measured(sample) for sample in samples]
        if self._eye is not None:
            told = self._eye(samples, told)
        return [bad(one) if isinstance(one, BadSample) else one._asdict() for one in told]

    def _measured(self, sample: Sample) -> RowMetricValues | BadSample:
        try:
            sizes = [sorted(size_of(image)) for image in sample.images]
        except BadSample as error:
            return error
        if any(short < 1 for short, _ in sizes):
            return BadSample(Reason.ZERO_PIXELS, "an image has no pixels")
        told = RowMetricValues(
            side=min((short for short, _ in sizes), default=None),
            aspect=max((round(long / short, DIGITS) for short, long in sizes), default=None),
            pixels=max((short * long for short, long in sizes), default=None),
        )
        return (
            self._read(told, sample.text)
            if any(part.text is not None for part in sample.parts)
            else told
        )

    def _read(self, told: RowMetricValues, text: str) -> RowMetricValues:
        found = tokenize_words(text)
        most = max(Counter(found).values(), default=0)
        told = told._replace(
            words=len(found),
            repetition=round(most / len(found), DIGITS) if most > 1 else None,
            word=self._listed(found),
        )
        if not self._languages or not found:
            return told
        code, probability = language(text)
        return told._replace(language=code, probability=round(probability, DIGITS))

    def _listed(self, text: Sequence[str]) -> str | None:
        whole = f" {' '.join(text)} "
        found = next((word for word in text if word in self._words), None)
        return found or next((phrase for phrase in self._phrases if f" {phrase} " in whole), None)


class EmbeddingScorer:
    """A model that embeds images: tells how they fit the text, and what a linear probe makes of them."""

    def __init__(
        self, pipeline: "Pipeline", probe: "tuple[Tensor, float] | None", *, texts: bool
    ) -> None:
        self._pipeline, self._probe, self._texts = pipeline, probe, texts

    @classmethod
    def of(cls, model: str, probe: str | None, *, texts: bool) -> "EmbeddingScorer":
        """Raises WeightsError for what is no artifact, or no probe for it."""
        from bridgework.inference.pipeline import Pipeline

        return cls(Pipeline.load(model), None if probe is None else _probe(probe), texts=texts)

    def __call__(
        self, samples: Sequence[Sample], told: Sequence[RowMetricValues | BadSample]
    ) -> list[RowMetricValues | BadSample]:
        """What was told of each sample, and what the model sees in its images."""
        pixels = self._pipeline.stage.model.pixels
        seen: list[RowMetricValues | BadSample] = []
        squares: list[NDArray[np.uint8]] = []
        for sample, one in zip(samples, told, strict=True):
            try:
                squares += (
                    []
                    if isinstance(one, BadSample)
                    else [load_image(image, pixels) for image in sample.images]
                )
                seen.append(one)
            except BadSample as error:
                seen.append(error)
        embedded = self._pipeline.embed_images(squares).float().cpu() if squares else None
        texts = self._embedded_texts(samples)
        start = 0
        for number, one in enumerate(seen):
            if isinstance(one, RowMetricValues) and embedded is not None and samples[number].images:
                end = start + len(samples[number].images)
                seen[number] = self._figures(one, embedded[start:end], texts.get(number))
                start = end
        return seen

    def _embedded_texts(self, samples: Sequence[Sample]) -> "dict[int, Tensor]":
        """(D,) for every sample that has both images and a text that the model can read."""
        if not self._texts:
            return {}
        read = [
            i
            for i, s in enumerate(samples)
            if s.images and s.text.strip() and readable(self._pipeline, s.text)
        ]
        return (
            dict(
                zip(
                    read,
                    self._pipeline.embed_texts([samples[i].text for i in read]).cpu(),
                    strict=True,
                )
            )
            if read
            else {}
        )

    def _figures(
        self, told: RowMetricValues, images: "Tensor", text_D: "Tensor | None"
    ) -> RowMetricValues:
        """`images` are (N, D), or (N, Q, D) of a Q-Former, of which the best query counts (BLIP-2, 3.1)."""
        if text_D is not None:
            told = told._replace(similarity=round(float((images @ text_D).max()), DIGITS))
        if self._probe is None:
            return told
        weight_D, bias = self._probe
        images_ND = images.mean(1) if images.ndim == 3 else images
        if images_ND.shape[1] != len(weight_D):
            raise WeightsError(
                f"the probe weighs {len(weight_D)} numbers and the model embeds an image in {images_ND.shape[1]}; "
                "take the model that the probe was fitted to"
            )
        return told._replace(score=round(float((images_ND @ weight_D).min() + bias), DIGITS))


def _probe(path: str) -> "tuple[Tensor, float]":
    """Weight (D,) and bias of a linear probe in a safetensors file."""
    from safetensors.torch import load

    try:
        tensors = load(content(path))
    except SafetensorError as error:
        raise WeightsError(f"{path} is no safetensors file: {error}") from None
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if (
        weight is None
        or weight.numel() != weight.shape[-1]
        or (bias is not None and bias.numel() != 1)
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise WeightsError(
            f"{path} is no linear probe: it needs `weight` (D,) or (1, D), and may have `bias`; has {shapes}"
        )
    return weight.flatten().float(), 0.0 if bias is None else float(bias)


def content(path: str) -> bytes:
    """The bytes of a file, by path or URL. Raises DataError where there is none."""
    fs, root = find_store(path)
    try:
        return bytes(fs.cat_file(root))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no file {path}") from None


def lines(path: str) -> list[str]:
    """The lines of a text file. Raises DataError where it is not UTF-8."""
    try:
        return content(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
