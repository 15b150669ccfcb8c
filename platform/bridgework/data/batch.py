"""Rows of one step, padded into the tensors that a model takes.

# B batch  T tokens  N images of the whole batch  S side in pixels  P patches  D width
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgework.system import IGNORE


@dataclass(frozen=True)
class Row:
    """One sample, ready for a batch."""

    step: int
    place: int  # in the global batch of that step
    key: str
    source: int  # index into the mixture's sources
    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    images: NDArray[Any]  # (n, 3, S, S) uint8 pixels, or (n, P, D) float16 cached features; n may be 0


@dataclass(frozen=True)
class Batch:
    """What a step of training or a call of generation reads; exactly one of pixels and features is there."""

    ids_BT: Tensor  # int64; IMAGE where an image token goes
    attention_BT: Tensor  # bool; False on padding
    labels_BT: Tensor  # int64; IGNORE where there is no loss
    pixels_N3HW: Tensor | None  # uint8; N may be 0
    features_NPD: Tensor | None  # float16; N may be 0
    keys: list[str]
    sources: list[int]

    def to(self, device: torch.device | str) -> "Batch":
        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            ids_BT=self.ids_BT.to(device, non_blocking=True),
            attention_BT=self.attention_BT.to(device, non_blocking=True),
            labels_BT=self.labels_BT.to(device, non_blocking=True),
            pixels_N3HW=move(self.pixels_N3HW),
            features_NPD=move(self.features_NPD),
        )

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a wiring's forward: ids, attention, labels, and pixels or features."""
        inputs = {"ids": self.ids_BT, "attention": self.attention_BT, "labels": self.labels_BT}
        seen = {"pixels": self.pixels_N3HW, "features": self.features_NPD}
        return inputs | {name: tensor for name, tensor in seen.items() if tensor is not None}


def collate(rows: Sequence[Row], *, pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """A batch as wide as its longest row: padded on the right to train, on the left to generate.

    Images of all rows follow each other in the order of their places; a batch without images has N = 0.
    """
    width = max(len(row.ids) for row in rows)
    ids = np.full((len(rows), width), pad_id, np.int64)
    labels = np.full((len(rows), width), IGNORE, np.int64)
    attention = np.zeros((len(rows), width), np.bool_)
    for i, row in enumerate(rows):
        at = slice(len(row.ids)) if side == "right" else slice(width - len(row.ids), width)
        ids[i, at], labels[i, at], attention[i, at] = row.ids, row.labels, True
    images = torch.from_numpy(np.concatenate([row.images for row in rows]))
    pixels = images.dtype == torch.uint8
    return Batch(
        ids_BT=torch.from_numpy(ids),
        attention_BT=torch.from_numpy(attention),
        labels_BT=torch.from_numpy(labels),
        pixels_N3HW=images if pixels else None,
        features_NPD=None if pixels else images,
        keys=[row.key for row in rows],
        sources=[row.source for row in rows],
    )
