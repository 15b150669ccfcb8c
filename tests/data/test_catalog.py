"""From a dataset's name to its place."""

import subprocess
import sys
from pathlib import Path

import pytest

from bridgework.data.catalog import destination, home, resolve
from bridgework.data.dataset import open_dataset, verify, write
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError


def put(path: str) -> str:
    write(shapes(3, size=16), path, source="s", license="l", made_by="t")
    return path


def test_a_bare_name_lies_under_home_and_a_path_stays_as_it_is(tmp_path: Path) -> None:
    named = put(str(tmp_path / "datasets" / "cats"))
    elsewhere, remote = put(str(tmp_path / "elsewhere")), put(f"memory://{tmp_path.name}/cats")
    assert resolve("cats", tmp_path) == named
    assert resolve(elsewhere, tmp_path) == elsewhere
    assert resolve(remote, tmp_path) == remote


def test_synthetic_shapes_are_made_once_and_found_again(tmp_path: Path) -> None:
    path = resolve("synthetic:shapes", tmp_path)
    written = (Path(path) / "manifest.json").stat().st_mtime_ns
    assert resolve("synthetic:shapes", tmp_path) == path and verify(path) == []
    assert (Path(path) / "manifest.json").stat().st_mtime_ns == written
    assert len(open_dataset(path)) == 256


def test_a_missing_dataset_is_named_with_a_suggestion_and_the_command(tmp_path: Path) -> None:
    put(str(tmp_path / "datasets" / "clipart"))
    with pytest.raises(
        DataError,
        match=r"dataset 'clip-art' not found.*bridgework data import.*did you mean 'clipart'",
    ):
        resolve("clip-art", tmp_path)
    with pytest.raises(DataError, match="no dataset here"):
        resolve(str(tmp_path / "nowhere"), tmp_path)


def test_a_broken_dataset_is_not_called_missing(tmp_path: Path) -> None:
    (Path(put(str(tmp_path / "datasets" / "cats"))) / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="not a manifest") as caught:
        resolve("cats", tmp_path)
    assert "data import" not in str(caught.value)


def test_home_is_the_variable_or_a_folder_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BRIDGEWORK_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("BRIDGEWORK_HOME")
    assert home() == Path.cwd() / ".bridgework"


def test_the_shipped_datasets_are_sound_and_their_test_sets_are_new() -> None:
    shipped = Path(__file__).parents[2] / "examples" / "data"
    texts = {}
    for path in sorted(shipped.glob("*/manifest.json")):
        assert verify(str(path.parent)) == [] and (path.parent / "LICENSE").is_file()
        texts[path.parent.name] = [
            sample.text for sample in open_dataset(str(path.parent)).samples()
        ]
    training = {*texts["clipart"], *texts["emoji"]}
    for name in ("heldout_clipart", "heldout_concepts", "heldout_style"):
        assert len(texts[name]) == len(set(texts[name])) == 300
    assert training.isdisjoint(texts["heldout_clipart"]) and training.isdisjoint(
        texts["heldout_concepts"]
    )
    assert set(texts["heldout_style"]) <= set(texts["emoji"])


@pytest.mark.parametrize(
    "name", ["a\nb", "a\0b", "a\x1bb", "x" * 300, "/tmp/a\nb", "s3://lab/a\0b"]
)
def test_a_dataset_is_named_by_a_line_that_can_be_a_folder(name: str, tmp_path: Path) -> None:
    for ask in (destination, resolve):
        with pytest.raises(DataError, match=r"control character|at most 240") as caught:
            ask(name, tmp_path)
        assert "\n" not in str(caught.value)


def test_processes_that_need_synthetic_data_at_once_write_it_once(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from bridgework.data.catalog import resolve; "
        "print(resolve('synthetic:shapes', Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err
        assert verify(out.strip()) == []
