"""A rank that happens to have no image in a step: nobody waits for it, and all learn what one process would have."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import product
from math import isfinite
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bridgework import artifacts
from bridgework.data import reader
from bridgework.data.collate import Row
from bridgework.data.dataset import write
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.system import Budget, Mixture, Source, Stage, System, ZeRO, load
from bridgework.training import loop
from tests.training.support import losses

WIRINGS = {
    "linear": "llava:v1/instruct",
    "mlp": "llava/instruct",
    "mlp over tiles": "llava:next/instruct",
    "concat": "minigpt4:without_qformer/polish",
    "qformer": "minigpt4/polish",
    "qformer that hears": "instructblip:vicuna_7b/instruct",
    "encoder-decoder": "instructblip/instruct",
    "resampler over tiles": "xgen_mm/instruct",
    "cross-attention": "flamingo/train",
}
Case = tuple[str, Literal[0, 3]]  # a wiring under a stage of ZeRO
QUICK: tuple[Case, ...] = (("mlp", 3), ("cross-attention", 3))
EVERY: tuple[Case, ...] = tuple(product(WIRINGS, (0, 3)))
HALF = 4  # rows of a rank
STEPS = (
    ("shown", "told"),
    ("told", "shown"),
    ("told", "told"),
)  # what the first and the second rank have


def stage_of(wiring: str, zero: Literal[0, 3], dataset: str) -> Stage:
    """A stage of a tiny system by itself, in float32."""
    name, _, stage = WIRINGS[wiring].partition("/")
    whole = load(name).tiny()[stage]
    return replace(
        whole,
        name="alone",
        starts_from=None,
        evals=(),
        curation=None,
        data=Mixture(
            sources=(Source(name="talks", dataset=dataset),),
            template=whole.data.template,
            lanes=2,
            window=1,
        ),
        budget=Budget(steps=len(STEPS), batch=2 * HALF, micro=2 * HALF),
        optim=replace(whole.optim, warmup=0.0, weight_decay=0.0),
        zero=ZeRO(stage=zero, precision="fp32"),
    )


def talks(shown: bool) -> Iterator[Sample]:
    """Questions and answers about one and two images, or about none."""
    images = [sample.images[0] for sample in shapes(rows=4 * HALF, size=40, seed=1)]
    for row in range(2 * HALF):
        files = tuple(images[2 * row : 2 * row + 1 + row % 2]) if shown else ()
        asked = (
            *(Part("user", image=place) for place in range(len(files))),
            Part("user", text=f"Number {row}?"),
        )
        yield Sample(f"{shown}-{row}", files, (*asked, Part("assistant", text=f"It is {row}.")))


def rows(stage: Stage, folder: Path, rank: int, world: int) -> Iterator[list[Row]]:
    """What a rank is fed: of two, each its half of STEPS; one alone has both."""
    halves = {}
    for kind in ("shown", "told"):
        source = Source(name="talks", dataset=str(folder / kind))
        budget = Budget(steps=2 * len(STEPS), batch=HALF, micro=HALF)
        of_kind = replace(stage, data=replace(stage.data, sources=(source,)), budget=budget)
        halves[kind] = reader.local(
            reader.ReaderConfig.of(of_kind, folder), rank=0, world=1, start=0
        )
    for step, kinds in enumerate(STEPS):
        batch = [row for kind in kinds for row in next(halves[kind])]
        placed = [replace(row, step=step, place=place) for place, row in enumerate(batch)]
        yield placed[rank * HALF : (rank + 1) * HALF] if world == 2 else placed


def _next(fed: Iterator[list[Row]], start: int) -> Iterator[list[Row]]:
    return fed


def train(folder: Path, cases: Iterable[Case], rank: int, world: int) -> None:
    """One of the processes: every case in turn."""
    for wiring, zero in cases:
        stage = stage_of(wiring, zero, str(folder / "shown"))
        place = folder / "runs" / f"{wiring}-{zero}-{world}" / stage.name
        place.mkdir(parents=True, exist_ok=True)
        system = System(name="alone", paper="none", stages=(stage,))
        job = loop.TrainJob(
            system, stage.name, reader.ReaderConfig.of(stage, folder), place, folder
        )
        fed = rows(stage, folder, rank, world)
        loop.run(job, partial(_next, fed), lambda metrics, step: None, rank=rank, world=world)
        dist.barrier()


def one_of_two(rank: int, folder: Path, cases: tuple[Case, ...]) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    meeting, patience = f"file://{folder}/rendezvous", timedelta(minutes=10)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=patience)
    train(folder, cases, rank, world=2)
    dist.destroy_process_group()


def run(folder: Path, cases: tuple[Case, ...]) -> Path:
    """The folder with the cases on two processes and, side by side with them, each wiring in this one."""
    for kind in ("shown", "told"):
        write(
            talks(kind == "shown"),
            str(folder / kind),
            source="test",
            license="CC0-1.0",
            made_by="tests",
        )
    two = spawn(one_of_two, (folder, cases), nprocs=2, join=False)
    alone: dict[str, Literal[0, 3]] = {wiring: 0 for wiring, _ in cases}
    train(folder, alone.items(), rank=0, world=1)
    while not two.join():
        pass
    return folder


@pytest.fixture(scope="module")
def quick(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("quick"), QUICK)


@pytest.fixture(scope="module")
def every(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("every"), EVERY)


@pytest.mark.parametrize(("wiring", "zero"), QUICK)
def test_a_rank_without_images_does_not_change_what_is_learned(
    wiring: str, zero: int, quick: Path
) -> None:
    compare(quick, wiring, zero)


@pytest.mark.slow
@pytest.mark.parametrize(("wiring", "zero"), EVERY)
def test_no_wiring_under_any_zero_waits_for_images(wiring: str, zero: int, every: Path) -> None:
    compare(every, wiring, zero)


def compare(folder: Path, wiring: str, zero: int) -> None:
    """Two processes against one: losses, weights, and that the images are in both."""
    one, two = (losses(folder, f"{wiring}-{each}", "alone") for each in ("0-1", f"{zero}-2"))
    assert [step for step, _ in two] == [0, 1, 2] and all(isfinite(loss) for _, loss in two)
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    expected, found = (
        artifacts.weights(folder / "runs" / f"{wiring}-{each}" / "alone" / "artifact")
        for each in ("0-1", f"{zero}-2")
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    stage = stage_of(wiring, 0, str(folder / "shown"))
    torch.manual_seed(stage.seed)
    before = dict(stage.model.build().named_parameters())
    bridge = [name for name in found if name.startswith("bridge.") and name in before]
    assert any(
        not torch.equal(found[name], before[name].detach()) for name in bridge
    )  # which only images reach
