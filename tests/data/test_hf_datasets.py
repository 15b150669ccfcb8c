"""Hugging Face datasets come in from disk: Arrow and Parquet, every kind of image cell, files that are not whole."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import hf, llava_json
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Sample
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

PICTURES = [sample.images[0] for sample in shapes(rows=40, size=16)]
CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def quiet(_: str) -> None:
    """For importers that are not asked what they say."""


def pairs(first: int, rows: int) -> pa.Table:
    """Pictures as `datasets` stores them, with captions; the first picture and row are number `first`."""
    numbers = range(first, first + rows)
    cells = pa.array([{"bytes": PICTURES[n], "path": f"{n}.png"} for n in numbers], CELL)
    return pa.table(
        {"id": list(numbers), "image": cells, "caption": [f"caption {n}" for n in numbers]}
    )


def stream(table: pa.Table, batch: int = 3) -> bytes:
    """An Arrow IPC stream, which is what `save_to_disk` writes."""
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return file.getvalue()


def file_format(table: pa.Table) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return file.getvalue()


def parquet(table: pa.Table, group: int = 4) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=group)
    return file.getvalue()


def saved(folder: Path, *tables: pa.Table) -> Path:
    """The files of `Dataset.save_to_disk`."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(tables):05d}.arrow" for n in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        (folder / name).write_bytes(stream(table))
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": name} for name in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    return folder


