"""All stages of every system at laptop size: in one process, on two ranks, and through Ray."""

import os
import shutil
from math import isfinite
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from bridgework.config import override
from bridgework.data import reader
from bridgework.inference.pipeline import Pipeline
from bridgework.system import System, load, recipes
from bridgework.training import loop
from tests.training.support import go, losses, uncurated


def short(name: str) -> System:
    return override(load(name).tiny(), {"stages.*.budget.steps": 2})


@pytest.mark.parametrize("name", recipes())
def test_every_stage_trains_and_saves_a_model(home: Path, run: str, name: str) -> None:
    system = short(name)
    results = go(system, home, run, stages=None)
    assert list(results) == [stage.name for stage in system.stages]
    for stage, result in results.items():
        assert isfinite(result.metrics["loss"])
        assert Pipeline.load(str(result.artifact), "cpu").stage.name == stage


@pytest.mark.slow
def test_two_ranks_match_the_losses_of_one(home: Path, tmp_path: Path) -> None:
    spawn(rank, (str(home), str(tmp_path)), nprocs=2)
    for name in recipes():
        system = uncurated(short(name))
        go(system, home, f"{tmp_path.name}-{name}", stages=None)
        for stage in (stage for stage in system.stages if stage.curation is None):
            one = losses(home, f"{tmp_path.name}-{name}", stage.name)
            two = losses(tmp_path, name, stage.name)
            assert [step for step, _ in two] == [0, 1], (name, stage.name)
            assert [loss for _, loss in two] == pytest.approx(
                [loss for _, loss in one], rel=1e-4
            ), (name, stage.name)


def rank(index: int, home: str, folder: str) -> None:
    """Train every stage of every system as one of two processes, without Ray."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(index)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=index, world_size=2
    )
    for name in recipes():
        system, place = uncurated(short(name)), Path(folder) / "runs" / name
        for stage in (stage for stage in system.stages if stage.curation is None):
            feed = reader.ReaderConfig.of(stage, Path(home))
            parent = None if stage.starts_from is None else place / stage.starts_from / "artifact"
            job = loop.TrainJob(system, stage.name, feed, place / stage.name, Path(home), parent)
            job.folder.mkdir(parents=True, exist_ok=True)
            loop.run(
                job,
                lambda start, feed=feed: reader.local(feed, rank=index, world=2, start=start),
                lambda metrics, step: None,
                rank=index,
                world=2,
            )
            dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.timeout(2400)  # seconds: every stage starts a Ray Train and a Ray Data twice
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", recipes())
def test_one_and_two_ray_workers_have_the_same_losses(home: Path, run: str, name: str) -> None:
    """Two workers curate with the models of one.

    Models that differ in their last bits generate another dataset.
    """
    system = short(name)
    go(system, home, f"{run}-1", stages=None, workers=1)
    curated = [stage.name for stage in system.stages if stage.curation is not None]
    go(
        system,
        home,
        f"{run}-2",
        stages=[s.name for s in system.stages if s.name not in curated],
        workers=2,
    )
    for stage in curated:
        both = [home / "runs" / f"{run}-{workers}" for workers in (1, 2)]
        for used in system[stage].curation.uses:
            shutil.rmtree(both[1] / used)
            shutil.copytree(both[0] / used, both[1] / used)
        go(system, home, f"{run}-2", stages=[stage], workers=2)
    for stage in system.stages:
        one, two = (losses(home, f"{run}-{workers}", stage.name) for workers in (1, 2))
        assert [step for step, _ in one] == [step for step, _ in two] == [0, 1]
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
