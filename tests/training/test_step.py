"""TrainingModule: sums and counts that do not depend on the split of the batch."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bridgework.config import config_class
from bridgework.data import reader
from bridgework.data.collate import Batch, collate
from bridgework.errors import SpecError
from bridgework.losses import Contrastive, LanguageModeling, QueryContrast
from bridgework.system import Stage, load
from bridgework.training.step import GradCacheBatch, TrainingModule, by_source, check
from tests.training.support import fresh, llava

STAGE = llava()["align"]


def batches(home: Path, size: int, stage: Stage = STAGE) -> list[Batch]:
    rows = next(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    return [collate(rows[i : i + size], pad_id=0) for i in range(0, len(rows), size)]


def test_micro_batches_sum_to_the_batch(home: Path) -> None:
    step = TrainingModule(fresh(STAGE), STAGE.losses).eval()
    with torch.no_grad():
        (whole,) = (step(b) for b in batches(home, 8))
        parts = torch.cat([step(b) for b in batches(home, 3)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(step.counts(batches(home, 3)), step.counts(batches(home, 8)))


def test_one_forward_feeds_every_loss(home: Path) -> None:
    model, (batch,) = fresh(STAGE), batches(home, 8)
    both = TrainingModule(model, (LanguageModeling(), Contrastive(weight=0.1))).eval()
    assert both.requested == {"logits", "pooled"}
    with torch.no_grad():
        each = torch.cat([TrainingModule(model, (loss,)).eval()(batch) for loss in both.losses])
        torch.testing.assert_close(both(batch), each)


def test_counts_are_labeled_tokens_and_samples(home: Path) -> None:
    (batch,) = batches(home, 8)
    counts_LR = TrainingModule(fresh(STAGE), (LanguageModeling(), Contrastive())).counts([batch])
    assert counts_LR[0].tolist() == (batch.labels_BT[:, 1:] != -100).sum(1).tolist()
    assert counts_LR[1].tolist() == [1.0] * 8


def test_contrast_in_two_passes_matches_loss_and_gradient_of_one_batch(
    home: Path,
) -> None:
    losses = (LanguageModeling(), Contrastive(weight=0.5))
    found = []
    for size in (8, 3):
        step, parts = TrainingModule(fresh(STAGE), losses), batches(home, size)
        shares = [step.share(b) for b in parts]
        samples = [len(b.keys) for b in parts]
        sums = [
            step(b, GradCacheBatch(shares, samples, k) if len(parts) > 1 else None)
            for k, b in enumerate(parts)
        ]
        torch.stack(sums).sum().backward()
        found.append((torch.stack(sums).sum(0).detach(), grads(step)))
    (whole, expected), (pieces, gradient) = found
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_contrast_in_two_passes_uses_image_identity(home: Path) -> None:
    """Loss and gradient match one pass; the first rows of all micro-batches have the same image."""
    stage = load("blip2:retrieval").tiny()["retrieval"]
    losses, found = (QueryContrast(), LanguageModeling()), []
    rows = next(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0))
    rows = [
        replace(row, identity=7 if number % 3 == 0 else row.identity)
        for number, row in enumerate(rows)
    ]
    for size in (8, 3):
        step = TrainingModule(fresh(stage), losses).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        parts = [collate(rows[i : i + size], pad_id=0) for i in range(0, len(rows), size)]
        shares, samples = [step.share(b) for b in parts], [len(b.keys) for b in parts]
        assert all("identity_B" in share for share in shares)
        sums = [
            step(b, GradCacheBatch(shares, samples, k) if len(parts) > 1 else None)
            for k, b in enumerate(parts)
        ]
        torch.stack([s.sum() for s in sums]).sum().backward()
        found.append((torch.stack([s.sum(1) for s in sums]).sum(0).detach(), grads(step)))
    (whole, expected), (pieces, gradient) = found
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)
    unknown = [collate([replace(row, identity=None) for row in rows], pad_id=0)]
    with torch.no_grad():
        assert not torch.allclose(step(unknown[0])[0].sum(), whole[0], rtol=1e-3)


def test_contrast_of_each_micro_batch_alone_is_another_loss(home: Path) -> None:
    step = TrainingModule(fresh(STAGE), (Contrastive(),))
    with torch.no_grad():
        whole, pieces = (sum(float(step(b).sum()) for b in batches(home, size)) for size in (8, 4))
    assert abs(whole - pieces) > 1.0


def test_an_idle_micro_batch_adds_nothing_but_its_graph(home: Path) -> None:
    step, parts = (
        TrainingModule(fresh(STAGE), (Contrastive(), LanguageModeling())),
        batches(home, 4),
    )
    idle = replace(parts[0], idle=True)
    alone = [step.share(b) for b in parts]
    busy = [*alone, {name: rows[:0] for name, rows in alone[0].items()}]
    with_idle = step(idle, GradCacheBatch(busy, [4, 4, 0], 2))
    contrast, captioning = with_idle.detach()
    assert not captioning.any()
    torch.testing.assert_close(
        contrast, step(parts[0], GradCacheBatch(alone, [4, 4], 0))[0].detach() * 2 / 3
    )
    with_idle.sum().backward()
    assert float(grads(step).abs().max()) == 0.0


def test_summands_of_a_sample_do_not_depend_on_the_batch(home: Path) -> None:
    step = TrainingModule(fresh(STAGE), STAGE.losses).eval()
    with torch.no_grad():
        together = step(*batches(home, 8))
        alone = torch.cat([step(b) for b in batches(home, 1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_values_are_summed_by_source() -> None:
    values_LR = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    assert by_source(values_LR, torch.tensor([1, 0, 1]), 3).tolist() == [
        [2.0, 5.0, 0.0],
        [16.0, 40.0, 0.0],
    ]


def test_whole_batch_loss_is_rejected_in_micro_batches() -> None:
    @config_class
    class Whole(LanguageModeling):
        whole_batch: ClassVar[bool] = True

    with pytest.raises(SpecError, match=r"Whole .* set stages\.align\.budget\.micro=8"):
        check(llava(stages__align__losses=(Whole(),))["align"], 4)
    check(llava(stages__align__losses=(Contrastive(),))["align"], 4)


def grads(step: TrainingModule) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])
