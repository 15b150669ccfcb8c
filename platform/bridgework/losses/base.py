"""Base class of the losses, and the checks that they share."""

from typing import ClassVar

import torch
from torch import Tensor

from bridgework.errors import DataError, SpecError


class Loss:
    """Base class of the losses: the defaults of `bridgework.system.LossSpec`.

    A loss adds `weight`, `requires` and a call that returns the sum of each sample.
    """

    whole_batch: ClassVar[bool] = False  # compares samples with each other
    supports_packing: ClassVar[bool] = False  # separates samples that share a sequence
    by_image: ClassVar[bool] = False  # reads which rows show one image

    @property
    def cached_outputs(self) -> tuple[str, ...]:
        """Names of the outputs to cache, so that micro-batches suffice (GradCache); () for none."""
        return ()

    def count(self, labels_BT: Tensor) -> Tensor:
        """Return the divisor of each sample, (B,) float32: 1 by default."""
        return torch.ones(len(labels_BT), device=labels_BT.device)


def check_label_smoothing(loss: str, value: float) -> None:
    """Raise SpecError for a `label_smoothing` outside [0, 1); `loss` is the name in messages."""
    if not 0.0 <= value < 1.0:
        raise SpecError(
            f"losses.{loss}.label_smoothing is out of range. Got {value:g}; "
            "expected a number in [0, 1). Fix: set 0 for none"
        )


def given(loss: str, requires: str, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Return the outputs that a loss reads. Raises DataError if the wiring left one out."""
    present = tuple(tensor for tensor in tensors if tensor is not None)
    if len(present) < len(tensors):
        raise DataError(
            f"losses.{loss}: an output that it reads is missing. "
            f"Got {len(present)} of {len(tensors)} tensors; expected all. "
            f"Fix: ask the wiring for {requires!r}, with labels"
        )
    return present
