"""llava:next: trained parameters, tokens per image, and one step of the tiny program."""

from pathlib import Path

import torch

from bridgework.data.collate import collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.models import base
from bridgework.recipes import llava
from bridgework.system import IMAGE, Layout
from bridgework.training.step import TrainingModule

TRAINS = {"align": {"bridge"}, "instruct": {"vision", "bridge", "tiles", "language"}}


def test_each_stage_trains_its_parts() -> None:
    for stage in llava.next().tiny().stages:
        learning = base.set_trainable(stage.model.build(), stage.trains)
        assert {name.split(".")[0] for name in learning} == TRAINS[stage.name]


def test_image_is_576_tokens_and_its_tiles_with_newlines() -> None:
    model = llava.NEXT_MODEL
    assert model.image_tokens == 576
    assert model.num_image_tokens(Layout(2, 2, 1000, 1000)) == 576 + 48 * 49 == 2928
    assert model.num_image_tokens(Layout(3, 1, 1008, 336)) == 576 + 24 * 73


def test_one_tiny_step_reads_tiles_and_updates_the_newline(home: Path) -> None:
    stage = llava.next().tiny()["instruct"]
    torch.manual_seed(0)
    model = stage.model.build()
    learning = base.set_trainable(model.train(), stage.trains)
    batch = collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)
    assert batch.layouts_N4 is not None
    layouts = [Layout(*row) for row in batch.layouts_N4.tolist()]
    assert int((batch.ids_BT == IMAGE).sum()) == sum(map(stage.model.num_image_tokens, layouts))
    TrainingModule(model, stage.losses)(batch).sum().backward()
    moved = {
        name.split(".")[0]
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.any()
    }
    assert moved == TRAINS["instruct"] and set(learning) >= {"tiles.newline"}
