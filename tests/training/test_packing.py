"""Packing: samples in one sequence have the same loss and gradient as alone, in every system."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bridgework.data.collate import Row, collate
from bridgework.data.reader import ReaderConfig, local
from bridgework.errors import SpecError
from bridgework.models import base
from bridgework.system import Packing, Stage, load
from bridgework.training.step import TrainingModule

PACKED = (
    "llava/instruct",
    "minigpt4/align",
    "instructblip/instruct",
    "instructblip:vicuna_7b/instruct",
    "blip2/generate",
    "blip2:flan_t5/generate",
    "xgen_mm/pretrain",
    "flamingo/train",
)


def stage_of(name: str, packing: Packing | None, batch: int = 16) -> Stage:
    """Return a system with two lanes, so that a sequence may hold many samples."""
    system, _, stage = name.partition("/")
    tiny = load(system)[stage].tiny()
    budget = replace(tiny.budget, batch=batch, steps=4)
    data = replace(
        tiny.data, packing=packing, lanes=2, window=2, max_tokens=min(512, tiny.model.context)
    )
    return replace(tiny, budget=budget, data=data)


def first_window(stage: Stage, home: Path) -> list[list[Row]]:
    return list(local(ReaderConfig.of(stage, home), rank=0, world=1, start=0))[: stage.data.window]


def taken(
    stage: Stage, steps: Sequence[Sequence[Row]]
) -> tuple[dict[tuple[int, str], float], torch.Tensor]:
    """Return the summed loss of each sample, by source and key, and the gradient of all."""
    torch.manual_seed(0)
    model = stage.model.build()
    base.set_trainable(model, stage.trains)
    step, sums = TrainingModule(model, stage.losses).train(), {}
    for rows in steps:
        batch = collate(rows, pad_id=0)
        sums_LR = step(batch)
        sums_LR.sum().backward()
        sums |= dict(
            zip(zip(batch.sources, batch.keys, strict=True), sums_LR[0].tolist(), strict=True)
        )
    return sums, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", PACKED)
def test_packed_loss_matches_padded_loss(home: Path, name: str) -> None:
    apart, together = stage_of(name, None), stage_of(name, Packing())
    padded, packed = first_window(apart, home), first_window(together, home)
    alone, gradient = taken(apart, padded)
    shared, gradient_shared = taken(together, packed)
    assert alone.keys() == shared.keys() and len(alone) == 32
    for sample, value in alone.items():
        assert shared[sample] == pytest.approx(value, rel=1e-5)
    torch.testing.assert_close(gradient_shared, gradient, rtol=1e-3, atol=1e-4)
    assert len({(row.step, row.place) for rows in packed for row in rows}) < 32


def test_a_window_packs_the_rows_that_it_pads(home: Path) -> None:
    """Complete windows hold the same samples; only the step of a sample may differ."""
    padded, packed = (
        [sorted((r.source, r.key) for rows in steps[t : t + 2] for r in rows) for t in (0, 2)]
        for steps in (
            list(
                local(
                    ReaderConfig.of(stage_of("llava/instruct", p), home), rank=0, world=1, start=0
                )
            )
            for p in (None, Packing(samples=3))
        )
    )
    assert padded == packed


@pytest.mark.parametrize("world", [1, 2])
def test_packed_batches_are_the_same_for_any_world_size_and_resume(home: Path, world: int) -> None:
    feed = ReaderConfig.of(stage_of("llava/instruct", Packing(tokens=400, images=3)), home)
    whole = list(local(feed, rank=0, world=1, start=0))
    for start in range(4):
        ranks = [list(local(feed, rank=rank, world=world, start=start)) for rank in range(world)]
        for step, expected in enumerate(whole[start:]):
            found = sorted((r.place, r.key) for rank in ranks for r in rank[step])
            assert found == sorted((r.place, r.key) for r in expected)


@pytest.mark.parametrize(
    "name", ["clip/contrast", "blip/captioner", "blip2/represent", "xgen_mm/prefer"]
)
def test_packing_is_rejected_if_samples_cannot_share_a_sequence(name: str) -> None:
    with pytest.raises(
        SpecError, match=r"data\.packing: .*\. Fix: set stages\.\w+\.data\.packing=none"
    ):
        stage_of(name, Packing())
