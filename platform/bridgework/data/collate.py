"""Collate the rows of one step into the padded tensors that a model takes.

# B sequences  T tokens  N images of the batch  S side in pixels  P patches  D width  R samples
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count, groupby
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
    place: int  # index of its sequence in the global batch; rows of one place are packed together
    key: str
    source: int  # index into the mixture's sources
    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    images: NDArray[Any]  # (n, 3, S, S) uint8 pixels or (n, P, D) float16 features; n may be 0
    layouts: tuple[Layout, ...] = ()  # one per image, if images are cut into tiles
    instruction: list[int] = field(default_factory=list)  # (I,) ids of the instruction stream
    rejected: tuple[list[int], list[int]] | None = None  # ids and labels of the rejected answer
    num_images: int = 0  # `images` may hold several tiles or frames of each
    replaces: str = ""  # key of the bad or skipped sample that this row replaces
    lane: int | None = None  # only if the stage's losses compare the samples of a lane
    identity: int | None = None  # hash of its image, 0 or more; only for mixtures with `by_image`
    # ids and weight of each answer; only if the loss trains on all answers
    answers: tuple[tuple[list[int], float], ...] = ()


@dataclass(frozen=True)
class Batch:
    """Inputs of a training step or a generation call; exactly one of pixels and features is set.

    A sequence is one sample, or several if `segments_BT` is set. A sample with a rejected answer
    fills two sequences: all chosen answers come first, then all rejected ones.
    """

    ids_BT: Tensor  # int64; IMAGE where an image token goes
    attention_BT: Tensor  # bool; False on padding
    labels_BT: Tensor  # int64; IGNORE where there is no loss
    pixels_N3HW: Tensor | None  # uint8; N may be 0
    features_NPD: Tensor | None  # float16; N may be 0
    keys: list[str]  # of the samples
    sources: list[int]
    layouts_N4: Tensor | None = None  # int64; columns, rows, width, height of each image
    lane_B: Tensor | None = None  # int64, per sample
    identity_B: Tensor | None = None  # int64, equal for samples of one image
    answers_AN: Tensor | None = None  # int64, all answers of all samples; IGNORE on padding
    answer_owner_A: Tensor | None = None  # int64, index of the sample of each answer
    answer_weight_A: Tensor | None = None  # float32
    instruction_BI: Tensor | None = None  # int64, one row per sample
    instruction_attention_BI: Tensor | None = None  # bool; False on padding
    # int64, index of the sample in the batch, -1 on padding; None: one sample per sequence
    segments_BT: Tensor | None = None
    replaced: list[bool] = field(default_factory=list)  # replaces a bad or skipped sample
    # int64, index of each sequence in the global batch; a rejected answer has its own
    places_B: Tensor | None = None
    owners_N: Tensor | None = None  # int64, index of the sequence of each image
    idle: bool = False  # dummy batch for a rank without rows: nothing in it counts

    def to(self, device: torch.device | str) -> "Batch":
        """Return a copy of the batch with all tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of a wiring's forward; fields that are None are omitted."""
        inputs = {
            "ids": self.ids_BT,
            "attention": self.attention_BT,
            "labels": self.labels_BT,
            "pixels": self.pixels_N3HW,
            "features": self.features_NPD,
            "layouts": self.layouts_N4,
            "lane": self.lane_B,
            "identity": self.identity_B,
            "answers": self.answers_AN,
            "answer_owner": self.answer_owner_A,
            "answer_weight": self.answer_weight_A,
            "instruction": self.instruction_BI,
            "instruction_attention": self.instruction_attention_BI,
            "segments": self.segments_BT,
        }
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def labels_by_sample(self) -> Tensor:
        """Return the labels with one row per sample, (R, T) int64; without packing, `labels_BT`."""
        if self.segments_BT is None:
            return self.labels_BT
        own_RT = [self.labels_BT[self.segments_BT == number] for number in range(len(self.keys))]
        return torch.nn.utils.rnn.pad_sequence(own_RT, batch_first=True, padding_value=IGNORE)

    def tokens_by_sample(self) -> Tensor:
        """Return the tokens of each sample, prompt and images included, (R,) int64."""
        if self.segments_BT is not None:
            return torch.bincount(self.segments_BT[self.attention_BT], minlength=len(self.keys))
        lengths_B = self.attention_BT.sum(1)
        return lengths_B.view(-1, len(self.keys)).sum(0)  # includes the rejected answer


