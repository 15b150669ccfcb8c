"""Answering loss: all answers that people gave to a question, each weighted by its share.

BLIP's VQA fine-tune (Li et al. 2022, arXiv:2201.12086, 5.3; blip_vqa.py of the release).
"""

# B questions  A answers of all of them  N tokens of the longest  V vocabulary

from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.config import config_class
from bridgework.errors import SpecError
from bridgework.losses.base import Loss, check_label_smoothing, given
from bridgework.system import IGNORE


class Answered(Protocol):
    """Outputs that the loss reads."""

    answers_ANV: Tensor | None
    answers_AN: Tensor | None  # int64 targets; IGNORE on padding
    owner_A: Tensor | None  # int64, the question of each answer
    weight_A: Tensor | None  # float32
    labels_BT: Tensor | None


@config_class
class Answering(Loss):
    """Weighted cross-entropy: the mean over questions of the sum over their answers and tokens."""

    label_smoothing: float = 0.0
    alone: float = 1.0  # weight of an answer if only one person was asked; BLIP on VG: 0.2
    weight: float = 1.0
    requires: ClassVar[str] = "answers"

    def __post_init__(self) -> None:
        check_label_smoothing("answering", self.label_smoothing)
        if self.alone <= 0:
            raise SpecError(f"losses.answering.alone must be above 0, got {self.alone:g}")

    def __call__(self, outputs: Answered) -> Tensor:
        """Return (B,) float32: for each question the weighted sum of its answers' nats."""
        logits_ANV, answers_AN, owner_A, weight_A, labels_BT = given(
            "answering",
            self.requires,
            outputs.answers_ANV,
            outputs.answers_AN,
            outputs.owner_A,
            outputs.weight_A,
            outputs.labels_BT,
        )
        nats_AN = cross_entropy(
            logits_ANV.float().transpose(1, 2),
            answers_AN,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        sums_A = nats_AN.sum(1) * weight_A
        return sums_A.new_zeros(len(labels_BT)).index_add(0, owner_A, sums_A)

    def count(self, labels_BT: Tensor) -> Tensor:
        """Return (B,) float32: 1 for every question with a label, else 0."""
        return (labels_BT[:, 1:] != IGNORE).any(1).float()
