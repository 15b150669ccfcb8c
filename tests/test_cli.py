"""The command line: its output, and one-line errors."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from bridgework import artifacts, cli
from bridgework.config import override
from bridgework.data.synthetic import shapes
from bridgework.system import System, load
from bridgework.tracking.mlflow_store import MLflowTracker
from tests.inference.tiny import pipeline
from tests.interop.test_clip import theirs as clip

SHORT = ("--set", "stages.*.budget.steps=2", "--set", "stages.*.optim.peak_lr=3e-3")


@dataclass(frozen=True)
class Said:
    """Output of a command, joined to one line, and its exit code."""

    out: str
    err: str
    code: int


class Bridgework:
    """Run the console script in this process."""

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
    """The artifact of a stage that was trained and registered by the command line."""
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
    """Run the console script in a new process, where a traceback would be printed."""
    command = [sys.executable, "-m", "bridgework.cli", *words]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "300", **environment}
    )


def test_systems_lists_variants_stages_and_trained_parameters(bridgework: Bridgework) -> None:
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


def test_show_counts_parameters_at_paper_scale_without_weights(bridgework: Bridgework) -> None:
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
        (
            ["show", "llava:v2"],
            "llava has no variant 'v2'; known: next, quickstart, science_qa, system, v1",
        ),
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
def test_wrong_argument_is_a_one_line_error_with_a_hint(
    bridgework: Bridgework, words: list[str], message: str
) -> None:
    said = bridgework(*words)
    assert said.code == 1
    assert said.err.startswith("error ")
    assert message in said.err
    assert "Traceback" not in said.err


def test_error_is_one_line_without_debug() -> None:
    quiet = process("show", "lava")
    assert (quiet.returncode, quiet.stdout) == (1, "")
    assert quiet.stderr == "error  there is no system 'lava'; did you mean 'llava'?\n"
    loud = process("--debug", "show", "lava")
    assert loud.returncode == 1
    assert "Traceback" in loud.stderr
    assert "SpecError" in loud.stderr


def test_storage_error_is_one_line(tmp_path: Path) -> None:
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


def test_modules_in_the_working_directory_are_imported(tmp_path: Path) -> None:
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


def test_train_writes_an_artifact_and_registers_a_version(
    bridgework: Bridgework, trained: Path, home: Path
) -> None:
    info = artifacts.describe(trained)
    assert (info.system, info.stage, info.steps) == ("llava-tiny", "align", 2)
    tracker = MLflowTracker(None, home, "bridgework")
    assert tracker.version("llava-tiny", "1").artifact == str(trained)


def test_repeated_train_registers_no_second_version(
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


def test_changed_recipe_is_rejected_by_path(bridgework: Bridgework, trained: Path) -> None:
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


def test_default_run_name_does_not_depend_on_options(bridgework: Bridgework, home: Path) -> None:
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


def test_rejected_change_suggests_fork(bridgework: Bridgework, trained: Path) -> None:
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


def test_register_promote_history_and_rollback(
    bridgework: Bridgework, trained: Path, home: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    pipe = pipeline()
    system = System(name="champions", paper="", stages=(pipe.stage,))
    artifacts.save(other, pipe.model.state_dict(), system=system, stage=pipe.stage.name)
    assert bridgework("register", str(trained), "champions").out == "model champions:1"
    assert bridgework("register", str(trained), "champions").out == "model champions:1"
    assert bridgework("register", str(other), "champions").out == "model champions:2"
    assert bridgework("promote", "champions:1").out == "champion champions:1"
    gate = tmp_path / "gate.toml"
    gate.write_text(
        'improve = ["heldout.loss"]\n[[evaluation]]\non = "heldout:synthetic:shapes"\nrows = 30\n'
    )
    worse = bridgework("promote", "champions:2", "--gate", str(gate))
    assert worse.code == 1 and "champions:2 was not promoted over version 1" in worse.err
    assert "heldout.loss improve" in worse.out
    nothing = bridgework("promote", "champions:2")
    assert nothing.code == 1 and "has no evaluations, so nothing can be compared" in nothing.err
    forced = bridgework("promote", "champions:2", "--force", "to try it")
    assert forced.out == "champion champions:2, before it 1"
    assert bridgework("rollback", "champions").out == "champion champions:1, instead of 2"
    decisions = json.loads(bridgework("history", "champions", "--json").out)
    verdicts = [one["verdict"] for one in decisions]
    assert verdicts[0] == "promoted" and verdicts[-2:] == ["forced", "rolled back"]
    assert "to try it" in bridgework("history", "champions").out


def test_compare_prints_paired_differences(
    bridgework: Bridgework, trained: Path, tmp_path: Path
) -> None:
    words = ("--on", "heldout:synthetic:shapes", "--set", "heldout.rows=6")
    said = bridgework("compare", str(trained), str(trained), *words)
    assert said.code == 0 and "heldout.loss" in said.out
    gap = json.loads(bridgework("compare", str(trained), str(trained), *words, "--json").out)
    assert gap["heldout.loss"]["value"] == 0 and gap["heldout.loss"]["p"] == 1
    assert gap["heldout.loss"]["n"] == 6 and gap["heldout.loss"]["better"] == "lower"


def test_eval_runs_the_evaluations_of_the_stage(bridgework: Bridgework, home: Path) -> None:
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
    said = bridgework("eval", str(home / "runs/judged/align/artifact"), "--json")
    assert said.code == 0
    figures = json.loads(said.out)
    assert {"heldout.loss", "heldout.loss_shuffled", "heldout.gap"} <= set(figures)
    assert f"heldout.loss {figures['heldout.loss']['value']:.4g}" in trained.out


def test_eval_without_evaluations_is_an_error(bridgework: Bridgework, trained: Path) -> None:
    said = bridgework("eval", str(trained))
    assert said.code == 1
    assert "has no evaluations. Fix: add some to its recipe's `evals`" in said.err


# --- models -----------------------------------------------------------------------------------------------------------


def test_ask_answers_about_an_image(bridgework: Bridgework, trained: Path, tmp_path: Path) -> None:
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
    few_shot = bridgework("ask", str(trained), "What is it?", "-i", str(image), *shown)
    assert (few_shot.code, few_shot.err) == (0, "")
    assert (
        "shows examples for one --image. Got 0"
        in bridgework("ask", str(trained), "What is it?", *shown).err
    )
    chosen = bridgework(
        "ask", str(trained), "-i", str(image), "--choice", "a red circle", "--choice", "nothing"
    )
    assert chosen.code == 0 and "a red circle" in chosen.out and "nothing" in chosen.out
    few_shot = bridgework(
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
    assert few_shot.code == 0 and "a red circle" in few_shot.out and few_shot.out != chosen.out
    missing = bridgework("ask", str(trained), "What?", "-i", "nowhere.png")
    assert missing.code == 1 and "nowhere.png cannot be read" in missing.err
    assert "there is nothing to ask" in bridgework("ask", str(trained)).err


def test_import_and_export_of_a_hugging_face_folder(bridgework: Bridgework, tmp_path: Path) -> None:
    clip("small").save_pretrained(tmp_path / "in")
    taken = bridgework("import", "hf", str(tmp_path / "in"), str(tmp_path / "artifact"))
    assert taken.code == 0 and "CLIPModel" in taken.out and "parity.json" in taken.out
    given = bridgework("export", str(tmp_path / "artifact"), str(tmp_path / "out"))
    assert given.code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    assert (
        "exists. Fix: remove it first"
        in bridgework("export", str(tmp_path / "artifact"), str(tmp_path / "out")).err
    )
    assert (
        "does not fit Idefics"
        in bridgework(
            "export", str(tmp_path / "artifact"), str(tmp_path / "x"), "--as", "Idefics"
        ).err
    )
