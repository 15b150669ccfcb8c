"""Flamingo's page: sizes, trained parameters, and one step of the tiny program."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bridgework.config import override
from bridgework.data.collate import Batch, collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.evaluation import VQA, Captions
from bridgework.inference.pipeline import Pipeline
from bridgework.models import base
from bridgework.recipes import flamingo
from bridgework.system import END, IMAGE, Scoring, Stage
from bridgework.training.engine import Engine, StepResult
from bridgework.training.step import TrainingModule, by_source

NEW = {"system": 1.2, "b9": 1.6, "b80": 10.0}  # billions of parameters in the blocks (table 5)


def test_gated_blocks_have_about_the_published_size() -> None:
    """They are a little smaller: keys and values read SigLIP's 1152 features, not 1536.

    9B has 8 blocks, not 10.
    """
    for variant, published in NEW.items():
        with torch.device("meta"):
            model = getattr(flamingo, variant)()["train"].model.build(pretrained=False)
        size = sum(p.numel() for p in model.gates.parameters()) / 1e9
        assert 0.8 * published < size <= published, variant


def test_first_step_updates_only_gates_and_extra_rows_and_reads_every_source(home: Path) -> None:
    stage = flamingo.system().tiny()["train"]
    torch.manual_seed(0)
    model = stage.model.build()
    learning = base.set_trainable(model, stage.trains)
    assert {name.split(".")[0] for name in learning} == {"bridge", "gates", "extra"}
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    assert int((batch.ids_BT == IMAGE).sum()) == len(batch.ids_BT) and bool(
        (batch.labels_BT == END).any()
    )
    step = TrainingModule(model, stage.losses)
    lambdas_S = torch.tensor([source.loss_weight for source in stage.data.leaves])
    own_R = torch.tensor(batch.sources)
    sums_LS, counts_LS = (
        by_source(x, own_R, len(lambdas_S)) for x in (step(batch), step.counts([batch]))
    )
    assert bool((counts_LS > 0).all())
    (lambdas_S * sums_LS / counts_LS).sum().backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {
        name for name in learning if "alpha" in name or name.startswith("extra")
    }  # closed gates pass no gradient to the resampler


def test_evals_are_cider_and_vqa_accuracy_at_0_to_32_shots() -> None:
    stage = flamingo.system()["train"]
    judged_on = (
        (Captions, "coco-karpathy-val", "coco-karpathy-train"),
        (VQA, "vqav2-val", "vqav2-train"),
    )
    for kind, judged, support in judged_on:
        shots = [judge.shots for judge in stage.evals if isinstance(judge, kind)]
        assert [s.count for s in shots if s is not None] == [0, 4, 8, 16, 32]
        assert {(s.support, s.select) for s in shots if s is not None} == {(support, "random")}
        assert {judge.dataset for judge in stage.evals if isinstance(judge, kind)} == {judged}
    assert stage.scoring == Scoring(prior=False)


def test_every_tiny_eval_runs_on_the_tiny_model(home: Path) -> None:
    stage = flamingo.system().tiny()["train"]
    torch.manual_seed(0)
    pipe = Pipeline(stage.model.build().eval(), stage)
    for judge in stage.evals:
        result = judge.run(pipe, home)
        assert {name.partition(".")[2] for name in result.metrics} == set(judge.better)
        assert all(math.isfinite(value) for value in result.metrics.values())


# Loss weights per source (B.1.2)

LAMBDAS = {"m3w": 1.0, "align": 0.25, "ltip": 2.0, "vtp": 0.5}


def weighted_stage(lambdas: dict[str, float], micro: int = 8) -> Stage:
    stage = override(
        flamingo.system().tiny()["train"],
        {"zero.stage": 0, "optim.clip": 0.0, "budget.micro": micro},
    )
    return override(
        stage, {f"data.sources.{name}.loss_weight": weight for name, weight in lambdas.items()}
    )


def half_open(stage: Stage) -> base.VLMModule:
    """Return the stage's model with half-open gates, so that the resampler learns at once."""
    torch.manual_seed(0)
    model: base.VLMModule = stage.model.build()
    for name, parameter in model.named_parameters():
        if "alpha" in name:
            nn.init.constant_(parameter, 0.5)
    return model


