"""Model and losses as one module: sums and counts, so that a batch may be cut anywhere."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from bridgework.data import reader
from bridgework.data.batch import Batch, collate
from bridgework.errors import SpecError
from bridgework.losses import Captioning, Contrastive
from bridgework.spec import spec
from bridgework.system import Stage
from bridgework.training.step import Beside, Step, check
from tests.training.support import fresh, llava

STAGE = llava()["align"]


def batches(home: Path, size: int, stage: Stage = STAGE) -> list[Batch]:
    rows = next(reader.local(reader.Feed.of(stage, home), rank=0, world=1, start=0))
    return [collate(rows[i : i + size], pad_id=0) for i in range(0, len(rows), size)]


def test_micro_batches_sum_to_the_whole_batch(home: Path) -> None:
    step = Step(fresh(STAGE), STAGE.losses, 1).eval()
    with torch.no_grad():
        (whole,) = (step(b) for b in batches(home, 8))
        parts = torch.stack([step(b) for b in batches(home, 3)]).sum(0)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(step.counts(batches(home, 3)), step.counts(batches(home, 8)))


def test_one_forward_feeds_every_loss(home: Path) -> None:
    model, (batch,) = fresh(STAGE), batches(home, 8)
    both = Step(model, (Captioning(), Contrastive(weight=0.1)), 1).eval()
    assert both.wants == {"logits", "pooled"}
    with torch.no_grad():
        each = torch.cat([Step(model, (loss,), 1).eval()(batch) for loss in both.losses])
        torch.testing.assert_close(both(batch), each)


def test_counts_are_labelled_tokens_and_samples(home: Path) -> None:
    (batch,) = batches(home, 8)
    counts = Step(fresh(STAGE), (Captioning(), Contrastive()), 1).counts([batch])
    assert counts[:, 0].tolist() == [float((batch.labels_BT[:, 1:] != -100).sum()), 8.0]


def test_contrast_in_two_passes_has_the_loss_and_the_gradient_of_the_whole_batch(home: Path) -> None:
    losses = (Captioning(), Contrastive(weight=0.5))
    found = []
    for size in (8, 3):
        step, parts = Step(fresh(STAGE), losses, 1), batches(home, size)
        shares = [step.share(b) for b in parts]
        sources = [s for b in parts for s in b.sources]
        sums = [step(b, Beside(shares, sources, k) if len(parts) > 1 else None) for k, b in enumerate(parts)]
        torch.stack(sums).sum().backward()
        found.append((torch.stack(sums).sum(0).detach(), grads(step)))
    (whole, expected), (pieces, gradient) = found
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_contrast_of_each_micro_batch_alone_is_another_loss(home: Path) -> None:
    step = Step(fresh(STAGE), (Contrastive(),), 1)
    with torch.no_grad():
        whole, pieces = (sum(float(step(b).sum()) for b in batches(home, size)) for size in (8, 4))
    assert abs(whole - pieces) > 1.0


def test_an_idle_micro_batch_adds_nothing_but_its_graph(home: Path) -> None:
    step, parts = Step(fresh(STAGE), (Contrastive(), Captioning()), 1), batches(home, 4)
    idle = replace(parts[0], idle=True)
    alone = [step.share(b) for b in parts]
    busy = [*alone, {name: rows[:0] for name, rows in alone[0].items()}]
    sources = [0] * 8
    with_idle = step(idle, Beside(busy, sources, 2))
    contrast, captioning = with_idle.detach().flatten().tolist()
    assert captioning == 0.0
    assert contrast == pytest.approx(float(step(parts[0], Beside(alone, sources, 0))[0].detach()) * 2 / 3)
    with_idle.sum().backward()
    assert float(grads(step).abs().max()) == 0.0
    assert torch.equal(step.counts([*parts, idle]), step.counts(parts))


def test_sums_and_counts_are_kept_by_source(home: Path) -> None:
    (batch,) = batches(home, 8)
    step = Step(fresh(STAGE), STAGE.losses, 2)
    apart = replace(batch, sources=[0, 1, 0, 1, 0, 1, 0, 1])
    with torch.no_grad():
        sums_LS, whole_L1 = step(apart), Step(step.model, STAGE.losses, 1)(batch)
    torch.testing.assert_close(sums_LS.sum(1, keepdim=True), whole_L1)
    assert (sums_LS > 0).all() and (step.counts([apart]) > 0).all()


def test_a_loss_that_needs_its_batch_whole_is_refused_in_micro_batches() -> None:
    @spec
    class Whole(Captioning):
        whole_batch: ClassVar[bool] = True

    with pytest.raises(SpecError, match=r"Whole .* set stages\.align\.budget\.micro=8"):
        check(llava(stages__align__losses=(Whole(),))["align"], 4)
    check(llava(stages__align__losses=(Contrastive(),))["align"], 4)


def grads(step: Step) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in step.model.parameters() if p.grad is not None])
