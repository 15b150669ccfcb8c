"""The cases, and the work per batch: our functions make a batch of any library's samples."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.ingest.store import MIX, WHOLE, Raw
from bridgework.data.collate import Batch, Row, collate
from bridgework.data.images import load_image
from bridgework.data.samples import Part
from bridgework.data.tokenization import SampleEncoder
from bridgework.models import EfficientNetConfig, LanguageConfig, LinearConfig, PrefixVLMConfig
from bridgework.system import Mixture, Packing, Source

BATCH = 32
WINDOW = 16  # steps: our reader decodes 512 rows before its first batch
SIDE = 224
LM = LanguageConfig(
    width=32, depth=1, heads=2, kv_heads=2, ffn=64, vocab=320, context=512, tokenizer="bytes"
)
MODEL = PrefixVLMConfig(
    vision=EfficientNetConfig(image_size=SIDE, grid=2, fit="crop"),
    bridge=LinearConfig(),
    language=LM,
)

Decode = Callable[[bytes], NDArray[np.uint8]]


@dataclass(frozen=True)
class Case:
    """Task of a comparison, the same for all sides."""

    name: str
    parts: tuple[str, ...]  # of the store; several are mixed by the square root of their sizes
    decodes: bool = True  # and tokenizes, and collates
    packing: Packing | None = None
    lanes: int = 16

    @property
    def mixture(self) -> Mixture:
        sources = tuple(Source(name=part, dataset="-") for part in self.parts)
        return Mixture(
            sources=sources,
            alpha=0.5,
            template="plain",
            packing=self.packing,
            lanes=self.lanes,
            window=WINDOW,
        )


READ, DECODE = Case("read", WHOLE, decodes=False), Case("decode", WHOLE)
MIXED, PACKED = Case("mix", MIX), Case("pack", MIX, packing=Packing(), lanes=4)
CASES = {each.name: each for each in (READ, DECODE, MIXED, PACKED)}


class Work:
    """Makes a batch of samples; if the case only reads, returns the samples."""

    def __init__(self, case: Case, decode: Decode) -> None:
        self._decodes = case.decodes
        self._streams = SampleEncoder.of(MODEL, case.mixture)
        self._decode = decode

    def __call__(self, raws: Sequence[Raw]) -> Batch | Sequence[Raw]:
        if not self._decodes:
            return raws
        rows = [self._row(place, raw) for place, raw in enumerate(raws)]
        return collate(rows, pad_id=self._streams.tokenizer.pad_token_id)

    def _row(self, place: int, raw: Raw) -> Row:
        encoded = self._streams.train([Part("caption", image=0), Part("caption", text=raw.text)])
        return Row(0, place, raw.key, 0, encoded.ids, encoded.labels, self._decode(raw.image)[None])


def ours(file: bytes) -> NDArray[np.uint8]:
    return load_image(file, MODEL.pixels)


def pillow(file: bytes) -> NDArray[np.uint8]:
    """Decode at full scale, resize and crop, as torchvision's Resize and CenterCrop do."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    short = min(image.size)
    wide, high = (SIDE * side // short for side in image.size)
    left, top = (wide - SIDE) // 2, (high - SIDE) // 2
    square = image.resize((wide, high), Image.Resampling.BICUBIC).crop(
        (left, top, left + SIDE, top + SIDE)
    )
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def keys(batch: Any) -> list[str]:
    """Return the keys of a step of any side: a Batch, rows or samples."""
    return list(batch.keys) if isinstance(batch, Batch) else [each.key for each in batch]
