"""Sources of the importers that mean harm: every value of a sound one replaced, every file of it cut and turned."""

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from bridgework.data.synthetic import shapes
from tests.hostile.recipes import places, put

SECRET = "secret.png"  # lies beside the source, not in it: a picture that no dataset may hold
DEEP: Any = [[[[[[[[[[[[[[[[[[[[["x"]]]]]]]]]]]]]]]]]]]]]
WRONG: tuple[Any, ...] = (  # what may stand in place of any value
    *(
        None,
        True,
        False,
        -1,
        0,
        1.5,
        float("nan"),
        float("inf"),
        10**30,
        10**400,
        "",
        " ",
        "x",
        "1",
        "\u200b",
    ),
    *(
        "a\0b",
        "a\nb",
        "\ud800",
        "<image>",
        "<image>\n<image>",
        "x" * 20_000,
        "../" + SECRET,
        "a/../../" + SECRET,
    ),
    *(
        "/etc/passwd",
        "C:\\x",
        "file:///etc/passwd",
        "http://127.0.0.1:9/x.png",
        "data:,x",
        "~/.ssh",
        "{0.__class__}",
    ),
    *([], {}, [[]], [{}], [None], ["x"], [1, 2, 3, 4, 5], {"a": 1}, {"from": "gpt"}, DEEP),
)


def pictures(count: int, size: int = 32) -> list[bytes]:
    return [sample.images[0] for sample in shapes(rows=count, size=size)]


@dataclass(frozen=True)
class Rows:
    """A format whose source is a list of rows in one file: `row` is one, of which many may be written."""

    format: str
    row: dict[str, Any]
    file: str
    write: Callable[[Sequence[Any]], str]
    images: tuple[str, ...] = ("a.png", "b.png")
    options: Mapping[str, Any] = field(default_factory=dict)
    whole: bool = True  # every row is a row of the dataset, or a bad one

    def lay(self, folder: Path, rows: Sequence[Any]) -> str:
        """Writes the source; what `run` is to be given."""
        for name, data in zip(self.images, pictures(len(self.images)), strict=True):
            (folder / name).write_bytes(data)
        (folder / self.file).write_text(self.write(rows))
        return str(folder if "table" in self.options else folder / self.file)


