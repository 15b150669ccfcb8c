"""Rows of one step, padded into the tensors that a model takes.

# B sequences  T tokens  N images of the whole batch  S side in pixels  P patches  D width  R samples
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
    place: int  # of its sequence in the global batch of that step: rows of one place are packed into one
    key: str
    source: int  # index into the mixture's sources
    ids: list[int]  # (T,)
    labels: list[int]  # (T,)
    images: NDArray[
        Any
    ]  # (n, 3, S, S) uint8 pixels, or (n, P, D) float16 cached features; n may be 0
    layouts: tuple[Layout, ...] = ()  # of each image, where images are cut into tiles
    instruction: list[int] = field(
        default_factory=list
    )  # (I,) the second stream, where the wiring reads one
    rejected: tuple[list[int], list[int]] | None = None  # ids and labels of the worse answer
    shown: int = 0  # images, of which `images` may hold several tiles or frames
    stands_for: str = ""  # key of the bad or skipped sample in whose place it came
    lane: int | None = None  # where the stage's losses compare the samples of a lane
    identity: int | None = (
        None  # of its image, 0 or more, where they know which rows show one image
    )
    answers: tuple[
        tuple[list[int], float], ...
    ] = ()  # ids and weight of each answer, where all of them are learned


@dataclass(frozen=True)
class Batch:
    """What a step of training or a call of generation reads; exactly one of pixels and features is there.

    A sequence is one sample, or with `segments_BT` several. Samples that come with a rejected answer fill two
    sequences each: the better answers of all come first, then the worse.
    """

    ids_BT: Tensor  # int64; IMAGE where an image token goes
    attention_BT: Tensor  # bool; False on padding
    labels_BT: Tensor  # int64; IGNORE where there is no loss
    pixels_N3HW: Tensor | None  # uint8; N may be 0
    features_NPD: Tensor | None  # float16; N may be 0
    keys: list[str]  # of the samples
    sources: list[int]
    layouts_N4: Tensor | None = None  # int64, of each image: columns, rows, width, height
    lane_B: Tensor | None = None  # int64, of each sample
    identity_B: Tensor | None = None  # int64, equal for samples of one image
    answers_AN: Tensor | None = None  # int64, all answers of all samples, IGNORE on padding
    answer_owner_A: Tensor | None = None  # int64, the sample of each
    answer_weight_A: Tensor | None = None  # float32
    instruction_BI: Tensor | None = None  # int64, one row a sample
    instruction_attention_BI: Tensor | None = None  # bool; False on padding
    segments_BT: Tensor | None = (
        None  # int64, the number of the sample in the batch, -1 on padding; None: a row each
    )
    replaced: list[bool] = field(
        default_factory=list
    )  # samples that stand for a bad or skipped one
    places_B: Tensor | None = (
        None  # int64, of each sequence in the global batch; a worse answer has one of its own
    )
    owners_N: Tensor | None = None  # int64, the sequence that each image belongs to
    idle: bool = False  # keeps a rank busy that has no rows left: nothing in it counts

    def to(self, device: torch.device | str) -> "Batch":
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
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
        """(R, T) int64: the labels of each sample in a row of its own; what they are already without packing."""
        if self.segments_BT is None:
            return self.labels_BT
        own_RT = [self.labels_BT[self.segments_BT == number] for number in range(len(self.keys))]
        return torch.nn.utils.rnn.pad_sequence(own_RT, batch_first=True, padding_value=IGNORE)

    def tokens_by_sample(self) -> Tensor:
        """(R,) int64: how many tokens each sample has, prompt and images included."""
        if self.segments_BT is not None:
            return torch.bincount(self.segments_BT[self.attention_BT], minlength=len(self.keys))
        lengths_B = self.attention_BT.sum(1)
        return lengths_B.view(-1, len(self.keys)).sum(0)  # with worse answers: both


def collate(rows: Sequence[Row], *, pad_id: int, side: Literal["right", "left"] = "right") -> Batch:
    """A batch as wide as its longest sequence: padded on the right to train, on the left to generate.

    Neighbors of one place share a sequence. Images of all rows follow each other in the order of their places; a
    batch without images has N = 0.
    """
    packed = [list(same) for _, same in groupby(rows, key=lambda row: row.place)]
    shared = len(packed) < len(rows)
    sequences = (
        [_joined(same) for same in packed] if shared else [(row.ids, row.labels) for row in rows]
    )
    sequences += [row.rejected for row in rows if row.rejected is not None]
    ids_BT, attention_BT = padded([ids for ids, _ in sequences], pad_id, side)
    labels_BT, _ = padded([labels for _, labels in sequences], IGNORE, side)
    shown = (
        rows if rows[0].rejected is None else [*rows, *rows]
    )  # a worse answer is about the same images
    images = torch.from_numpy(np.concatenate([row.images for row in shown]))
    layouts = [layout for row in shown for layout in row.layouts]
    pixels = images.dtype == torch.uint8
    answers = [(number, *answer) for number, row in enumerate(rows) for answer in row.answers]
    asked = [row.instruction for row in shown]
    owners = [number for number, same in enumerate(packed) for row in same for _ in row.images]
    owners += [
        len(packed) + number for number, row in enumerate(shown[len(rows) :]) for _ in row.images
    ]
    instruction_BI, instruction_attention_BI = (
        padded(asked, 0, "right") if any(map(len, asked)) else (None, None)
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
        segments_BT=_segments(packed, side) if shared else None,
        replaced=[bool(row.stands_for) for row in rows],
        places_B=torch.tensor(
            [2 * same[0].place for same in packed]
            + [2 * row.place + 1 for row in shown[len(rows) :]]
        ),
        owners_N=torch.tensor(owners, dtype=torch.int64),
    )


def _numbers(values: Sequence[int | None]) -> Tensor | None:
    """(R,) int64; None where the rows have none."""
    known = [value for value in values if value is not None]
    return torch.tensor(known) if known else None


def _joined(rows: Sequence[Row]) -> tuple[list[int], list[int]]:
    """Ids and labels of a sequence. The first token of a sample has no label: what lies before it is another's."""
    ids = [token for row in rows for token in row.ids]
    return ids, [label for row in rows for label in (IGNORE, *row.labels[1:])]


def _segments(packed: Sequence[Sequence[Row]], side: Literal["right", "left"]) -> Tensor:
    numbers = count()
    told = [
        [number for row in same for number in [next(numbers)] * len(row.ids)] for same in packed
    ]
    return padded(told, -1, side)[0]


def padded(
    rows: Sequence[Sequence[int]], pad: int, side: Literal["right", "left"] = "right"
) -> tuple[Tensor, Tensor]:
    """(B, T) int64, and (B, T) bool: False on padding."""
    width = max(map(len, rows))
    values_BT = np.full((len(rows), width), pad, np.int64)
    real_BT = np.zeros((len(rows), width), np.bool_)
    for i, row in enumerate(rows):
        at = slice(len(row)) if side == "right" else slice(width - len(row), width)
        values_BT[i, at], real_BT[i, at] = row, True
    return torch.from_numpy(values_BT), torch.from_numpy(real_BT)
