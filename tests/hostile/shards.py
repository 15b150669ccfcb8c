"""Datasets that were damaged on their way, and datasets that were made to do damage: sound by every digest."""

import hashlib
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bridgework.data.dataset import write
from bridgework.data.manifest import Manifest, Shard
from bridgework.data.samples import SCHEMA, to_row
from bridgework.data.synthetic import shapes

ROWS, GROUP = 12, 4
MADE: dict[str, Any] = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}
FIRST, SECOND = "shard-00000.parquet", "shard-00001.parquet"


def sound(folder: Path) -> Path:
    """12 rows in two shards, of two groups and one."""
    write(shapes(ROWS, size=16), str(folder), **MADE, group_rows=GROUP, shard_rows=2 * GROUP)
    return folder


# --- damaged: no digest fits any more --------------------------------------------------------------------------------

Harm = Callable[[Path], object]


def turned(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path, share: float) -> None:
    os.truncate(file, int(file.stat().st_size * share))


def swapped(folder: Path) -> None:
    (folder / FIRST).rename(folder / "aside")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "aside").rename(folder / SECOND)


def edited(folder: Path, **fields: Any) -> None:
    """The manifest with other fields, and the digest that it had."""
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


DAMAGE: Mapping[str, Harm] = {
    "a shard cut at 0": lambda d: cut(d / FIRST, 0),
    "a shard cut at 1/4": lambda d: cut(d / FIRST, 0.25),
    "a shard cut at 1/2": lambda d: cut(d / FIRST, 0.5),
    "a shard cut in its footer": lambda d: cut(d / FIRST, 0.98),
    "a shard without its last byte": lambda d: os.truncate(
        d / FIRST, (d / FIRST).stat().st_size - 1
    ),
    "a shard with a byte behind it": lambda d: (d / FIRST).write_bytes(
        (d / FIRST).read_bytes() + b"\0"
    ),
    "shards swapped": swapped,
    "a bit turned in a page": lambda d: turned(d / FIRST, (d / FIRST).read_bytes().index(b"IDAT")),
    "a bit turned in the footer": lambda d: turned(d / FIRST, (d / FIRST).stat().st_size - 40),
    "a bit turned in the footer's length": lambda d: turned(
        d / FIRST, (d / FIRST).stat().st_size - 8
    ),
    "a shard that is HTML": lambda d: (d / FIRST).write_text("<html>404</html>"),
    "a shard that is gone": lambda d: (d / FIRST).unlink(),
    "a manifest that counts 10^9 rows": lambda d: edited(d, rows=10**9),
    "a manifest of another license": lambda d: edited(d, licence="mine"),
    "a manifest without shards": lambda d: edited(d, shards=[]),
    "a manifest that is gone": lambda d: (d / "manifest.json").unlink(),
    "a manifest that is HTML": lambda d: (d / "manifest.json").write_text("<html>"),
    "a manifest of brackets": lambda d: (d / "manifest.json").write_text("[" * 200_000),
    "a manifest that is no text": lambda d: (d / "manifest.json").write_bytes(b"\xff\xfe\0"),
}


# --- hostile: whoever made it knows how a digest is made -------------------------------------------------------------


def dataset(
    folder: Path, shard: pa.Table | bytes, *, rows: int = ROWS, groups: int = GROUP, **options: Any
) -> Path:
    """A dataset of one shard, whose manifest says what is in the file: `rows` rows in groups of GROUP."""
    folder.mkdir()
    file = folder / FIRST
    if isinstance(shard, bytes):
        file.write_bytes(shard)
    else:
        pq.write_table(shard, file, row_group_size=groups, write_page_checksum=True, **options)
    entry = Shard(FIRST, rows, file.stat().st_size, hashlib.sha256(file.read_bytes()).hexdigest())
    (folder / "manifest.json").write_text(Manifest(rows, GROUP, (entry,), **MADE).to_json())
    return folder


def table(change: Mapping[str, Any] | None = None, schema: pa.Schema = SCHEMA) -> pa.Table:
    """The rows of `sound`, the second of them with other fields."""
    rows = [to_row(sample) for sample in shapes(ROWS, size=16)]
    rows[1] |= change or {}
    return pa.Table.from_pylist(rows, schema)


