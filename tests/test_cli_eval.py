"""`bridgework eval --on`: evaluations that the stage does not have."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from bridgework import artifacts, cli, evaluation
from bridgework.cli.judging import figures_table
from bridgework.errors import SpecError
from bridgework.system import System
from tests.inference.tiny import pipeline

Judge = Callable[..., str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the artifact of a stage without evaluations."""
    pipe, folder = pipeline(), tmp_path_factory.mktemp("model") / "artifact"
    system = System(name="judged", paper="", stages=(pipe.stage,))
    artifacts.save(folder, pipe.model.state_dict(), system=system, stage=pipe.stage.name)
    return str(folder)


@pytest.fixture
def judge(model: str) -> Judge:
    def run(*words: str) -> str:
        done = CliRunner().invoke(cli.app, ["eval", model, *words])
        if done.exception:
            raise done.exception
        return done.stdout

    return run


def test_on_and_set_select_and_change_evaluations(
    judge: Judge,
) -> None:
    few = ("--set", "vqa.rows=2", "--set", "vqa.writing.beams=1", "--set", "vqa.writing.most=2")
    said = judge(
        "--on",
        "vqa:synthetic:shapes",
        "--on",
        "heldout:synthetic:shapes",
        "--set",
        "heldout.rows=3",
        *few,
    )
    figures = [line.split()[0] for line in said.splitlines()[1:]]
    names = [
        "vqa.accuracy",
        "vqa.most_common",
        "heldout.loss",
        "heldout.loss_shuffled",
        "heldout.gap",
        "heldout.perplexity",
    ]
    assert figures == names


def test_every_figure_is_printed_with_its_interval_and_rows(judge: Judge) -> None:
    said = judge("--on", "heldout:synthetic:shapes", "--set", "heldout.rows=5", "--json")
    figures = json.loads(said[said.index("{") :])
    loss = figures["heldout.loss"]
    assert loss["better"] == "lower" and figures["heldout.loss_shuffled"]["better"] is None
    assert loss["interval"]["n"] == 5
    assert loss["interval"]["low"] < loss["value"] < loss["interval"]["high"]


def test_samples_are_written_with_their_answers(judge: Judge, tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    few = ("--set", "vqa.rows=3", "--set", "vqa.writing.beams=1", "--set", "vqa.writing.most=2")
    judge("--on", "vqa:synthetic:shapes", *few, "--samples", str(file))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1, 2]
    assert all(
        {"key", "input", "target", "filtered_resps", "vqa.accuracy"} <= set(line) for line in lines
    )


def test_every_evaluation_has_a_kind(judge: Judge) -> None:
    with pytest.raises(SpecError) as refused:
        judge()
    kinds = str(refused.value).partition("KIND is one of ")[2].split(", ")
    assert len(kinds) == len(
        [name for name in evaluation.__all__ if name not in ("Result", "Writing")]
    )
    assert {"captions", "vqa", "pope", "chair", "retrieval"} <= set(kinds)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--on", "vqq:x"), "no evaluation 'vqq'; did you mean 'vqa'"),
        (("--on", "vqa"), "not of the form KIND:DATASET"),
        (("--on", "vqa:x", "--on", "vqa:y"), "'vqa' is used twice"),
        (("--on", "vqa:x", "--set", "vqa.row=2"), "no field 'row'; did you mean 'rows'"),
        (("--on", "vqa:x", "--set", "vqa.rows"), "not of the form NAME.FIELD=VALUE"),
    ],
)
def test_wrong_on_and_set_are_rejected(judge: Judge, words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        judge(*words)


def test_missing_dataset_is_an_error(judge: Judge, home: Path) -> None:
    with pytest.raises(Exception, match="dataset 'nonesuch' not found"):
        judge("--on", "pope:nonesuch")


def test_int8_prints_the_difference_of_every_figure(judge: Judge) -> None:
    said = judge("--on", "heldout:synthetic:shapes", "--set", "heldout.rows=3", "--int8")
    lines = [line.split() for line in said.splitlines()]
    at = next(number for number, line in enumerate(lines) if line[2:3] == ["int8"])
    rows = lines[at + 1 :]
    assert len(rows) >= 3
    for name, value, small, difference, *_ in rows:
        assert name.startswith("heldout.")
        assert float(small) - float(value) == pytest.approx(float(difference), rel=0.2, abs=2e-3)
        assert abs(float(difference)) < max(0.5, 0.01 * abs(float(value)))


def test_names_of_figures_are_complete_on_80_columns() -> None:
    names = ["retrieval.text_to_image_r1", "retrieval.text_to_image_r10"]
    heads = ("A", "B", "B - A", "95 % interval", "p", "n", "rows to decide", "better")
    table = figures_table(names, "metric", *heads)
    for name in names:
        table.add_row(
            name,
            "0.1067",
            "0.3933",
            "+0.2867",
            "[0.2281, 0.3452]",
            "2.5e-19",
            "300",
            "26",
            "higher",
        )
    printed = io.StringIO()
    Console(width=80, file=printed).print(table)
    lines = printed.getvalue().splitlines()
    assert [line.split()[0] for line in lines if line.startswith("retrieval")] == names
