"""Scripts that are run by hand: each one starts with valid systems, and each benchmark runs at its smallest size."""

import os
import re
import runpy
import subprocess
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
    "benchmarks.sweep_features": lambda: sweep_features.trials(count=8, steps=64),
    "benchmarks.train_step": train_step.system,
    "examples.ablations": ablations,
    "examples.clip_zero_shot": clip_zero_shot.system,
    "examples.lmms_eval": lambda: drawings(Path("questions"), DRAWINGS),
}
# Words after `python -m benchmarks.`, and the lines that must be printed; # is a number.
RUNS: dict[str, tuple[str, ...]] = {
    "balance": ("| 2 | 16 steps | # | # | # | # |", "| 8 | 64 steps | # | # | # | # |"),
    "capfilt --steps 4": ("| -2 | # | # | # |", "| 2 | # | (#|nan) | # |"),
    "cli --rounds 1": ("--help # s # x import torch", "show llava # s # x import torch"),
    "evaluate_in_task --steps 8 --every 4 --rows 4": (
        "stop, median # s # s", "step, median # s # s", "share of the stops #% #%",
    ),
    "ingest --quick --rounds 1": (
        "local # # - # # # # 0 0 -", "webdataset-0 # # - # # # # 0 0 -", "local # - - # # # # - - #",
    ),
    "ingest.decoding --rounds 1": ("2560 x 1920 # x # # # # (#..#)",),
    "ingest.reading --quick": ("one source 2 kB 16 steps # # # #", "four sources at sqrt 2 kB 64 steps # # # #"),
    "mixture_merges --mixtures 3 --steps 2 --rows 64": (
        "emoji_nature: 64 rows", "# s for 5 runs and 3 merges", "# s for 3 runs on mixtures",
        '{"retrieval.image_to_text_r10": [[#, #], [#, #], [#, #]]}', "retrieval.text_to_image_r10: Spearman",
    ),
    "plan": (
        "4,096 3.5 # # # #", "100,000 shards, 1,000,000,000 rows: opened in # s, planned in # s",
        "peak memory # MB, of which # MB before",
    ),
    "plan --ray": ("6,250,000 windows: Ray Data dataset created in # s",),
    "quickstart --seeds 1 --stages warm --steps 2 --home {home}": (
        "| warm, 0 | - | - | # % (# to #) | # % (# to #) | - | - |",
    ),
    "recorder --steps 10": ("256 # # # #% #", "1,024 # # # #% #"),
    "resume --quick --rounds 1": (
        "all 64 steps of an epoch have the same samples as with one worker", "local # # # # # 0 0 # the plan",
    ),
    "serve --clients 1 --requests 2 --tokens 4 --repeats 1 --depth 1": (
        "│ 1 │ bridgework │ # │ # │ # / # / # │ # / # / # │ # / # / # │ 0 │ 1.00 │",
        "│ 1 │ transformers │ # │ # │ # / # / # │ # / # / # │ # / # / # │ 0 │ # │",
        "│ 1 │ naive │ # │ # │ - / - / - │ - / - / - │ # / # / # │ 0 │ # │",
    ),
    "serve known --depth 1": ('{"first_ttft_ms": #, "second_ttft_ms": #, "ratio_median": #}',),
    "serve kill --depth 1": ('{"answers": 64, "errors": {}}',),
    "store --shards 100 --latency 0": (
        "list # s # CPU-s", "start, to the first step # s # CPU-s", "peak memory # GB",
    ),
    "sweep_features --trials 2 --steps 2": (
        "2 trials of 2 steps: # CPU-s with the tower", "in every step, # CPU-s with cached features: #x",
        "share of the tower in a trial #%; largest difference of a loss #",
    ),
    "trace --runs 300": ("trace llava # s", "trace --uses a sample # s", "trace a wrong name # s"),
    "train_step --pairs 1 --steps 4": (
        "bare torch # s a step", "bridgework # s a step", "speed # of the bare loop (# to #)",
    ),
    "twins": ("| different files | # | # | # | # | # |", "| grey | # | # | # | # | # |"),
}  # fmt: skip
LEFT_OUT = {
    "control_plane": "about ten minutes on two cores",
    "gpu.road": "needs a CUDA GPU",
    "gpu.train_step": "needs a CUDA GPU with 48 GB",
}
NUMBER = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?"


def pattern(line: str) -> re.Pattern[str]:
    """Return the pattern of a printed line, in which the widths of columns are free."""
    text = re.escape(line).replace(re.escape("(#|nan)"), f"(?:{NUMBER}|nan)")
    text = text.replace(re.escape("#"), NUMBER)
    return re.compile(r"[ ]+".join(re.split(r"(?:\\ )+", text)))


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


def test_every_benchmark_is_run_or_left_out_for_a_reason() -> None:
    names = {
        ".".join(path.relative_to(FOLDERS[0]).with_suffix("").parts).removesuffix(".__main__")
        for path in SCRIPTS
        if path.is_relative_to(FOLDERS[0])
    }
    assert names == {words.split()[0] for words in RUNS} | LEFT_OUT.keys()


@pytest.mark.slow
@pytest.mark.timeout(1_800)  # a frozen tower reads 3,000 images, next to other tests
@pytest.mark.parametrize("words", RUNS)
def test_a_benchmark_prints_its_figures(words: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *f"benchmarks.{words.format(home=tmp_path / 'runs')}".split()],
        cwd=source.ROOT,
        env=os.environ
        | {"BRIDGEWORK_HOME": str(tmp_path), "COLUMNS": "200", "RAY_USAGE_STATS_ENABLED": "0"},
        capture_output=True,
        text=True,
        timeout=1_700,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    for line in RUNS[words]:
        assert pattern(line).search(done.stdout), f"no line {line!r} in:\n{done.stdout}"


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_benchmark_is_left_out(name: str) -> None:
    pytest.skip(LEFT_OUT[name])