def shown(image: int | None, text: str = "a red ring") -> dict[str, Any]:
    """Parts that show the image at this index."""
    return {
        "parts": [
            {"role": "caption", "text": None, "image": image},
            {"role": "caption", "text": text, "image": None},
        ]
    }


def boxed(*corners: float, image: int = 0) -> dict[str, Any]:
    return {"boxes": [{"image": image, "corners": list(corners), "label": "ring"}]}


def with_column(index: int, column: pa.Array, field: pa.Field | str) -> pa.Table:
    return table().set_column(index, field, column)


def not_text() -> pa.Table:
    """Keys that are said to be UTF-8, of which the first is half of a surrogate pair."""
    data = pa.array([b"\xed\xa0\x80", *(b"key-%d" % row for row in range(1, ROWS))], pa.binary())
    return with_column(0, pa.StringArray.from_buffers(ROWS, *data.buffers()[1:]), SCHEMA.field(0))


def nested(depth: int) -> pa.Table:
    kind: Any = pa.int32()
    value: Any = 1
    for _ in range(depth):
        kind, value = pa.list_(kind), [value]
    return table().append_column("deep", pa.array([value] * ROWS, kind))


def parquet(shard: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(shard, sink, row_group_size=GROUP, write_page_checksum=True)
    return bytes(sink.getvalue())


def footer_of(size: int) -> bytes:
    """A shard that says its footer has `size` bytes."""
    return parquet(table())[:-8] + struct.pack("<I", size) + b"PAR1"


NULLABLE = pa.schema([field.with_nullable(True) for field in SCHEMA])
KEY = SCHEMA.field("key")
Made = Callable[[Path], Path]

WRONG_SHARD: Mapping[str, Made] = {  # verify finds it; reading stops, with one line
    "a column renamed": lambda d: dataset(d, table().rename_columns(["id", *SCHEMA.names[1:]])),
    "a column more": lambda d: dataset(d, table().append_column("run", pa.array(["harm"] * ROWS))),
    "a column less": lambda d: dataset(d, table().drop_columns(["licence"])),
    "a column of numbers": lambda d: dataset(d, with_column(3, pa.array([1] * ROWS), "rejected")),
    "a column as a dictionary": lambda d: dataset(
        d,
        with_column(
            0,
            table()["key"].combine_chunks().dictionary_encode(),
            pa.field("key", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        ),
    ),
    "a column of lists of lists": lambda d: dataset(d, nested(60)),
    "no list of images": lambda d: dataset(d, table({"images": None}, NULLABLE)),
    "no key": lambda d: dataset(d, table({"key": None}, NULLABLE)),
    "an empty key": lambda d: dataset(d, table({"key": ""})),
    "text that is not UTF-8": lambda d: dataset(d, not_text()),
    "an image place out of range": lambda d: dataset(d, table(shown(1))),
    "an image place below zero": lambda d: dataset(d, table(shown(-1))),
    "an image that no part shows": lambda d: dataset(d, table({"parts": shown(None)["parts"][1:]})),
    "a part that is null": lambda d: dataset(d, table({"parts": [None]})),
    "a part of an unknown role": lambda d: dataset(
        d, table({"parts": [{"role": "root", "text": "harm", "image": None}]})
    ),
    "a box without corners": lambda d: dataset(
        d, table({"boxes": [{"image": 0, "corners": None, "label": "ring"}]})
    ),
    "a box of NaN": lambda d: dataset(d, table(boxed(0.1, float("nan"), 0.5, 0.5))),
    "a box outside its image": lambda d: dataset(d, table(boxed(0.1, 0.1, 7.0, 0.5))),
    "a box in an image that is not there": lambda d: dataset(
        d, table(boxed(0.1, 0.1, 0.5, 0.5, image=3))
    ),
    "smaller row groups": lambda d: dataset(d, table(), groups=2),
    "larger row groups": lambda d: dataset(d, table(), groups=5),
    "fewer rows than claimed": lambda d: dataset(d, table(), rows=10**9),
    "more rows than claimed": lambda d: dataset(d, table(), rows=4),
    "no bytes": lambda d: dataset(d, b""),
    "a footer of 2 GB": lambda d: dataset(d, footer_of(0x7FFFFFFF)),
    "a footer of less than nothing": lambda d: dataset(d, footer_of(0xFFFFFFFF)),
    "a tar": lambda d: dataset(d, b"evil.sh".ljust(512, b"\0") * 3),
    "a pickle": lambda d: dataset(d, pickle.dumps(list(range(100)))),
}

BAD_ROW: Mapping[
    str, Mapping[str, Any]
] = {  # verify finds it; a reader puts this row aside, and reads the others
    "an image that is null": {"images": [None]},
    "an image of 0 bytes": {"images": [b""]},
    "an image that is HTML": {"images": [b"<html>404</html>"]},
}

HARMLESS: Mapping[str, Made] = {  # nothing to find, nothing happens, and all rows come
    "a provenance of 10 MB": lambda d: dataset(
        d, table({"provenance": [("harm", "x" * 10_000_000)]})
    ),
    "text with NUL": lambda d: dataset(d, table(shown(0, "a\0red\0ring"))),
    "a type that pickles itself": lambda d: dataset(d, extended(d, b"arrow.py_extension_type")),
    "a type that nobody knows": lambda d: dataset(d, extended(d, b"my_lab.harm")),
    "pandas objects": lambda d: dataset(
        d, table().replace_schema_metadata({b"pandas": pandas_objects()})
    ),
}


class Harmful:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


def extended(folder: Path, name: bytes) -> pa.Table:
    """Keys of an extension type, as pyarrow before 14 unpickled it while it read the schema."""
    harm = pickle.dumps(Harmful(folder.with_name("unpickled")))
    field = KEY.with_metadata({b"ARROW:extension:name": name, b"ARROW:extension:metadata": harm})
    return pa.Table.from_arrays(table().columns, schema=pa.schema([field, *list(SCHEMA)[1:]]))


def pandas_objects() -> bytes:
    column = {
        "name": "key",
        "field_name": "key",
        "pandas_type": "object",
        "numpy_type": "object",
        "metadata": None,
    }
    return json.dumps(
        {"index_columns": [], "columns": [column], "pandas_version": "3.1.1"}
    ).encode()


# --- mutations -------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        float("nan"),
        10**9,
        10**30,
        "",
        "..",
        ".",
        "a\0b",
        "x" * 1_000,
        "../../etc/passwd",
    ),
    *("/etc/passwd", "C:\\x", "http://example.org/x", "manifest.json", [], {}, [[]], [None]),
)


