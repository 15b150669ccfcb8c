"""`bridgework curate`: any curation by its name, with its fields as words."""

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from bridgework.cli import app
from bridgework.curation import known, load
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import pair
from bridgework.errors import DataError, SpecError
from tests.curation.support import embedder, file, flags, scenes, written

SCENES = scenes(20)


@pytest.fixture
def source(tmp_path: Path) -> str:
    """20 scenes, and 5 of them again."""
    rows = [pair(f"scene-{n}", file(scene), f"scene {n}") for n, scene in enumerate(SCENES)]
    again = [
        pair(f"again-{n}", file(SCENES[n], "JPEG", quality=60), f"scene {n} again")
        for n in range(5)
    ]
    return written(tmp_path / "source", [*rows, *again])


def curate(*words: str) -> Result:
    done = CliRunner().invoke(app, ["curate", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_without_arguments_the_curations_are_listed() -> None:
    printed = curate().stdout
    for name in ("capfilt", "decontaminate", "dedup", "filters"):
        assert name in known()
        assert f"{name} " in printed and (load(name).__module__).endswith(name)
    assert "Deduplication: drop rows whose image" in printed
    assert not {"flow", "facts", "explain", "twins", "words", "measuring"} & known().keys()


def test_name_alone_lists_the_fields() -> None:
    lines = {line.split()[0]: line.split()[1:] for line in curate("dedup").stdout.splitlines()}
    assert lines["distance"] == ["int", "4"] and lines["by"][-1] == "bytes"
    assert lines["max_bad"] == ["float", "0.005"]
    fields = curate("capfilt").stdout
    names = {line.split()[0] for line in fields.splitlines() if line.strip()}
    assert "required" in fields and not {"sources", "makes"} & names


def test_arguments_are_datasets_then_fields(source: str, tmp_path: Path) -> None:
    other, dest = written(tmp_path / "other", list(flags())[:8]), tmp_path / "made"
    done = curate("dedup", source, other, str(dest), "by=perceptual", "distance=2", "text=no")
    manifest = json.loads((dest / "manifest.json").read_text())
    assert done.stdout.strip() == str(dest)
    assert manifest["parents"] == [open_dataset(place).manifest.digest for place in (source, other)]
    told = {name: manifest["parameters"][name] for name in ("by", "distance", "text")}
    assert told == {"by": "perceptual", "distance": 2, "text": False}
    assert sum(manifest["parameters"]["counts"].values()) == 33


def test_same_command_does_nothing_and_another_is_rejected(source: str, tmp_path: Path) -> None:
    words = ("dedup", source, str(tmp_path / "made"), "by=perceptual")
    first = curate(*words).stderr
    assert (
        "25 rows to annotate" in first
        and "kept 20 of 25 rows (20 kept; 5 duplicate of an earlier row)" in first
    )
    assert "nothing to do" in curate(*words).stderr
    with pytest.raises(
        DataError, match=r"`by=perceptual distance=4`; expected `by=bytes distance=3`"
    ):
        curate(*words[:3], "distance=3")


def test_every_curation_takes_max_bad(source: str, tmp_path: Path) -> None:
    torn = pair("torn", b"<html>", "no scene")
    spoilt = written(tmp_path / "spoilt", [*open_dataset(source).samples(), torn])
    with pytest.raises(DataError, match=r"1 of 26 rows are bad \(1 not_an_image\)"):
        curate("filters", spoilt, str(tmp_path / "made"), "min_side=10")
    curate("filters", spoilt, str(tmp_path / "made"), "min_side=10", "max_bad=0.04")
    manifest = open_dataset(str(tmp_path / "made")).manifest
    assert manifest.quarantined == {"not_an_image": 1} and "max_bad" not in manifest.parameters


def test_bare_name_is_resolved_in_the_home(source: str, home: Path) -> None:
    done = curate("dedup", source, "a-clean-set")
    assert done.stdout.strip() == str(home / "datasets" / "a-clean-set")
    assert (
        curate("filters", "a-clean-set", "a-cleaner-set", "min_side=10")
        .stdout.strip()
        .endswith("a-cleaner-set")
    )


def test_own_module_is_a_curation(source: str, tmp_path: Path) -> None:
    (tmp_path / "desk").mkdir()
    curate(
        "tests.curation.vowels",
        source,
        str(tmp_path / "made"),
        f"desk={tmp_path / 'desk'}",
        "at_least=3",
    )
    assert open_dataset(str(tmp_path / "made")).manifest.made_by == "tests.curation.vowels"


def test_model_path_is_relative_to_the_working_directory(
    source: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = embedder(home)
    curate("dedup", source, str(tmp_path / "whole"), "by=embedding", f"model={folder}")
    monkeypatch.chdir(folder.parent)
    curate("dedup", source, str(tmp_path / "part"), "by=embedding", f"model=./{folder.name}")
    digests = {open_dataset(str(tmp_path / name)).manifest.digest for name in ("whole", "part")}
    assert len(digests) == 1


def test_explain_counts_the_reasons_and_draws_both_kinds(
    source: str, home: Path, tmp_path: Path
) -> None:
    printed = curate(
        "dedup", source, str(tmp_path / "explained"), "by=perceptual", "--explain"
    ).stdout
    lines = [line.split() for line in printed.splitlines()]
    assert ["kept", "20", "80.0%"] in lines and [
        "duplicate",
        "of",
        "an",
        "earlier",
        "row",
        "5",
        "20.0%",
    ] in lines
    (sheet,) = (home / "curated").glob("explained-*.png")
    assert str(sheet) in printed
    with Image.open(sheet) as page:
        left, right = (
            page.crop((0, 40, page.width // 2, page.height)),
            page.crop((page.width // 2, 40, *page.size)),
        )
        first = [part.crop((12, 12, 156, 156)).resize((96, 72)) for part in (left, right)]
    for shown in first:  # scene 0 is the first that was kept and, again, the first that was dropped
        assert len(shown.convert("RGB").getcolors(1 << 16) or []) > 1000
    assert (
        curate("dedup", source, str(tmp_path / "explained"), "by=perceptual", "--explain").stdout
        == printed
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("dedupe", "a", "b"), r"there is no curation 'dedupe'; did you mean 'dedup'\?"),
        (
            ("./my.py", "a", "b"),
            r"there is no curation './my.py'; known: .*its module's path, e.g. my_lab.sharp",
        ),
        (("my/curation", "a", "b"), r"there is no curation 'my/curation'.*its module's path"),
        (
            ("bridgework.curation.runner", "a", "b"),
            "Got none; expected one public config class with judge and decide",
        ),
        (
            ("dedup", "a", "b", "distence=3"),
            r"curate dedup has no field 'distence'; did you mean 'distance'\?",
        ),
        (
            ("dedup", "a", "b", "by=color"),
            "by: 'color' is not allowed; known: bytes, embedding, perceptual",
        ),
        (("dedup", "a", "b", "distance=near"), "distance must be int, got 'near'"),
        (
            ("dedup", "a", "by=bytes"),
            "curate dedup takes SOURCE... DEST, and then KEY=VALUE; got a by=bytes",
        ),
        (
            ("dedup", "a", "b", "by=bytes", "c"),
            "curate dedup: expected KEY=VALUE after the dataset arguments, got 'c'",
        ),
        (("dedup", "a", "b", "max_bad=2"), "max_bad is a share of the rows, from 0 to 1; got 2"),
        (
            ("dedup", "a", "b", "max_bed=0.1"),
            r"curate dedup has no field 'max_bed'; did you mean 'max_bad'\?",
        ),
        (("capfilt", "a", "b", "filter=./f"), "curate capfilt needs captioner=VALUE"),
        (("capfilt", "a", "b", "makes=c"), "curate capfilt has no field 'makes'"),
    ],
)
def test_invalid_arguments_are_rejected(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        curate(*words)
