"""The frozen DPO reference in a run: after a resume, under ZeRO, and not in the artifact."""

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bridgework import artifacts
from bridgework.data import reader
from bridgework.data.collate import Batch, collate
from bridgework.errors import SpecError
from bridgework.losses import DPO, LanguageModeling
from bridgework.models import PrefixVLMConfig, base
from bridgework.system import Stage, System
from bridgework.training.engine import Engine
from bridgework.training.step import TrainingModule
from tests.training.support import Stop, fresh, go, llava, losses, same, stop_at, weights

PREFER = "instruct"  # LLaVA's stage that trains bridge and language model, with another loss


def prefer(steps: int = 4, **shard: Any) -> System:
    """Return two stages: captioning, and DPO that starts from it."""
    system = llava(steps)
    first, second = system["align"], system[PREFER]
    second = replace(
        second,
        model=replace(cast(PrefixVLMConfig, second.model), reference="frozen_copy"),
        losses=(DPO(beta=0.5),),
        data=second.data.tiny("preferences"),
        zero=replace(second.zero, **shard),
        evals=(),
    )
    return replace(system, stages=(replace(first, evals=()), second))


def batch(stage: Stage, home: Path) -> Batch:
    return collate(
        next(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0
    )


def engine(stage: Stage) -> tuple[Engine, Any]:
    model: Any = fresh(stage)
    learning = base.set_trainable(model, stage.trains)
    return Engine(TrainingModule(model, stage.losses), stage, learning), model


def held(model: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = model.reference.state_dict()
    return found


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_resumed_dpo_matches_unbroken_dpo(home: Path, run: str, zero: int) -> None:
    system = prefer(6, stage=zero)
    go(system, home, f"{run}-whole", stages=None)
    with pytest.raises(Stop):
        go(system, home, run, stages=None, checkpoint_every=2, evaluate_every=1, report=stop_at(5))
    go(system, home, run, stages=None, checkpoint_every=2)
    assert same(weights(home, run, PREFER), weights(home, f"{run}-whole", PREFER))
    seen, unbroken = losses(home, run, PREFER), dict(losses(home, f"{run}-whole", PREFER))
    assert all(unbroken[step] == value for step, value in seen)
    assert unbroken[0] == pytest.approx(log(2)) != pytest.approx(unbroken[5], abs=1e-2)
    assert [step for step, _ in seen][-2:] == [4, 5]


def test_artifact_does_not_hold_the_reference(home: Path, run: str) -> None:
    system = prefer(2, stage=2)
    go(system, home, run, stages=None)
    assert weights(home, run, PREFER).keys() == weights(home, run, "align").keys()
    loaded = artifacts.load(home / "runs" / run / PREFER / "artifact")
    assert loaded.stage == system[PREFER] and not held(loaded.model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("zero", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16")])
def test_checkpoint_restores_the_reference_exactly(
    home: Path, tmp_path: Path, zero: int, precision: str
) -> None:
    stage = prefer(stage=zero, precision=precision)[PREFER]
    given = batch(stage, home)
    before, model = engine(stage)
    first = before.train_step([given], 1e-2)
    assert float(first.losses_L[0]) == pytest.approx(log(2), abs=1e-6)
    before.save(tmp_path, {"step": 1})
    start = held(model)
    assert any(
        not torch.equal(p, start[name]) for name, p in model.named_parameters() if name in start
    )
    after, again = engine(stage)
    after.load(tmp_path)
    assert same(held(again), start)
    losses_of = [e.train_step([given], 0.0).losses_L for e in (before, after)]
    assert torch.equal(*losses_of) and float(losses_of[0][0]) != pytest.approx(log(2), abs=1e-3)


@pytest.mark.usefixtures("process_group")
def test_zero_3_is_rejected_with_the_fixes(home: Path) -> None:
    stage = prefer(stage=3)[PREFER]
    with pytest.raises(SpecError, match=r"(shard|zero)\.stage"):
        engine(stage)[0].train_step([batch(stage, home)], 1e-2)


def test_stage_without_dpo_makes_no_copy(home: Path, run: str) -> None:
    stage = replace(
        prefer(2)[PREFER], losses=(LanguageModeling(),), data=llava()[PREFER].data, starts_from=None
    )
    go(replace(prefer(2), stages=(stage,)), home, run, stages=None, checkpoint_every=1)
    (checkpoint,) = (home / "runs" / run / PREFER / "checkpoints").glob(
        "00000001-*/state/*model_states.pt"
    )
    saved = torch.load(checkpoint, weights_only=True)["module"]
    assert saved and not [name for name in saved if "reference" in name]
