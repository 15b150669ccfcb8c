"""Rows of one step, padded into the tensors that a model takes.

# B batch  T tokens  N images of the whole batch  S side in pixels  P patches  D width
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridgework.system import IGNORE, Layout


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
    layouts: tuple[Layout, ...] = ()  # of each image, where images are cut into tiles
    instruction: list[int] = field(default_factory=list)  # (I,) the second stream, where the wiring reads one
    rejected: tuple[list[int], list[int]] | None = None  # ids and labels of the worse answer


@dataclass(frozen=True)
class Batch:
    """What a step of training or a call of generation reads; exactly one of pixels and features is there.

    Samples that come with a rejected answer fill 2B rows: the better answers of all, then the worse.
    """

    ids_BT: Tensor  # int64; IMAGE where an image token goes
    attention_BT: Tensor  # bool; False on padding
    labels_BT: Tensor  # int64; IGNORE where there is no loss
    pixels_N3HW: Tensor | None  # uint8; N may be 0
    features_NPD: Tensor | None  # float16; N may be 0
    keys: list[str]  # of the samples
    sources: list[int]
    layouts_N4: Tensor | None = None  # int64, of each image: columns, rows, width, height
    instruction_BI: Tensor | None = None  # int64
    instruction_attention_BI: Tensor | None = None  # bool; False on padding
    idle: bool = False  # keeps a rank busy that has no rows left: nothing in it counts

    def to(self, device: torch.device | str) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a wiring's forward; what the batch does not have is left out."""
        inputs = {
            "ids": self.ids_BT,
            "attention": self.attention_BT,
            "labels": self.labels_BT,
            "pixels": self.pixels_N3HW,
            "features": self.features_NPD,
            "layouts": self.layouts_N4,
            "instruction": self.instruction_BI,
            "instruction_attention": self.instruction_attention_BI,
        }
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}


def collate(rows: Sequence[Row], *, pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """A batch as wide as its longest row: padded on the right to train, on the left to generate.

    Images of all rows follow each other in the order of their places; a batch without images has N = 0.
    """
    sequences = [(row.ids, row.labels) for row in rows] + [row.rejected for row in rows if row.rejected is not None]
    ids_BT, attention_BT = _padded([ids for ids, _ in sequences], pad_id, side)
    labels_BT, _ = _padded([labels for _, labels in sequences], IGNORE, side)
    shown = rows if len(sequences) == len(rows) else [*rows, *rows]  # a worse answer is about the same images
    images = torch.from_numpy(np.concatenate([row.images for row in shown]))
    layouts = [layout for row in shown for layout in row.layouts]
    pixels = images.dtype == torch.uint8
    asked = [row.instruction for row in shown]
    instruction_BI, instruction_attention_BI = _padded(asked, 0, "right") if any(map(len, asked)) else (None, None)
    return Batch(
        ids_BT=ids_BT,
        attention_BT=attention_BT,
        labels_BT=labels_BT,
        pixels_N3HW=images if pixels else None,
        features_NPD=None if pixels else images,
        keys=[row.key for row in rows],
        sources=[row.source for row in rows],
        layouts_N4=torch.tensor(layouts) if layouts else None,
        instruction_BI=instruction_BI,
        instruction_attention_BI=instruction_attention_BI,
    )


def _padded(rows: Sequence[Sequence[int]], pad: int, side: Literal["right", "left"]) -> tuple[Tensor, Tensor]:
    """(B, T) int64, and (B, T) bool: False on padding."""
    width = max(map(len, rows))
    values_BT = np.full((len(rows), width), pad, np.int64)
    real_BT = np.zeros((len(rows), width), np.bool_)
    for i, row in enumerate(rows):
        at = slice(len(row)) if side == "right" else slice(width - len(row), width)
        values_BT[i, at], real_BT[i, at] = row, True
    return torch.from_numpy(values_BT), torch.from_numpy(real_BT)
