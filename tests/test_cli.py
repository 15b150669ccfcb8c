"""The program as a person meets it: what it prints, and one line where something is wrong."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridgework import artifacts, cli
from bridgework.config import override
from bridgework.data.synthetic import shapes
from bridgework.system import load
from bridgework.tracking.mlflow_store import MLflowTracker
from tests.interop.test_clip import theirs as clip

SHORT = ("--set", "stages.*.budget.steps=2", "--set", "stages.*.optim.peak_lr=3e-3")


@dataclass(frozen=True)
class Said:
    """What a command printed, in one line, and how it ended."""

    out: str
    err: str
    code: int


class Bridgework:
    """The console script, run in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *words: str) -> Said:
        self._monkeypatch.setattr(sys, "argv", ["bridgework", *words])
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = self._capsys.readouterr()
        return Said(
            " ".join(said.out.split()), " ".join(said.err.split()), int(ended.value.code or 0)
        )


@pytest.fixture
def bridgework(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bridgework:
    return Bridgework(monkeypatch, capsys)


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    """The artifact of a stage that the command line trained, with a version of it registered."""
    words = [
        "bridgework",
        "train",
        "llava",
        "--tiny",
        "--workers",
        "0",
        "--stage",
        "align",
        "--run",
        "cli",
        *SHORT,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert not ended.value.code
    return home / "runs/cli/align/artifact"


def process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own, where a traceback would be seen."""
    command = [sys.executable, "-m", "bridgework.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300", **environment}
    )


def test_systems_lists_variants_stages_and_what_trains(bridgework: Bridgework) -> None:
    said = bridgework("systems")
    assert said.code == 0
    for word in (
        "llava",
        "llava:v1",
        "llava:quickstart",
        "align",
        "instruct",
        "bridge.*",
        "21.0 M",
        "2,180 x 256",
    ):
        assert word in said.out


def test_show_counts_the_paper_s_parameters_without_its_weights(bridgework: Bridgework) -> None:
    said = bridgework("show", "llava")
    assert said.code == 0
    assert "align 20,979,712" in said.out  # 1024 x 4096 + 4096 + 4096 x 4096 + 4096
    assert "instruct 6,759,395,328" in said.out  # with Vicuna-7B's 6,738,415,616
    assert f"fingerprint {load('llava').fingerprint()}" in said.out
    assert "stages.align.optim.peak_lr = 0.001" in said.out


def test_show_takes_changes_by_dotted_path(bridgework: Bridgework) -> None:
    said = bridgework("show", "llava", "--tiny", "--set", "stages.*.model.bridge=linear")
    changed = override(load("llava").tiny(), {"stages.*.model.bridge": "linear"})
    assert f"fingerprint {changed.fingerprint()}" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "lava"], "there is no system 'lava'; did you mean 'llava'?"),
        (["show", "llava:v2"], "llava has no variant 'v2'; known: next, quickstart, system, v1"),
        (["show", "llava", "--set", "stages.align.optim.peek_lr=1"], "did you mean 'peak_lr'?"),
        (["show", "llava", "--set", "stages.alig.seed=1"], "did you mean 'align'?"),
        (
            ["show", "llava", "--set", "stages.align.optim.peak_lr=fast"],
            "must be float, got 'fast'",
        ),
        (
            ["show", "llava", "--set", "stages.align.seed"],
            "'stages.align.seed' is not of the form KEY=VALUE",
        ),
        (
            ["train", "llava", "--tiny", "--stage", "alig", "--workers", "0"],
            "did you mean 'align'?",
        ),
        (["sweep", "llava_bridg"], "did you mean 'llava_bridge'?"),
        (["eval", "not/an/artifact"], "not/an/artifact is not an artifact"),
        (["promote", "unknown-model"], "no model 'unknown-model' is registered"),
        (["rollback", "unknown-model"], "no model 'unknown-model' is registered"),
    ],
)
def test_a_wrong_word_is_one_line_with_advice(
    bridgework: Bridgework, words: list[str], message: str
) -> None:
    said = bridgework(*words)
    assert said.code == 1
    assert said.err.startswith("error ")
    assert message in said.err
    assert "Traceback" not in said.err


def test_an_error_is_one_line_and_a_traceback_only_with_debug() -> None:
    quiet = process("show", "lava")
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert quiet.stderr == "error  there is no system 'lava'; did you mean 'llava'?\n"
    loud = process("--debug", "show", "lava")
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr
    assert "SpecError" in loud.stderr


def test_what_a_store_or_a_disk_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, message in (
        (("data", "stats", "foo://x"), "Protocol not known: foo"),
        (
            ("data", "export", "webdataset", "synthetic:shapes", str(tmp_path / "file" / "below")),
            "Not a directory",
        ),
        (
            ("data", "preview", "synthetic:shapes", "--html", str(tmp_path)),
            "is a folder; give the name of a file",
        ),
    ):
        said = process(*words)
        assert said.returncode == 1 and said.stderr.startswith("error  "), said.stderr
        assert message in said.stderr and "Traceback" not in said.stderr


def test_modules_of_ones_own_are_found_where_the_command_is_given(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.py").write_text(
        "from bridgework.system import System, load\n\ndef system() -> System:\n    return load('llava').tiny()\n"
    )
    script = (
        "import sys; sys.path = [p for p in sys.path if p]; from bridgework.cli import main; main()"
    )
    said = subprocess.run(
        [sys.executable, "-c", script, "show", "own.mine"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert said.returncode == 0, said.stderr
    assert load("llava").tiny().fingerprint() in said.stdout


def test_train_leaves_an_artifact_and_a_version(
    bridgework: Bridgework, trained: Path, home: Path
) -> None:
    info = artifacts.describe(trained)
    assert (info.system, info.stage, info.steps) == ("llava-tiny", "align", 2)
    tracker = MLflowTracker(None, home, "bridgework")
    assert tracker.version("llava-tiny", "1").artifact == str(trained)


def test_the_same_command_again_makes_no_second_version(
    bridgework: Bridgework, trained: Path, home: Path
) -> None:
    said = bridgework(
        "train", "llava", "--tiny", "--workers", "0", "--stage", "align", "--run", "cli", *SHORT
    )
    assert said.code == 0
    assert "finished before" in said.err
    assert "model llava-tiny:1" in said.out
    assert [v.version for v in MLflowTracker(None, home, "bridgework").versions("llava-tiny")] == [
        "1"
    ]


def test_a_changed_recipe_is_refused_by_its_path(bridgework: Bridgework, trained: Path) -> None:
    said = bridgework(
        "train",
        "llava",
        "--tiny",
        "--workers",
        "0",
        "--run",
        "cli",
        *SHORT,
        "--set",
        "stages.align.seed=7",
    )
    assert said.code == 1
    assert "stages.align.seed was 0, is 7" in said.err


def test_a_run_that_was_given_no_name_is_found_with_other_options(
    bridgework: Bridgework, home: Path
) -> None:
    words = (
        "train",
        "llava",
        "--tiny",
        "--workers",
        "0",
        "--stage",
        "align",
        *SHORT,
        "--set",
        "stages.align.seed=31",
    )
    short = {"stages.*.budget.steps": 2, "stages.*.optim.peak_lr": 3e-3, "stages.align.seed": 31}
    system = override(load("llava").tiny(), short)
    for more in ((), ("--set", "stages.align.budget.micro=4")):
        said = bridgework(*words, *more)
        assert said.code == 0, said.err
    assert "finished before" in said.err
    assert (home / "runs" / f"llava-tiny-{system.identity()[:6]}" / "align" / "artifact").is_dir()
    older = home / "runs" / f"llava-tiny-{system.fingerprint()[:6]}"  # as an older version named it
    (home / "runs" / f"llava-tiny-{system.identity()[:6]}").rename(older)
    assert "finished before" in bridgework(*words).err


def test_a_refused_change_names_the_word_that_forks(bridgework: Bridgework, trained: Path) -> None:
    words = (
        "train",
        "llava",
        "--tiny",
        "--workers",
        "0",
        "--stage",
        "align",
        *SHORT,
        "--set",
        "stages.align.seed=7",
    )
    refused = bridgework(*words, "--run", "cli")
    assert (
        refused.code == 1
        and "with --fork cli it starts from this run's newest checkpoint" in refused.err
    )
    forked = bridgework(
        *words, "--run", "cli-forked", "--fork", "cli"
    )  # of two steps no checkpoint was kept
    assert (
        forked.code == 1
        and "run 'cli' has no checkpoint of stage 'align', the first that must train" in forked.err
    )


def test_promote_and_rollback_move_the_champion(
    bridgework: Bridgework, trained: Path, home: Path
) -> None:
    tracker = MLflowTracker(None, home, "bridgework")
    first = tracker.version("llava-tiny", "1")
    run = tracker.start("again")
    model = tracker.output(run, "llava-align", str(trained), {"digest": "d"})
    tracker.register("champions", model, run, first.artifact, {"heldout.loss": "2.0"})
    tracker.register("champions", model, run, first.artifact, {"heldout.loss": "2.5"})
    assert bridgework("promote", "champions:1").out == "champion champions:1"
    worse = bridgework("promote", "champions:2", "--metric", "heldout.loss", "--lower")
    assert worse.code == 1
    assert (
        "champions:2 has heldout.loss 2.5, the champion, version 1, 2, and lower is better: not promoted"
        in worse.err
    )
    assert bridgework("promote", "champions:2").out == "champion champions:2, before it 1"
    assert bridgework("rollback", "champions").out == "champion champions:1"


def test_eval_judges_an_artifact_by_its_stage(bridgework: Bridgework, home: Path) -> None:
    words = (
        "train",
        "tests.tuning.tiny",
        "--stage",
        "align",
        "--workers",
        "0",
        "--run",
        "judged",
        *SHORT,
    )
    trained = bridgework(*words)
    assert trained.code == 0, trained.err
    said = bridgework("eval", str(home / "runs/judged/align/artifact"))
    assert said.code == 0
    figures = dict(zip(said.out.split()[2::2], said.out.split()[3::2], strict=True))
    assert set(figures) == {"heldout.loss", "heldout.loss_shuffled", "heldout.gap"}
    assert f"heldout.loss {figures['heldout.loss']}" in trained.out


def test_eval_of_a_stage_without_evaluations_says_so(bridgework: Bridgework, trained: Path) -> None:
    said = bridgework("eval", str(trained))
    assert said.code == 1
    assert "has no evaluations. Fix: add some to its recipe's `evals`" in said.err


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_is_asked_about_an_image(
    bridgework: Bridgework, trained: Path, tmp_path: Path
) -> None:
    image = tmp_path / "shape.png"
    image.write_bytes(next(shapes(rows=1, size=32)).images[0])
    written = bridgework("ask", str(trained), "What is it?", "-i", str(image), "--tokens", "4")
    assert (written.code, written.err) == (0, "")
    nucleus = ("--temperature", "1", "--top-p", "0.9", "--seed", "3", "--tokens", "8")
    drawn = [
        bridgework("ask", str(trained), "What is it?", "-i", str(image), *nucleus) for _ in range(2)
    ]
    assert drawn[0] == drawn[1] and drawn[0].code == 0
    searched = (
        "--beams",
        "2",
        "--length-penalty",
        "-1",
        "--repetition-penalty",
        "1.2",
        "--tokens",
        "4",
    )
    assert bridgework("ask", str(trained), "What is it?", "-i", str(image), *searched).code == 0
    short = bridgework(
        "ask", str(trained), "What is it?", "-i", str(image), "--length-penalty", "-1"
    )
    assert (
        short.code == 1
        and "length_penalty ranks the beams of a search. Got -1 with beams=1" in short.err
    )
    shown = ("--like", "synthetic:shapes", "--shots", "2", "--tokens", "4")
    behind = bridgework("ask", str(trained), "What is it?", "-i", str(image), *shown)
    assert (behind.code, behind.err) == (0, "")
    assert (
        "shows examples for one --image, got 0"
        in bridgework("ask", str(trained), "What is it?", *shown).err
    )
    chosen = bridgework(
        "ask", str(trained), "-i", str(image), "--choice", "a red circle", "--choice", "nothing"
    )
    assert chosen.code == 0 and "a red circle" in chosen.out and "nothing" in chosen.out
    behind = bridgework(
        "ask",
        str(trained),
        "-i",
        str(image),
        *shown,
        "--choice",
        "a red circle",
        "--choice",
        "nothing",
    )
    assert behind.code == 0 and "a red circle" in behind.out and behind.out != chosen.out
    missing = bridgework("ask", str(trained), "What?", "-i", "nowhere.png")
    assert missing.code == 1 and "nowhere.png cannot be read" in missing.err
    assert "there is nothing to ask" in bridgework("ask", str(trained)).err


def test_a_folder_of_hugging_face_goes_in_and_out(bridgework: Bridgework, tmp_path: Path) -> None:
    clip("small").save_pretrained(tmp_path / "in")
    taken = bridgework("import", "hf", str(tmp_path / "in"), str(tmp_path / "artifact"))
    assert taken.code == 0 and "CLIPModel" in taken.out and "parity.json" in taken.out
    given = bridgework("export", str(tmp_path / "artifact"), str(tmp_path / "out"))
    assert given.code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    assert (
        "exists; remove it first"
        in bridgework("export", str(tmp_path / "artifact"), str(tmp_path / "out")).err
    )
    assert (
        "is no Idefics"
        in bridgework(
            "export", str(tmp_path / "artifact"), str(tmp_path / "x"), "--as", "Idefics"
        ).err
    )