def one_step(lambdas: dict[str, float], batches: list[Batch], micro: int = 8) -> StepResult:
    stage = weighted_stage(lambdas, micro)
    model = half_open(stage)
    learning = base.set_trainable(model, stage.trains)
    return Engine(TrainingModule(model, stage.losses), stage, learning).train_step(batches, 0.0)


def grad_norm_in_plain_torch(lambdas: dict[str, float], batch: Batch) -> Tensor:
    """Return the gradient norm of the paper's loss (2.4).

    It is the sum over sources of lambda times the mean over samples of their sums over tokens.
    """
    stage = weighted_stage(lambdas)
    model = half_open(stage)
    base.set_trainable(model.train(), stage.trains)
    outputs = model(**batch.inputs())
    nats_BT = nn.functional.cross_entropy(
        outputs.logits_BTV[:, :-1].transpose(1, 2), outputs.labels_BT[:, 1:], reduction="none"
    )
    real_BT = outputs.labels_BT[:, 1:] >= 0
    total = torch.zeros(())
    for number, weight in enumerate(lambdas.values()):
        own = torch.tensor([source == number for source in batch.sources])
        total = total + weight * nats_BT[own].sum() / real_BT[own].any(1).sum()
    total.backward()
    return nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@pytest.mark.usefixtures("process_group")
def test_step_loss_is_the_weighted_sum_of_source_means(home: Path) -> None:
    rows = next(local(ReaderConfig.of(weighted_stage(LAMBDAS), home), rank=0, world=1, start=0))
    full, parts = (
        collate(rows, pad_id=0),
        [collate(rows[i : i + 2], pad_id=0) for i in range(0, 8, 2)],
    )
    assert sorted(set(full.sources)) == [0, 1, 2, 3]
    one, other = one_step(LAMBDAS, [full]), {name: 3 * weight for name, weight in LAMBDAS.items()}
    weights_S = torch.tensor([*LAMBDAS.values()])
    torch.testing.assert_close(one.losses_L, one.means_LS @ weights_S)
    assert one.norm == pytest.approx(float(grad_norm_in_plain_torch(LAMBDAS, full)), rel=1e-4)
    thrice = one_step(other, [full])
    assert float(thrice.losses_L) == pytest.approx(3 * float(one.losses_L), rel=1e-5)
    assert thrice.norm == pytest.approx(3 * one.norm, rel=1e-4)
    for batches, micro in ((parts, 2), (parts[::-1], 2), ([collate(rows[::-1], pad_id=0)], 8)):
        same = one_step(LAMBDAS, batches, micro)
        torch.testing.assert_close(same.losses_L, one.losses_L, rtol=1e-5, atol=1e-6)
        assert same.norm == pytest.approx(one.norm, rel=1e-3)


@pytest.mark.usefixtures("process_group")
def test_source_of_weight_0_changes_nothing(home: Path) -> None:
    rows = next(local(ReaderConfig.of(weighted_stage(LAMBDAS), home), rank=0, world=1, start=0))
    without = {**LAMBDAS, "m3w": 0.0}
    left = [row for row in rows if row.source != 0]
    full, less = (
        one_step(without, [collate(rows, pad_id=0)]),
        one_step(without, [collate(left, pad_id=0)]),
    )
    torch.testing.assert_close(full.losses_L, less.losses_L, rtol=1e-5, atol=1e-6)
    assert full.norm == pytest.approx(less.norm, rel=1e-3) and full.norm != pytest.approx(
        one_step(LAMBDAS, [collate(rows, pad_id=0)]).norm, rel=1e-2
    )
