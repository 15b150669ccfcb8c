"""Dropout in training: masks depend on positions, so any split of the batch has the same loss."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bridgework.config import override
from bridgework.models.base import set_trainable
from bridgework.system import System, load
from tests.training.support import fresh, job, train_ranks

LORA = "lora(rank=4,alpha=8,dropout=0.1)"
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "projector": ("llava", "align", {"model.bridge": "mlp(dropout=0.1)"}),
    "qformer three objectives": ("blip2", "represent", {"model.bridge.dropout": 0.1}),
    "qformer bridge": ("blip2:flan_t5", "generate", {"model.bridge.dropout": 0.1}),
    "encoder, decoder, twin": ("blip", "pretrain", {"model.text.dropout": 0.1}),
    "instruction": ("instructblip", "instruct", {"model.bridge.dropout": 0.1}),
    "adapters": (
        "llava",
        "instruct",
        {"model.language.lora": LORA, "trains": {"language.*lora_*": 1.0}},
    ),
    "packed": (
        "llava",
        "instruct",
        {
            "model.language.lora": LORA,
            "trains": {"language.*lora_*": 1.0},
            "data.packing": "packing()",
        },
    ),
    "preference": ("xgen_mm", "prefer", {"model.language.lora.dropout": 0.1}),
}
IN_PARTS = (
    "projector",
    "qformer bridge",
    "instruction",
    "adapters",
    "packed",
    "preference",
)  # no loss needs the batch at once


def system(case: str, micro: int = 8, *, dropout: bool = True) -> System:
    """Return one tiny stage on synthetic data."""
    name, stage_name, changes = CASES[case]
    stage = load(name).tiny()[stage_name]
    kind = (
        "preferences" if any(loss.requires == "preference" for loss in stage.losses) else "shapes"
    )
    plain = replace(stage, evals=(), starts_from=None, curation=None, data=stage.data.tiny(kind))
    own = changes if dropout else {path: without(value) for path, value in changes.items()}
    fast = {"optim.peak_lr": 0.02, "optim.warmup": 0.0}  # adapters begin as nothing
    made = override(
        plain, {"budget.steps": 3, "budget.micro": micro, "zero.stage": 0, **fast, **own}
    )
    return System(name="dropout", paper="", stages=(made,))


def without(value: Any) -> Any:
    return (
        value.replace("dropout=0.1", "dropout=0.0")
        if isinstance(value, str)
        else 0.0
        if value == 0.1
        else value
    )


def two_ranks(rank: int, home: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for number, case in enumerate(CASES):
        found = train_ranks(job(system(case), Path(home), Path(folder) / str(number)), rank, 2)
        if rank == 0:
            (Path(folder) / f"{number}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_loss_with_dropout_is_the_same_on_two_workers(home: Path, tmp_path: Path) -> None:
    alone = {
        case: train_ranks(job(system(case), home, tmp_path / f"alone-{i}"))
        for i, case in enumerate(CASES)
    }
    spawn(two_ranks, (str(home), str(tmp_path)), nprocs=2)
    for number, (case, expected) in enumerate(alone.items()):
        found = {
            int(step): loss
            for step, loss in json.loads((tmp_path / f"{number}.json").read_text()).items()
        }
        assert found == pytest.approx(expected, rel=1e-5), case


@pytest.mark.parametrize("case", IN_PARTS)
@pytest.mark.usefixtures("process_group")
def test_loss_with_dropout_is_the_same_in_micro_batches(
    case: str, home: Path, tmp_path: Path
) -> None:
    complete = train_ranks(job(system(case), home, tmp_path / "complete"))
    assert train_ranks(job(system(case, micro=3), home, tmp_path / "parts")) == pytest.approx(
        complete, rel=1e-5
    )
    assert train_ranks(job(system(case, dropout=False), home, tmp_path / "off")) != pytest.approx(
        complete, rel=1e-5
    )


def test_frozen_modules_draw_no_random_numbers() -> None:
    stage = system("adapters").stages[0]
    model: Any = fresh(stage)
    set_trainable(model, stage.trains)
    model.train()
    assert not model.vision.training and not model.bridge.training
