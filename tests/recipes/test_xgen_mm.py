"""xGen-MM's page: sizes, trained parameters, and tiny steps over tiles and preferences."""

from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch

from bridgework.data.collate import Batch, collate
from bridgework.data.dataset import write
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.models import base, lora
from bridgework.recipes import xgen_mm
from bridgework.system import IMAGE, Layout, Stage
from bridgework.training.step import TrainingModule

STAGES = {
    "pretrain": {"bridge", "language"},
    "instruct": {"bridge", "language"},
    "multi_image": {"bridge", "language"},
    "prefer": {"language"},
    "safety": {"language"},
}


def tiny(name: str) -> Stage:
    return xgen_mm.system().tiny()[name]


def preferences(folder: Path) -> str:
    """Write conversations about synthetic images, each with a preferred and a rejected answer."""
    samples = (
        Sample(
            sample.key,
            sample.images,
            (
                Part("user", image=0),
                Part("user", text="What is it?"),
                Part("assistant", text=sample.text),
            ),
            rejected="no idea",
        )
        for sample, _ in zip(shapes(), range(32), strict=False)
    )
    write(samples, str(folder), source="test", license="CC0-1.0", made_by="test")
    return str(folder)


def batch(stage: Stage, home: Path) -> Batch:
    return collate(next(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0)), pad_id=0)


@pytest.mark.parametrize("name", STAGES)
def test_each_stage_trains_its_parts(name: str) -> None:
    stage = tiny(name)
    learning = base.set_trainable(stage.model.build(), stage.trains)
    assert {parameter.split(".")[0] for parameter in learning} == STAGES[name]
    adapters = {"lora_" in parameter for parameter in learning}
    assert adapters == {name in ("prefer", "safety")}


def test_parts_have_their_published_sizes() -> None:
    with torch.device("meta"):
        model = xgen_mm.ADAPTED.build(pretrained=False)
    sizes = {
        name: sum(p.numel() for p in part.parameters()) / 1e9
        for name, part in model.named_children()
    }
    adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) / 1e9
    assert round(sizes["language"] - adapters, 2) == 3.82  # Phi-3-mini
    assert 4.2 < sum(sizes.values()) - adapters < 4.6  # "4B"
    assert 0.02 < adapters / sizes["language"] < 0.03


def test_image_is_128_tokens_per_square_and_at_most_640() -> None:
    assert xgen_mm.BASE.image_tokens == 128
    places = {xgen_mm.TILED.num_image_tokens(Layout(*grid, 1, 1)) for grid in xgen_mm.TILED.grids}
    assert places == {384, 512, 640}


def test_tiny_step_over_tiles_updates_bridge_and_language(home: Path) -> None:
    stage = tiny("instruct")
    torch.manual_seed(0)
    model = stage.model.build()
    learning = base.set_trainable(model.train(), stage.trains)
    given = batch(stage, home)
    assert given.layouts_N4 is not None and given.pixels_N3HW is not None
    squares = int((1 + given.layouts_N4[:, 0] * given.layouts_N4[:, 1]).sum())
    assert len(given.pixels_N3HW) == squares > len(given.keys)
    assert int((given.ids_BT == IMAGE).sum()) == squares * stage.model.image_tokens
    TrainingModule(model, stage.losses)(given).sum().backward()
    unchanged = {
        n
        for n, p in model.named_parameters()
        if n in learning and (p.grad is None or not p.grad.any())
    }
    assert not {name for name in unchanged if "rotary" not in name}


def test_preference_loss_starts_at_ln_2_and_updates_only_the_adapters(
    home: Path, tmp_path: Path
) -> None:
    stage = tiny("prefer")
    source = replace(stage.data.sources[0], dataset=preferences(tmp_path / "pairs"))
    stage = replace(stage, data=replace(stage.data, sources=(source,)))
    torch.manual_seed(0)
    model = stage.model.build()
    learning = base.set_trainable(model, stage.trains)
    given = batch(stage, home)
    assert len(given.ids_BT) == 2 * len(given.keys)
    step = TrainingModule(model, stage.losses)
    sums_LR, counts_LR = step(given), step.counts([given])
    assert counts_LR.tolist() == [[1.0] * len(given.keys)]
    torch.testing.assert_close(sums_LR / counts_LR, torch.full_like(sums_LR, log(2)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        optimizer.zero_grad()
        loss = step(given).sum() / len(given.keys)
        loss.backward()
        optimizer.step()
    assert step(given).sum().item() / len(given.keys) < log(2)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(learning)


def test_dpo_reference_is_the_stages_initial_model(home: Path, tmp_path: Path) -> None:
    stage = tiny("prefer")
    torch.manual_seed(0)
    start: Any = tiny("instruct").model.build()
    model = stage.model.build()
    model.load_state_dict(lora.remap_adapters(model, start.state_dict()), strict=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    source = replace(stage.data.sources[0], dataset=preferences(tmp_path / "pairs"))
    given = batch(replace(stage, data=replace(stage.data, sources=(source,))), home)
    outputs = model.eval()(**given.inputs(), requested=frozenset({"preference"}))
    bare = start.eval()(**given.inputs())
    log_V = bare.logits_BTV[:, :-1].log_softmax(-1)
    targets = given.labels_BT[:, 1:]
    nats = (
        log_V.gather(-1, targets.clamp(min=0).unsqueeze(-1))
        .squeeze(-1)
        .masked_fill(targets < 0, 0.0)
        .sum(1)
    )
    references = torch.cat([outputs.chosen_reference_B, outputs.rejected_reference_B])
    torch.testing.assert_close(references, nats, atol=1e-3, rtol=1e-4)
    assert not torch.allclose(
        torch.cat([outputs.chosen_B, outputs.rejected_B]), references, atol=1e-2
    )
