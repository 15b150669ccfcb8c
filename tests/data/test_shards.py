"""Datasets on disk: written atomically, read as written, and every kind of damage is found."""

import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from bridgework.data.dataset import Dataset, Manifest, Problem, open_dataset, verify, write
from bridgework.data.manifest import Shard
from bridgework.data.quarantine import BadSample, Quarantine, Reason
from bridgework.data.samples import LICENSE, Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError, ResourceError

ROWS = 37


def make(dest: str, samples: list[Sample] | None = None, **options: Any) -> Manifest:
    rows = list(shapes(ROWS, size=16)) if samples is None else samples
    given: dict[str, Any] = {
        "source": "s",
        "license": "CC0-1.0",
        "made_by": "test",
        "group_rows": 4,
        "shard_rows": 16,
    }
    return write(rows, dest, **(given | options))


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    make(str(tmp_path / "d"))
    return tmp_path / "d"


@pytest.mark.parametrize("place", ["local", "memory"])
def test_samples_are_read_in_order_from_any_file_system(place: str, tmp_path: Path) -> None:
    path = str(tmp_path / "d") if place == "local" else f"memory://{tmp_path.name}/deep/d"
    manifest = make(path, parameters={"a": [1, 2]}, parents=["p"])
    dataset = open_dataset(path)
    assert list(dataset.samples()) == list(shapes(ROWS, size=16))
    assert dataset.manifest == manifest and dataset.manifest.digest == manifest.digest
    assert [shard.rows for shard in manifest.shards] == [16, 16, 5]
    assert verify(path) == []


def test_locate_agrees_with_counting(dataset: Path) -> None:
    opened = open_dataset(str(dataset))
    everything = list(opened.samples())
    for row in range(ROWS):
        shard, group, place = opened.locate(row)
        assert opened.read_group(shard, group)[place] == everything[row]
    for row in (-1, ROWS):
        with pytest.raises(DataError, match=f"37 rows; row {row}"):
            opened.locate(row)


def test_row_groups_are_full_except_the_last_and_images_are_stored_uncompressed(
    dataset: Path,
) -> None:
    for name, groups in (("shard-00000.parquet", [4, 4, 4, 4]), ("shard-00002.parquet", [4, 1])):
        metadata = pq.ParquetFile(dataset / name).metadata
        assert [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)] == groups
        columns = {
            c["path_in_schema"]: c["compression"]
            for c in metadata.row_group(0).to_dict()["columns"]
        }
        assert (
            columns["images.list.element"] == "UNCOMPRESSED"
            and columns["parts.list.element.text"] == "ZSTD"
        )


def test_digest_depends_on_content_and_not_on_location(tmp_path: Path) -> None:
    first, again = make(str(tmp_path / "a")), make(str(tmp_path / "b"))
    other = make(str(tmp_path / "c"), list(shapes(ROWS, size=16, seed=1)))
    assert first.digest == again.digest != other.digest


def test_more_shards_than_open_files_can_be_read_in_any_order(tmp_path: Path) -> None:
    make(str(tmp_path / "d"), group_rows=1, shard_rows=2)
    opened = open_dataset(str(tmp_path / "d"))
    keys = [
        opened.read_group(*opened.locate(row)[:2])[0].key
        for row in [*range(ROWS), *reversed(range(ROWS))]
    ]
    assert keys[:ROWS] == keys[ROWS:][::-1]


# --- atomic writes --------------------------------------------------------------------------------


def test_error_while_writing_leaves_no_files(tmp_path: Path) -> None:
    def cut() -> Iterator[Sample]:
        yield from shapes(30, size=16)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(
            cut(),
            str(tmp_path / "d"),
            source="s",
            license="l",
            made_by="t",
            group_rows=4,
            shard_rows=8,
        )
    assert list(tmp_path.iterdir()) == []


def test_existing_dataset_is_never_overwritten(dataset: Path) -> None:
    before = (dataset / "manifest.json").read_bytes()
    with pytest.raises(DataError, match="already holds a dataset"):
        make(str(dataset))
    assert (dataset / "manifest.json").read_bytes() == before and verify(str(dataset)) == []


def test_interrupted_write_leaves_no_dataset_and_can_be_repeated(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, move = open_dataset(str(dataset)).manifest.digest, LocalFileSystem.mv

    def torn(fs: LocalFileSystem, path: str, to: str, **kwargs: Any) -> None:
        if path.endswith("shard-00001.parquet"):
            raise KeyboardInterrupt
        move(fs, path, to, **kwargs)

    shutil.rmtree(dataset)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalFileSystem, "mv", torn)
        make(str(dataset))
    assert [path.name for path in dataset.iterdir() if path.suffix == ".parquet"] == [
        "shard-00000.parquet"
    ]
    with pytest.raises(DataError, match="a write was interrupted"):
        open_dataset(str(dataset))
    (dataset / "shard-00099.parquet").write_bytes(b"of a writer that had more to write")
    make(str(dataset))
    assert verify(str(dataset)) == [] and open_dataset(str(dataset)).manifest.digest == digest


