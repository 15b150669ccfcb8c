"""Cross-entropy over named classes, for linear probes and fine-tunes of image towers."""

# B samples  C classes

from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.config import config_class
from bridgework.losses.base import Loss, check_label_smoothing, given
from bridgework.system import IGNORE


class Classified(Protocol):
    """Outputs that the loss reads."""

    classes_BC: Tensor | None  # logits
    labels_BT: Tensor | None  # int64, of which the first is the class


@config_class
class Classification(Loss):
    """Cross-entropy of a sample's class under the logits of the classification head."""

    label_smoothing: float = 0.0
    weight: float = 1.0
    requires: ClassVar[str] = "classes"

    def __post_init__(self) -> None:
        check_label_smoothing("classification", self.label_smoothing)

    def __call__(self, outputs: Classified) -> Tensor:
        """Return (B,) float32 in nats; 0 for a sample without a class."""
        logits_BC, labels_BT = given(
            "classification", self.requires, outputs.classes_BC, outputs.labels_BT
        )
        return cross_entropy(
            logits_BC.float(),
            labels_BT[:, 0],
            reduction="none",
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
        )

    def count(self, labels_BT: Tensor) -> Tensor:
        """Return (B,) float32: 1 for every sample with a class, else 0."""
        return (labels_BT[:, 0] != IGNORE).float()
