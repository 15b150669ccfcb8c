"""ZeRO 2 and 3 match ZeRO 0 for every wiring that is not rejected before it starts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bridgework.config import override
from bridgework.data.catalog import resolve
from bridgework.errors import SpecError
from bridgework.losses import LanguageModeling, QueryContrast
from bridgework.system import System, load
from tests.training.support import go, job, train_ranks
from tests.training.test_frozen_copy import PREFER, prefer

SPLIT = {
    "zero_optimization.stage3_param_persistence_threshold": 0
}  # else tiny parameters stay complete on every rank
STEPS, EVERY = 4, 3
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "three objectives": ("blip2", "represent", {}),
    "two passes over micro-batches": (
        "blip2",
        "represent",
        {"losses": (QueryContrast(), LanguageModeling()), "budget.micro": 3},
    ),
    "a limit on a parameter of one number": (
        "clip",
        "contrast",
        {"optim.peak_lr": 0.05, "optim.warmup": 0.0},
    ),
    "a Q-Former that reads instructions": ("instructblip", "instruct", {}),
    "gated layers": ("flamingo", "train", {}),
}


def system(case: str, zero: int) -> System:
    name, stage_name, changes = CASES[case]
    stage = load(name).tiny()[stage_name]
    plain = replace(
        stage, evals=(), starts_from=None, curation=None, data=stage.data.tiny("shapes")
    )
    made = override(
        plain, {"budget.steps": STEPS, "zero.stage": zero, "zero.config": SPLIT, **changes}
    )
    return System(name="zero", paper="", stages=(made,))


def two_ranks(rank: int, home: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for number, case in enumerate(CASES):
        for zero in (2, 3):
            place = Path(folder) / f"{number}-{zero}"
            found = train_ranks(job(system(case, zero), Path(home), place, every=EVERY), rank, 2)
            if rank == 0:
                (place / "losses.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", ["three objectives", "a limit on a parameter of one number"])
@pytest.mark.usefixtures("process_group")
def test_zero_3_matches_zero_0(case: str, home: Path, tmp_path: Path) -> None:
    complete, split = (
        train_ranks(job(system(case, zero), home, tmp_path / str(zero))) for zero in (0, 3)
    )
    assert split == pytest.approx(complete, rel=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_match_complete_ones_and_resume_on_another_number_of_workers(
    home: Path, tmp_path: Path
) -> None:
    expected = {
        case: train_ranks(job(system(case, 0), home, tmp_path / f"{i}-0"))
        for i, case in enumerate(CASES)
    }
    spawn(two_ranks, (str(home), str(tmp_path)), nprocs=2)
    for number, case in enumerate(CASES):
        for zero in (2, 3):
            place = tmp_path / f"{number}-{zero}"
            found = {int(k): v for k, v in json.loads((place / "losses.json").read_text()).items()}
            assert found == pytest.approx(expected[case], rel=1e-5), (case, zero)
            given = job(system(case, zero), home, place, every=EVERY)
            shutil.rmtree(given.folder / "artifact")
            shutil.rmtree(given.folder / "journal")
            assert train_ranks(given) == {3: pytest.approx(expected[case][3], rel=1e-5)}, (
                case,
                zero,
            )


def two_ranks_with_nan_in_fresh_memory(rank: int, home: str, folder: str) -> None:
    """In deterministic mode, torch fills memory that nothing was written to with NaN."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    train_ranks(job(system(next(iter(CASES)), 3), Path(home), Path(folder) / "run"), rank, 2)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")  # sets LOCAL_RANK
def test_padding_of_shards_may_hold_nan(home: Path, tmp_path: Path) -> None:
    """DeepSpeed never writes it, and a run must not stop because of its bits."""
    resolve("synthetic:shapes", home)  # before two processes would write it
    spawn(two_ranks_with_nan_in_fresh_memory, (str(home), str(tmp_path)), nprocs=2)
    assert any(tmp_path.rglob("artifact.json"))


REFUSED = {
    "blip": "encoder, decoder and momentum encoder share weights, which every worker needs complete",
    "a frozen copy": 'model.reference="frozen_copy" needs complete parameters on every worker',
}


@pytest.mark.parametrize("what", REFUSED)
def test_unshardable_wiring_is_rejected_before_any_write(home: Path, run: str, what: str) -> None:
    if what == "blip":
        made, stage = override(load("blip").tiny(), {"stages.*.zero.stage": 3}), "pretrain"
    else:
        made, stage = prefer(stage=3), PREFER
        made = replace(made, stages=tuple(replace(each, starts_from=None) for each in made.stages))
    with pytest.raises(
        SpecError, match=rf"{REFUSED[what]}\. Got 3; expected 0, 1 or 2\. Fix: set stages\.{stage}"
    ):
        go(made, home, run, stages=[stage])
    assert not (home / "runs" / run).exists()
