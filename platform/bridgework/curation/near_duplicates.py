"""Near-duplicate images: equal bytes, similar perceptual hashes or similar embeddings.

The perceptual hash is pHash of ImageHash: 64 signs of a cosine transform of the brightness. It is
robust to another encoding, size or quality, but not to mirroring, cropping or rotation. An image of
a single brightness has no hash and is compared by its bytes. The hash ignores color, therefore the
code also contains the two color channels (YCbCr) of a 4 x 4 thumbnail: of 80 pairs of clip art with
similar hashes, 77 are flags, fruit, balloons and the like of different colors
(benchmarks/twins.py).
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
Codes = NDArray[Any]  # (N, 8) uint8 of bits, or (N, D) float32 vectors of length 1

HASH_BITS = 64
HASH_BYTES = HASH_BITS // 8
THUMBNAIL = 4  # pixels per side
BANDS = 3  # of a hash, 21 bits each, so that a million hashes have about as many buckets
MOST_BITS = 16  # maximum distance; unrelated images differ in 32 bits on average
FLAT = 2.0  # of 255, standard deviation of the brightness, below which the hash is noise
DECODED = 128  # pixels; the hash uses 32 x 32
BLOCK = 4096  # rows per search
ROUNDING = 1e-3  # of a cosine, because embeddings are stored in float16


def check_fields(by: By, model: str | None, distance: int, similarity: float) -> None:
    """Check the fields. Raises SpecError if they exclude each other, or one is out of range."""
    if by == "embedding" and model is None:
        raise SpecError("by=embedding needs model=ARTIFACT, which embeds images")
    if by != "embedding" and model is not None:
        raise SpecError(f"by={by} uses no model. Fix: leave out model, or set by=embedding")
    if not 0 <= distance <= MOST_BITS:
        raise SpecError(f"distance is 0 to {MOST_BITS} bits of {HASH_BITS}; got {distance}")
    if not 0 < similarity <= 1:
        raise SpecError(f"similarity is a cosine in (0, 1]; got {similarity:g}")


class ImageHasher:
    """Computes the codes by which images are compared, with a model if `by` is embedding."""

    def __init__(self, by: By, pipeline: "Pipeline | None" = None) -> None:
        self._by, self._pipeline = by, pipeline

    @classmethod
    def of(cls, by: By, model: str | None) -> "ImageHasher":
        """Load the model from an artifact's folder; None unless `by` is embedding."""
        if model is None:
            return cls(by)
        from bridgework.inference.pipeline import Pipeline

        return cls(by, Pipeline.load(model))

    def __call__(self, images: Sequence[bytes]) -> list[bytes | BadSample | None]:
        """Return the code of each image file.

        The code is a hash with colors, or D float16; None if only the bytes are compared; a
        BadSample if the image cannot be decoded.
        """
        results = [self._hash_or_load(image) for image in images]
        vectors = iter(self._embed([one for one in results if isinstance(one, np.ndarray)]))
        return [next(vectors) if isinstance(one, np.ndarray) else one for one in results]

    def _hash_or_load(self, image: bytes) -> NDArray[np.uint8] | bytes | BadSample | None:
        try:
            if self._by == "perceptual":
                return perceptual_code(image)
            if self._pipeline is None:
                return None
            return load_image(image, self._pipeline.stage.model.pixels)
        except BadSample as error:
            return error

    def _embed(self, squares: Sequence[NDArray[np.uint8]]) -> list[bytes]:
        if self._pipeline is None or not squares:
            return []
        vectors = self._pipeline.embed_images(squares).float()
        # the mean over the queries of a Q-Former
        vectors_ND = vectors.mean(1) if vectors.ndim == 3 else vectors
        return [row.tobytes() for row in vectors_ND.cpu().numpy().astype(np.float16)]


