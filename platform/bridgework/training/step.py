"""Model and losses as one module: the only thing that training differs in from system to system.

A loss says what each sample adds to a sum and to what the sum is divided by. The counts of all micro-batches and all
ranks are added up before the first backward, so the loss of an optimizer step is the mean over its whole global batch:
the same number on 1 worker or 8, in one micro-batch or ten. Sums are kept by source of the mixture: each may have a
mean and a weight of its own (Flamingo's lambda; Alayrac et al. 2022, arXiv:2204.14198, 2.4).
"""

# R samples of a micro-batch, or of a share  L losses  S sources of the mixture

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bridgework.data.collate import Batch
from bridgework.errors import SpecError
from bridgework.models.base import VLMModule
from bridgework.system import LossSpec, Stage


class GradCacheBatch(NamedTuple):
    """What a micro-batch is compared with: a worker's whole share without gradient, and its own place in it."""

    shares: Sequence[dict[str, Tensor]]  # of each micro-batch: name of the output -> (r, ...)
    samples: Sequence[int]  # of each micro-batch; 0 of an idle one
    own: int


class TrainingModule(nn.Module):
    """Runs the wiring once and every loss on what it gave."""

    def __init__(self, model: VLMModule, losses: Sequence[LossSpec]) -> None:
        super().__init__()
        self.model = model
        self.losses = tuple(losses)
        self.requested = frozenset(loss.requires for loss in losses)
        self.cached_outputs = sorted({name for loss in losses for name in loss.cached_outputs})
        self.options = {
            name: value for loss in losses for name, value in getattr(loss, "options", {}).items()
        }

    def forward(self, batch: Batch, beside: GradCacheBatch | None = None) -> Tensor:
        """What every sample of the batch adds to the sum of every loss: sums_LR, float32.

        With `beside`, the samples are those of the worker's share, and a loss that compares samples sees all of them,
        of which this micro-batch alone has a gradient. Added up over the micro-batches, sums and gradients are those of
        the share at once (GradCache, Gao et al. 2021, arXiv:2101.06983).
        """
        outputs = self.model(**batch.inputs(), **self.options, requested=self.requested)
        return torch.stack([self._sums(loss, outputs, batch, beside) for loss in self.losses])

    def _sums(
        self, loss: LossSpec, outputs: Any, batch: Batch, beside: GradCacheBatch | None
    ) -> Tensor:
        if beside is None or not loss.cached_outputs:
            own_r: Tensor = loss(outputs) * (not batch.idle)
            if beside is None:
                return own_r
            before, after = sum(beside.samples[: beside.own]), sum(beside.samples[beside.own + 1 :])
            if batch.idle:
                return (
                    own_r.new_zeros(before + after) + own_r.sum()
                )  # a zero, but the graph of the other ranks
            return torch.cat([own_r.new_zeros(before), own_r, own_r.new_zeros(after)])
        parts = {name: [share[name] for share in beside.shares] for name in _compared(loss, batch)}
        for name, shares in parts.items():
            shares[beside.own] = self._real(getattr(outputs, name), batch)
        whole_R: Tensor = loss(
            replace(outputs, **{name: torch.cat(shares) for name, shares in parts.items()})
        )
        # every micro-batch sees the sums of the share, and each gives their gradient through its own outputs
        return whole_R - whole_R.detach() * (1 - 1 / len(beside.shares))

    @torch.no_grad()
    def share(self, batch: Batch) -> dict[str, Tensor]:
        """What a micro-batch gives to the comparison of all."""
        outputs = self.model(**batch.inputs(), **self.options, requested=self.requested)
        names = {name for loss in self.losses for name in _compared(loss, batch)}
        return {name: self._real(getattr(outputs, name), batch).detach() for name in names}

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """What every sample adds to the divisors of the losses: counts_LR, float32."""
        labels = [batch.labels_by_sample() for batch in batches]
        return torch.stack(
            [
                torch.cat([loss.count(labels_RT).float() for labels_RT in labels])
                for loss in self.losses
            ]
        )

    @staticmethod
    def _real(rows: Tensor, batch: Batch) -> Tensor:
        """Of an idle batch none, but with the graph that the other ranks' have."""
        return rows[:0] if batch.idle else rows


def _compared(loss: LossSpec, batch: Batch) -> set[str]:
    """The outputs of a worker's share that a loss compares in two passes; which rows show one image is one of them."""
    known = batch.identity_B is not None and getattr(loss, "by_image", False)
    return (
        {*loss.cached_outputs, "identity_B"}
        if loss.cached_outputs and known
        else set(loss.cached_outputs)
    )


def by_source(values_LR: Tensor, sources_R: Tensor, sources: int) -> Tensor:
    """(L, S) float32: the values of the samples added up by the source that each came from."""
    values_LR = values_LR.float()
    return values_LR.new_zeros(len(values_LR), sources).index_add(
        1, sources_R.to(values_LR.device), values_LR
    )


def check(stage: Stage, micro_batches: int) -> None:
    """Raises SpecError for a stage that would end in its first step.

    That is so where a loss compares all samples of a batch with each other but sees them in pieces, and where ZeRO 3
    would split parameters that the wiring needs complete.
    """
    if stage.zero.stage == 3:
        why = stage.model.unshardable(frozenset(loss.requires for loss in stage.losses))
        if why is not None:
            raise SpecError(
                f"stages.{stage.name}.zero.stage: ZeRO 3 splits every parameter over the workers, and {why}. "
                f"Got 3; expected 0, 1 or 2. Fix: set stages.{stage.name}.zero.stage=2"
            )
    whole = [
        type(loss).__name__ for loss in stage.losses if loss.whole_batch and not loss.cached_outputs
    ]
    if whole and micro_batches > 1:
        raise SpecError(
            f"{stage.name}: {whole[0]} compares the samples of a batch with each other and must see a worker's share "
            f"of the {stage.budget.batch} at once, not {micro_batches} micro-batches; set "
            f"stages.{stage.name}.budget.micro={stage.budget.batch}"
        )
