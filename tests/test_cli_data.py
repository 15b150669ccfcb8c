"""`bridgework data`: every command on real datasets, through the command line parser."""

import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bridgework.cli.data import data
from bridgework.data.dataset import open_dataset
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHAPES = "synthetic:shapes"


def run(*words: str | int | Path) -> Result:
    return CliRunner().invoke(data, [str(word) for word in words], catch_exceptions=False)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three images with caption files."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for sample in shapes(rows=3, size=16):
        (folder / f"{sample.key}.png").write_bytes(sample.images[0])
        (folder / f"{sample.key}.txt").write_text(sample.text)
    return folder


def test_import_writes_a_dataset_with_its_options(pictures: Path, tmp_path: Path) -> None:
    done = run("import", "folder", pictures, tmp_path / "made", "max_bad=0.5", "--license", "MIT")
    assert done.exit_code == 0, done.output
    made = open_dataset(str(tmp_path / "made"))
    assert (len(made), made.manifest.license) == (3, "MIT")


def test_bare_name_is_written_to_and_read_from_home(pictures: Path, home: Path) -> None:
    assert run("import", "folder", pictures, "three").exit_code == 0
    assert (home / "datasets" / "three" / "manifest.json").is_file()
    assert "ok        three" in run("verify", "three").stdout


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["foldr"], DataError, "did you mean 'folder'"),
        (["folder", "tabel=x.csv"], SpecError, "no field 'tabel'; did you mean 'table'?"),
        (["folder", "max_bad=2"], SpecError, "max_bad is a share of the rows, from 0 to 1; got 2"),
        (["folder", "max_bad=lots"], SpecError, "max_bad must be float, got 'lots'"),
        (
            ["folder", "MIT"],
            SpecError,
            "'MIT' is not of the form KEY=VALUE, e.g. license=CC-BY-4.0",
        ),
        (["emoji", "--license", "MIT"], SpecError, "no field 'license'; known: max_bad"),
        (
            ["folder", "sayy=hello"],
            SpecError,
            "no field 'sayy'; known: image, license, max_bad, table, text, workers",
        ),
        (["folder", "workers=-1"], SpecError, "workers=-1: 0 or more actors are allowed"),
        (["./my_format.py"], DataError, "its module's path, e.g. my_lab.photos"),
        (["emoji", "--workers", "2"], SpecError, "no field 'workers'"),
    ],
)
def test_wrong_import_arguments_are_rejected_with_a_hint(
    words: list[str], error: type[Exception], said: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        run("import", words[0], pictures, tmp_path / "made", *words[1:])
    assert said in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_interrupted_import_resumes(pictures: Path, tmp_path: Path) -> None:
    (pictures / "bad.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="1 of 4 rows are bad"):
        run("import", "folder", pictures, tmp_path / "made")
    assert not (tmp_path / "made").exists()
    done = run("import", "folder", pictures, tmp_path / "made", "max_bad=0.3")
    assert done.stdout == f"{tmp_path / 'made'}{os.linesep}" and "1 quarantined" in done.stderr
    assert (
        "nothing to do"
        in run("import", "folder", pictures, tmp_path / "made", "max_bad=0.3").stderr
    )


def test_export_writes_another_format_and_reports_losses(pictures: Path, tmp_path: Path) -> None:
    done = run("export", "webdataset", SHAPES, tmp_path / "tars", "rows=100")
    assert done.stdout.splitlines() == [
        str(tmp_path / "tars"),
        "256 rows, 256 images; lost: nothing",
    ]
    assert run("import", "webdataset", f"{tmp_path}/tars/*.tar", tmp_path / "back").exit_code == 0
    assert len(open_dataset(str(tmp_path / "back"))) == 256
    done = run("export", "llava-json", SHAPES, tmp_path / "talks", "prompt=What is it?")
    assert (
        done.stdout.splitlines()[-1]
        == "256 rows, 256 images; lost: labels of 256 rows, license of 256 rows"
    )


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["webdatast", SHAPES], DataError, "did you mean 'webdataset'"),
        (["webdataset", SHAPES, "row=3"], SpecError, "no field 'row'; did you mean 'rows'?"),
        (["llava-json", SHAPES], DataError, "prompt=TEXT makes one of a pair"),
        (["llava-json", "synthetic:shape"], DataError, "did you mean 'synthetic:shapes'"),
    ],
)
def test_wrong_export_arguments_are_rejected_with_a_hint(
    words: list[str], error: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(error) as caught:
        run("export", words[0], words[1], tmp_path / "out", *words[2:])
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["import", "verify"])
def test_empty_name_is_rejected(command: str, pictures: Path) -> None:
    words = ("folder", pictures) if command == "import" else ()
    with pytest.raises(SpecError, match="the dataset's name is empty"):
        run(command, *words, "")


def test_verify_exits_with_1_and_reports_the_file(pictures: Path, tmp_path: Path) -> None:
    run("import", "folder", pictures, tmp_path / "made")
    shard = tmp_path / "made" / "shard-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    done = run("verify", SHAPES, tmp_path / "made")
    assert done.exit_code == 1
    assert f"ok        {SHAPES}" in done.stdout and "shard-00000.parquet" in done.stdout


def test_verify_checks_every_dataset_after_a_failure(tmp_path: Path) -> None:
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "manifest.json").write_text("{")
    done = run("verify", tmp_path / "torn", "synthetic:shape", SHAPES)
    assert done.exit_code == 1
    assert f"ok        {SHAPES}" in done.stdout
    assert "not a manifest" in done.stdout and "did you mean 'synthetic:shapes'" in " ".join(
        done.stdout.split()
    )


def test_missing_dataset_is_rejected_with_the_known_names() -> None:
    for command in ("stats", "preview"):
        with pytest.raises(DataError, match="did you mean 'synthetic:shapes'"):
            run(command, "synthetic:shape")


def test_stats_of_a_stage_count_tokens() -> None:
    done = run("stats", SHAPES, "--for", "llava/instruct", "--tiny")
    assert "for instruct" in done.stdout and "tokens per row" in done.stdout
    assert "tokens per row" not in run("stats", SHAPES).stdout


def test_unknown_stage_is_rejected_with_a_suggestion() -> None:
    with pytest.raises(SpecError, match="did you mean 'align'"):
        run("stats", SHAPES, "--for", "llava/alig")


def test_preview_prints_or_writes_a_page(tmp_path: Path) -> None:
    done = run("preview", SHAPES, "--for", "llava", "--tiny", "-n", 2)
    assert done.stdout.count("with loss") == 2
    page = tmp_path / "new" / "page.html"
    assert (
        run("preview", "--for", "llava/align", "--tiny", "--html", page).stdout
        == f"{page}{os.linesep}"
    )
    assert page.read_text(encoding="utf-8").count("<article>") == 4


def test_html_path_must_not_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(
        SpecError, match=r"is a folder; give the name of a file, e\.g\. .*preview\.html"
    ):
        run("preview", SHAPES, "--html", tmp_path)


def test_preview_without_a_dataset_is_rejected() -> None:
    with pytest.raises(SpecError, match="needs a PATH, or --for"):
        run("preview")
