"""Drops rows whose picture stood in an earlier row: by its bytes, by a perceptual hash, or by a model's embedding.

The first of a group of twins stays, and the note of every other names it. A row is compared with the rows that stay,
so a chain of pictures, each like the next, does not collapse into its first. Rows of one image are compared as `by`
says; documents, videos and pictures of a single brightness by the bytes of all their images; rows without images by
their text.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from bridgework.config import config_class
from bridgework.curation.near_duplicates import (
    By,
    ImageHasher,
    checked,
    codes,
    digest,
    earlier,
    repainted,
)
from bridgework.curation.runner import Decision, Fact, Model, Rows, bad
from bridgework.curation.text import tokenize_words
from bridgework.data.quarantine import BadSample
from bridgework.data.samples import Sample
from bridgework.errors import SpecError


@config_class
class Dedup:
    """What makes two rows twins."""

    by: By = "bytes"
    model: Model | None = None  # embeds images
    distance: int = 4  # bits of 64 in which two perceptual hashes may differ
    color: int = 20  # of 255, how far apart the colors of their sixteenths may be; 255: a repainted copy is a twin
    similarity: float = 0.95  # cosine of two embeddings from which on they are twins
    text: bool = False  # their texts must be the same as well, but for case and punctuation

    drawn: ClassVar[tuple[str, ...]] = ("by",)

    def __post_init__(self) -> None:
        checked(self.by, self.model, self.distance, self.similarity)
        if not 0 <= self.color <= 255:
            raise SpecError(f"color is a difference of 0 to 255; got {self.color}")

    def models(self, home: Path) -> Mapping[str, str]:
        """The embedding model's weights."""
        if self.model is None:
            return {}
        from bridgework import artifacts

        return {"model": artifacts.describe(self.model).digest}

    def judge(self, home: Path) -> "DedupJudge":
        return DedupJudge(ImageHasher.of(self.by, self.model))

    def decide(self, rows: Rows) -> Iterator[Decision]:
        """Two passes: what every row is like, then which stay. Memory: keys and signatures of all rows."""
        keys = list[str]()
        signatures = list[Signature]()
        for sample, fact in rows():
            keys.append(sample.key)
            signatures.append(Signature(**fact))
        twins = self._twins(signatures)
        for number, (sample, _) in enumerate(rows()):
            twin = next(twins)
            if twin == number:
                yield Decision("kept", (sample,))
            else:
                yield Decision("duplicate of an earlier row", note=f"twin of {keys[twin]}")

    def _twins(self, signatures: Sequence["Signature"]) -> Iterator[int]:
        """For each row the row that stays for it: itself, or an earlier one."""
        identities = [signature.identity(self.text) for signature in signatures]
        firsts = {identity: number for number, identity in reversed(list(enumerate(identities)))}
        looked = [
            n for n, s in enumerate(signatures) if s.code is not None and firsts[identities[n]] == n
        ]
        near = self._near([signatures[number] for number in looked])
        stays = list[int]()
        for number, signature in enumerate(signatures):
            first = firsts[identities[number]]
            twin = stays[first] if first < number else number
            if first == number and signature.code is not None:
                found = (looked[place] for place in next(near))
                twin = next(
                    (n for n in found if stays[n] == n and self._alike(signature, signatures[n])),
                    number,
                )
            stays.append(twin)
            yield twin

    def _near(self, signatures: Sequence["Signature"]) -> Iterator[Iterable[int]]:
        """For each signature the earlier ones that are near."""
        if not signatures:
            return iter(())
        limit = self.distance if self.by == "perceptual" else self.similarity
        return earlier(codes(self.by, list(map(_decoded, signatures))), limit)

    def _alike(self, one: "Signature", other: "Signature") -> bool:
        """Of two that are near: whether words and colors agree, where they are asked to."""
        if self.text and one.text != other.text:
            return False
        return self.by != "perceptual" or repainted(*map(_decoded, (one, other))) <= self.color


class Signature(NamedTuple):
    """A fact: what is compared of a row."""

    images: str | None  # digest of the bytes of all images, in order; None for a row without
    text: str  # digest of its words
    code: str | None  # base64 of what is near or far; None where bytes alone can tell

    def identity(self, with_text: bool) -> str:
        """Rows of one identity are twins by any measure."""
        if self.images is None:
            return f"text {self.text}"
        return f"{self.images} {self.text}" if with_text else self.images


class DedupJudge:
    """Tells the signature of every row."""

    def __init__(self, signer: ImageHasher) -> None:
        self._signer = signer

    def __call__(self, samples: Sequence[Sample]) -> list[Fact]:
        """A fact for each sample; a lone image that cannot be decoded, where it must be, is bad."""
        lone = [sample.images[0] for sample in samples if len(sample.images) == 1]
        told = iter(self._signer(lone))
        return [
            _fact(sample, next(told) if len(sample.images) == 1 else None) for sample in samples
        ]


def _decoded(signature: Signature) -> bytes:
    return base64.b64decode(signature.code or "")


def _fact(sample: Sample, code: bytes | BadSample | None) -> Fact:
    if isinstance(code, BadSample):
        return bad(code)
    images = digest(*sample.images) if sample.images else None
    text = digest(" ".join(tokenize_words(sample.text)).encode())
    return Signature(
        images, text, None if code is None else base64.b64encode(code).decode()
    )._asdict()
