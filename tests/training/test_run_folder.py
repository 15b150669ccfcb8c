"""Run directory: one writer, one recipe, free disk space."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bridgework.config import override, to_dict
from bridgework.errors import ResourceError, RunError, SpecError
from bridgework.system import fingerprint
from bridgework.training import run_dir
from tests.training.support import llava

HOLD = """
import sys
from pathlib import Path
from bridgework.training.run_dir import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_second_process_on_one_run_is_rejected(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path / "monday")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(RunError, match="'monday' is being trained by another process"):
            run_dir.locked(tmp_path / "monday").__enter__()
        other.kill()  # which frees the lock
    with run_dir.locked(tmp_path / "monday"):
        pass


@pytest.mark.parametrize(
    "run",
    [
        *(
            "a\nb",
            "a\rb",
            "a\0b",
            "\x1b[31m",
            "a\tb",
            "a\u2028b",
            "\u202eb",
            "\ud800",
            "x" * 300,
            "",
            " ",
        ),
        *("é" * 150, f"a/{'x' * 241}", "a/\n/b", "../up", "/abs", "..", "a/../../b"),
    ],
)
def test_run_name_must_be_one_line_and_a_folder_name(run: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^a run's name ") as caught:
        run_dir.path_of(tmp_path, run)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "run",
    ["monday", "mine/align", "été 2026", "模型-1", "a.b_c@d#2", "x" * 240, "10:30 run", "v\u00a01"],
)
def test_a_run_may_have_any_other_name(run: str, tmp_path: Path) -> None:
    assert run_dir.path_of(tmp_path, run) == tmp_path / "runs" / run


def test_same_recipe_is_accepted_and_another_is_rejected_by_its_paths(tmp_path: Path) -> None:
    system = llava()
    run_dir.same_recipe(tmp_path, system)
    run_dir.same_recipe(tmp_path, llava())
    other = override(
        system,
        {"stages.align.optim.peak_lr": 0.5, "stages.instruct.data.sources.vqav2.factor": 2.0},
    )
    with pytest.raises(RunError) as refused:
        run_dir.same_recipe(tmp_path, other)
    assert "stages.align.optim.peak_lr was 0.003, is 0.5" in str(refused.value)
    assert "stages.instruct.data.sources.vqav2.factor was 1.0, is 2.0" in str(refused.value)
    run_dir.same_recipe(tmp_path, system)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    run_dir.same_recipe(tmp_path, llava())
    with pytest.raises(RunError, match="and 7 more"):
        run_dir.same_recipe(
            tmp_path, override(llava(), {"stages.instruct.data.sources.*.factor": 2.0})
        )


def test_full_disk_is_reported_before_the_run(tmp_path: Path) -> None:
    run_dir.check_disk_space(tmp_path, need=1)
    with pytest.raises(ResourceError, match=r"MB free; expected at least .* set BRIDGEWORK_HOME"):
        run_dir.check_disk_space(tmp_path, need=10**18)


def test_options_may_change_and_every_recipe_is_recorded(tmp_path: Path) -> None:
    changed = llava(stages__align__budget__micro=2)
    assert run_dir.same_recipe(tmp_path, llava()) == (llava().fingerprint(),)
    for _ in range(2):
        known = run_dir.same_recipe(tmp_path, changed)
        assert known == (llava().fingerprint(), changed.fingerprint())
    history = json.loads((tmp_path / "recipes.json").read_text())
    assert history[1]["changed"] == ["stages.align.budget.micro was 8, is 2"]
    assert json.loads((tmp_path / "recipe.json").read_text()) == json.loads(
        json.dumps(to_dict(changed))
    )


def test_a_field_that_an_older_version_did_not_have_counts_with_its_default(tmp_path: Path) -> None:
    run_dir.same_recipe(tmp_path, llava())
    file = tmp_path / "recipe.json"
    older = json.loads(file.read_text())
    for stage in older["stages"]:
        del stage["optim"]["eps"]
    file.write_text(json.dumps(older))
    (tmp_path / "recipes.json").unlink()
    known = run_dir.same_recipe(tmp_path, llava())
    assert known == (fingerprint(older), llava().fingerprint())


def test_a_recipe_that_this_version_cannot_read_is_compared_by_its_text(tmp_path: Path) -> None:
    run_dir.same_recipe(tmp_path, llava())
    file = tmp_path / "recipe.json"
    older = json.loads(file.read_text())
    older["stages"][0]["optim"]["momentum"] = 0.9
    file.write_text(json.dumps(older))
    with pytest.raises(RunError, match=r"stages\.align\.optim\.momentum was 0\.9, is None"):
        run_dir.same_recipe(tmp_path, llava())
