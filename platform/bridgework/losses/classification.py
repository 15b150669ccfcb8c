"""Cross-entropy over named classes: what a linear probe and a fine-tune of an image tower learn by."""

# B samples  C classes

from typing import ClassVar, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.config import config_class
from bridgework.errors import DataError, SpecError
from bridgework.system import IGNORE


class Classified(Protocol):
    """The outputs that the loss reads."""

    classes_BC: Tensor | None  # logits
    labels_BT: Tensor | None  # int64, of which the first is the class


@config_class
class Classification:
    """Cross-entropy of a sample's class under the logits of the classification head."""

    label_smoothing: float = 0.0
    weight: float = 1.0
    requires: ClassVar[str] = "classes"
    whole_batch: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = False
    cached_outputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SpecError(
                f"losses.classification.label_smoothing is out of range. Got {self.label_smoothing:g}; expected a "
                "number in [0, 1). Fix: set 0 for none"
            )

    def __call__(self, outputs: Classified) -> Tensor:
        """(B,) float32 in nats; 0 for a sample without a class."""
        if outputs.classes_BC is None or outputs.labels_BT is None:
            raise DataError(
                "the classification loss reads logits of classes; ask the wiring for 'classes', with labels"
            )
        return cross_entropy(
            outputs.classes_BC.float(),
            outputs.labels_BT[:, 0],
            reduction="none",
            ignore_index=IGNORE,
            label_smoothing=self.label_smoothing,
        )

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32: one for every sample with a class."""
        return (labels_BT[:, 0] != IGNORE).float()
