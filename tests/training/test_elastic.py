"""Buffers of a model, after a resume with another number of workers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgework.data import reader
from bridgework.data.collate import collate
from bridgework.models import base
from bridgework.system import Stage
from bridgework.training.deepspeed_backend import convert_to_universal
from bridgework.training.engine import Engine
from bridgework.training.step import TrainingModule
from tests.training.support import fresh, llava
from tests.training.test_frozen_copy import PREFER, batch, prefer

pytestmark = pytest.mark.usefixtures("process_group")


def engine(stage: Stage, *, seen: float = 0.0, universal: bool = False) -> Engine:
    model: base.VLMModule = fresh(stage)
    model.register_buffer("seen", torch.tensor([seen]))
    learning = base.set_trainable(model, stage.trains)
    return Engine(TrainingModule(model, stage.losses), stage, learning, universal=universal)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_buffers_are_restored(home: Path, tmp_path: Path, zero: int) -> None:
    """A momentum encoder and its queues are buffers."""
    stage = llava(stages__align__zero__stage=zero)["align"]
    given = collate(
        next(reader.local(reader.ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0
    )
    before = engine(stage, seen=7.0)
    before.train_step([given], 1e-2)
    before.save(tmp_path / "own", {"step": 1})
    convert_to_universal(tmp_path / "own", tmp_path / "any")
    after = engine(stage, universal=True)
    after.load(tmp_path / "any")
    assert after.state(["seen"])["seen"].tolist() == [7.0]
    assert torch.equal(
        after.train_step([given], 0.0).losses_L, before.train_step([given], 0.0).losses_L
    )


def test_dpo_reference_is_restored(home: Path, tmp_path: Path) -> None:
    stage = prefer(stage=2)[PREFER]
    stage = replace(stage, starts_from=None)
    given = batch(stage, home)
    before = engine(stage)
    before.train_step([given], 1e-2)
    before.save(tmp_path / "own", {"step": 1})
    convert_to_universal(tmp_path / "own", tmp_path / "any")
    after = engine(stage, universal=True)
    after.load(tmp_path / "any")
    assert torch.equal(
        before.train_step([given], 0.0).losses_L, after.train_step([given], 0.0).losses_L
    )
