"""Tiny MEDs, and batches of pairs for them."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bridgework.models import BlipViTConfig, MEDConfig, MEDTextConfig, MomentumConfig
from bridgework.models.blip_med import MED, Task
from bridgework.system import IGNORE

TINY = MEDConfig(vision=BlipViTConfig(), text=MEDTextConfig(dropout=0.0)).tiny()
ALL: tuple[Task, ...] = ("contrast", "match", "caption")
CLS, SEP, PAD = 256, 259, 257


class Pairs(NamedTuple):
    ids: Tensor
    attention: Tensor
    labels: Tensor
    pixels: Tensor


def spec(*tasks: Task, momentum: MomentumConfig | None = None) -> MEDConfig:
    return replace(TINY, tasks=tasks or ALL, momentum=momentum)


def build(*tasks: Task, momentum: MomentumConfig | None = None, seed: int = 0) -> MED:
    """In eval mode; every parameter shaken, for as drawn many are zero or one and an error could hide."""
    torch.manual_seed(seed)
    model = spec(*tasks, momentum=momentum).build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "heads.temperature":
                parameter.add_(0.1 * torch.randn_like(parameter))
    if model.momentum is not None:
        model.momentum.update(model._momentum_source(), 0.0)
    return model.eval()


def pairs(lengths: tuple[int, ...] = (5, 7, 4, 6), seed: int = 1, asked: int = 0) -> Pairs:
    """Return [CLS] text [SEP] with loss after [CLS] and `asked` more tokens, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    count, width = len(lengths), max(lengths)
    ids = torch.randint(0, 250, (count, width), generator=generator)
    attention = torch.arange(width) < torch.tensor(lengths)[:, None]
    ids[:, 0] = CLS
    ids[torch.arange(count), torch.tensor(lengths) - 1] = SEP
    ids[~attention] = PAD
    labels = ids.masked_fill(~attention, IGNORE)
    labels[:, : 1 + asked] = IGNORE
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return Pairs(ids, attention, labels, pixels)


def left(given: Tensor, attention: Tensor, fill: int | bool) -> Tensor:
    """The same rows, padded on the left."""
    moved = torch.full_like(given, fill)
    for row, (values, real) in enumerate(zip(given, attention, strict=True)):
        moved[row, len(real) - int(real.sum()) :] = values[real]
    return moved
