"""Direct preference optimization (DPO): raise the better of two answers over the worse one.

Rafailov et al. 2023, arXiv:2305.18290.
"""

# B samples, each with a better and a worse answer  T tokens

from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import logsigmoid

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.losses.base import Loss, given
from bridgework.system import IGNORE


class Preferred(Protocol):
    """Outputs that the loss reads: log-likelihoods in nats, summed over the tokens of an answer."""

    chosen_B: Tensor | None
    rejected_B: Tensor | None
    chosen_reference_B: Tensor | None
    rejected_reference_B: Tensor | None
    labels_BT: Tensor | None  # (2B, T): the better answers of all samples, then the worse


@config_class
class DPO(Loss):
    """-log sigmoid(beta (gain of the better answer - gain of the worse)).

    A gain is the log-likelihood under the model minus that under the reference model.
    """

    beta: float = 0.1
    weight: float = 1.0
    requires: ClassVar[str] = "preference"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise SpecError(f"losses.dpo.beta must be above 0, got {self.beta:g}")

    def __call__(self, outputs: Preferred) -> Tensor:
        """Return (B,) float32; 0 for a sample without labels, which only fills a batch."""
        chosen_B, rejected_B, chosen_reference_B, rejected_reference_B, labels_BT = given(
            "dpo",
            self.requires,
            outputs.chosen_B,
            outputs.rejected_B,
            outputs.chosen_reference_B,
            outputs.rejected_reference_B,
            outputs.labels_BT,
        )
        losses_B = dpo(chosen_B - chosen_reference_B, rejected_B - rejected_reference_B, self.beta)
        return losses_B * self.count(labels_BT)

    def count(self, labels_BT: Tensor) -> Tensor:
        """Return (B,) float32 for labels (2B, T): 1 for every sample with a label, else 0."""
        better_BT = labels_BT[: len(labels_BT) // 2, 1:]
        return (better_BT != IGNORE).any(1).float()


def dpo(chosen_gain_B: Tensor, rejected_gain_B: Tensor, beta: float) -> Tensor:
    """Return (B,) float32: ln 2 if both answers gained equally (2305.18290, eq. 7)."""
    return -logsigmoid(beta * (chosen_gain_B.float() - rejected_gain_B.float()))