def lines(rows: Sequence[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rated(text: str, rating: str) -> dict[str, Any]:
    aspects = ("Helpfulness", "Visual Faithfulness", "Ethical Considerations")
    return {"response": text, "annotations": {aspect: {"Rating": rating} for aspect in aspects}}


TALK = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A ring."}]
ROWS: tuple[Rows, ...] = (
    Rows(
        "folder",
        {"image": "a.png", "caption": "a ring"},
        "table.jsonl",
        lines,
        options={"table": "table.jsonl"},
    ),
    Rows(
        "folder",
        {"image": "a.png", "caption": "a ring"},
        "table.json",
        json.dumps,
        options={"table": "table.json"},
    ),
    Rows(
        "llava-json", {"id": "a", "image": "a.png", "conversations": TALK}, "talks.json", json.dumps
    ),
    Rows(
        "llava-json", {"id": 1, "image": ["a.png"], "conversations": TALK}, "talks.json", json.dumps
    ),
    Rows(
        "preferences",
        {
            "id": "a",
            "image": "a.png",
            "question": "What is it?",
            "chosen": "A ring.",
            "rejected": "A cat.",
        },
        "pairs.jsonl",
        lines,
    ),
    Rows(
        "preferences",
        {
            "idx": 1,
            "images": ["a.png"],
            "conversations": TALK[:1],
            "chosen": TALK[1:],
            "rejected": {"value": "A cat."},
        },
        "pairs.json",
        json.dumps,
    ),
    Rows(
        "vlfeedback",
        {
            "id": "a",
            "prompt": "What?",
            "image": "a.png",
            "completions": [rated("A ring.", "5"), rated("A cat.", "1")],
        },
        "rated.jsonl",
        lines,
        whole=False,  # answers that are rated alike prefer nothing, and are left out
    ),
    Rows(
        "interleaved",
        {
            "url": "http://example.org",
            "text_list": ["A ring.", "A dot."],
            "image_info": [{"image_name": "a.png", "matched_text_index": 1}],
        },
        "pages.jsonl",
        lines,
        options={"min_side": 8},
        whole=False,  # a document without an image or a text is left out
    ),
    Rows(
        "interleaved",
        {"texts": ["A ring.", None, "A dot."], "images": [None, "a.png", None], "url": "x"},
        "pages.json",
        json.dumps,
        options={"min_side": 8},
        whole=False,
    ),
    Rows(
        "video",
        {"video": "a.gif", "caption": "a ring"},
        "table.jsonl",
        lines,
        images=(),
        options={"table": "table.jsonl", "frames": 2},
    ),
)


def mutants(row: Any) -> list[Any]:
    """The row with each of its values replaced by each of WRONG, without each of its keys, and each of WRONG itself."""
    changed = [put(row, path, value) for path in places(row) for value in WRONG]
    lacking = [{name: value for name, value in row.items() if name != less} for less in row]
    return [*changed, *lacking, *WRONG]


# --- several tables in one object ------------------------------------------------------------------------------------

IMAGE: dict[str, Any] = {"id": 1, "file_name": "a.png", "width": 32, "height": 32, "license": 4}
CAPTION: dict[str, Any] = {"id": 7, "image_id": 1, "caption": "a ring"}
BOX: dict[str, Any] = {
    "id": 7,
    "image_id": 1,
    "category_id": 18,
    "bbox": [1.0, 2.0, 8.0, 8.0],
    "iscrowd": 0,
}
LICENSES = [{"id": 4, "name": "CC-BY"}]
CATEGORIES = [{"id": 18, "name": "ring"}]
QUESTION: dict[str, Any] = {"question_id": 1, "image_id": 1, "question": "What is it?"}
ANSWER: dict[str, Any] = {
    "question_id": 1,
    "image_id": 1,
    "multiple_choice_answer": "ring",
    "question_type": "what",
    "answers": [{"answer": "ring", "answer_id": 1}, {"answer": "dot", "answer_id": 2}],
}


@dataclass(frozen=True)
class Document:
    """A format whose source is an object of tables; `options` name further such files beside the first."""

    format: str
    tables: Mapping[str, Any]
    rows: int | None  # as many must come out or be put aside; None: at least one
    options: Mapping[str, Any] = field(default_factory=dict)

    def lay(
        self, folder: Path, tables: Mapping[str, Any] | None = None
    ) -> tuple[str, dict[str, str]]:
        """Writes the source; what `run` is to be given."""
        (folder / "a.png").write_bytes(pictures(1)[0])
        (folder / "source.json").write_text(json.dumps(self.tables if tables is None else tables))
        given = {}
        for name, value in self.options.items():
            given[name] = value if isinstance(value, str) else str(folder / f"{name}.json")
            if not isinstance(value, str):
                (folder / f"{name}.json").write_text(json.dumps(value))
        return str(folder / "source.json"), given


def documents() -> Iterator[tuple[str, Document]]:
    """Every table of every format once with all the wrong rows that it may have."""
    captions, boxes, images = ([row, *mutants(row)] for row in (CAPTION, BOX, IMAGE))
    asked, answered = [QUESTION, *mutants(QUESTION)], [ANSWER, *mutants(ANSWER)]
    each = [{**QUESTION, "question_id": number} for number in range(len(answered))]
    own = [
        {**row, "question_id": n} if isinstance(row, dict) else row
        for n, row in enumerate(answered)
    ]
    shown, told = (
        {"images": [IMAGE, {**IMAGE, "id": 2}], "licenses": LICENSES},
        {"categories": CATEGORIES},
    )
    yield "captions", Document("coco", {**shown, "annotations": captions}, len(captions))
    yield "images of captions", Document("coco", {"images": images, "annotations": [CAPTION]}, 1)
    yield "images", Document("coco", {"images": images, "annotations": [BOX], **told}, len(images))
    yield "boxes", Document("coco", {**shown, "annotations": boxes, **told}, None)
    yield (
        "boxes beside captions",
        Document(
            "coco",
            {**shown, "annotations": [CAPTION, {**CAPTION, "image_id": 2}]},
            None,
            {"instances": {**shown, "annotations": boxes, **told}},
        ),
    )
    yield (
        "licenses",
        Document("coco", {**shown, "licenses": mutants(LICENSES[0]), "annotations": [CAPTION]}, 1),
    )
    yield (
        "questions",
        Document(
            "vqa", {"questions": asked}, len(asked), {"annotations": {"annotations": [ANSWER]}}
        ),
    )
    yield (
        "answers",
        Document("vqa", {"questions": each}, len(each), {"annotations": {"annotations": own}}),
    )


# --- files that are not text -----------------------------------------------------------------------------------------


def tar(*members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = (
                (len(data) if kind == tarfile.REGTYPE else 0),
                kind,
                link,
            )
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def sound_tar(rows: int = 4) -> bytes:
    return tar(
        *(
            m
            for i, p in enumerate(pictures(rows))
            for m in ((f"{i}.png", p), (f"{i}.txt", b"a ring"))
        )
    )


def sound_table(rows: int = 4) -> pa.Table:
    images = [{"bytes": data, "path": None} for data in pictures(rows)]
    return pa.table({"image": images, "caption": ["a ring"] * rows})


def parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return bytes(sink.getvalue())


def arrow(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def animation() -> bytes:
    """A video of four frames, of half a second each."""
    frames = [Image.open(io.BytesIO(data)) for data in pictures(4)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500, loop=0)
    return file.getvalue()


FILES: Mapping[str, tuple[str, str, Callable[[], bytes], int, Mapping[str, Any]]] = {
    # what: (format, file, its bytes, rows that it holds, options)
    "a tar": ("webdataset", "source/a.tar", sound_tar, 4, {}),
    "a Parquet file": ("hf", "source/train.parquet", lambda: parquet(sound_table()), 4, {}),
    "an Arrow file": ("hf", "source/data.arrow", lambda: arrow(sound_table()), 4, {}),
    "a video": ("video", "source/a.gif", animation, 1, {"frames": 2}),
}


def turned(data: bytes, count: int, seed: int) -> Iterator[bytes]:
    """The file cut at some points, and with some bytes turned."""
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.choice((1, 1, 3, 9))):
            at = draw.randrange(len(changed))
            match draw.randrange(4):
                case 0:
                    changed[at : at + 4] = draw.choice(
                        (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f")
                    )
                case 1 if at:
                    del changed[at:]
                case _:
                    changed[at] = draw.randrange(256)
        yield bytes(changed)


OTHERS: Mapping[str, bytes] = {  # in the place of any file
    "no bytes": b"",
    "HTML": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "a pickle": b"\x80\x04cposix\nsystem\n\x8c\x04harm\x85R.",
    "a magic number alone": b"PAR1",
    "zeros": bytes(4096),
    "gzip": b"\x1f\x8b\x08\0\0\0\0\0\0\x03" + bytes(600),
}

PLAYLISTS: Mapping[
    str, str
] = {  # what FFmpeg reads as the names of other files; {port} is somebody's
    "HLS": "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/x.ts\n#EXT-X-ENDLIST\n",
    "concat": "ffconcat version 1.0\nfile http://127.0.0.1:{port}/x.ts\n",
    "DASH": "<MPD><Period><AdaptationSet><Representation><BaseURL>http://127.0.0.1:{port}/x</BaseURL>"
    "</Representation></AdaptationSet></Period></MPD>",
    "RTSP": "v=0\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\n",
}

TABLES: Mapping[
    str, str
] = {  # CSV files that begin with the sound row `a.png,a ring`, and how many rows follow it
    "NUL": "b.png,a\0ring\n",
    "a quote that never ends": 'b.png,"a ring\n',
    "a quote inside": 'b.png,a "ring" x\n',
    "a field of 1 MB": "b.png," + "x" * 1_000_000 + "\n",
    "more columns": "b.png,a ring,harm,harm\n",
    "fewer columns": "b.png\n",
    "a formula": "b.png,=cmd|'/c calc'!A0\n",
    "ends of lines": "b.png,a ring\rb.png,a dot\r\n",
    "a path elsewhere": "../secret.png,a ring\n/etc/passwd,a ring\nlink.png,a ring\n",
    "the line of names again": "image,caption\n",
}

PICTURE_LISTS: Any = pa.schema([("image", pa.list_(pa.binary())), ("caption", pa.string())])
COLUMNS: Mapping[
    str, Callable[[], pa.Table]
] = {  # what a Parquet file holds in place of {bytes, path} and a text
    "pickles for images": lambda: pa.table(
        {"image": [b"\x80\x04cposix\nsystem\n."] * 4, "caption": ["a ring"] * 4}
    ),
    "paths elsewhere": lambda: pa.table(
        {
            "image": ["../secret.png", "/etc/passwd", "link.png", "http://127.0.0.1:9/x"],
            "caption": ["a ring"] * 4,
        }
    ),
    "nothing": lambda: pa.table(
        {"image": pa.nulls(4, pa.binary()), "caption": pa.nulls(4, pa.string())}
    ),
    "empty lists": lambda: pa.table({"image": [[]] * 4, "caption": ["a ring"] * 4}, PICTURE_LISTS),
    "text that is not UTF-8": lambda: with_captions(not_text(4)),
    "texts as a dictionary": lambda: with_captions(pa.array(["a ring"] * 4).dictionary_encode()),
    "numbers for texts": lambda: with_captions(pa.array([1, 2, 3, 4])),
    "talks by nobody": lambda: with_captions(pa.array([[{"from": None, "value": "x"}]] * 4)),
    "a type that pickles itself": lambda: extended(sound_table()),
    "pandas objects": lambda: sound_table().replace_schema_metadata(
        {b"pandas": b'{"columns": [], "x": "object"}'}
    ),
    "two columns of one name": lambda: pa.table(
        [*sound_table().columns, ["x"] * 4], ["image", "caption", "caption"]
    ),
    "no rows": lambda: sound_table().slice(0, 0),
    "no columns": lambda: pa.table({}),
}


def with_captions(captions: pa.Array) -> pa.Table:
    return sound_table().set_column(1, "caption", captions)


def not_text(rows: int) -> pa.Array:
    data = pa.array([b"\xed\xa0\x80"] * rows, pa.binary())
    return pa.StringArray.from_buffers(rows, *data.buffers()[1:])


def extended(table: pa.Table) -> pa.Table:
    """Its texts are of an extension type, as pyarrow before 14 unpickled it while it read the schema."""
    told = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": OTHERS["a pickle"],
    }
    fields = [table.schema.field(0), table.schema.field(1).with_metadata(told)]
    return pa.Table.from_arrays(table.columns, schema=pa.schema(fields))


PAGES: Mapping[
    str, bytes
] = {  # each shows the picture a.png and says "a ring", or no picture of the folder
    "tags in tags": b"<div>" * 100_000 + b"<p>a ring</p><img src=a.png>",
    "a list in a list": b"<ul><li>" * 5_000 + b"a ring<img src=a.png>",
    "attributes": b"<p " + b"x=1 " * 100_000 + b">a ring</p><img src=a.png>",
    "one tag": b"<" + b"p" * 1_000_000 + b">a ring<img src=a.png>",
    "entities": b'<!DOCTYPE h [<!ENTITY a "ha"><!ENTITY b "'
    + b"&a;" * 9_999
    + b'">]><p>a ring &b;&b;</p><img src=a.png>',
    "an external entity": b'<!DOCTYPE h [<!ENTITY x SYSTEM "file:///etc/passwd">]><p>a ring &x;</p><img src=a.png>',
    "a script": b"<script>document.write('<img src=b.png>')</script><p>a ring</p><img src=a.png onerror=harm()>",
    "images of elsewhere": (
        b"<p>a ring</p><img src='../secret.png'><img src='/etc/passwd'><img src='file:///etc/passwd'>"
        b"<img src='http://127.0.0.1:9/x.png'><img src='//127.0.0.1:9/x.png'><img src='%2e%2e/secret.png'>"
        b"<img src='data:image/png;base64,AAAA'><img src='..\\secret.png'><img src='link.png'><img src=a.png>"
    ),
    "a base elsewhere": b"<base href='http://127.0.0.1:9/'><p>a ring</p><img src=a.png>",
    "a refresh": b"<meta http-equiv=refresh content='0;url=file:///etc/passwd'><p>a ring</p><img src=a.png>",
    "another encoding": "<p>a ring</p><img src=a.png>".encode("utf-16"),
    "NUL": b"<p>a\0 ring</p><img src=a.png>",
    "bytes": bytes(range(256)) * 40 + b"<p>a ring</p><img src=a.png>",
}
