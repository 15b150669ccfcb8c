"""The import engine: a source becomes the same dataset with any number of workers and after any interruption."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bridgework.data.dataset import Dataset, open_dataset, verify, write
from bridgework.data.importers import Row, ingest
from bridgework.data.manifest import Manifest, read_manifest
from bridgework.data.quarantine import Reason, SkippedRow, UnreadableFile, records
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, SpecError

PNG = next(shapes(1, size=16)).images[0]
CHUNK = 5


def quiet(_: str) -> None:
    """For imports that are not asked what they say."""


class Source:
    """Rows with planned flaws, which counts how often each is read and can fail at any of them."""

    def __init__(
        self, rows: int, *, bad: tuple[int, ...] = (), keys: dict[int, str] | None = None
    ) -> None:
        self.keys = [(keys or {}).get(row, f"row-{row}") for row in range(rows)]
        self.bad = set(bad)
        self.reads: Counter[int] = Counter()
        self.breaks: dict[int, type[BaseException]] = {}  # when a row is listed
        self.fails: dict[int, Callable[[], BaseException]] = {}  # when a row is read

    def rows(self) -> Iterator[Row]:
        for row, key in enumerate(self.keys):
            if row in self.breaks:
                raise self.breaks[row]
            yield key, partial(self.read, row)

    def read(self, row: int) -> Sample:
        self.reads[row] += 1
        if row in self.fails:
            raise self.fails[row]()
        return pair(self.keys[row], b"<html>" if row in self.bad else PNG, f"caption {row}")

    def ingest(self, dest: Path | str, **changes: Any) -> Manifest:
        given: dict[str, Any] = {
            "license": "CC0-1.0",
            "made_by": "test",
            "parameters": {},
            "max_bad": 1.0,
            "say": quiet,
        }
        return ingest(self.rows, "source", str(dest), chunk_rows=CHUNK, **(given | changes))


def test_rows_of_the_source_are_rows_written_plus_rows_put_aside(tmp_path: Path) -> None:
    source = Source(23, bad=(0, 7, 8, 22), keys={3: "row-1", 12: "row-4", 20: "row-12"})
    manifest = source.ingest(tmp_path / "d", parameters={"sha256": "of the source"})
    assert manifest.rows + sum(manifest.quarantined.values()) == 23
    assert manifest.quarantined == {"duplicate_key": 2, "not_an_image": 4}
    assert {(r.dataset, r.digest) for r in records(f"{tmp_path}/d.quarantine")} == {
        ("source", "of the source")
    }
    table = {record.row: record.reason for record in records(f"{tmp_path}/d.quarantine")}
    assert table == {row: Reason.NOT_AN_IMAGE for row in (0, 7, 8, 22)} | {
        row: Reason.DUPLICATE_KEY for row in (3, 12)
    }
    assert verify(str(tmp_path / "d")) == []
    kept = [f"caption {row}" for row in range(23) if row not in table]
    assert [sample.text for sample in open_dataset(str(tmp_path / "d")).samples()] == kept


def test_every_row_of_uneven_shards_is_found_by_number(tmp_path: Path) -> None:
    manifest = Source(23, bad=(0, 7, 8), keys={12: "row-1"}).ingest(tmp_path / "d")
    assert [shard.rows for shard in manifest.shards] == [4, 3, 4, 5, 3]
    dataset = Dataset(str(tmp_path / "d"))
    for row, sample in enumerate(dataset.samples()):
        shard, group, place = dataset.locate(row)
        assert dataset.read_group(shard, group)[place] == sample


def test_a_key_that_stood_in_another_chunk_is_put_aside_as_one_in_the_same_chunk_is(
    tmp_path: Path,
) -> None:
    keys = {6: "row-5", 13: "row-5", 14: "row-0"}
    whole, cut = (Source(15, bad=(5,), keys=keys) for _ in range(2))
    cut.ingest(tmp_path / "cut")
    given: dict[str, Any] = {
        "license": "",
        "made_by": "",
        "parameters": {},
        "max_bad": 1,
        "say": quiet,
    }
    ingest(whole.rows, "source", str(tmp_path / "whole"), **given)
    tables = [list(records(f"{tmp_path}/{name}.quarantine")) for name in ("cut", "whole")]
    assert [(r.row, r.key, r.reason) for r in tables[0]] == [
        (r.row, r.key, r.reason) for r in tables[1]
    ]
    assert [r.row for r in tables[0]] == [5, 13, 14]


def test_a_chunk_of_nothing_but_repetitions_or_bad_rows_leaves_no_shard(tmp_path: Path) -> None:
    source = Source(
        20, bad=tuple(range(5, 10)), keys={row: f"row-{row % 5}" for row in range(10, 15)}
    )
    manifest = source.ingest(tmp_path / "d")
    assert [shard.file for shard in manifest.shards] == [
        "shard-00000.parquet",
        "shard-00003.parquet",
    ]
    assert manifest.rows == 10 and verify(str(tmp_path / "d")) == []


def test_the_plan_deals_uneven_shards_in_whole_row_groups(tmp_path: Path) -> None:
    def rows() -> Iterator[Row]:
        for row in range(500):
            yield (
                f"row-{row}",
                partial(pair, f"row-{row}", b"" if row in (0, 101, 350) else PNG, f"caption {row}"),
            )

    given: dict[str, Any] = {
        "license": "",
        "made_by": "",
        "parameters": {},
        "max_bad": 1.0,
        "say": quiet,
    }
    manifest = ingest(rows, "s", str(tmp_path / "d"), chunk_rows=100, **given)
    assert [shard.rows for shard in manifest.shards] == [99, 99, 100, 99, 100]
    dataset, size = Dataset(str(tmp_path / "d")), manifest.group_rows
    places = [dataset.locate_planned(row) for row in range(len(dataset))]
    assert sorted(places) == [dataset.locate(row) for row in range(len(dataset))]
    groups = [
        {place[:2] for place in places[first : first + size]}
        for first in range(0, len(dataset), size)
    ]
    assert [len(group) for group in groups[: 5 * (100 // size)]] == [1] * 15
    for row in (-1, len(dataset)):
        with pytest.raises(DataError, match="497 rows; row"):
            dataset.locate_planned(row)


def test_rows_that_are_left_out_are_counted_and_hide_no_other(tmp_path: Path) -> None:
    source = Source(23, bad=(7,), keys={12: "row-1"})
    for row in (0, 6, 13):
        source.fails[row] = partial(SkippedRow, "questions without two answers")
    said: list[str] = []
    manifest = source.ingest(tmp_path / "d", say=said.append)
    assert manifest.left_out == {"questions without two answers": 3}
    assert (
        manifest.rows + sum(manifest.quarantined.values()) + sum(manifest.left_out.values()) == 23
    )
    assert {record.row for record in records(f"{tmp_path}/d.quarantine")} == {7, 12}
    assert said[-1].endswith("; left out: 3 questions without two answers")
    assert read_manifest(str(tmp_path / "d")) == manifest


def test_a_manifest_without_left_out_rows_has_the_digest_that_it_always_had(tmp_path: Path) -> None:
    manifest = Source(3).ingest(tmp_path / "d")
    assert "left_out" not in json.loads((tmp_path / "d" / "manifest.json").read_text())
    assert replace(manifest, left_out={"documents without a text": 1}).digest != manifest.digest


# --- files and places -------------------------------------------------------------------------------------------------


def test_lost_files_are_held_to_the_share_of_files_and_not_of_rows(tmp_path: Path) -> None:
    source = Source(300)
    source.fails[299] = partial(UnreadableFile, Reason.TRUNCATED, "b.parquet ends early")
    with pytest.raises(
        DataError, match=r"1 of 2 files cannot be read to their end.*b\.parquet ends early; 0\.50%"
    ):
        source.ingest(tmp_path / "d", files=2, max_bad=0.005)
    assert [record.reason for record in records(f"{tmp_path}/d.quarantine")] == [Reason.TRUNCATED]
    assert not (tmp_path / "d").exists()
    assert source.ingest(tmp_path / "d", files=200, max_bad=0.005).rows == 299


def test_files_of_somebody_else_are_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "shard-00000.parquet").write_bytes(b"years of work")
    (tmp_path / "file").write_text("")
    for dest, told in (
        ("mine", "holds shard-00000.parquet; expected an empty folder"),
        ("file", "is a file"),
    ):
        with pytest.raises(DataError, match=told):
            Source(3).ingest(tmp_path / dest)
        with pytest.raises(DataError, match=told):
            write(shapes(2), str(tmp_path / dest), source="s", license="", made_by="test")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["shard-00000.parquet"]
    assert (tmp_path / "mine" / "shard-00000.parquet").read_bytes() == b"years of work"


def test_a_destination_inside_the_source_is_refused(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "license": "",
        "made_by": "",
        "parameters": {},
        "max_bad": 1,
        "say": quiet,
    }
    with pytest.raises(DataError, match="is inside the source"):
        ingest(Source(3).rows, str(tmp_path / "photos"), str(tmp_path / "photos" / "d"), **given)
    assert (
        ingest(Source(3).rows, str(tmp_path / "photos"), str(tmp_path / "photos-2"), **given).rows
        == 3
    )


def test_a_source_is_the_same_in_every_spelling_and_another_license_is_another_dataset(
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"made_by": "", "parameters": {}, "max_bad": 1, "say": quiet}
    for spelled in ("photos", "./photos/", "photos//"):
        assert (
            ingest(Source(3).rows, spelled, str(tmp_path / "d"), license="CC0-1.0", **given).source
            == "photos"
        )
    with pytest.raises(DataError, match=r"Got license 'CC0-1\.0'; expected 'MIT'"):
        ingest(Source(3).rows, "photos", str(tmp_path / "d"), license="MIT", **given)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_bad_rows_is_between_none_and_all(share: float, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="max_bad is a share of the rows, from 0 to 1"):
        Source(3).ingest(tmp_path / "d", max_bad=share)


# --- cut off ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["local", "memory"])
def test_an_import_that_was_cut_off_goes_on_and_gives_the_same_dataset(
    place: str, tmp_path: Path
) -> None:
    dest = str(tmp_path / "d") if place == "local" else f"memory://{tmp_path.name}/d"
    unbroken = Source(23, bad=(3, 18), keys={19: "row-1"}).ingest(tmp_path / "unbroken")
    source, said = Source(23, bad=(3, 18), keys={19: "row-1"}), list[str]()
    source.breaks[12] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        source.ingest(dest)
    fs, root = fsspec.core.url_to_fs(dest)
    assert not fs.exists(root) and fs.isdir(f"{root}.part")
    with pytest.raises(DataError, match="no dataset here"):
        open_dataset(dest)
    source.breaks.clear()
    assert source.ingest(dest, say=said.append).digest == unbroken.digest
    assert source.reads == Counter(
        range(23)
    )  # the two whole chunks were not read again, the third had not been begun
    assert "resumes an interrupted import" in said[0]
    assert verify(dest) == [] and not fs.exists(f"{root}.part")


class Objects(MemoryFileSystem):
    """As object stores are: a folder is there as long as something lies in it."""

    protocol = "objects"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        super().rm(path, recursive, maxdepth)
        self.pseudo_dirs[:] = [""]


def test_a_store_without_empty_folders_ends_an_import_as_any_other(tmp_path: Path) -> None:
    fsspec.register_implementation("objects", Objects, clobber=True)
    dest = f"objects://{tmp_path.name}/d"
    with pytest.raises(DataError, match="no samples came out of it"):
        Source(3, bad=(0, 1, 2)).ingest(dest)
    assert Source(23).ingest(dest).rows == 23
    assert verify(dest) == []


def test_only_the_chunk_that_was_cut_is_read_twice(tmp_path: Path) -> None:
    source = Source(23)
    source.fails[13] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        source.ingest(tmp_path / "d")
    assert [path.name for path in (tmp_path / "d.part").glob("*/*")] != []
    assert not list((tmp_path / "d.part").glob("*/shard-00002*"))
    source.fails.clear()
    source.ingest(tmp_path / "d")
    assert {row for row, times in source.reads.items() if times == 2} == {10, 11, 12, 13}
    assert max(source.reads.values()) == 2 and not (tmp_path / "d.part").exists()


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no record": lambda part: (part / "shard-00001.json").unlink(),
    "half a record": lambda part: (part / "shard-00001.json").write_bytes(
        (part / "shard-00001.json").read_bytes()[:99]
    ),
    "another record": lambda part: (part / "shard-00001.json").write_bytes(
        (part / "shard-00000.json").read_bytes()
    ),
    "no shard": lambda part: (part / "shard-00001.parquet").unlink(),
    "a flipped byte": lambda part: (part / "shard-00001.parquet").write_bytes(
        bytes(
            byte ^ (place == 900)
            for place, byte in enumerate((part / "shard-00001.parquet").read_bytes())
        )
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_chunk_whose_files_are_not_sound_is_done_again_and_no_other(
    name: str, tmp_path: Path
) -> None:
    unbroken = Source(23).ingest(tmp_path / "unbroken")
    source = Source(23)
    source.breaks[15] = KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        source.ingest(tmp_path / "d")
    DAMAGE[name](next((tmp_path / "d.part").iterdir()))
    source.breaks.clear()
    assert source.ingest(tmp_path / "d").digest == unbroken.digest
    assert {row for row, times in source.reads.items() if times == 2} == set(range(5, 10))
    assert verify(str(tmp_path / "d")) == []


def test_shards_that_were_moved_before_the_cut_are_not_made_again(tmp_path: Path) -> None:
    whole = Source(23).ingest(tmp_path / "d")
    source = Source(23)
    source.breaks[20] = KeyboardInterrupt
    (tmp_path / "d" / "manifest.json").unlink()
    (tmp_path / "aside").mkdir()
    for path in (tmp_path / "d").iterdir():
        path.rename(tmp_path / "aside" / path.name)
    with pytest.raises(KeyboardInterrupt):
        source.ingest(tmp_path / "d")
    part = next((tmp_path / "d.part").iterdir())
    for name in ("shard-00000.parquet", "shard-00001.parquet"):
        (part / name).rename(tmp_path / "d" / name)
    (tmp_path / "d" / "shard-00099.parquet").write_bytes(b"of an import that was larger")
    (tmp_path / "d" / "manifest.json.part").write_text("of the import that was cut off")
    with pytest.raises(DataError, match="a write was interrupted"):
        open_dataset(str(tmp_path / "d"))
    source.breaks.clear()
    assert source.ingest(tmp_path / "d").digest == whole.digest
    assert source.reads == Counter(range(23)) and verify(str(tmp_path / "d")) == []


def test_another_source_or_option_beside_half_an_import_starts_afresh(tmp_path: Path) -> None:
    source = Source(23)
    source.breaks[15] = KeyboardInterrupt
    for changes in ({}, {"parameters": {"sha256": "changed"}}, {"made_by": "another importer"}):
        with pytest.raises(KeyboardInterrupt):
            source.ingest(tmp_path / "d", **changes)
        assert len(list((tmp_path / "d.part").iterdir())) == 1
    assert source.reads == Counter({row: 3 for row in range(15)})
    source.breaks.clear()
    source.ingest(tmp_path / "d", parameters={"sha256": "a third"})
    assert source.reads == Counter({row: 4 if row < 15 else 1 for row in range(23)})
    assert not (tmp_path / "d.part").exists()


def test_an_import_again_does_nothing_and_reads_nothing(tmp_path: Path) -> None:
    source = Source(23)
    first = source.ingest(tmp_path / "d")
    (tmp_path / "d.part" / "0123456789abcdef").mkdir(
        parents=True
    )  # as a kill behind the manifest leaves it
    source.reads.clear()
    assert source.ingest(tmp_path / "d") == first
    assert not source.reads and not (tmp_path / "d.part").exists()


# --- too much is bad -------------------------------------------------------------------------------------------------


def test_the_limit_counts_all_rows_and_a_mended_source_is_read_again_where_it_was_bad(
    tmp_path: Path,
) -> None:
    source = Source(23, bad=(2, 11))
    with pytest.raises(
        DataError, match=r"2 of 23 rows are bad \(2 not_an_image\)\. Got 8.70%; at most 5.00% is"
    ):
        source.ingest(tmp_path / "d", max_bad=0.05)
    assert not (tmp_path / "d").exists()
    assert {record.row for record in records(f"{tmp_path}/d.quarantine")} == {2, 11}
    source.bad = {11}
    manifest = source.ingest(tmp_path / "d", max_bad=0.05)
    assert manifest.quarantined == {"not_an_image": 1}
    assert {record.row for record in records(f"{tmp_path}/d.quarantine")} == {11}
    assert {row for row, times in source.reads.items() if times == 2} == {*range(5), *range(10, 15)}


@pytest.mark.parametrize("rows", [0, 3])
def test_a_source_without_a_good_row_is_an_error_and_leaves_nothing_half_done(
    rows: int, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="no samples came out"):
        Source(rows, bad=(0, 1, 2)).ingest(tmp_path / "d")
    assert not (tmp_path / "d").exists() and not (tmp_path / "d.part").exists()


def test_what_no_shard_can_hold_is_a_bad_row_and_no_crash(tmp_path: Path) -> None:
    def give(sample: Callable[[], Sample]) -> Sample:
        return sample()

    odd: dict[str, Callable[[], Sample]] = {
        "half a surrogate": lambda: pair("a", PNG, "caption \ud800"),
        "its key too": lambda: pair("\udcff", PNG, "caption"),
        "no text": lambda: Sample("b", (), (Part("user", text=3), Part("assistant", text="x"))),
        "a number": lambda: pair("c", PNG, "x", provenance={"x": 1}),
        "too large": lambda: Sample(
            "d", (b"\0" * 40_000_000,) * 2, (Part("user", image=0), Part("user", image=1))
        ),
        "good": lambda: pair("good", PNG, "x"),
    }

    def rows() -> Iterator[Row]:
        return ((f"{key}\udcff", partial(give, make)) for key, make in odd.items())

    given: dict[str, Any] = {
        "license": "",
        "made_by": "",
        "parameters": {},
        "max_bad": 1.0,
        "say": quiet,
    }
    assert ingest(rows, "source", str(tmp_path / "d"), **given).rows == 1
    found = {record.row: record.reason for record in records(f"{tmp_path}/d.quarantine")}
    assert found == {
        0: Reason.BAD_ROW,
        1: Reason.BAD_ROW,
        2: Reason.BAD_ROW,
        3: Reason.BAD_ROW,
        4: Reason.TOO_MANY_BYTES,
    }


def test_an_error_that_is_not_one_rows_own_stops_the_import_and_keeps_what_is_done(
    tmp_path: Path,
) -> None:
    source = Source(23)
    source.fails[13] = ConnectionError
    with pytest.raises(ConnectionError):
        source.ingest(tmp_path / "d")
    source.fails.clear()
    assert source.ingest(tmp_path / "d").rows == 23 and source.reads[3] == 1


# --- workers ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
def test_workers_make_the_same_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rows() -> Iterator[Row]:
        for row in range(17):
            key = f"row-{1 if row == 13 else row}"
            yield key, partial(pair, key, b"<html>" if row == 4 else PNG, f"caption {row}")

    monkeypatch.chdir(tmp_path)  # relative paths mean the same to a worker
    given: dict[str, Any] = {
        "license": "",
        "made_by": "",
        "parameters": {},
        "max_bad": 1.0,
        "say": quiet,
    }
    alone, shared = (
        ingest(rows, "s", f"by-{n}", chunk_rows=CHUNK, workers=n, **given) for n in (0, 2)
    )
    assert shared.digest == alone.digest and shared.quarantined == {
        "duplicate_key": 1,
        "not_an_image": 1,
    }
    assert verify("by-2") == [] and len(shared.shards) == 4