def perceptual_code(image: bytes) -> bytes | None:
    """Return pHash (8 bytes), then Cb and Cr of each pixel of a thumbnail (32 bytes).

    Returns None for an image of a single brightness. Raises the errors of `decode`.
    """
    picture = decode(image, size=DECODED)
    gray = picture.convert("L")
    if float(np.asarray(gray, np.float32).std()) < FLAT:
        return None
    small = picture.convert("YCbCr").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
    hash_bytes = np.packbits(imagehash.phash(gray).hash.flatten()).tobytes()
    return hash_bytes + np.asarray(small)[..., 1:].tobytes()


def color_distance(one: bytes, other: bytes) -> int:
    """Return the maximum color difference of two perceptual codes, of 255.

    For 400 drawings, copies as JPEG at quality 20, WebP at 30 or at half the size differ by at most
    10, copies that are 15 % brighter or darker by 19 (benchmarks/twins.py).
    """
    colors, others = (
        np.frombuffer(code, np.uint8, offset=HASH_BYTES).astype(np.int16) for code in (one, other)
    )
    return int(np.abs(colors - others).max())


def digest(*parts: bytes) -> str:
    """Return a digest of 32 hex digits of the parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(hashlib.sha256(part).digest())
    return total.hexdigest()[:32]


def pack_codes(by: By, signatures: Sequence[bytes]) -> Codes:
    """Return the codes of `ImageHasher` as one array, hashes without colors. Needs at least one."""
    if by == "perceptual":
        hashes = b"".join(code[:HASH_BYTES] for code in signatures)
        return np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES)
    stored_ND = np.frombuffer(b"".join(signatures), np.float16).reshape(len(signatures), -1)
    vectors_ND: Codes = stored_ND.astype(np.float32)
    length_N1: Codes = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return vectors_ND / length_N1


def earlier_neighbors(codes: Codes, limit: float) -> Iterator[NDArray[np.int64]]:
    """Yield for each row the earlier rows within the limit, in order.

    The limit is a number of bits for hashes, a minimum cosine for vectors. The search is exact.
    Memory: the codes, their index, and the neighbors of BLOCK rows at a time.
    """
    binary = codes.dtype == np.uint8
    index: Any = _hash_index(int(limit)) if binary else faiss.IndexFlatIP(codes.shape[1])
    index.add(codes)
    # faiss returns bits below the radius, and cosines above it
    radius = int(limit) + 1 if binary else limit - ROUNDING
    for start in range(0, len(codes), BLOCK):
        ends, _, neighbors = index.range_search(codes[start : start + BLOCK], radius)
        for row in range(len(ends) - 1):
            of_row = neighbors[ends[row] : ends[row + 1]]
            yield np.sort(of_row[of_row < start + row])


def _hash_index(distance: int) -> "faiss.IndexBinary":
    """Return an index that finds all hashes within `distance` bits.

    Of two hashes that differ in d bits, one of three bands differs in at most d // 3 bits; it is
    looked up with that many bits flipped. From three flips on, comparing all hashes is faster.
    """
    if distance // BANDS > 2:
        return faiss.IndexBinaryFlat(HASH_BITS)
    index = faiss.IndexBinaryMultiHash(HASH_BITS, BANDS, HASH_BITS // BANDS)
    index.nflip = distance // BANDS
    return index


class NearestIndex:
    """Finds the nearest image of a small set by exhaustive search."""

    def __init__(self, by: By, signatures: Sequence[bytes]) -> None:
        self._by = by
        codes = pack_codes(by, signatures)
        self._index: Any = (
            faiss.IndexBinaryFlat(HASH_BITS)
            if by == "perceptual"
            else faiss.IndexFlatIP(codes.shape[1])
        )
        self._index.add(codes)

    def __call__(self, signatures: Sequence[bytes]) -> list[tuple[float, int]]:
        """Return (bits of distance or cosine, position in the set) for each code."""
        if not signatures:
            return []
        nearness, places = self._index.search(pack_codes(self._by, signatures), 1)
        pairs = zip(nearness[:, 0], places[:, 0], strict=True)
        return [(float(near), int(place)) for near, place in pairs]
