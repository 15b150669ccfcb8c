"""Direct preference optimization: of two answers the better one gains on the worse (Rafailov et al., 2305.18290)."""

# B samples, each with a better and a worse answer  T tokens

from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import logsigmoid

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError
from bridgework.system import IGNORE


class Preferred(Protocol):
    """The outputs that the loss reads: log-likelihoods in nats, summed over an answer's tokens."""

    chosen_B: Tensor | None
    rejected_B: Tensor | None
    chosen_reference_B: Tensor | None
    rejected_reference_B: Tensor | None
    labels_BT: Tensor | None  # (2B, T): the better answers of all samples, then the worse


@config_class
class DPO:
    """-log sigmoid(beta (gain of the better answer - gain of the worse)), gains over the reference model."""

    beta: float = 0.1
    weight: float = 1.0
    requires: ClassVar[str] = "preference"
    whole_batch: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = False
    cached_outputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise SpecError(f"losses.preference.beta must be above 0, got {self.beta:g}")

    def __call__(self, outputs: Preferred) -> Tensor:
        """(B,) float32; a sample without labels, which only fills a batch, has none."""
        answers = (
            outputs.chosen_B,
            outputs.rejected_B,
            outputs.chosen_reference_B,
            outputs.rejected_reference_B,
        )
        chosen_B, rejected_B, chosen_reference_B, rejected_reference_B = map(_given, answers)
        losses_B = dpo(chosen_B - chosen_reference_B, rejected_B - rejected_reference_B, self.beta)
        return losses_B * self.count(_given(outputs.labels_BT))

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32 of labels (2B, T): 1 for every sample with a label."""
        better_BT = labels_BT[: len(labels_BT) // 2, 1:]
        return (better_BT != IGNORE).any(1).float()


def dpo(chosen_gain_B: Tensor, rejected_gain_B: Tensor, beta: float) -> Tensor:
    """(B,) float32: ln 2 where neither answer gained more than the other (2305.18290, eq. 7)."""
    return -logsigmoid(beta * (chosen_gain_B.float() - rejected_gain_B.float()))


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise DataError(
            "the preference loss reads two answers a sample; ask the wiring for 'preference', with labels"
        )
    return tensor
