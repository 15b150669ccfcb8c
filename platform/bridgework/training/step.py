"""Model and losses as one module: the only thing that training differs in from system to system.

A loss is a sum over a batch and a count to divide it by. The counts of all micro-batches and all ranks are added up
before the first backward, so the loss of an optimizer step is the mean over its whole global batch: the same number
on 1 worker or 8, in one micro-batch or ten.
"""

# B samples of a micro-batch  L losses

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bridgework.data.batch import Batch
from bridgework.errors import SpecError
from bridgework.system import LossSpec, Stage


class Step(nn.Module):
    """Runs the wiring once and every loss on what it gave."""

    def __init__(self, model: nn.Module, losses: Sequence[LossSpec]) -> None:
        super().__init__()
        self.model = model
        self.losses = tuple(losses)
        self.wants = frozenset(loss.needs for loss in losses)

    def forward(self, batch: Batch) -> Tensor:
        """The sum of every loss over the batch: sums_L, float32."""
        outputs = self.model(**batch.inputs(), wants=self.wants)
        return torch.stack([loss(outputs).float() for loss in self.losses])

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """What each sum is divided by: counts_L, float32, over the micro-batches of this rank."""
        return torch.tensor([float(sum(loss.count(b.labels_BT) for b in batches)) for loss in self.losses])


def check(stage: Stage, micro_batches: int) -> None:
    """Raises SpecError when a loss compares all samples of a batch with each other but sees them in pieces."""
    whole = [type(loss).__name__ for loss in stage.losses if loss.whole_batch]
    if whole and micro_batches > 1:
        raise SpecError(
            f"{stage.name}: {whole[0]} compares the samples of a batch with each other and must see a worker's share "
            f"of the {stage.budget.batch} at once, not {micro_batches} micro-batches; set "
            f"stages.{stage.name}.budget.micro={stage.budget.batch}"
        )