def hub(folder: Path, *tables: pa.Table, split: str = "train") -> Path:
    """The files of a dataset on the Hub."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for n, table in enumerate(tables):
        (folder / "data" / f"{split}-{n:05d}-of-{len(tables):05d}.parquet").write_bytes(
            parquet(table)
        )
    return folder


def bring(source: Path | str, dest: Path, **options: Any) -> Manifest:
    return hf.HFImporter(**{"max_bad": 1.0} | options).run(str(source), str(dest), say=quiet)


def read(dest: Path) -> dict[str, Sample]:
    assert verify(str(dest)) == []
    return {sample.key: sample for sample in open_dataset(str(dest)).samples()}


def aside(dest: Path) -> dict[str, Reason]:
    return {record.key: record.reason for record in records(f"{dest}.quarantine")}


# --- what is sound ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["saved", "hub"])
def test_rows_come_in_the_order_of_the_files_with_the_bytes_as_they_are(
    form: str, tmp_path: Path
) -> None:
    source = (saved if form == "saved" else hub)(
        tmp_path / "s", pairs(0, 7), pairs(7, 1), pairs(8, 6)
    )
    manifest = bring(source, tmp_path / "d", license="MIT")
    name = "row" if form == "saved" else "train"
    found = read(tmp_path / "d")
    assert list(found) == [f"{name}-{n:08d}" for n in range(14)]
    assert [(s.images, s.text) for s in found.values()] == [
        ((PICTURES[n],), f"caption {n}") for n in range(14)
    ]
    assert manifest.license == "MIT" and manifest.parameters["text"] == "caption"


CELLS: dict[str, Callable[[int], tuple[Any, pa.DataType]]] = {
    "bytes and path": lambda n: ({"bytes": PICTURES[n], "path": None}, CELL),
    "a path alone": lambda n: ({"bytes": None, "path": f"pictures/{n}.png"}, CELL),
    "large bytes": lambda n: ({"bytes": PICTURES[n]}, pa.struct([("bytes", pa.large_binary())])),
    "binary": lambda n: (PICTURES[n], pa.binary()),
    "path": lambda n: (f"pictures/{n}.png", pa.string()),
    "a list of one": lambda n: ([{"bytes": PICTURES[n], "path": None}], pa.list_(CELL)),
}


@pytest.mark.parametrize("kind", CELLS)
def test_an_image_is_bytes_or_a_path_in_the_folder(kind: str, tmp_path: Path) -> None:
    (tmp_path / "s" / "pictures").mkdir(parents=True)
    for n in range(5):
        (tmp_path / "s" / "pictures" / f"{n}.png").write_bytes(PICTURES[n])
    cells, kinds = zip(*(CELLS[kind](n) for n in range(5)), strict=True)
    table = pa.table(
        {"photo": pa.array(cells, kinds[0]), "title": [f"caption {n}" for n in range(5)]}
    )
    (tmp_path / "s" / "train.parquet").write_bytes(parquet(table, group=2))
    bring(tmp_path / "s", tmp_path / "d", image="photo", text="title")
    assert [sample.images[0] for sample in read(tmp_path / "d").values()] == PICTURES[:5]


@pytest.mark.parametrize("write", [stream, file_format, parquet])
def test_a_list_of_captions_gives_a_row_for_each(
    write: Callable[[pa.Table], bytes], tmp_path: Path
) -> None:
    texts = [["one", "two"], ["three"], [], None, ["four", "", "six"]]
    table = pairs(0, 5).set_column(2, "caption", pa.array(texts, pa.list_(pa.string())))
    path = tmp_path / ("x.parquet" if write is parquet else "x.arrow")
    path.write_bytes(write(table))
    manifest = bring(path, tmp_path / "d")
    found = {key: (sample.images[0], sample.text) for key, sample in read(tmp_path / "d").items()}
    assert found == {
        "x-00000000": (PICTURES[0], "one"),
        "x-00000000#2": (PICTURES[0], "two"),
        "x-00000001": (PICTURES[1], "three"),
        "x-00000004": (PICTURES[4], "four"),
        "x-00000004#3": (PICTURES[4], "six"),
    }
    assert aside(tmp_path / "d") == dict.fromkeys(
        ("x-00000002", "x-00000003", "x-00000004#2"), Reason.EMPTY_TEXT
    )
    assert manifest.rows == 5


@pytest.mark.parametrize("form", ["list of structs", "struct of lists"])
def test_conversations_come_in_as_those_of_llavas_json(form: str, tmp_path: Path) -> None:
    talks = [
        [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A shape."}],
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{"from": "human", "value": "No answer"}],
        [{"from": "human", "value": "Is <image> like <image>?"}, {"from": "gpt", "value": "No."}],
    ]
    shown = [PICTURES[:1], [], [], PICTURES[1:3]]
    if form == "struct of lists":
        fields = ("from", "value")
        cells = [{name: [turn[name] for turn in talk] for name in fields} for talk in talks]
        column = pa.array(cells, pa.struct([(name, pa.list_(pa.string())) for name in fields]))
    else:
        column = pa.array(talks)
    images = pa.array(
        [[{"bytes": image, "path": None} for image in of] for of in shown], pa.list_(CELL)
    )
    (tmp_path / "x.arrow").write_bytes(
        stream(pa.table({"image": images, "conversations": column}), batch=2)
    )
    bring(tmp_path / "x.arrow", tmp_path / "d")
    (tmp_path / "p").mkdir()
    for n, image in enumerate(PICTURES[:3]):
        (tmp_path / "p" / f"{n}.png").write_bytes(image)
    names = (["p/0.png"], [], [], ["p/1.png", "p/2.png"])
    rows = [
        {"id": n, "image": of, "conversations": talk}
        for n, (of, talk) in enumerate(zip(names, talks, strict=True))
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    llava_json.LlavaJsonImporter(max_bad=1).run(
        str(tmp_path / "x.json"), str(tmp_path / "e"), say=quiet
    )
    ours, theirs = (list(read(tmp_path / name).values()) for name in "de")
    assert [(s.images, s.parts) for s in ours] == [(s.images, s.parts) for s in theirs] and len(
        ours
    ) == 3
    assert (
        list(aside(tmp_path / "d").values())
        == list(aside(tmp_path / "e").values())
        == [Reason.BAD_ROW]
    )


# --- which files -----------------------------------------------------------------------------------------------------


def test_one_split_is_read_and_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    hub(tmp_path / "s", pairs(0, 3), pairs(3, 2))
    hub(tmp_path / "s", pairs(10, 4), split="test")
    with pytest.raises(
        DataError, match=r"holds the splits test, train; choose one, e\.g\. split=test"
    ):
        bring(tmp_path / "s", tmp_path / "d")
    with pytest.raises(DataError, match="no split 'tset'; did you mean 'test'"):
        bring(tmp_path / "s", tmp_path / "d", split="tset")
    bring(tmp_path / "s", tmp_path / "d", split="test")
    assert list(read(tmp_path / "d")) == [f"test-{n:08d}" for n in range(4)]


def test_splits_may_be_folders_and_the_cache_of_a_dataset_is_no_part_of_it(tmp_path: Path) -> None:
    saved(tmp_path / "s" / "train", pairs(0, 3))
    saved(tmp_path / "s" / "validation", pairs(3, 2))
    (tmp_path / "s" / "train" / "cache-0123.arrow").write_bytes(stream(pairs(20, 5)))
    (tmp_path / "s" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    bring(tmp_path / "s", tmp_path / "d", split="train")
    assert list(read(tmp_path / "d")) == [f"train-{n:08d}" for n in range(3)]


def test_a_file_of_five_that_is_missing_and_two_datasets_in_one_folder_are_errors(
    tmp_path: Path,
) -> None:
    hub(tmp_path / "s", pairs(0, 3), pairs(3, 2), pairs(5, 2))
    (tmp_path / "s" / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match="not complete: file 1 of 3, counted from 0, is missing"):
        bring(tmp_path / "s", tmp_path / "d")
    assert bring(tmp_path / "s" / "data" / "train-00002-of-00003.parquet", tmp_path / "d").rows == 2
    for name in ("a", "b"):
        hub(tmp_path / "t" / name, pairs(0, 3))
    with pytest.raises(DataError, match="in the folders a/data, b/data; give one of them"):
        bring(tmp_path / "t", tmp_path / "e")
    with pytest.raises(DataError, match=r"no \.arrow and no \.parquet file"):
        bring(tmp_path / "nowhere", tmp_path / "e")


def test_a_dataset_may_lie_in_a_store(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for n, (write, ending) in enumerate(((stream, "arrow"), (parquet, "parquet"))):
        fs.pipe_file(f"/{tmp_path.name}/{n}/train.{ending}", write(pairs(0, 9)))
        bring(f"memory://{tmp_path.name}/{n}", tmp_path / f"d{n}")
        assert [sample.images[0] for sample in read(tmp_path / f"d{n}").values()] == PICTURES[:9]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {},
            r"has no column 'caption'; its columns are id, picture, captoin; did you mean 'captoin'\?; name one",
        ),
        (
            {"text": "captoin", "image": "img"},
            "has no column 'img'; its columns are .*; name one with image=COLUMN",
        ),
        ({"text": "captoin", "image": "id"}, "column 'id' holds int64; an image is bytes"),
        ({"text": "id", "image": "picture"}, "column 'id' holds int64; a text, a list of texts"),
    ],
)
def test_columns_that_are_not_there_are_one_clear_error(
    options: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "x.parquet").write_bytes(
        parquet(pairs(0, 3).rename_columns(["id", "picture", "captoin"]))
    )
    with pytest.raises(DataError, match=words):
        bring(tmp_path / "x.parquet", tmp_path / "d", **({"image": "picture"} | options))
    assert not (tmp_path / "d").exists()


def test_the_same_files_again_are_nothing_to_do_and_others_are_an_error(tmp_path: Path) -> None:
    source = saved(tmp_path / "s", pairs(0, 6))
    first = bring(source, tmp_path / "d")
    assert bring(source, tmp_path / "d") == first
    (source / "data-00000-of-00001.arrow").write_bytes(stream(pairs(10, 6)))
    with pytest.raises(DataError, match=r"another dataset\. Got sha256"):
        bring(source, tmp_path / "d")
    assert [
        sample.images[0] for sample in read_all(bring(source, tmp_path / "e"), tmp_path / "e")
    ] == PICTURES[10:16]


def read_all(_: Manifest, dest: Path) -> list[Sample]:
    return list(read(dest).values())


# --- as other tools write them ---------------------------------------------------------------------------------------

UUID = "6d3b2c1a-1111-4abc-9def-abcdefabcdef"
WRITERS = {
    "Ray Data": [f"0356AFpwqkWuS1bVOfu7D{'abc'[n]}_{n:06}.parquet" for n in range(3)],
    "Ray Data, before": [f"{'6b1c0f' * 5}ab_{n:06}.parquet" for n in range(3)],
    "Ray Data, short": [f"6b1c0f_{n:06}.parquet" for n in range(3)],
    "Ray Data, by blocks": [f"2_{n:06}_{n % 2:06}-0.parquet" for n in range(3)],
    "dask": [f"part.{n}.parquet" for n in range(3)],
    "DuckDB": [f"data_{n}.parquet" for n in range(3)],
    "DuckDB, by year": [f"year={2020 + n}/data_0.parquet" for n in range(3)],
    "Spark": [f"part-{n:05}-{UUID}-c000.snappy.parquet" for n in range(3)],
    "pyarrow": [f"part-{n}.parquet" for n in range(3)],
    "polars": [f"a=x/b={n}/{n:08}.parquet" for n in range(3)],
    "numbered": [f"RLAIF-V-Dataset_{n:03}.parquet" for n in range(3)],
    "chunks": [f"captions_chunk{n}.parquet" for n in range(3)],
    "hashes": [f"{name}.parquet" for name in ("0f3a91", "1b2c77", "ab12cd")],
    "BigQuery": [f"{n:012}.parquet" for n in range(3)],
}


@pytest.mark.parametrize("writer", WRITERS)
def test_files_that_one_writer_numbered_are_one_dataset(writer: str, tmp_path: Path) -> None:
    for number, name in enumerate(WRITERS[writer]):
        file = tmp_path / "s" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(parquet(pairs(3 * number, 3)))
    for name in ("_SUCCESS", "_metadata", "_temporary/0/x.parquet", ".part.0.parquet.crc"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"x")
    for name in ("__MACOSX/._x.parquet", "._x.parquet", ".ipynb_checkpoints/x.parquet"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / name).write_bytes(b"x")
    bring(tmp_path / "s", tmp_path / "d")
    assert sorted(sample.text for sample in read(tmp_path / "d").values()) == [
        f"caption {n}" for n in range(9)
    ]


def test_what_ray_data_writes_is_read(tmp_path: Path, ray_session: None) -> None:
    import ray.data

    for number in range(2):
        table = pairs(3 * number, 3)
        ray.data.from_arrow([table.slice(0, 2), table.slice(2)]).write_parquet(str(tmp_path / "s"))
    assert len(list((tmp_path / "s").iterdir())) > 1
    bring(tmp_path / "s", tmp_path / "d")
    assert len(read(tmp_path / "d")) == 6


@pytest.mark.parametrize(
    "names",
    [
        ("train", "test"),
        ("coco_2014", "coco_2017"),
        ("v1", "v2"),
        ("cifar10", "cifar100"),
        ("train_0", "test_0"),
        ("train/part.0", "test/part.0"),
    ],
)
def test_files_of_several_datasets_stay_apart(names: tuple[str, str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "s" / f"{name}.parquet").write_bytes(parquet(pairs(0, 3)))
    with pytest.raises(DataError, match="holds the splits"):
        bring(tmp_path / "s", tmp_path / "d")


def test_files_that_are_not_read_are_counted(tmp_path: Path) -> None:
    hub(tmp_path / "s", pairs(0, 3))
    for name in (
        "more.csv",
        "more.jsonl",
        "images.zip",
        "README.md",
        "dataset_infos.json",
        "._x.csv",
    ):
        (tmp_path / "s" / name).write_text("x")
    made = bring(tmp_path / "s", tmp_path / "d", max_bad=0)
    assert made.left_out == {"files of .csv": 1, "files of .jsonl": 1, "files of .zip": 1}


def test_a_file_may_be_named_where_it_is_one_of_a_series(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / "s").mkdir(exist_ok=True)
        (tmp_path / "s" / f"set_{number}.parquet").write_bytes(parquet(pairs(3 * number, 3)))
    assert bring(tmp_path / "s", tmp_path / "d", split="set_1").rows == 3
    assert bring(tmp_path / "s", tmp_path / "e").rows == 6


COLUMNS: dict[str, pa.Array] = {
    "a category": pa.array(["a cat", "a dog", "a cat"]).dictionary_encode(),
    "categories in lists": pa.array([["a cat"], ["a dog"], ["a cat"]], pa.list_(pa.string())),
    "a list of fixed size": pa.array([["a cat"], ["a dog"], ["a cat"]], pa.list_(pa.string(), 1)),
    "large text": pa.array(["a cat", "a dog", "a cat"], pa.large_string()),
}


@pytest.mark.parametrize("write", [stream, file_format, parquet])
@pytest.mark.parametrize("kind", COLUMNS)
def test_texts_come_in_whatever_layout_their_column_has(
    kind: str, write: Callable[[pa.Table], bytes], tmp_path: Path
) -> None:
    path = tmp_path / ("x.parquet" if write is parquet else "x.arrow")
    column = COLUMNS[kind]
    if kind == "categories in lists" and write is not parquet:
        values = pa.array(["a cat", "a dog", "a cat"]).dictionary_encode()
        column = pa.ListArray.from_arrays([0, 1, 2, 3], values)
    path.write_bytes(write(pairs(0, 3).set_column(2, "caption", column)))
    bring(path, tmp_path / "d")
    assert [s.text for s in read(tmp_path / "d").values()] == ["a cat", "a dog", "a cat"]


def test_images_in_lists_of_fixed_size_and_dictionaries_are_read(tmp_path: Path) -> None:
    shown = [PICTURES[0], PICTURES[1], PICTURES[0]]
    columns = {
        "fixed": pa.array([[{"bytes": p, "path": None}] for p in shown], pa.list_(CELL, 1)),
        "dictionary": pa.array(shown, pa.binary()).dictionary_encode(),
    }
    for name, column in columns.items():
        (tmp_path / f"{name}.arrow").write_bytes(stream(pairs(0, 3).set_column(1, "image", column)))
        bring(tmp_path / f"{name}.arrow", tmp_path / name)
        assert [s.images[0] for s in read(tmp_path / name).values()] == shown


@pytest.mark.parametrize("null", ["caption", "image"])
def test_a_first_file_without_values_tells_no_type(null: str, tmp_path: Path) -> None:
    talks = [[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]] * 2
    empty: dict[str, Any] = {"image": pa.nulls(2), "conversations": talks}
    if null == "caption":
        empty = {"image": pairs(0, 2)["image"], "caption": pa.nulls(2)}
    shown = [[{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "A shape."}]]
    full = {"image": pairs(5, 1)["image"], "conversations": shown}
    hub(tmp_path / "s", pa.table(empty), pairs(2, 3) if null == "caption" else pa.table(full))
    bring(tmp_path / "s", tmp_path / "d")
    assert len(read(tmp_path / "d")) == 3
    bad = aside(tmp_path / "d")
    assert list(bad.values()) == ([Reason.EMPTY_TEXT] * 2 if null == "caption" else [])


# --- what is broken --------------------------------------------------------------------------------------------------


def test_bad_cells_are_put_aside_each_with_its_reason(tmp_path: Path) -> None:
    bad: list[tuple[Any, Any, Reason]] = [
        ({"bytes": b"<html>", "path": None}, "x", Reason.NOT_AN_IMAGE),
        ({"bytes": b"", "path": None}, "x", Reason.EMPTY_FILE),
        ({"bytes": PICTURES[0][:60], "path": None}, "x", Reason.TRUNCATED),
        ({"bytes": None, "path": None}, "x", Reason.MISSING_IMAGE),
        (None, "x", Reason.MISSING_IMAGE),
        ({"bytes": None, "path": "/etc/passwd"}, "x", Reason.OUTSIDE),
        ({"bytes": None, "path": "../x.png"}, "x", Reason.OUTSIDE),
        ({"bytes": None, "path": "gone.png"}, "x", Reason.MISSING_IMAGE),
        ({"bytes": PICTURES[0], "path": None}, "", Reason.EMPTY_TEXT),
        ({"bytes": PICTURES[0], "path": None}, None, Reason.EMPTY_TEXT),
        ({"bytes": PICTURES[0], "path": None}, "an <image>", Reason.PLACEHOLDERS),
    ]
    table = pa.table(
        {
            "image": pa.array([cell for cell, _, _ in bad], CELL),
            "text": [text for _, text, _ in bad],
        }
    )
    good = pa.table({"image": pairs(0, 1)["image"], "text": ["good"]})
    (tmp_path / "x.arrow").write_bytes(stream(pa.concat_tables([table, good])))
    manifest = bring(tmp_path / "x.arrow", tmp_path / "d")
    assert list(aside(tmp_path / "d").values()) == [reason for _, _, reason in bad]
    assert manifest.rows == 1 and sum(manifest.quarantined.values()) == len(bad)


def test_a_text_that_is_not_utf_8_is_one_bad_row(tmp_path: Path) -> None:
    texts = pa.array([b"good", b"\xff\xfe", b"good"], pa.binary())
    images = pairs(0, 3)["image"]
    raw = pa.table(
        {"image": images, "caption": pa.Array.from_buffers(pa.string(), 3, texts.buffers())}
    )
    (tmp_path / "x.parquet").write_bytes(parquet(raw))
    bring(tmp_path / "x.parquet", tmp_path / "d")
    assert (
        aside(tmp_path / "d") == {"x-00000001": Reason.BAD_ROW} and len(read(tmp_path / "d")) == 2
    )


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9, "mark"])
def test_whole_batches_of_a_stream_that_was_cut_come_out_and_the_cut_is_one_row(
    cut: Any, tmp_path: Path
) -> None:
    saved(tmp_path / "s", pairs(0, 9), pairs(9, 3))
    path = tmp_path / "s" / "data-00000-of-00002.arrow"
    data = path.read_bytes()
    path.write_bytes(data[:-8] if cut == "mark" else data[: int(cut * len(data))])
    bring(tmp_path / "s", tmp_path / "d")
    whole = {0.3: 0, 0.6: 3, 0.9: 6, "mark": 9}[cut]
    texts = [sample.text for sample in read(tmp_path / "d").values()]
    assert texts == [f"caption {n}" for n in [*range(whole), 9, 10, 11]]
    assert aside(tmp_path / "d") == {path.name: Reason.TRUNCATED}


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (lambda data: b"<html><body>404</body></html>" * 9, Reason.CORRUPT),
        (lambda data: b"", Reason.EMPTY_FILE),
        (lambda data: data[: len(data) // 2], Reason.TRUNCATED),
    ],
    ids=["HTML", "0 bytes", "cut"],
)
def test_a_parquet_file_without_its_end_is_an_error_alone_and_one_row_among_others(
    harm: Callable[[bytes], bytes], reason: Reason, tmp_path: Path
) -> None:
    hub(tmp_path / "s", pairs(0, 4), pairs(4, 4))
    path = tmp_path / "s" / "data" / "train-00000-of-00002.parquet"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(DataError, match=r"train-00000-of-00002\.parquet"):
        bring(path, tmp_path / "d")
    bring(tmp_path / "s", tmp_path / "d")
    assert aside(tmp_path / "d") == {f"data/{path.name}": reason} and len(read(tmp_path / "d")) == 4


def test_a_row_group_that_was_changed_costs_its_own_rows(tmp_path: Path) -> None:
    data = bytearray(parquet(pairs(0, 12)))
    column = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(1)
    data[column.data_page_offset : column.data_page_offset + 40] = b"\xff" * 40
    (tmp_path / "x.parquet").write_bytes(data)
    manifest = bring(tmp_path / "x.parquet", tmp_path / "d")
    assert [sample.text for sample in read(tmp_path / "d").values()] == [
        f"caption {n}" for n in (0, 1, 2, 3, 8, 9, 10, 11)
    ]
    assert manifest.quarantined == {"corrupt": 4}


def test_every_flipped_byte_of_an_arrow_stream_is_survived(tmp_path: Path) -> None:
    sound = stream(pairs(0, 4).select(["image", "caption"]), batch=2)
    for place in range(0, len(sound), 97):
        data = bytearray(sound)
        data[place] ^= 0x80
        (tmp_path / "x.arrow").write_bytes(data)
        try:
            manifest = bring(tmp_path / "x.arrow", tmp_path / f"d{place}")
        except DataError:
            continue
        assert verify(str(tmp_path / f"d{place}")) == [] and manifest.rows <= 4


def test_columns_of_a_later_file_that_differ_cost_that_file_alone(tmp_path: Path) -> None:
    saved(tmp_path / "s", pairs(0, 3), pairs(3, 3).rename_columns(["id", "image", "title"]))
    bring(tmp_path / "s", tmp_path / "d")
    assert len(read(tmp_path / "d")) == 3 and list(aside(tmp_path / "d").values()) == [
        Reason.BAD_ROW
    ]
