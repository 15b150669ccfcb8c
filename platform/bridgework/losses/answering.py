"""All answers that people gave to a question, each weighted by the share of people who gave it.

BLIP's fine-tune for questions (Li et al. 2022, arXiv:2201.12086, 5.3; blip_vqa.py of the release).
"""

# B questions  A answers of all of them  N tokens of the longest  V vocabulary

from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError
from bridgework.system import IGNORE


class Answered(Protocol):
    """The outputs that the loss reads."""

    answers_ANV: Tensor | None
    answers_AN: Tensor | None  # int64 targets; IGNORE on padding
    owner_A: Tensor | None  # int64, the question of each answer
    weight_A: Tensor | None  # float32
    labels_BT: Tensor | None


@config_class
class Answering:
    """Weighted cross-entropy of answers: the mean over questions of the sum over their answers and tokens."""

    label_smoothing: float = 0.0
    alone: float = (
        1.0  # weight of an answer where one person was asked; BLIP's for Visual Genome is 0.2
    )
    weight: float = 1.0
    requires: ClassVar[str] = "answers"
    whole_batch: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = False
    cached_outputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SpecError(
                f"losses.answering.label_smoothing is out of range. Got {self.label_smoothing:g}; expected a number in "
                "[0, 1). Fix: set 0 for none"
            )
        if self.alone <= 0:
            raise SpecError(f"losses.answering.alone must be above 0, got {self.alone:g}")

    def __call__(self, outputs: Answered) -> Tensor:
        """(B,) float32: of each question, the weighted sum of its answers' cross-entropies in nats."""
        given = (outputs.answers_ANV, outputs.answers_AN, outputs.owner_A, outputs.weight_A)
        logits_ANV, answers_AN, owner_A, weight_A = map(_given, given)
        nats_AN = cross_entropy(
            logits_ANV.float().transpose(1, 2),
            answers_AN,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        sums_A = nats_AN.sum(1) * weight_A
        return sums_A.new_zeros(len(_given(outputs.labels_BT))).index_add(0, owner_A, sums_A)

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32: one for every question with a label."""
        return (labels_BT[:, 1:] != IGNORE).any(1).float()


def _given(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise DataError(
            "the answering loss reads all answers of a question; ask the wiring for 'answers', with labels"
        )
    return tensor