def manifests(folder: Path) -> Iterator[str]:
    """The manifest with each of its values replaced by each of ODD."""
    fields = json.loads((folder / "manifest.json").read_text())
    for path in _paths({name: value for name, value in fields.items() if name != "digest"}):
        yield from (manifest(fields, path, value) for value in ODD)


def manifest(fields: Mapping[str, Any], path: tuple[Any, ...], value: Any) -> str:
    """The manifest with another value at `path`, under the digest that it then has."""
    changed = json.loads(json.dumps(fields))
    changed.pop("digest")
    at = changed
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return json.dumps(changed | {"digest": digest})


def _paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for step, below in inner:
        yield (*at, step)
        yield from _paths(below, (*at, step))


def mutated(count: int, seed: int) -> Iterator[bytes]:
    """`count` shards with some bytes turned, most of them in the footer."""
    draw, whole = random.Random(seed), parquet(table())
    footer = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    for _ in range(count):
        data = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 4))):
            at = (
                draw.randrange(footer, len(data) - 8)
                if draw.random() < 0.6
                else draw.randrange(len(data))
            )
            if draw.random() < 0.3:
                data[at : at + 5] = (
                    b"\xfe\xff\xff\xff\x0f"  # a length of 2^31 - 1, as Parquet's footer writes it
                )
            else:
                data[at] = draw.randrange(256)
        yield bytes(data)
