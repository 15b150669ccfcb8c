"""Damaged and hostile datasets: found by `verify`, stopped with one line, and nothing in them ever runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bridgework.data.dataset import Problem, open_dataset, verify
from bridgework.data.manifest import Manifest, Shard
from bridgework.data.quarantine import Reason, records
from bridgework.data.reader import ReaderConfig, local
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from bridgework.system import Mixture, Source
from tests.hostile import shards
from tests.toy import Eye


def rows(folder: Path) -> list[Sample]:
    return list(open_dataset(str(folder)).samples())


def stops(read: Callable[[], object]) -> str:
    """The one line with which it stops."""
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1_000, message
    return message


def found(folder: Path) -> list[Problem]:
    problems = verify(str(folder))
    assert all("\n" not in problem.what for problem in problems)
    return problems


@pytest.mark.parametrize("name", shards.DAMAGE)
def test_damage_is_found_and_never_read_as_something_else(name: str, tmp_path: Path) -> None:
    folder = shards.sound(tmp_path / "d")
    assert not found(folder)
    whole = rows(folder)
    shards.DAMAGE[name](folder)
    assert found(folder)
    try:
        assert rows(folder) == whole
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert name == "a bit turned in the footer"  # in the name of the program that wrote it


def test_a_file_that_nobody_listed_is_found_and_not_read(tmp_path: Path) -> None:
    folder = shards.sound(tmp_path / "d")
    (folder / "shard-00002.parquet").write_bytes((folder / shards.FIRST).read_bytes())
    assert [problem.file for problem in found(folder)] == ["shard-00002.parquet"]
    assert len(rows(folder)) == shards.ROWS


@pytest.mark.parametrize("name", shards.WRONG_SHARD)
def test_a_shard_that_is_wrong_by_right_digests_is_found_and_stops_the_reader(
    name: str, tmp_path: Path
) -> None:
    folder = shards.WRONG_SHARD[name](tmp_path / "d")
    assert found(folder)
    assert shards.FIRST in stops(lambda: rows(folder))


@pytest.mark.parametrize("name", shards.HARMLESS)
def test_what_no_reader_needs_does_nothing(name: str, tmp_path: Path) -> None:
    folder = shards.HARMLESS[name](tmp_path / "d")
    assert not found(folder)
    assert [sample.key for sample in rows(folder)] == shards.table()["key"].to_pylist()
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_a_key_in_two_shards_is_found(tmp_path: Path) -> None:
    folder = shards.dataset(tmp_path / "d", shards.table())
    twice = folder / shards.SECOND
    twice.write_bytes((folder / shards.FIRST).read_bytes())
    one = Manifest.from_json((folder / "manifest.json").read_text()).shards[0]
    both = (one, Shard(twice.name, one.rows, one.bytes, one.sha256))
    (folder / "manifest.json").write_text(
        Manifest(2 * shards.ROWS, shards.GROUP, both, **shards.MADE).to_json()
    )
    problems = found(folder)
    assert len(problems) == shards.ROWS and all(
        "duplicate key" in problem.what for problem in problems
    )


@pytest.mark.parametrize(
    "file",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "..\\..\\secret",
        "..",
        ".",
        "",
        "a\0b",
        "manifest.json",
        "http:x",
        7,
        None,
        [],
    ],
)
def test_a_manifest_names_plain_files_of_its_own_folder_alone(file: Any, tmp_path: Path) -> None:
    folder = shards.sound(tmp_path / "d")
    fields = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(shards.manifest(fields, ("shards", 0, "file"), file))
    stops(lambda: open_dataset(str(folder)))
    assert [problem.file for problem in found(folder)] == ["manifest.json"]


def test_every_odd_manifest_is_refused_or_read(tmp_path: Path) -> None:
    folder = shards.sound(tmp_path / "d")
    outcomes = {"read": 0, "refused": 0}
    for text in shards.manifests(folder):
        (folder / "manifest.json").write_text(text)
        found(folder)
        try:
            opened = open_dataset(str(folder))
            for row in range(min(len(opened), 100)):
                opened.read_group(*opened.locate(row)[:2])
            outcomes["read"] += 1
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 2_000
            outcomes["refused"] += 1
    assert outcomes["refused"] > outcomes["read"] > 0, outcomes


def test_every_mutated_shard_is_read_whole_or_refused(tmp_path: Path) -> None:
    outcomes = {"read": 0, "refused": 0}
    for number, data in enumerate(shards.mutated(400, seed=0)):
        folder = shards.dataset(tmp_path / f"{number}", data)
        try:
            assert len(rows(folder)) == shards.ROWS
            outcomes["read"] += 1
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 1_000
            outcomes["refused"] += 1
        verify(str(folder), images=False)
    assert min(outcomes.values()) > 10, outcomes


@pytest.mark.parametrize("name", shards.BAD_ROW)
def test_a_bad_row_is_found_and_put_aside_and_the_others_are_read(
    name: str, tmp_path: Path
) -> None:
    folder = shards.dataset(tmp_path / "d", shards.table(shards.BAD_ROW[name]))
    assert len(found(folder)) == 1
    mixture = Mixture(
        sources=(Source(name="d", dataset=str(folder)),), lanes=2, window=2, max_bad=0.5
    )
    feed = ReaderConfig(
        mixture=mixture,
        datasets=(str(folder),),
        digests=(open_dataset(str(folder)).manifest.digest,),
        batch=4,
        steps=6,
        seed=0,
        model=Eye(),
        quarantine=str(tmp_path / "aside"),
    )
    keys = shards.table()["key"].to_pylist()
    read = {row.key for step in local(feed, rank=0, world=1, start=0) for row in step}
    aside = list(records(str(tmp_path / "aside")))
    assert [(record.key, record.row) for record in aside] == [(keys[1], 1)]
    assert aside[0].reason in (Reason.EMPTY_FILE, Reason.NOT_AN_IMAGE)
    assert read == set(keys) - {keys[1]}
