"""The public API: its names, its laziness, its reference, and the examples in its docstrings."""

import doctest
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import bridgework
from bridgework.data.synthetic import shapes
from tests.house import api_reference

# module -> least number of lines of its examples
EXAMPLES = {
    "api": 15,
    "config": 4,
    "inference.pipeline": 5,
    "mixture": 7,
    "system": 16,
    "training.options": 2,
}
HEAVY = "{'torch', 'transformers', 'ray', 'deepspeed', 'mlflow', 'pyarrow'}"


def imported(code: str) -> set[str]:
    """The heavy libraries that a fresh process has imported after `code`."""
    program = f"import sys\n{code}\nprint(' '.join(sorted({HEAVY} & set(sys.modules))))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split("\n")[-2].split())


def test_the_import_alone_loads_nothing_heavy() -> None:
    assert imported("import bridgework as bw; dir(bw)") == set()


def test_recipes_and_overrides_load_neither_ray_nor_transformers() -> None:
    code = "import bridgework as bw; bw.override(bw.load('llava'), {'stages.*.model.bridge': 'linear'})"
    assert imported(code) <= {"torch", "pyarrow"}


def test_training_in_this_process_needs_no_ray(home: Path) -> None:
    code = (
        "import bridgework as bw; from rich.console import Console; "
        "system = bw.override(bw.load('llava').tiny(), {'stages.align.budget.steps': 1}); "
        "bw.train(system, stages=['align'], track=False, console=Console(quiet=True))"
    )
    assert not imported(code) & {"ray", "mlflow"}


def test_training_in_this_process_without_zero_needs_no_deepspeed(home: Path) -> None:
    code = (
        "import bridgework as bw; from rich.console import Console; "
        "system = bw.override(bw.load('llava').tiny(), {'stages.align.budget.steps': 1, "
        "'stages.align.zero.stage': 0}); "
        "bw.train(system, stages=['align'], track=False, console=Console(quiet=True))"
    )
    assert not imported(code) & {"ray", "mlflow", "deepspeed"}


def test_every_public_name_is_there_and_another_one_is_suggested() -> None:
    for name in bridgework.__all__:
        assert getattr(bridgework, name).__doc__, name
    with pytest.raises(AttributeError, match="did you mean 'override'"):
        bridgework.overide  # noqa: B018


def test_the_reference_is_what_the_docstrings_say() -> None:
    written = api_reference.FILE.read_text(encoding="utf-8")
    assert written == api_reference.reference(), "run `python -m tests.house.api_reference`"


def test_examples_in_docstrings_run(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder with two photos and an artifact."""
    system = bridgework.override(bridgework.load("llava").tiny(), {"stages.align.budget.steps": 1})
    result = bridgework.train(system, stages=["align"], home=home, run="doctest", track=False)
    (tmp_path / "artifact").symlink_to(result["align"].artifact)
    (tmp_path / "photos").mkdir()
    for number, sample in enumerate(shapes(2)):
        (tmp_path / "photos" / f"{number}.png").write_bytes(sample.images[0])
        (tmp_path / "photos" / f"{number}.txt").write_text(sample.text)
    monkeypatch.chdir(tmp_path)
    for module, least in EXAMPLES.items():
        done = doctest.testmod(import_module(f"bridgework.{module}"), optionflags=doctest.ELLIPSIS)
        assert done.failed == 0 and done.attempted >= least, module
