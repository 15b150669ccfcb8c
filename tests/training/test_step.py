"""Model and losses as one module: sums and counts, so that a batch may be cut anywhere."""

from pathlib import Path

import pytest
import torch

from bridgework.data import reader
from bridgework.data.batch import Batch, collate
from bridgework.errors import SpecError
from bridgework.losses import Captioning, Contrastive
from bridgework.system import Stage
from bridgework.training.step import Step, check
from tests.training.support import fresh, llava

STAGE = llava()["align"]


def batches(home: Path, size: int, stage: Stage = STAGE) -> list[Batch]:
    rows = next(reader.local(reader.Feed.of(stage, home), rank=0, world=1, start=0))
    return [collate(rows[i : i + size], pad_id=0) for i in range(0, len(rows), size)]


def test_micro_batches_sum_to_the_whole_batch(home: Path) -> None:
    step = Step(fresh(STAGE), STAGE.losses).eval()
    with torch.no_grad():
        (whole,) = (step(b) for b in batches(home, 8))
        parts = torch.stack([step(b) for b in batches(home, 3)]).sum(0)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(step.counts(batches(home, 3)), step.counts(batches(home, 8)))


def test_one_forward_feeds_every_loss(home: Path) -> None:
    model, (batch,) = fresh(STAGE), batches(home, 8)
    both = Step(model, (Captioning(), Contrastive(weight=0.1))).eval()
    assert both.wants == {"logits", "pooled"}
    with torch.no_grad():
        each = torch.cat([Step(model, (loss,)).eval()(batch) for loss in both.losses])
        torch.testing.assert_close(both(batch), each)


def test_counts_are_labelled_tokens_and_samples(home: Path) -> None:
    (batch,) = batches(home, 8)
    counts = Step(fresh(STAGE), (Captioning(), Contrastive())).counts([batch])
    assert counts.tolist() == [float((batch.labels_BT[:, 1:] != -100).sum()), 8.0]


def test_contrast_in_micro_batches_is_refused() -> None:
    stage = llava(stages__align__budget__micro=2)["align"]
    check(stage, 4)
    with pytest.raises(SpecError, match=r"Contrastive .* set stages\.align\.budget\.micro=8"):
        check(llava(stages__align__losses=(Contrastive(),))["align"], 4)
