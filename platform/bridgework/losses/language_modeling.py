"""Language modeling loss: next-token prediction on the tokens that have a label."""

# B batch  T tokens  V vocabulary  L labeled tokens

from typing import ClassVar, Literal, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.config import added, config_class
from bridgework.losses.base import Loss, check_label_smoothing, given
from bridgework.system import IGNORE


class Logits(Protocol):
    """Outputs that the loss reads, with an optional `segments_BT`: int64, each token's sample."""

    logits_BTV: Tensor | None
    labels_BT: Tensor | None


@config_class
class LanguageModeling(Loss):
    """Cross-entropy of the next token; every generative stage uses it.

    A batch's loss is the mean over its labeled tokens (the default), or the mean over its samples
    of each one's sum.
    """

    label_smoothing: float = 0.0
    weight: float = 1.0
    mean: Literal["tokens", "samples"] = added(default="tokens")
    name: ClassVar[str] = "language_modeling"  # in paths and metrics
    requires: ClassVar[str] = "logits"
    supports_packing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_label_smoothing(self.name, self.label_smoothing)

    def __call__(self, outputs: Logits) -> Tensor:
        """Return (B,) float32: the unweighted sum over the labeled tokens of each sample.

        If the outputs have `segments_BT`, samples share rows and B counts samples.
        """
        logits_BTV, labels_BT = given(
            self.name, self.requires, outputs.logits_BTV, outputs.labels_BT
        )
        segments_BT: Tensor | None = getattr(outputs, "segments_BT", None)
        return language_modeling(logits_BTV, labels_BT, self.label_smoothing, segments_BT)

    def count(self, labels_BT: Tensor) -> Tensor:
        """Return (B,) float32: the labeled tokens after the first, or 1 for a row with any."""
        labeled_BT = labels_BT[:, 1:] != IGNORE
        return (labeled_BT.sum(1) if self.mean == "tokens" else labeled_BT.any(1)).float()


def language_modeling(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    label_smoothing: float = 0.0,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """Return (B,) float32: the summed cross-entropy of each label under the logits before it.

    A sample without labels has 0, with a graph. `segments_BT` numbers the sample of each token,
    -1 on padding; the first token of a sample must have no label.
    """
    targets_BT = labels_BT[:, 1:]
    chosen_BT = targets_BT != IGNORE
    # selected before the cast: float32 logits of prompts and images would take the most memory
    logits_LV = logits_BTV[:, :-1][chosen_BT].float()
    nats_L = cross_entropy(
        logits_LV, targets_BT[chosen_BT], reduction="none", label_smoothing=label_smoothing
    )
    if segments_BT is None:
        return nats_L.new_zeros(len(labels_BT)).index_add(0, chosen_BT.nonzero()[:, 0], nats_L)
    samples = int(segments_BT.max()) + 1
    return nats_L.new_zeros(samples).index_add(0, segments_BT[:, 1:][chosen_BT], nats_L)
