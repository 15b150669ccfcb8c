"""Model and losses as one module: the only thing that training differs in from system to system.

A loss says what each sample adds to a sum and to what the sum is divided by. The counts of all micro-batches and all
ranks are added up before the first backward, so the loss of an optimizer step is the mean over its whole global batch:
the same number on 1 worker or 8, in one micro-batch or ten. Sums are kept by source of the mixture: each may have a
mean and a weight of its own (Flamingo's lambda; Alayrac et al. 2022, arXiv:2204.14198, 2.4).
"""

# B samples of a micro-batch  L losses  S sources of the mixture

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridgework.data.batch import Batch
from bridgework.errors import SpecError
from bridgework.models.freezing import Freezable
from bridgework.system import LossSpec, Stage


class Beside(NamedTuple):
    """What a micro-batch is compared with: a worker's whole share without gradient, and its own place in it."""

    shares: Sequence[dict[str, Tensor]]  # of each micro-batch: name of the output -> (b, ...)
    sources: Sequence[int]  # of all their samples
    own: int


class Step(nn.Module):
    """Runs the wiring once and every loss on what it gave."""

    def __init__(self, model: Freezable, losses: Sequence[LossSpec], sources: int) -> None:
        super().__init__()
        self.model = model
        self.losses = tuple(losses)
        self.wants = frozenset(loss.needs for loss in losses)
        self._sources = sources
        self.spliced = sorted({name for loss in losses for name in loss.spliced})

    def forward(self, batch: Batch, beside: Beside | None = None) -> Tensor:
        """The sum of every loss over the batch: sums_LS, float32.

        With `beside`, a loss that compares samples sees the worker's share, of which this micro-batch alone has a
        gradient. Added up over the micro-batches, sums and gradients are those of the share at once (GradCache, Gao et
        al. 2021, arXiv:2101.06983).
        """
        outputs = self.model(**batch.inputs(), wants=self.wants)
        return torch.stack([self._sum(loss, outputs, batch, beside) for loss in self.losses])

    def _sum(self, loss: LossSpec, outputs: Any, batch: Batch, beside: Beside | None) -> Tensor:
        if beside is None or not loss.spliced:
            return self._by_source(loss(outputs) * (not batch.idle), batch.sources)
        parts = {name: [share[name] for share in beside.shares] for name in loss.spliced}
        for name, shares in parts.items():
            shares[beside.own] = self._real(getattr(outputs, name), batch)
        whole = self._by_source(
            loss(replace(outputs, **{name: torch.cat(shares) for name, shares in parts.items()})), beside.sources
        )
        # every micro-batch sees the sums of the share, and each gives their gradient through its own outputs
        return whole - whole.detach() * (1 - 1 / len(beside.shares))

    @torch.no_grad()
    def share(self, batch: Batch) -> dict[str, Tensor]:
        """What a micro-batch gives to the comparison of all."""
        outputs = self.model(**batch.inputs(), wants=self.wants)
        return {name: self._real(getattr(outputs, name), batch).detach() for name in self.spliced}

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """What the sums are divided by: counts_LS, float32, over the micro-batches of this rank."""
        real = [b for b in batches if not b.idle]
        return torch.stack([self._counts(loss, real) for loss in self.losses])

    def _counts(self, loss: LossSpec, batches: Sequence[Batch]) -> Tensor:
        counts = [self._by_source(loss.count(b.labels_BT), b.sources) for b in batches]
        return torch.stack([torch.zeros(self._sources), *counts]).sum(0)

    @staticmethod
    def _real(rows: Tensor, batch: Batch) -> Tensor:
        """Of an idle batch none, but with the graph that the other ranks' have."""
        return rows[:0] if batch.idle else rows

    def _by_source(self, values_B: Tensor, sources: Sequence[int]) -> Tensor:
        index_B = torch.tensor(sources, device=values_B.device)
        return torch.zeros(self._sources, device=values_B.device).index_add(0, index_B, values_B.float())


def check(stage: Stage, micro_batches: int) -> None:
    """Raises SpecError when a loss compares all samples of a batch with each other but sees them in pieces."""
    whole = [type(loss).__name__ for loss in stage.losses if loss.whole_batch and not loss.spliced]
    if whole and micro_batches > 1:
        raise SpecError(
            f"{stage.name}: {whole[0]} compares the samples of a batch with each other and must see a worker's share "
            f"of the {stage.budget.batch} at once, not {micro_batches} micro-batches; set "
            f"stages.{stage.name}.budget.micro={stage.budget.batch}"
        )
