"""When two pictures are one: the same bytes, nearly the same perceptual hash, nearly the same direction for a model.

The perceptual hash is pHash's (64 signs of a cosine transform of the brightness, in ImageHash): it stands up to
another encoding, size or quality, and not to mirroring, cutting or turning. A picture of a single brightness has none,
and is then like others by its bytes alone. Of color the hash knows nothing, so the two color channels (YCbCr) of a
4 x 4 thumbnail stand beside it: of 80 pairs of clip art that are near by the hash, 77 are flags, fruit, balloons and
the like of different colors (benchmarks/twins.py).
"""

# N rows  D dimensions of an embedding

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import faiss
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bridgework.data.images import decode, load_image
from bridgework.data.quarantine import BadSample
from bridgework.errors import SpecError

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

By = Literal["bytes", "perceptual", "embedding"]
Codes = NDArray[Any]  # (N, 8) uint8 of bits, or (N, D) float32 of length 1

HASH_BITS = 64
HASH_BYTES = HASH_BITS // 8
THUMBNAIL = 4  # cells a side
BANDS = 3  # of a hash, 21 bits each: a million hashes are as many buckets
MOST_BITS = 16  # that two hashes may differ in; pictures that have nothing in common differ in 32 on average
FLAT = 2.0  # of 255, the standard deviation of a picture's brightness: below it the hash is noise
DECODED = 128  # pixels: the hash looks at 32 x 32
BLOCK = 4096  # rows that are looked for at once
ROUNDING = 1e-3  # of a cosine: embeddings are kept in float16


def checked(by: By, model: str | None, distance: int, similarity: float) -> None:
    """Raises SpecError for fields that do not go together, or are out of range."""
    if (by == "embedding") != (model is not None):
        raise SpecError(
            f"by={by} "
            + (
                "needs model=ARTIFACT, which embeds images"
                if model is None
                else "asks no model; leave it out"
            )
        )
    if not 0 <= distance <= MOST_BITS:
        raise SpecError(f"distance is 0 to {MOST_BITS} bits of {HASH_BITS}; got {distance}")
    if not 0 < similarity <= 1:
        raise SpecError(f"similarity is a cosine in (0, 1]; got {similarity:g}")


class ImageHasher:
    """What is to be compared of pictures; holds the model, if one is asked."""

    def __init__(self, by: By, pipeline: "Pipeline | None" = None) -> None:
        self._by, self._pipeline = by, pipeline

    @classmethod
    def of(cls, by: By, model: str | None) -> "ImageHasher":
        """`model` is an artifact's folder; only an embedding has one."""
        if model is None:
            return cls(by)
        from bridgework.inference.pipeline import Pipeline

        return cls(by, Pipeline.load(model))

    def __call__(self, images: Sequence[bytes]) -> list[bytes | BadSample | None]:
        """For each file a hash with its colors or D float16, None where its bytes alone can tell, or why it is bad."""
        seen = [self._look(image) for image in images]
        made = iter(self._embed([one for one in seen if isinstance(one, np.ndarray)]))
        return [next(made) if isinstance(one, np.ndarray) else one for one in seen]

    def _look(self, image: bytes) -> NDArray[np.uint8] | bytes | BadSample | None:
        try:
            if self._by == "perceptual":
                return perceptual(image)
            return (
                None
                if self._pipeline is None
                else load_image(image, self._pipeline.stage.model.pixels)
            )
        except BadSample as error:
            return error

    def _embed(self, squares: Sequence[NDArray[np.uint8]]) -> list[bytes]:
        if self._pipeline is None or not squares:
            return []
        made = self._pipeline.embed_images(squares).float()
        made_ND = made.mean(1) if made.ndim == 3 else made  # over the queries of a Q-Former
        return [row.tobytes() for row in made_ND.cpu().numpy().astype(np.float16)]