def test_invalid_datasets_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no usable samples"):
        make(str(tmp_path / "d"), [])
    with pytest.raises(DataError, match="not a multiple of group_rows"):
        make(str(tmp_path / "d"), shard_rows=6)
    with pytest.raises(DataError, match="no dataset here"):
        open_dataset(str(tmp_path / "d"))


def test_too_many_bad_rows_prevent_a_dataset_and_a_few_are_counted(tmp_path: Path) -> None:
    quarantine = Quarantine(str(tmp_path / "q"), limit=0.1)
    for row in range(4):
        quarantine.add("s", f"{row}", row, BadSample(Reason.CORRUPT, "x"))
    assert make(str(tmp_path / "good"), quarantine=quarantine).quarantined == {"corrupt": 4}
    quarantine.add("s", "4", 4, BadSample(Reason.CORRUPT, "x"))
    with pytest.raises(DataError, match="5 of 42 rows are bad"):
        make(str(tmp_path / "bad"), quarantine=quarantine)
    assert not (tmp_path / "bad").exists()


# --- damage ---------------------------------------------------------------------------------------


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def rewrite_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap(folder: Path) -> None:
    one, two, spare = (
        folder / "shard-00000.parquet",
        folder / "shard-00001.parquet",
        folder / "spare",
    )
    shutil.move(one, spare)
    shutil.move(two, one)
    shutil.move(spare, two)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda d: os.truncate(d / "shard-00001.parquet", 900), "has 900 bytes"),
    "emptied": (lambda d: os.truncate(d / "shard-00001.parquet", 0), "has 0 bytes"),
    "appended": (lambda d: lengthen(d / "shard-00000.parquet"), "bytes; the manifest says"),
    "flipped": (lambda d: flip(d / "shard-00002.parquet", 1_000), "sha256 does not match"),
    "missing": (lambda d: (d / "shard-00001.parquet").unlink(), "is missing"),
    "extra": (lambda d: (d / "shard-00009.parquet").write_bytes(b"x"), "is not in the manifest"),
    "edited manifest": (
        lambda d: rewrite_manifest(d, licence="mine"),
        "changed after it was written",
    ),
    "wrong count": (lambda d: rewrite_manifest(d, rows=36), "counts 36 rows, its shards 37"),
    "other schema": (lambda d: rewrite_manifest(d, schema=9), "Got 9; expected 1"),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), "no manifest"),
    "HTML": (lambda d: (d / "manifest.json").write_text("<html>"), "not a manifest"),
    "list": (lambda d: (d / "manifest.json").write_text("[]"), "not a manifest"),
    "binary": (lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\x00"), "not a manifest"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_verify_finds(name: str, dataset: Path) -> None:
    harm, words = DAMAGE[name]
    harm(dataset)
    found = verify(str(dataset))
    assert len(found) == 1 and words in found[0].what, found


def test_swapped_shards_of_one_size_are_named(tmp_path: Path) -> None:
    image = next(shapes(1, size=16)).images[0]
    make(
        str(tmp_path / "d"),
        [pair("a", image, "cat"), pair("b", image, "dog")],
        group_rows=1,
        shard_rows=1,
    )
    swap(tmp_path / "d")
    assert verify(str(tmp_path / "d"))[0] == Problem(
        "shard-00000.parquet", "holds the bytes of shard-00001.parquet"
    )


def test_every_flipped_byte_is_found(dataset: Path) -> None:
    shard = dataset / "shard-00002.parquet"
    original = shard.read_bytes()
    for place in range(0, len(original), 97):
        flip(shard, place)
        assert verify(str(dataset), images=False) != []
        shard.write_bytes(original)


def test_flipped_byte_inside_an_image_is_an_error_for_readers(dataset: Path) -> None:
    shard = dataset / "shard-00000.parquet"
    flip(shard, shard.read_bytes().index(b"IDAT") + 9)
    with pytest.raises(
        DataError, match=r"shard-00000.parquet, row group 0.*bridgework data verify"
    ):
        open_dataset(str(dataset)).read_group(0, 0)


def test_error_of_a_corrupt_shard_has_the_file_and_a_fix(dataset: Path) -> None:
    os.truncate(dataset / "shard-00001.parquet", 100)
    with pytest.raises(
        DataError, match=r"shard-00001.parquet.*100 bytes; the manifest says.*verify"
    ):
        open_dataset(str(dataset)).read_group(1, 0)
    (dataset / "shard-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"shard-00000\.parquet"):
        list(Dataset(str(dataset)).samples())


def test_verify_finds_duplicate_keys_and_undecodable_images(tmp_path: Path) -> None:
    good, *rest = shapes(3, size=16)
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "TIFF")
    bad = [pair("cut", good.images[0][:50], "x"), pair("tiff", file.getvalue(), "x"), *rest]
    text = Sample("text", (), (Part("user", text="a"), Part("assistant", text="b")))
    make(str(tmp_path / "d"), [good, good, text, *bad])
    found = [problem.what for problem in verify(str(tmp_path / "d"))]
    assert len(found) == 3
    assert "duplicate key" in found[0] and "'cut'" in found[1] and "not_an_image" in found[2]
    assert len(verify(str(tmp_path / "d"), images=False)) == 1


def test_files_of_operating_systems_are_not_part_of_a_dataset(tmp_path: Path) -> None:
    dest = tmp_path / "d"
    (dest / ".ipynb_checkpoints").mkdir(parents=True)
    for name in (".DS_Store", "._manifest.json", "Thumbs.db", ".ipynb_checkpoints/x.json"):
        (dest / name).write_bytes(b"x")
    make(str(dest))
    assert verify(str(dest)) == [] and len(open_dataset(str(dest))) == ROWS
    (dest / ".secret").write_bytes(b"x")
    assert [problem.file for problem in verify(str(dest))] == [".secret"]


@pytest.mark.parametrize(
    "name", ["rows", "group_rows", "quarantined", "left_out", "shard rows", "shard bytes"]
)
@pytest.mark.parametrize("count", [-1, 1.5, True, None, "3", []], ids=str)
def test_counts_of_a_manifest_are_integers_from_0(name: str, count: Any, tmp_path: Path) -> None:
    make(str(tmp_path / "d"))
    fields = json.loads((tmp_path / "d" / "manifest.json").read_text())
    del fields["digest"]
    fields["license"] = fields.pop(LICENSE)
    shard = dict(fields["shards"][0])
    change: dict[str, Any] = {name: count}
    if name in ("quarantined", "left_out"):
        change = {name: {"bad_row": count}}
    elif name.startswith("shard"):
        change = {"shards": [shard | {name.partition(" ")[2]: count}]}
    with pytest.raises(DataError, match="a count in the manifest is not an integer, or is below 0"):
        changed = {**fields, **change}
        changed["shards"] = tuple(Shard(**entry) for entry in changed["shards"])
        Manifest(**{**changed, "parents": tuple(changed["parents"])})


@pytest.mark.parametrize("name", ["parameters", "quarantined", "left_out"])
@pytest.mark.parametrize("table", [[], "x", 3, None])
def test_tables_of_a_manifest_are_mappings(name: str, table: Any) -> None:
    made: dict[str, Any] = {"source": "x", "license": "CC0", "made_by": "tests", name: table}
    with pytest.raises(DataError, match="not a mapping of strings"):
        Manifest(0, 1, (), **made)


def test_license_files_are_allowed_and_progress_is_reported(dataset: Path) -> None:
    (dataset / "LICENSE").write_text("public domain")
    calls: list[tuple[int, int]] = []
    assert verify(str(dataset), progress=lambda done, rows: calls.append((done, rows))) == []
    assert calls == [(16, ROWS), (32, ROWS), (37, ROWS)]


def test_manifest_cannot_point_outside_its_folder(dataset: Path) -> None:
    shards = json.loads((dataset / "manifest.json").read_text())["shards"]
    shards[0]["file"] = "../../secret.parquet"
    rewrite_manifest(dataset, shards=shards)
    with pytest.raises(DataError, match="outside its own folder"):
        open_dataset(str(dataset))


class NoCredentialsError(Exception):
    """Error of a store's client library, not derived from Python's own errors."""


@pytest.mark.parametrize(
    "error", [ConnectionResetError("peer"), TimeoutError("10 s"), NoCredentialsError("none")]
)
def test_unreachable_store_is_not_a_data_error(
    dataset: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(shard: int) -> Any:
        raise error

    opened = open_dataset(str(dataset))
    monkeypatch.setattr(opened, "_file", gone)
    with pytest.raises(ResourceError, match="cannot be reached"):
        opened.read_group(0, 0)
    with pytest.raises(ResourceError, match="cannot be reached"):
        next(opened.keys())


@pytest.mark.parametrize("error", [PermissionError("no"), NoCredentialsError("none")])
def test_store_that_denies_the_manifest_gives_a_one_line_error(
    dataset: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> bytes:
        raise error

    monkeypatch.setattr(LocalFileSystem, "cat_file", refuse)
    with pytest.raises(
        ResourceError, match=r"manifest\.json cannot be reached\. Got .*Error: no.*its store is up"
    ):
        open_dataset(str(dataset))
