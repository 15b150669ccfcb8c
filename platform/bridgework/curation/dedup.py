"""Deduplication: drop rows whose image occurs in an earlier row.

Images are compared by bytes, by a perceptual hash or by a model's embedding (`by`). The first row
of a group of duplicates is kept, and the note of every other row contains its key. A row is
compared with the kept rows only, so that a chain of similar images does not collapse into the first
one. Rows of several images, videos and images of a single brightness are compared by the bytes of
all images, rows without images by their text.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from bridgework.config import config_class
from bridgework.curation.near_duplicates import (
    By,
    ImageHasher,
    check_fields,
    color_distance,
    digest,
    earlier_neighbors,
    pack_codes,
)
from bridgework.curation.runner import Annotation, Decision, Model, Rows, bad
from bridgework.curation.text import tokenize_words
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.errors import SpecError


@config_class
class Dedup:
    """Criteria for duplicates."""

    by: By = "bytes"
    model: Model | None = None  # embeds images
    distance: int = 4  # of 64 bits, maximum difference of two perceptual hashes
    # of 255, maximum color difference of 4 x 4 thumbnails; 255: recolored copies are duplicates
    color: int = 20
    similarity: float = 0.95  # minimum cosine of two embeddings
    text: bool = False  # the texts must be equal as well, except for case and punctuation

    drawn: ClassVar[tuple[str, ...]] = ("by",)

    def __post_init__(self) -> None:
        check_fields(self.by, self.model, self.distance, self.similarity)
        if not 0 <= self.color <= 255:
            raise SpecError(f"color: got {self.color}; expected a difference of 0 to 255")

    def models(self, home: Path) -> Mapping[str, str]:
        """Return the digest of the embedding model."""
        if self.model is None:
            return {}
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> "DedupAnnotator":
        """Build the annotator, which computes the signature of every row."""
        return DedupAnnotator(ImageHasher.of(self.by, self.model))

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Keep the first row of every group of duplicates.

        Two passes: signatures of all rows, then decisions. Memory: keys and signatures of all rows.
        """
        keys = list[str]()
        signatures = list[Signature]()
        for sample, annotation in rows():
            keys.append(sample.key)
            signatures.append(Signature(**annotation))
        originals = self._originals(signatures)
        for number, (sample, _) in enumerate(rows()):
            original = next(originals)
            if original == number:
                yield Decision("kept", (sample,))
            else:
                yield Decision("duplicate of an earlier row", note=f"duplicate of {keys[original]}")

    def _originals(self, signatures: Sequence["Signature"]) -> Iterator[int]:
        """Yield for each row the kept row of its group: itself, or an earlier one."""
        identities = [signature.identity(self.text) for signature in signatures]
        firsts = {identity: number for number, identity in reversed(list(enumerate(identities)))}
        searched = [
            n for n, s in enumerate(signatures) if s.code is not None and firsts[identities[n]] == n
        ]
        neighbors = self._neighbors([signatures[number] for number in searched])
        originals = list[int]()
        for number, signature in enumerate(signatures):
            first = firsts[identities[number]]
            original = originals[first] if first < number else number
            if first == number and signature.code is not None:
                candidates = (searched[place] for place in next(neighbors))
                original = next(
                    (
                        n
                        for n in candidates
                        if originals[n] == n and self._is_duplicate(signature, signatures[n])
                    ),
                    number,
                )
            originals.append(original)
            yield original

    def _neighbors(self, signatures: Sequence["Signature"]) -> Iterator[Iterable[int]]:
        """Yield for each signature the positions of the similar earlier ones."""
        if not signatures:
            return iter(())
        limit = self.distance if self.by == "perceptual" else self.similarity
        return earlier_neighbors(pack_codes(self.by, list(map(_decoded, signatures))), limit)

    def _is_duplicate(self, one: "Signature", other: "Signature") -> bool:
        """Compare the words and colors of two neighbors, as far as the fields require it."""
        if self.text and one.text != other.text:
            return False
        return self.by != "perceptual" or color_distance(*map(_decoded, (one, other))) <= self.color


class Signature(NamedTuple):
    """Annotation: digests and code of a row."""

    images: str | None  # digest of the bytes of all images, in order; None for a row without images
    text: str  # digest of its words
    code: str | None  # base64 of the hash or embedding; None if only bytes are compared

    def identity(self, with_text: bool) -> str:
        """Return a name that is equal for exact duplicates."""
        if self.images is None:
            return f"text {self.text}"
        return f"{self.images} {self.text}" if with_text else self.images


class DedupAnnotator:
    """Annotator that computes the signature of every row."""

    def __init__(self, hasher: ImageHasher) -> None:
        self._hasher = hasher

    def __call__(self, samples: Sequence[Sample]) -> list[Annotation]:
        """Annotate every sample; a single image that must be decoded and cannot be is bad."""
        codes = iter(self._hasher([s.images[0] for s in samples if len(s.images) == 1]))
        return [_annotation(s, next(codes) if len(s.images) == 1 else None) for s in samples]


def _decoded(signature: Signature) -> bytes:
    return base64.b64decode(signature.code or "")


def _annotation(sample: Sample, code: bytes | BadSample | None) -> Annotation:
    if isinstance(code, BadSample):
        return bad(code)
    images = digest(*sample.images) if sample.images else None
    text = digest(" ".join(tokenize_words(sample.text)).encode())
    encoded = None if code is None else base64.b64encode(code).decode()
    return Signature(images, text, encoded)._asdict()
