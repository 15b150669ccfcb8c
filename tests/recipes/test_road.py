"""Every system, all its stages: the same program at a laptop's size, in this process and on Ray's workers."""

from math import isfinite
from pathlib import Path

import pytest

from bridgework.inference import Pipeline
from bridgework.spec import override
from bridgework.system import System, load, recipes
from tests.training.support import go, losses


def short(name: str) -> System:
    return override(load(name).tiny(), {"stages.*.budget.steps": 2})


@pytest.mark.parametrize("name", recipes())
def test_every_stage_trains_and_leaves_a_model(home: Path, run: str, name: str) -> None:
    system = short(name)
    results = go(system, home, run, stages=None)
    assert list(results) == [stage.name for stage in system.stages]
    for stage, result in results.items():
        assert isfinite(result.metrics["loss"])
        assert Pipeline.load(str(result.artefact), "cpu").stage.name == stage


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("name", recipes())
def test_one_worker_and_two_have_the_same_losses(home: Path, run: str, name: str) -> None:
    system = short(name)
    for workers in (1, 2):
        go(system, home, f"{run}-{workers}", stages=None, workers=workers)
    for stage in system.stages:
        one, two = (losses(home, f"{run}-{workers}", stage.name) for workers in (1, 2))
        assert [step for step, _ in one] == [step for step, _ in two] == [1, 2]
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
