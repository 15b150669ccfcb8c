"""Scripts that are run by hand: each one starts, and the systems that it trains are valid."""

import os
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import control_plane, evaluate_in_task, sweep_features, train_step
from examples import clip_zero_shot
from examples.ablations.arms import ablations
from examples.lmms_eval.__main__ import STEPS as DRAWINGS
from examples.lmms_eval.__main__ import system as drawings
from tests.house import source

FOLDERS = [source.ROOT / "benchmarks", source.ROOT / "examples"]
MAIN = 'if __name__ == "__main__":'
SCRIPTS = [
    path
    for path in source.python()
    if any(map(path.is_relative_to, FOLDERS))
    and (path.name == "__main__.py" or MAIN in path.read_text(encoding="utf-8"))
]


def gpu_stages() -> object:
    from benchmarks.gpu.train_step import stages  # sets LOCAL_RANK for its process

    return stages()


# What a script trains, by its own defaults: a changed recipe or bridge refuses it here.
SYSTEMS: dict[str, Callable[[], object]] = {
    "benchmarks.control_plane": lambda: control_plane.system(steps=2, lanes=8, batch=16),
    "benchmarks.evaluate_in_task": lambda: evaluate_in_task.judged(steps=60, rows=64),
    "benchmarks.gpu.train_step": gpu_stages,
    "benchmarks.sweep_features": lambda: sweep_features.trials(count=8, steps=40),
    "benchmarks.train_step": train_step.system,
    "examples.ablations": ablations,
    "examples.clip_zero_shot": clip_zero_shot.system,
    "examples.lmms_eval": lambda: drawings(Path("questions"), DRAWINGS),
}


def test_both_folders_have_scripts() -> None:
    assert {path.relative_to(source.ROOT).parts[0] for path in SCRIPTS} == {
        "benchmarks",
        "examples",
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=source.name)
def test_a_script_prints_its_help(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # without a parser, --help would start its work
    assert re.search(r"\bArgumentParser\(|\btyper\.run\(", script.read_text(encoding="utf-8"))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with mock.patch.dict(os.environ), pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert not end.value.code
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_systems_of_a_script_are_valid(name: str) -> None:
    with mock.patch.dict(os.environ):
        assert SYSTEMS[name]()
