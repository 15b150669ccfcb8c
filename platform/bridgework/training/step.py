"""Training module: model and losses in one, the only part of training that depends on the system.

A loss returns per-sample summands and per-sample contributions to the divisor. The counts of all
micro-batches and all ranks are summed before the first backward. The loss of an optimizer step is
therefore the mean over its complete global batch: the same number on 1 worker or 8, in one
micro-batch or ten. Sums are per source of the mixture, because each source may have its own mean
and weight (Flamingo's lambda; Alayrac et al. 2022, arXiv:2204.14198, 2.4).
"""

# R samples of a micro-batch, or of a worker's share  L losses  S sources of the mixture

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
    """Cached outputs of all micro-batches of a worker, without gradient, and the current index."""

    shares: Sequence[dict[str, Tensor]]  # per micro-batch: name of the output -> (r, ...)
    samples: Sequence[int]  # per micro-batch; 0 for an idle one
    own: int  # index of the current micro-batch


class TrainingModule(nn.Module):
    """Runs the wiring once and every loss on its outputs."""

    def __init__(self, model: VLMModule, losses: Sequence[LossSpec]) -> None:
        super().__init__()
        self.model = model
        self.losses = tuple(losses)
        self.requested = frozenset(loss.requires for loss in losses)
        self.cached_outputs = sorted({name for loss in losses for name in loss.cached_outputs})
        self.options = {
            name: value for loss in losses for name, value in getattr(loss, "options", {}).items()
        }

    def forward(self, batch: Batch, cache: GradCacheBatch | None = None) -> Tensor:
        """Return sums_LR, float32: each sample's summand of every loss.

        With `cache`, R is the number of samples of the worker's complete share. Losses that compare
        samples then see the outputs of all of them, of which only this micro-batch's carry
        gradients. Summed over the micro-batches, sums and gradients equal those of one pass over
        the share (GradCache, Gao et al. 2021, arXiv:2101.06983).
        """
        outputs = self.model(**batch.inputs(), **self.options, requested=self.requested)
        return torch.stack([self._sums(loss, outputs, batch, cache) for loss in self.losses])

    def _sums(
        self, loss: LossSpec, outputs: Any, batch: Batch, cache: GradCacheBatch | None
    ) -> Tensor:
        if cache is None or not loss.cached_outputs:
            own_r: Tensor = loss(outputs) * (not batch.idle)
            if cache is None:
                return own_r
            before, after = sum(cache.samples[: cache.own]), sum(cache.samples[cache.own + 1 :])
            if batch.idle:
                # zeros, but with the same graph as on the other ranks
                return own_r.new_zeros(before + after) + own_r.sum()
            return torch.cat([own_r.new_zeros(before), own_r, own_r.new_zeros(after)])
        parts = {name: [share[name] for share in cache.shares] for name in _compared(loss, batch)}
        for name, shares in parts.items():
            shares[cache.own] = self._real(getattr(outputs, name), batch)
        sums_R: Tensor = loss(
            replace(outputs, **{name: torch.cat(shares) for name, shares in parts.items()})
        )
        # Every micro-batch computes the sums of the complete share. Each one adds its fraction of
        # the value, and the full gradient through its own outputs.
        return sums_R - sums_R.detach() * (1 - 1 / len(cache.shares))

    @torch.no_grad()
    def share(self, batch: Batch) -> dict[str, Tensor]:
        """Return the outputs of a micro-batch that losses compare with those of the others."""
        outputs = self.model(**batch.inputs(), **self.options, requested=self.requested)
        names = {name for loss in self.losses for name in _compared(loss, batch)}
        return {name: self._real(getattr(outputs, name), batch).detach() for name in names}

    def counts(self, batches: Sequence[Batch]) -> Tensor:
        """Return counts_LR, float32: each sample's contribution to the divisor of every loss."""
        labels = [batch.labels_by_sample() for batch in batches]
        return torch.stack(
            [
                torch.cat([loss.count(labels_RT).float() for labels_RT in labels])
                for loss in self.losses
            ]
        )

    @staticmethod
    def _real(rows: Tensor, batch: Batch) -> Tensor:
        """Return the rows, or none of an idle batch but with the same graph as on other ranks."""
        return rows[:0] if batch.idle else rows


def _compared(loss: LossSpec, batch: Batch) -> set[str]:
    """Return the names of the outputs that a loss compares in two passes.

    They include the image identity of the rows if the loss reads it.
    """
    known = batch.identity_B is not None and getattr(loss, "by_image", False)
    return (
        {*loss.cached_outputs, "identity_B"}
        if loss.cached_outputs and known
        else set(loss.cached_outputs)
    )


def by_source(values_LR: Tensor, sources_R: Tensor, sources: int) -> Tensor:
    """Return (L, S) float32: the samples' values, summed by source."""
    values_LR = values_LR.float()
    return values_LR.new_zeros(len(values_LR), sources).index_add(
        1, sources_R.to(values_LR.device), values_LR
    )


def check(stage: Stage, micro_batches: int) -> None:
    """Raise SpecError for a stage that would fail in its first step.

    It would if a loss compares all samples of a batch but sees them in several micro-batches, or if
    ZeRO 3 would shard parameters that the wiring needs complete.
    """
    if stage.zero.stage == 3:
        why = stage.model.unshardable(frozenset(loss.requires for loss in stage.losses))
        if why is not None:
            raise SpecError(
                f"stages.{stage.name}.zero.stage: ZeRO 3 shards every parameter over the workers, "
                f"and {why}. Got 3; expected 0, 1 or 2. Fix: set stages.{stage.name}.zero.stage=2"
            )
    comparing = [
        type(loss).__name__ for loss in stage.losses if loss.whole_batch and not loss.cached_outputs
    ]
    if comparing and micro_batches > 1:
        raise SpecError(
            f"{stage.name}: {comparing[0]} compares the samples of a batch with each other and "
            f"must see a worker's share of the {stage.budget.batch} at once. Got {micro_batches} "
            "micro-batches; expected 1. "
            f"Fix: set stages.{stage.name}.budget.micro={stage.budget.batch}"
        )
