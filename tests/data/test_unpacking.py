"""Files of kilobytes that unpack to gigabytes are refused before they are read; sound ones are not."""

import hashlib
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgework.data.arrow_bounds import check_messages, unpacked_bytes
from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import hf, preferences
from bridgework.data.manifest import FILE, Manifest, Shard
from bridgework.data.quarantine import BadSample, Reason, records
from bridgework.data.samples import SCHEMA, to_row
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

ROWS = 4
HUGE = "a" * 20_000_000  # four of them are 80 MB, and a few kilobytes where they are stored
PNG = next(shapes(1, size=16)).images[0]


def shard(folder: Path, change: dict[str, Any], **how: Any) -> Path:
    """A dataset of one shard, whose rows have other fields; its manifest fits."""
    rows = [to_row(sample) | change for sample in shapes(ROWS, size=16)]
    folder.mkdir()
    file = folder / "shard-00000.parquet"
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, file, compression="zstd", write_page_checksum=True, **how)
    data = file.read_bytes()
    entry = Shard(file.name, ROWS, len(data), hashlib.sha256(data).hexdigest())
    made: dict[str, Any] = {"source": "x", "license": "CC0", "made_by": "tests"}
    (folder / FILE).write_text(Manifest(ROWS, ROWS, (entry,), **made).to_json())
    return folder


CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a text": ({"ocr": HUGE}, {"use_dictionary": False}),
    "a key": ({"key": HUGE}, {"use_dictionary": False}),
    "a text in a dictionary": ({"ocr": HUGE}, {}),
    "images in a dictionary": ({"images": [b"x" * 1_000_000] * 20}, {}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_shard_that_unpacks_to_far_more_is_refused_before_it_is_read(
    name: str, tmp_path: Path
) -> None:
    change, how = CHANGES[name]
    folder = shard(tmp_path / "d", change, **how)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 100_000
    del change
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    with pytest.raises(
        DataError, match=r"row group 0 has .* bytes and unpacks to 80,.*data verify"
    ):
        open_dataset(str(folder)).read_group(0, 0)
    assert tracemalloc.get_traced_memory()[1] < 30_000_000
    tracemalloc.stop()
    assert pa.total_allocated_bytes() - before < 60_000_000  # a dictionary holds its value once
    assert any("unpacks to" in problem.what for problem in verify(str(folder)))
    if name == "a key":
        with pytest.raises(DataError, match="unpacks to"):
            list(open_dataset(str(folder)).keys())


def test_a_shard_whose_texts_compress_well_is_read(tmp_path: Path) -> None:
    folder = shard(tmp_path / "d", {"ocr": "a" * 1_000_000})
    assert len(open_dataset(str(folder)).read_group(0, 0)) == ROWS


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    return file.getvalue()


def arrow(table: pa.Table) -> bytes:
    file, how = io.BytesIO(), pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(file, table.schema, options=how) as writer:
        writer.write_table(table)
    return file.getvalue()


def arrow_file(table: pa.Table) -> bytes:
    file, how = io.BytesIO(), pa.ipc.IpcWriteOptions(compression="lz4")
    with pa.ipc.new_file(file, table.schema, options=how) as writer:
        writer.write_table(table)
    return file.getvalue()


WRITERS: dict[str, tuple[str, Callable[[pa.Table], bytes]]] = {
    "parquet": ("parquet", parquet),
    "arrow": ("arrow", arrow),
    "arrow file": ("arrow", arrow_file),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_table_that_unpacks_to_far_more_is_put_aside(kind: str, tmp_path: Path) -> None:
    ending, write = WRITERS[kind]
    cells = [{"bytes": PNG, "path": None}] * ROWS
    (tmp_path / "src").mkdir()
    for number, text in enumerate(("a cat", HUGE)):
        file = tmp_path / "src" / f"data-{number:05d}-of-00002.{ending}"
        file.write_bytes(write(pa.table({"image": cells, "caption": [text] * ROWS})))
    hf.HFImporter(max_bad=1).run(str(tmp_path / "src"), str(tmp_path / "d"), say=lambda _: None)
    assert len(open_dataset(str(tmp_path / "d"))) == ROWS
    bad = list(records(f"{tmp_path}/d.quarantine"))
    assert {record.reason for record in bad} == {Reason.TOO_MANY_BYTES}
    assert all("unpacks to" in record.detail for record in bad)


def test_a_row_that_a_dictionary_makes_huge_costs_itself_alone(tmp_path: Path) -> None:
    cell = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    big = [{"bytes": b"x" * 900_000, "path": None}] * 100
    image = pa.array([[{"bytes": PNG, "path": None}], big], cell)
    table = {"images": image, "question": ["What?"] * 2, "chosen": ["a"] * 2, "rejected": ["b"] * 2}
    pq.write_table(pa.table(table), tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 1_000_000
    file, dest = str(tmp_path / "x.parquet"), str(tmp_path / "d")
    preferences.PreferencesImporter(max_bad=1).run(file, dest, say=lambda _: None)
    assert len(open_dataset(dest)) == 1
    (bad,) = records(f"{dest}.quarantine")
    assert bad.reason is Reason.TOO_MANY_BYTES


def test_arrow_messages_are_counted_by_what_they_declare() -> None:
    many = pa.table({"n": list(range(9)), "text": ["a" * 100] * 9})
    for write in (arrow, arrow_file):
        data = write(many)
        check_messages(pa.BufferReader(data[8:] if write is arrow_file else data))
    kept = pa.table({"text": pa.array(["b" * 20_000_000]).take([0] * ROWS)}).slice(0, ROWS)
    with pytest.raises(BadSample, match="a batch has"):
        check_messages(pa.BufferReader(arrow(kept)))


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (pa.array(["ab", None, "c"]), 3),
        (pa.array([b"abcd"]), 4),
        (pa.array(["ab", "ab", None]).dictionary_encode(), 4),
        (pa.array([["ab"], ["c", "d"], None]), 4),
        (pa.array([["ab", "c"]] * 2, pa.list_(pa.string(), 2)), 6),
        (pa.array([{"a": "xy", "b": [b"z"]}]), 3),
        (pa.array([[("k", "value")]], pa.map_(pa.string(), pa.string())), 6),
        (pa.array([["ab", "ab"]], pa.list_(pa.string())).slice(0, 1), 4),
        (pa.nulls(3), 0),
    ],
)
def test_texts_count_as_often_as_they_occur(array: pa.Array, size: int) -> None:
    assert unpacked_bytes(array) == size
