"""Next-token prediction on the tokens that carry a label."""

# B batch  T tokens  V vocabulary  L labeled tokens

from typing import ClassVar, Literal, Protocol

from torch import Tensor
from torch.nn.functional import cross_entropy

from bridgework.config import added, config_class
from bridgework.errors import DataError, SpecError
from bridgework.system import IGNORE


class Logits(Protocol):
    """The outputs that the loss reads."""

    logits_BTV: Tensor | None
    labels_BT: Tensor | None


@config_class
class LanguageModeling:
    """Cross-entropy of the next token; the language modeling loss of every generative stage.

    A batch's loss is the mean over its labeled tokens, or the mean over its samples of each one's sum.
    """

    label_smoothing: float = 0.0
    weight: float = 1.0
    mean: Literal["tokens", "samples"] = added(default="tokens")
    requires: ClassVar[str] = "logits"
    whole_batch: ClassVar[bool] = False
    supports_packing: ClassVar[bool] = True
    cached_outputs: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise SpecError(
                f"losses.captioning.label_smoothing lies in [0, 1), got {self.label_smoothing:g}"
            )

    def __call__(self, outputs: Logits) -> Tensor:
        """(B,) float32: the unweighted sum over the labeled tokens of each sample.

        With `segments_BT` among the outputs, samples that share a row are told apart by their numbers in it.
        """
        if outputs.logits_BTV is None or outputs.labels_BT is None:
            raise DataError(
                "the captioning loss reads logits and labels; ask the wiring for 'logits' and give labels"
            )
        segments_BT: Tensor | None = getattr(outputs, "segments_BT", None)
        return language_modeling(
            outputs.logits_BTV, outputs.labels_BT, self.label_smoothing, segments_BT
        )

    def count(self, labels_BT: Tensor) -> Tensor:
        """(B,) float32: the tokens that each sum runs over, the first of a row excepted; or 1 for a row with any."""
        labeled_BT = labels_BT[:, 1:] != IGNORE
        return (labeled_BT.sum(1) if self.mean == "tokens" else labeled_BT.any(1)).float()


def language_modeling(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    label_smoothing: float = 0.0,
    segments_BT: Tensor | None = None,
) -> Tensor:
    """(B,) summed cross-entropy of each label under the logits before it; 0, with a graph, when there is none.

    With `segments_BT`, one number for each sample; -1 is padding. The first token of a sample must have no label.
    """
    targets_BT = labels_BT[:, 1:]
    chosen_BT = targets_BT != IGNORE
    logits_LV = logits_BTV[:, :-1][
        chosen_BT
    ].float()  # chosen first: float32 of prompts and images would be the most
    nats_L = cross_entropy(
        logits_LV, targets_BT[chosen_BT], reduction="none", label_smoothing=label_smoothing
    )
    if segments_BT is None:
        return nats_L.new_zeros(len(labels_BT)).index_add(0, chosen_BT.nonzero()[:, 0], nats_L)
    samples = int(segments_BT.max()) + 1
    return nats_L.new_zeros(samples).index_add(0, segments_BT[:, 1:][chosen_BT], nats_L)