def perceptual(image: bytes) -> bytes | None:
    """pHash, 8 bytes, and Cb and Cr of each cell of a thumbnail, 32 bytes; None for a picture of a single brightness.

    Raises BadSample as `decode` does.
    """
    picture = decode(image, size=DECODED)
    grey = picture.convert("L")
    if float(np.asarray(grey, np.float32).std()) < FLAT:
        return None
    small = picture.convert("YCbCr").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    return (
        np.packbits(imagehash.phash(grey).hash.flatten()).tobytes()
        + np.asarray(small)[..., 1:].tobytes()
    )


def repainted(one: bytes, other: bytes) -> int:
    """How far apart the colors of two perceptual signatures are where they differ most, of 255.

    Of 400 drawings, those as JPEG at quality 20, WebP at 30 or of half the size are 10 apart at most, 15 % brighter or
    darker ones 19 (benchmarks/twins.py).
    """
    colors, others = (
        np.frombuffer(code, np.uint8, offset=HASH_BYTES).astype(np.int16) for code in (one, other)
    )
    return int(np.abs(colors - others).max())


def digest(*parts: bytes) -> str:
    """32 hex digits that name some bytes."""
    told = hashlib.sha256()
    for part in parts:
        told.update(hashlib.sha256(part).digest())
    return told.hexdigest()[:32]


def codes(by: By, signatures: Sequence[bytes]) -> Codes:
    """What `Signer` gave as one array, hashes without their colors; of one row at least."""
    if by == "perceptual":
        return np.frombuffer(b"".join(code[:HASH_BYTES] for code in signatures), np.uint8).reshape(
            -1, HASH_BYTES
        )
    made_ND = (
        np.frombuffer(b"".join(signatures), np.float16)
        .reshape(len(signatures), -1)
        .astype(np.float32)
    )
    length_N1: Codes = np.linalg.norm(made_ND, axis=1, keepdims=True)
    return made_ND / length_N1


def earlier(codes: Codes, limit: float) -> Iterator[NDArray[np.int64]]:
    """For each row the rows before it that are near, in order: at most `limit` bits away, or a cosine of `limit`.

    Exact. Memory: the codes, their index, and the near rows of BLOCK rows at a time.
    """
    binary = codes.dtype == np.uint8
    index: Any = _hashes(int(limit)) if binary else faiss.IndexFlatIP(codes.shape[1])
    index.add(codes)
    radius = (
        int(limit) + 1 if binary else limit - ROUNDING
    )  # of bits, fewer than it; of cosines, more
    for start in range(0, len(codes), BLOCK):
        ends, _, near = index.range_search(codes[start : start + BLOCK], radius)
        for row in range(len(ends) - 1):
            found = near[ends[row] : ends[row + 1]]
            yield np.sort(found[found < start + row])


def _hashes(distance: int) -> "faiss.IndexBinary":
    """Finds all hashes within `distance` bits.

    Cut into three bands, two hashes that differ in d bits have a band that differs in d // 3 at most: it is looked up
    with so many bits flipped. From three flips on it is quicker to compare all.
    """
    if distance // BANDS > 2:
        return faiss.IndexBinaryFlat(HASH_BITS)
    index = faiss.IndexBinaryMultiHash(HASH_BITS, BANDS, HASH_BITS // BANDS)
    index.nflip = distance // BANDS
    return index


class Nearest:
    """The nearest of some pictures to others, for sets that are small: every one is compared."""

    def __init__(self, by: By, signatures: Sequence[bytes]) -> None:
        self._by = by
        made = codes(by, signatures)
        self._index: Any = (
            faiss.IndexBinaryFlat(HASH_BITS)
            if by == "perceptual"
            else faiss.IndexFlatIP(made.shape[1])
        )
        self._index.add(made)

    def __call__(self, signatures: Sequence[bytes]) -> list[tuple[float, int]]:
        """(how near, which of the set) for each signature: bits that differ, or the cosine."""
        if not signatures:
            return []
        found, which = self._index.search(codes(self._by, signatures), 1)
        return [(float(how), int(at)) for how, at in zip(found[:, 0], which[:, 0], strict=True)]