def collate(rows: Sequence[Row], *, pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """Return a batch as wide as its longest sequence. `side` is right to train, left to generate.

    Neighboring rows of one place share a sequence. The images of all rows are concatenated in the
    order of the rows; a batch without images has N = 0.
    """
    packed = [list(same) for _, same in groupby(rows, key=lambda row: row.place)]
    is_packed = len(packed) < len(rows)
    sequences = (
        [_joined(same) for same in packed] if is_packed else [(row.ids, row.labels) for row in rows]
    )
    sequences += [row.rejected for row in rows if row.rejected is not None]
    ids_BT, attention_BT = padded([ids for ids, _ in sequences], pad_id, side)
    labels_BT, _ = padded([labels for _, labels in sequences], IGNORE, side)
    rejected = [] if rows[0].rejected is None else rows  # a rejected answer has the same images
    both = [*rows, *rejected]
    images = torch.from_numpy(np.concatenate([row.images for row in both]))
    layouts = [layout for row in both for layout in row.layouts]
    pixels = images.dtype == torch.uint8
    answers = [(number, *answer) for number, row in enumerate(rows) for answer in row.answers]
    instructions = [row.instruction for row in both]
    owners = [number for number, same in enumerate(packed) for row in same for _ in row.images]
    owners += [len(packed) + number for number, row in enumerate(rejected) for _ in row.images]
    instruction_BI, instruction_attention_BI = (
        padded(instructions, 0, "right") if any(map(len, instructions)) else (None, None)
    )
    return Batch(
        ids_BT=ids_BT,
        attention_BT=attention_BT,
        labels_BT=labels_BT,
        pixels_N3HW=images if pixels else None,
        features_NPD=None if pixels else images,
        keys=[row.key for row in rows],
        sources=[row.source for row in rows],
        layouts_N4=torch.tensor(layouts) if layouts else None,
        lane_B=_numbers([row.lane for row in rows]),
        identity_B=_numbers([row.identity for row in rows]),
        answers_AN=padded([ids for _, ids, _ in answers], IGNORE)[0] if answers else None,
        answer_owner_A=torch.tensor([owner for owner, _, _ in answers]) if answers else None,
        answer_weight_A=torch.tensor([weight for _, _, weight in answers]) if answers else None,
        instruction_BI=instruction_BI,
        instruction_attention_BI=instruction_attention_BI,
        segments_BT=_segments(packed, side) if is_packed else None,
        replaced=[bool(row.replaces) for row in rows],
        places_B=torch.tensor(
            [2 * same[0].place for same in packed] + [2 * row.place + 1 for row in rejected]
        ),
        owners_N=torch.tensor(owners, dtype=torch.int64),
    )


def _numbers(values: Sequence[int | None]) -> Tensor | None:
    """Return the values that are not None as (R,) int64, or None if there are none."""
    known = [value for value in values if value is not None]
    return torch.tensor(known) if known else None


def _joined(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Return the ids and labels of a packed sequence.

    The first token of a sample has no label, because the token before it belongs to another sample.
    """
    ids = [token for row in rows for token in row.ids]
    return ids, [label for row in rows for label in (IGNORE, *row.labels[1:])]


def _segments(packed: Sequence[Sequence[Row]], side: Literal["right", "left"]) -> Tensor:
    numbers = count()
    segments = [
        [number for row in same for number in [next(numbers)] * len(row.ids)] for same in packed
    ]
    return padded(segments, -1, side)[0]


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: Literal["right", "left"] = "right"
) -> tuple[Tensor, Tensor]:
    """Pad `rows` to one width.

    Returns the values, (B, T) int64, and a mask, (B, T) bool: False on padding.
    """
    width = max(map(len, rows))
    values_BT = np.full((len(rows), width), pad, np.int64)
    mask_BT = np.zeros((len(rows), width), np.bool_)
    for i, row in enumerate(rows):
        at = slice(len(row)) if side == "right" else slice(width - len(row), width)
        values_BT[i, at], mask_BT[i, at] = row, True
    return torch.from_numpy(values_BT), torch.from_numpy(mask_BT)
