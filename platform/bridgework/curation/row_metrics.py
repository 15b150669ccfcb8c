"""Metrics of a row: image sizes, words, language, image-text similarity and a probe's score."""

# N images  Q queries  D width of an embedding

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError

from bridgework.curation.capfilt import readable
from bridgework.curation.runner import Annotation, bad
from bridgework.curation.text import language, tokenize_words
from bridgework.data.images import load_image, size_of
from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import Sample
from bridgework.errors import DataError, WeightsError
from bridgework.storage import find_store

if TYPE_CHECKING:
    from torch import Tensor

    from bridgework.inference.pipeline import Pipeline

DIGITS = 4  # of shares, probabilities, cosines and scores


class RowMetricValues(NamedTuple):
    """Annotation. None: the row lacks the field, or the metric was not requested."""

    side: int | None = None  # pixels, shortest side of all images
    aspect: float | None = None  # longer side / shorter side, maximum over the images
    pixels: int | None = None  # of the largest image
    words: int | None = None
    repetition: float | None = None  # share of the most frequent word
    word: str | None = None  # a word or phrase of the list that occurs in the text
    language: str | None = None
    probability: float | None = None  # of the language
    similarity: float | None = None  # cosine of the text and the most similar image
    score: float | None = None  # of the worst image


class RowMetrics:
    """Annotator that measures rows, with a list of words and optionally a model."""

    def __init__(
        self,
        words: Iterable[str] = (),
        *,
        languages: bool = False,
        scorer: "EmbeddingScorer | None" = None,
    ) -> None:
        phrases = [" ".join(tokenize_words(entry)) for entry in words]
        self._phrases = [phrase for phrase in phrases if " " in phrase]
        self._words = frozenset(phrases) - {""}
        self._languages = languages
        self._scorer = scorer

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        """Annotate every sample; a row with an unreadable image is bad."""
        values = [self._measure(sample) for sample in samples]
        if self._scorer is not None:
            values = self._scorer(samples, values)
        return [bad(one) if isinstance(one, BadSample) else one._asdict() for one in values]

    def _measure(self, sample: Sample) -> RowMetricValues | BadSample:
        try:
            sizes = [sorted(size_of(image)) for image in sample.images]
        except BadSample as error:
            return error
        if any(short < 1 for short, _ in sizes):
            return BadSample(Reason.ZERO_PIXELS, "an image has no pixels")
        values = RowMetricValues(
            side=min((short for short, _ in sizes), default=None),
            aspect=max((round(long / short, DIGITS) for short, long in sizes), default=None),
            pixels=max((short * long for short, long in sizes), default=None),
        )
        if all(part.text is None for part in sample.parts):
            return values
        return self._measure_text(values, sample.text)

    def _measure_text(self, values: RowMetricValues, text: str) -> RowMetricValues:
        words = tokenize_words(text)
        most = max(Counter(words).values(), default=0)
        values = values._replace(
            words=len(words),
            repetition=round(most / len(words), DIGITS) if most > 1 else None,
            word=self._find_listed(words),
        )
        if not self._languages or not words:
            return values
        code, probability = language(text)
        return values._replace(language=code, probability=round(probability, DIGITS))

    def _find_listed(self, words: Sequence[str]) -> str | None:
        text = f" {' '.join(words)} "
        found = next((word for word in words if word in self._words), None)
        return found or next((phrase for phrase in self._phrases if f" {phrase} " in text), None)


class EmbeddingScorer:
    """Adds the image-text similarity and the score of a linear probe, by a model's embeddings."""

    def __init__(
        self, pipeline: "Pipeline", probe: "tuple[Tensor, float] | None", *, texts: bool
    ) -> None:
        self._pipeline, self._probe, self._texts = pipeline, probe, texts

    @classmethod
    def of(cls, model: str, probe: str | None, *, texts: bool) -> "EmbeddingScorer":
        """Load the model and the probe. Raises WeightsError if one of them is not valid."""
        from bridgework.inference.pipeline import Pipeline

        return cls(Pipeline.load(model), None if probe is None else _load_probe(probe), texts=texts)

    def __call__(
        self, samples: Sequence[Sample], values: Sequence[RowMetricValues | BadSample]
    ) -> list[RowMetricValues | BadSample]:
        """Return the values with similarity and score added."""
        pixels = self._pipeline.stage.model.pixels
        result: list[RowMetricValues | BadSample] = []
        squares: list[NDArray[np.uint8]] = []
        for sample, one in zip(samples, values, strict=True):
            try:
                if not isinstance(one, BadSample):
                    squares += [load_image(image, pixels) for image in sample.images]
                result.append(one)
            except BadSample as error:
                result.append(error)
        images = self._pipeline.embed_images(squares).float().cpu() if squares else None
        texts = self._embed_texts(samples)
        start = 0
        for row, one in enumerate(result):
            if isinstance(one, RowMetricValues) and images is not None and samples[row].images:
                end = start + len(samples[row].images)
                result[row] = self._score(one, images[start:end], texts.get(row))
                start = end
        return result

    def _embed_texts(self, samples: Sequence[Sample]) -> "dict[int, Tensor]":
        """Return (D,) by row, of every row with images and a text that has tokens for the model."""
        if not self._texts:
            return {}
        rows = [
            row
            for row, sample in enumerate(samples)
            if sample.images and sample.text.strip() and readable(self._pipeline, sample.text)
        ]
        if not rows:
            return {}
        vectors_ND = self._pipeline.embed_texts([samples[row].text for row in rows]).cpu()
        return dict(zip(rows, vectors_ND, strict=True))

    def _score(
        self, values: RowMetricValues, images: "Tensor", text_D: "Tensor | None"
    ) -> RowMetricValues:
        """Add similarity and score from image vectors (N, D), or (N, Q, D) of a Q-Former.

        Of the Q vectors of an image, the most similar counts (BLIP-2, 3.1).
        """
        if text_D is not None:
            values = values._replace(similarity=round(float((images @ text_D).max()), DIGITS))
        if self._probe is None:
            return values
        weight_D, bias = self._probe
        images_ND = images.mean(1) if images.ndim == 3 else images
        if images_ND.shape[1] != len(weight_D):
            raise WeightsError(
                f"the probe does not fit the model. Got {len(weight_D)} weights; "
                f"expected {images_ND.shape[1]}. Fix: use the model to which the probe was fitted"
            )
        return values._replace(score=round(float((images_ND @ weight_D).min() + bias), DIGITS))


def _load_probe(path: str) -> "tuple[Tensor, float]":
    """Return the weight (D,) and the bias of a linear probe in a safetensors file."""
    from safetensors.torch import load

    try:
        tensors = load(content(path))
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from None
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if (
        weight is None
        or weight.numel() != weight.shape[-1]
        or (bias is not None and bias.numel() != 1)
    ):
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        raise WeightsError(
            f"{path} is not a linear probe. Got {shapes}; expected `weight` (D,) or (1, D), and "
            "optionally `bias`"
        )
    return weight.flatten().float(), 0.0 if bias is None else float(bias)


def content(path: str) -> bytes:
    """Return the bytes of a file at a path or URL. Raises DataError if there is none."""
    fs, root = find_store(path)
    try:
        return bytes(fs.cat_file(root))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no file {path}") from None


def lines(path: str) -> list[str]:
    """Return the lines of a text file. Raises DataError if it is not UTF-8."""
    try:
        return content(path).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
