"""How likely a model and its reference find two answers: what preference learning compares (arXiv:2305.18290, 4)."""

# B samples, each with a better and a worse answer: 2B rows, the better ones first  T tokens  V vocabulary

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bridgework.errors import DataError
from bridgework.losses.captioning import captioning
from bridgework.models import lora


def compared(language: nn.Module, logits: Callable[[], Tensor], labels_BT: Tensor | None) -> dict[str, Tensor]:
    """`chosen_B`, `rejected_B` and `chosen_reference_B`, `rejected_reference_B`: nats, summed over an answer's tokens.

    `logits` runs `language` and gives (2B, T, V). The reference is the same model with its adapters off: all else must
    be frozen. Raises DataError without labels or for an odd number of rows, SpecError for a model without adapters.
    """
    if labels_BT is None or len(labels_BT) % 2:
        rows = "no labels" if labels_BT is None else f"{len(labels_BT)} rows"
        raise DataError(f"preferences need the labels of a better and a worse answer of every sample, got {rows}")
    chosen_B, rejected_B = (-captioning(logits(), labels_BT)).chunk(2)
    with torch.no_grad(), lora.off(language):
        chosen_reference_B, rejected_reference_B = (-captioning(logits(), labels_BT)).chunk(2)
    return {
        "chosen_B": chosen_B,
        "rejected_B": rejected_B,
        "chosen_reference_B": chosen_reference_B,
        "rejected_reference_B": rejected_reference_B,
    }
