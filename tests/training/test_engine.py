"""The DeepSpeed engine against plain torch."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bridgework.data import reader
from bridgework.data.collate import collate
from bridgework.errors import RunError
from bridgework.models import base
from bridgework.system import Stage
from bridgework.training.deepspeed_engine import Engine, config
from bridgework.training.step import TrainingModule
from tests.training.support import fresh, llava

pytestmark = pytest.mark.usefixtures("process_group")


def engine(stage: Stage, model: base.VLMModule) -> Engine:
    return Engine(
        TrainingModule(model, stage.losses), stage, base.set_trainable(model, stage.trains)
    )


def test_config_is_overridden_by_dotted_path() -> None:
    overlay = {"zero_optimization.overlap_comm": False, "wall_clock_breakdown": True}
    made = config(llava(stages__align__zero__config=overlay)["align"])
    assert made["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert made["wall_clock_breakdown"] is True


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_gradient_norm_matches_torch(home: Path, zero: int) -> None:
    stage = llava(stages__align__zero__stage=zero)["align"]
    batch = collate(
        next(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0
    )
    model = fresh(stage)
    base.set_trainable(model, stage.trains)
    logits_BTV, labels_BT = model(**batch.inputs()).logits_BTV, batch.labels_BT
    nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten()
    ).backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    norm = engine(stage, fresh(stage)).train_step([batch], 0.0).norm
    assert norm == pytest.approx(float(grads.norm()), rel=1e-4)


@pytest.mark.parametrize("zero", [0, 3])
def test_state_is_complete_named_and_float32(zero: int) -> None:
    stage = llava(stages__align__zero__stage=zero, stages__align__zero__precision="bf16")["align"]
    expected = {
        n: p.detach().clone() for n, p in fresh(stage).bridge.named_parameters(prefix="bridge")
    }
    found = engine(stage, fresh(stage)).state(expected)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "fp32")]
)
def test_limit_also_applies_to_the_optimizer_copy(home: Path, zero: int, precision: str) -> None:
    changes = {"stages__align__zero__stage": zero, "stages__align__zero__precision": precision}
    stage = llava(**changes)["align"]
    batch = collate(
        next(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0
    )
    model = fresh(stage)
    model.limits = {"bridge.linear_1.bias": (-1e-3, 1e-3)}
    with torch.no_grad():
        model.get_parameter("bridge.linear_1.bias").fill_(5.0)
    limited = engine(stage, model)
    for _ in range(2):
        limited.train_step([batch], 1e-3)
        assert float(limited.state(model.limits)["bridge.linear_1.bias"].abs().max()) <= 1e-3 + 1e-5


def test_integers_stay_integers() -> None:
    stage, model = llava()["align"], fresh(llava()["align"])
    model.register_buffer("steps_seen", torch.tensor(2**24 + 1))  # which float32 cannot hold
    assert engine(stage, model).state(["steps_seen"])["steps_seen"].equal(torch.tensor(2**24 + 1))


def test_folder_without_state_is_rejected(tmp_path: Path) -> None:
    stage = llava()["align"]
    with pytest.raises(RunError, match="no state"):
        engine(stage, fresh(stage)).load(tmp_path)
