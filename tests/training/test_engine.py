"""The engine: its step against plain torch, its two backends against each other."""

from pathlib import Path

import pytest
import torch
from torch import nn

from bridgework.data import reader
from bridgework.data.collate import collate
from bridgework.errors import RunError
from bridgework.models import base
from bridgework.system import Stage
from bridgework.training.deepspeed_backend import config
from bridgework.training.engine import Engine
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


SINGLE = {"stages__align__zero__stage": 0, "stages__align__zero__precision": "fp32"}


def backend_of(stage: Stage) -> str:
    return type(engine(stage, fresh(stage))._backend).__name__


def test_one_worker_without_zero_trains_without_deepspeed() -> None:
    assert backend_of(llava(**SINGLE)["align"]) == "TorchBackend"
    for other in (
        {"stages__align__zero__stage": 1},
        {"stages__align__zero__precision": "bf16"},
        {"stages__align__zero__config": {"wall_clock_breakdown": False}},
    ):
        assert backend_of(llava(**SINGLE | other)["align"]) == "DeepSpeedBackend"


def steps(engine: Engine, stage: Stage, home: Path, first: int, last: int) -> list[float]:
    """Losses of the steps, with dropout."""
    rows = reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=first)
    losses = []
    for step in range(first, last):
        engine.draws = step
        half = len(batch := next(rows)) // 2
        micro = [collate(part, pad_id=0) for part in (batch[:half], batch[half:])]
        losses.append(float(engine.train_step(micro, 1e-2).losses_L[0]))
    return losses


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_the_backends_have_the_same_losses_and_read_each_others_state(
    home: Path, tmp_path: Path, clip: float
) -> None:
    plain = llava(**SINGLE, stages__align__optim__clip=clip)["align"]
    # the value of the setting is DeepSpeed's default
    deepspeed = llava(
        **SINGLE,
        stages__align__optim__clip=clip,
        stages__align__zero__config={"wall_clock_breakdown": False},
    )["align"]
    results = {}
    for name, stage, other in (("plain", plain, deepspeed), ("deepspeed", deepspeed, plain)):
        own = engine(stage, fresh(stage))
        before = steps(own, stage, home, 0, 2)
        own.save(tmp_path / name, {"step": 2, "mixed": {}})
        after = steps(own, stage, home, 2, 4)
        resumed = engine(other, fresh(other))
        assert resumed.load(tmp_path / name)["step"] == 2
        assert steps(resumed, other, home, 2, 4) == pytest.approx(after, rel=1e-6)
        results[name] = before + after
    assert results["plain"] == pytest.approx(results["deepspeed"], rel=1e-6)
    assert len(set(results["plain"])) == 4
