"""Importers: rows in = rows out + rows put aside, every bad row with its reason, nothing read outside the source."""

import csv
import io
import json
import pickle
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.images import decode
from bridgework.data.importers import (
    clipart,
    emoji,
    folder,
    formats,
    llava_json,
    load,
    plain,
    read_image,
)
from bridgework.data.quarantine import BadSample, Reason, records
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

PNG = next(shapes(1, size=16)).images[0]


def quiet(_: str) -> None:
    """For importers that are not asked what they say."""


def read(dest: Path | str) -> dict[str, Sample]:
    assert verify(str(dest)) == []
    return {sample.key: sample for sample in open_dataset(str(dest)).samples()}


def aside(dest: Path | str) -> dict[str, Reason]:
    return {record.key: record.reason for record in records(f"{dest}.quarantine")}


def talk(*values: str) -> list[dict[str, str]]:
    return [
        {"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)
    ]


# --- finding them ----------------------------------------------------------------------------------------------------


def test_importers_are_found_by_name() -> None:
    assert {"clipart", "emoji", "folder", "hf", "llava-json", "vlfeedback", "webdataset"} <= set(
        formats()
    )
    assert all(callable(load(name)) for name in formats())
    assert (
        load("llava-json") is llava_json.LlavaJsonImporter
        and load("bridgework.data.importers.folder") is folder.FolderImporter
    )
    with pytest.raises(DataError, match="did you mean 'llava-json'"):
        load("lava-json")
    assert not {"engine", "tables", "records"} & set(formats())
    with pytest.raises(DataError, match="Got none; expected one public config class with run"):
        load("bridgework.data.samples")


@pytest.mark.parametrize(
    "name",
    ["./my_format.py", ".my_format", "my/format.py", "my/format", "/my/format", "..", ".", ""],
)
def test_a_path_of_a_file_is_no_format(name: str) -> None:
    with pytest.raises(DataError, match=f"there is no format {name!r}"):
        load(name)


# --- llava-json ------------------------------------------------------------------------------------------------------


@pytest.fixture
def llava(tmp_path: Path) -> Callable[..., Path]:
    def make(rows: Any, name: str = "rows.json") -> Path:
        (tmp_path / "images").mkdir(exist_ok=True)
        for picture in ("a.png", "images/b.png"):
            (tmp_path / picture).write_bytes(PNG)
        (tmp_path / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
        return tmp_path / name

    return make


def test_conversations_keep_their_text_and_the_places_of_their_images(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {
            "id": "one",
            "image": "a.png",
            "conversations": talk("<image>\nWhat?", "A shape.", "Sure?", "Yes."),
        },
        {
            "id": "two",
            "image": ["a.png", "images/b.png"],
            "conversations": talk("Is <image> like <image>?", "Yes."),
        },
        {"id": 3, "conversations": [{"from": "system", "value": "Be kind."}, *talk("Hi", "Hello")]},
    ]
    manifest = llava_json.LlavaJsonImporter(license="CC-BY-4.0").run(
        str(llava(rows)), str(tmp_path / "d"), say=quiet
    )
    found = read(tmp_path / "d")
    assert found["one"].parts == (
        Part("user", image=0),
        Part("user", text="\nWhat?"),
        Part("assistant", text="A shape."),
        Part("user", text="Sure?"),
        Part("assistant", text="Yes."),
    )
    assert found["two"].images == (PNG, PNG)
    assert [part.text for part in found["two"].parts] == ["Is ", None, " like ", None, "?", "Yes."]
    assert found["3"].images == () and found["3"].parts[0] == Part("system", text="Be kind.")
    assert (manifest.rows, manifest.license, manifest.source) == (
        3,
        "CC-BY-4.0",
        str(tmp_path / "rows.json"),
    )
    assert manifest.made_by == "bridgework.data.importers.llava_json" and manifest.quarantined == {}


def test_one_id_with_many_conversations_is_kept_and_a_repetition_is_not(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    first, second = ({"id": "x", "conversations": talk(q, "yes")} for q in ("one?", "two?"))
    llava_json.LlavaJsonImporter(max_bad=1).run(
        str(llava([first, second, first])), str(tmp_path / "d"), say=quiet
    )
    assert list(read(tmp_path / "d")) == ["x", "x#2"]
    assert aside(tmp_path / "d") == {"x": Reason.DUPLICATE_KEY}


BAD_ROWS: dict[str, tuple[Any, Reason]] = {
    "no object": (7, Reason.BAD_ROW),
    "no turns": ({"id": "k"}, Reason.BAD_ROW),
    "empty turns": ({"id": "k", "conversations": []}, Reason.BAD_ROW),
    "unknown role": ({"id": "k", "conversations": [{"from": "bot", "value": "x"}]}, Reason.BAD_ROW),
    "list role": (
        {"id": "k", "conversations": [{"from": "human", "value": ["x"]}]},
        Reason.BAD_ROW,
    ),
    "no answer": ({"id": "k", "conversations": talk("a?")}, Reason.BAD_ROW),
    "answers alone": ({"id": "k", "conversations": talk("a", "b")[1:]}, Reason.BAD_ROW),
    "two questions": ({"id": "k", "conversations": talk("a?") + talk("b?", "c")}, Reason.BAD_ROW),
    "blank answer": ({"id": "k", "conversations": talk("a?", " ")}, Reason.EMPTY_TEXT),
    "image in answer": (
        {"id": "k", "image": "a.png", "conversations": talk("?", "<image>")},
        Reason.PLACEHOLDERS,
    ),
    "no placeholder": (
        {"id": "k", "image": "a.png", "conversations": talk("?", "!")},
        Reason.PLACEHOLDERS,
    ),
    "no image": ({"id": "k", "conversations": talk("<image>?", "!")}, Reason.PLACEHOLDERS),
    "gone": (
        {"id": "k", "image": "gone.png", "conversations": talk("<image>", "!")},
        Reason.MISSING_IMAGE,
    ),
    "folder": (
        {"id": "k", "image": "images", "conversations": talk("<image>", "!")},
        Reason.MISSING_IMAGE,
    ),
    "number": ({"id": "k", "image": [4], "conversations": talk("<image>", "!")}, Reason.BAD_ROW),
    "absolute": (
        {"id": "k", "image": "/etc/passwd", "conversations": talk("<image>", "!")},
        Reason.OUTSIDE,
    ),
    "upwards": (
        {"id": "k", "image": "images/../../x", "conversations": talk("<image>", "!")},
        Reason.OUTSIDE,
    ),
    "backslash": (
        {"id": "k", "image": "..\\x.png", "conversations": talk("<image>", "!")},
        Reason.OUTSIDE,
    ),
    "URL": (
        {"id": "k", "image": "http://x/y.png", "conversations": talk("<image>", "!")},
        Reason.OUTSIDE,
    ),
    "NUL": ({"id": "k", "image": "a.png\0", "conversations": talk("<image>", "!")}, Reason.OUTSIDE),
    "link": (
        {"id": "k", "image": "link.png", "conversations": talk("<image>", "!")},
        Reason.OUTSIDE,
    ),
    "HTML": (
        {"id": "k", "image": "page.png", "conversations": talk("<image>", "!")},
        Reason.NOT_AN_IMAGE,
    ),
    "0 bytes": (
        {"id": "k", "image": "empty.png", "conversations": talk("<image>", "!")},
        Reason.EMPTY_FILE,
    ),
    "pickle": (
        {"id": "k", "image": "code.png", "conversations": talk("<image>", "!")},
        Reason.NOT_AN_IMAGE,
    ),
    "cut": (
        {"id": "k", "image": "cut.png", "conversations": talk("<image>", "!")},
        Reason.TRUNCATED,
    ),
    "images": (
        {"id": "k", "images": ["a.png"], "conversations": talk("?", "!")},
        Reason.PLACEHOLDERS,
    ),
    "video": ({"id": "k", "video": "a.mp4", "conversations": talk("?", "!")}, Reason.BAD_ROW),
}


def test_every_bad_row_is_put_aside_with_its_reason(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    outside = tmp_path.parent / "outside.png"
    outside.write_bytes(PNG)
    source = llava(
        [
            {"id": "good", "conversations": talk("Hi", "Hello")},
            *(row for row, _ in BAD_ROWS.values()),
        ]
    )
    files = {
        "page": b"<html>",
        "empty": b"",
        "cut": PNG[: len(PNG) // 2],
        "code": pickle.dumps(print),
    }
    for name, data in files.items():
        (tmp_path / f"{name}.png").write_bytes(data)
    (tmp_path / "link.png").symlink_to(outside)
    manifest = llava_json.LlavaJsonImporter(max_bad=1).run(
        str(source), str(tmp_path / "d"), say=quiet
    )
    table = {record.row: record.reason for record in records(f"{tmp_path}/d.quarantine")}
    assert table == {row: reason for row, (_, reason) in enumerate(BAD_ROWS.values(), start=1)}
    assert list(read(tmp_path / "d")) == ["good"]
    assert manifest.quarantined == Counter(str(reason) for _, reason in BAD_ROWS.values())
    assert manifest.rows + sum(manifest.quarantined.values()) == 1 + len(BAD_ROWS)


def test_a_source_that_is_mostly_bad_leaves_no_dataset_but_the_table(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    source, dest = str(llava([1, {"id": "k", "conversations": talk("a", "b")}])), tmp_path / "d"
    for _ in range(2):  # the second try does not add to the table of the first
        with pytest.raises(DataError, match=r"1 of 2 rows are bad \(1 bad_row\).*d\.quarantine"):
            llava_json.LlavaJsonImporter().run(source, str(dest), say=quiet)
        assert not dest.exists() and aside(dest) == {"row-00000000": Reason.BAD_ROW}
    assert llava_json.LlavaJsonImporter(max_bad=0.5).run(source, str(dest), say=quiet).rows == 1


@pytest.mark.parametrize("text", ["", "{}", "[1,", "[" * 100_000, "\xff", '"<html>"'])
def test_a_source_that_is_no_list_is_an_error(
    text: str, llava: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"rows\.json"):
        llava_json.LlavaJsonImporter().run(str(llava(text)), str(tmp_path / "d"), say=quiet)
    assert not (tmp_path / "d").exists()


def test_images_stand_under_either_name_and_a_video_is_refused_with_its_importer(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [
        {
            "id": "list",
            "images": ["a.png", "images/b.png"],
            "conversations": talk("<image><image>", "!"),
        },
        {"id": "one", "images": "a.png", "image": None, "conversations": talk("<image>", "!")},
        {"id": "text", "image": "", "images": [], "video": None, "conversations": talk("?", "!")},
        {"id": "film", "video": "a.mp4", "conversations": talk("?", "!")},
    ]
    llava_json.LlavaJsonImporter(max_bad=1).run(str(llava(rows)), str(tmp_path / "d"), say=quiet)
    assert {key: len(sample.images) for key, sample in read(tmp_path / "d").items()} == {
        "list": 2,
        "one": 1,
        "text": 0,
    }
    (film,) = records(f"{tmp_path}/d.quarantine")
    assert (
        film.key == "film"
        and "llava-json reads images, `data import video` reads videos" in film.detail
    )


def test_conversations_are_a_list_or_json_lines(llava: Callable[..., Path], tmp_path: Path) -> None:
    rows = [
        {"id": str(place), "conversations": talk("Who\u2028are you?", "!")} for place in range(3)
    ]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    llava_json.LlavaJsonImporter(max_bad=1).run(
        str(llava(lines + "\n{\n", "rows.jsonl")), str(tmp_path / "lines"), say=quiet
    )
    llava_json.LlavaJsonImporter().run(str(llava(rows)), str(tmp_path / "list"), say=quiet)
    assert read(tmp_path / "lines") == read(tmp_path / "list")
    assert aside(tmp_path / "lines") == {"row-00000003": Reason.BAD_ROW}
    with pytest.raises(
        DataError,
        match=r"rows\.json is not JSON: Extra data.*a list of rows.*or JSON lines.*\.jsonl",
    ):
        llava_json.LlavaJsonImporter().run(str(llava(lines)), str(tmp_path / "none"), say=quiet)


def test_images_may_lie_elsewhere_and_everything_in_a_store(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    source = llava([{"id": "k", "image": "b.png", "conversations": talk("<image>", "!")}])
    dest = f"memory://{tmp_path.name}/d"
    llava_json.LlavaJsonImporter(images=str(tmp_path / "images")).run(str(source), dest, say=quiet)
    assert read(dest)["k"].images == (PNG,)


def test_the_same_import_again_does_nothing_and_says_so(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    row, said = {"id": "k", "conversations": talk("a", "b")}, list[str]()
    source, dest = str(llava([row])), tmp_path / "d"
    first = llava_json.LlavaJsonImporter().run(source, str(dest), say=said.append)
    written = (dest / "manifest.json").stat().st_mtime_ns
    assert llava_json.LlavaJsonImporter().run(source, str(dest), say=said.append) == first
    assert (dest / "manifest.json").stat().st_mtime_ns == written
    assert "1 rows in 1 shards" in said[0] and "nothing to do" in said[1]
    with pytest.raises(DataError, match=r"another dataset\. Got images"):
        llava_json.LlavaJsonImporter(images=str(tmp_path / "images")).run(
            source, str(dest), say=quiet
        )
    llava([row, row])
    with pytest.raises(DataError, match=r"another dataset\. Got sha256"):
        llava_json.LlavaJsonImporter().run(source, str(dest), say=quiet)


# --- folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "src" / "deep").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "deep/c.webp"):
        (tmp_path / "src" / name).write_bytes(PNG)
    return tmp_path / "src"


def test_a_text_file_beside_an_image_is_its_caption(pictures: Path, tmp_path: Path) -> None:
    (pictures / "a.txt").write_text("a cat\n")
    (pictures / "deep" / "c.txt").write_text("")
    folder.FolderImporter(max_bad=1).run(str(pictures), str(tmp_path / "d"), say=quiet)
    assert {key: sample.text for key, sample in read(tmp_path / "d").items()} == {"a.png": "a cat"}
    assert aside(tmp_path / "d") == {"b.JPG": Reason.EMPTY_TEXT, "deep/c.webp": Reason.EMPTY_TEXT}


@pytest.mark.parametrize("table", ["rows.csv", "rows.tsv", "rows.json", "rows.jsonl"])
def test_a_table_names_images_and_captions(table: str, pictures: Path, tmp_path: Path) -> None:
    rows = [
        ("a.png", 'a "cat", sitting'),
        ("a.png", "another caption of it"),
        ("a.png", 'a "cat", sitting'),
        ("b.JPG", "two words" if table.endswith(".tsv") else "two\nlines"),
        ("deep/c.webp", "an <image> of a dog"),
        ("../src/a.png", "x"),
        ("deep/none.png", "x"),
        ("", "x"),
    ]
    entries = [{"file": name, "text": text} for name, text in rows]
    with (pictures / table).open(
        "w", newline="", encoding="utf-8-sig" if table.endswith("sv") else "utf-8"
    ) as file:
        if table.endswith("sv"):
            delimiter = "\t" if table.endswith(".tsv") else ","
            csv.writer(file, delimiter=delimiter).writerows([("file", "text"), *rows])
        elif table.endswith(".json"):
            json.dump(entries, file)
        else:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)
    options: Any = {"table": table, "image": "file", "text": "text", "max_bad": 1}
    made = folder.FolderImporter(**options).run(str(pictures), str(tmp_path / "d"), say=quiet)
    assert made.left_out == {"captions that their picture has already": 1}
    assert {key: sample.text for key, sample in read(tmp_path / "d").items()} == {
        "a.png": 'a "cat", sitting',
        "a.png#2": "another caption of it",
        "b.JPG": rows[3][1],
    }
    assert list(aside(tmp_path / "d").values()) == [
        Reason.PLACEHOLDERS,
        Reason.OUTSIDE,
        Reason.MISSING_IMAGE,
        Reason.BAD_ROW,
    ]


def test_broken_tables_are_errors_or_bad_rows(pictures: Path, tmp_path: Path) -> None:
    (pictures / "t.jsonl").write_text(
        '{"image": "a.png", "caption": "a cat"}\nnot json\n[1]\n\n{"image": "a.png"}\n'
    )
    (pictures / "t.json").write_text('{"image": "a.png"}')
    (pictures / "t.xml").write_text("<image/>")
    folder.FolderImporter(table="t.jsonl", max_bad=1).run(
        str(pictures), str(tmp_path / "d"), say=quiet
    )
    assert list(aside(tmp_path / "d").values()) == [Reason.BAD_ROW] * 3
    for source, table, words in (
        (pictures, "none.csv", "no file"),
        (pictures, "t.xml", "none of .csv, .tsv, .json, .jsonl"),
        (pictures, "t.json", "holds a dict; a list of rows is wanted"),
        (tmp_path / "nowhere", None, "no folder"),
    ):
        with pytest.raises(DataError, match=words):
            folder.FolderImporter(table=table).run(str(source), str(tmp_path / "e"), say=quiet)


NAMES = (
    "Screenshot 2024-05-01 at 4.42.48\u202fPM.png",
    "v\u00a013.05.05.png",
    "12:30 lunch.png",
    "deep/10:15:00/a.png",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467.png",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645.png",
    "\U0001f3f4\U000e0067\U000e0062\U000e007f.png",
    "\uf022.png",
    "soft\u00ad.png",
    "a'b\"c&d;e$f`g.png",
)


@pytest.mark.parametrize("given", ["text files", "table"])
def test_pictures_come_in_under_any_name_that_a_system_gives(given: str, tmp_path: Path) -> None:
    for name in NAMES:
        file = tmp_path / "src" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(PNG)
        file.with_suffix(".txt").write_text(f"caption of {name}")
    rows = [{"image": name, "caption": f"caption of {name}"} for name in NAMES]
    (tmp_path / "src" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = "t.jsonl" if given == "table" else None
    folder.FolderImporter(table=table).run(str(tmp_path / "src"), str(tmp_path / "d"), say=quiet)
    found = read(tmp_path / "d")
    assert {key: s.text for key, s in found.items()} == {n: f"caption of {n}" for n in NAMES}


DANGEROUS = (
    *("../a.png", "a/../../a.png", "/etc/passwd", "..", "a\0.png", "a\n.png", "a\r.png", "a\t.png"),
    *("a\x1b[31m.png", "a\x7f.png", "a\x85.png", "a\u2028.png", "a\u2029.png", "\u202egnp.a"),
    *("\u2066a.png", "C:/a.png", "C:\\a.png", "..\\a.png", "\\\\host\\a.png", "a\ud800.png"),
)


@pytest.mark.parametrize("name", DANGEROUS)
def test_a_name_that_leads_out_or_controls_a_terminal_is_outside(name: str) -> None:
    assert not plain(name)
    with pytest.raises(BadSample, match=r"outside: .* is not a plain path inside the image folder"):
        read_image("/tmp", name)


@pytest.mark.parametrize(
    "name",
    [
        *("http://a.org/b.png", "HTTPS://a.org/b.png", "//a.org/b.png", "s3://bucket/b.png"),
        *("data:image/png;base64,AA", "file:///etc/passwd", " https://a.org/b.png"),
    ],
)
def test_an_address_is_refused_as_one_and_nothing_is_fetched(name: str) -> None:
    with pytest.raises(BadSample, match="is an address, and nothing is fetched"):
        read_image("/tmp", name)


def test_hidden_files_and_files_of_other_kinds_are_counted_and_no_rows(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for name in ("cat.png", "photo.jfif", "old.jpe", "UP.PNG"):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(PNG)
    for name in ("cat.txt", "photo.txt", "old.TXT", "UP.TXT"):
        (src / name).write_text(f"text of {name}")
    hidden = ("._cat.png", "._cat.txt", ".DS_Store", "__MACOSX/._cat.png", "__MACOSX/cat.png")
    more = (".ipynb_checkpoints/cat-checkpoint.png", ".git/x.png", "@eaDir/cat.png")
    for name in (*hidden, *more):
        (src / name).parent.mkdir(exist_ok=True)
        (src / name).write_bytes(b"x")
    for name in ("a.avif", "b.heic", "c.tiff", "d.TIFF", "film.mov", "notes", "alone.txt"):
        (src / name).write_bytes(b"x")
    said = list[str]()
    made = folder.FolderImporter().run(str(src), str(tmp_path / "d"), say=said.append)
    assert list(read(tmp_path / "d")) == ["UP.PNG", "cat.png", "old.jpe", "photo.jfif"]
    assert made.left_out == {
        "files of .avif": 1,
        "files of .heic": 1,
        "files of .mov": 1,
        "files of .tiff": 2,
        "files without an ending": 1,
        "hidden files": len(hidden) + len(more),
        "texts without a file that they describe": 1,
    }
    assert all(f"left out: {rows} {what}" in said[-1] for what, rows in made.left_out.items())


def test_pictures_in_linked_folders_are_read_inside_and_put_aside_outside(tmp_path: Path) -> None:
    src = tmp_path / "src"
    for folder_ in (src / "own", tmp_path / "disk" / "deep"):
        folder_.mkdir(parents=True)
    for file in ("src/own/a", "disk/b", "disk/deep/c"):
        (tmp_path / f"{file}.png").write_bytes(PNG)
        (tmp_path / f"{file}.txt").write_text(file)
    (src / "inside").symlink_to(src / "own")
    (src / "coco").symlink_to(tmp_path / "disk")
    (src / "own" / "up").symlink_to(src)
    (tmp_path / "disk" / "deep" / "again").symlink_to(tmp_path / "disk")
    made = folder.FolderImporter(max_bad=1).run(str(src), str(tmp_path / "d"), say=quiet)
    assert list(read(tmp_path / "d")) == ["inside/a.png", "own/a.png"]
    assert aside(tmp_path / "d") == dict.fromkeys(("coco/b.png", "coco/deep/c.png"), Reason.OUTSIDE)
    assert made.left_out == {"files without an ending": 3}  # links to folders that are above them


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_is_found_in_either_form_of_its_letters(form: str, tmp_path: Path) -> None:
    src, name = tmp_path / "src", "caf\u00e9/\u00fcber.png"
    other = "NFD" if form == "NFC" else "NFC"
    file = src / unicodedata.normalize(form, name)
    file.parent.mkdir(parents=True)
    file.write_bytes(PNG)
    (file.parent / unicodedata.normalize(other, "\u00fcber.txt")).write_text("a cafe")
    (src / "t.csv").write_text(f"image,caption\n{unicodedata.normalize(other, name)},a cafe\n")
    for table in (None, "t.csv"):
        made = folder.FolderImporter(table=table).run(
            str(src), str(tmp_path / f"d{table}"), say=quiet
        )
        assert made.rows == 1


def test_a_key_that_was_given_never_meets_one_that_was_made(
    llava: Callable[..., Path], tmp_path: Path
) -> None:
    ids = ["a", "a", "a#2", "a", "row-00000005", None, "b#2", "b", "b", "a#2"]
    rows = [
        {"conversations": talk(f"question {n}", "yes")} | ({} if key is None else {"id": key})
        for n, key in enumerate(ids)
    ]
    llava_json.LlavaJsonImporter().run(str(llava(rows)), str(tmp_path / "d"), say=quiet)
    found = read(tmp_path / "d")
    assert len(found) == len(rows)
    assert [sample.parts[0].text for sample in found.values()] == [
        f"question {n}" for n in range(len(rows))
    ]
    assert list(found)[:2] == ["a", "a#2"] and list(found)[4] == "row-00000005"


@pytest.mark.parametrize("table", ["t.json", "t.jsonl"])
def test_a_list_of_captions_gives_a_row_for_each(
    table: str, pictures: Path, tmp_path: Path
) -> None:
    rows = [
        {"image": "a.png", "caption": ["one", "two", "one"]},
        {"image": "b.JPG", "caption": ["three", " "]},
        {"image": "b.JPG", "caption": ["four", 4]},
        {"image": "deep/c.webp", "caption": []},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (pictures / table).write_text(json.dumps(rows) if table == "t.json" else lines)
    made = folder.FolderImporter(table=table, max_bad=1).run(
        str(pictures), str(tmp_path / "d"), say=quiet
    )
    assert {key: sample.text for key, sample in read(tmp_path / "d").items()} == {
        "a.png": "one",
        "a.png#2": "two",
        "b.JPG": "three",
    }
    assert made.left_out == {"captions that their picture has already": 1}
    assert aside(tmp_path / "d") == {
        "b.JPG#2": Reason.EMPTY_TEXT,
        "b.JPG#3": Reason.BAD_ROW,  # the list holds a number
        "deep/c.webp": Reason.EMPTY_TEXT,
    }


# --- emoji -----------------------------------------------------------------------------------------------------------


def package(style: str, entries: list[dict[str, Any]], images: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        members = {f"package/img/{style}/64/{name}": data for name, data in images.items()}
        for name, data in (members | {"package/emoji.json": json.dumps(entries).encode()}).items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        escape = tarfile.TarInfo(f"package/img/{style}/64/bad.png")
        escape.type, escape.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(escape)
    return file.getvalue()


def entry(code: str, style: str = "twitter", **changes: Any) -> dict[str, Any]:
    given = {
        "name": "RED APPLE",
        "unified": code.upper(),
        "image": f"{code}.png",
        f"has_img_{style}": True,
    }
    return given | {"category": "Food & Drink", "subcategory": "food-fruit"} | changes


def test_emoji_are_read_from_the_archive_and_from_its_folder_alike(tmp_path: Path) -> None:
    entries = [
        entry("1f34e"),
        entry("1f34f", name=""),
        entry("bad"),
        entry("1f350", has_img_twitter=False),
    ]
    (tmp_path / "t.tgz").write_bytes(
        package("twitter", entries, {"1f34e.png": PNG, "1f34f.png": PNG})
    )
    manifest = emoji.EmojiImporter(max_bad=1).run(
        str(tmp_path / "t.tgz"), str(tmp_path / "d"), say=quiet
    )
    found = read(tmp_path / "d")
    assert list(found) == ["twitter-1f34e"] and found["twitter-1f34e"].text == "red apple"
    assert (
        found["twitter-1f34e"].labels == ("Food & Drink", "food-fruit")
        and manifest.license == "CC-BY-4.0"
    )
    assert aside(tmp_path / "d") == {
        "twitter-1f34f": Reason.EMPTY_TEXT,
        "twitter-bad": Reason.MISSING_IMAGE,
    }
    (tmp_path / "p" / "img" / "twitter" / "64").mkdir(parents=True)
    (tmp_path / "p" / "emoji.json").write_text(json.dumps(entries))
    for code in ("1f34e", "1f34f"):
        (tmp_path / "p" / "img" / "twitter" / "64" / f"{code}.png").write_bytes(PNG)
    emoji.EmojiImporter(max_bad=1).run(str(tmp_path / "p"), str(tmp_path / "e"), say=quiet)
    assert read(tmp_path / "e") == found


def test_archives_that_are_cut_or_not_ours_to_copy_are_refused(tmp_path: Path) -> None:
    whole = package(
        "google", [entry("1f34e", "google")], {"1f34e.png": np.random.default_rng(0).bytes(9_000)}
    )
    for data, words in (
        (whole[: len(whole) // 2], "neither a folder nor a complete"),
        (b"<html>not found</html>", "neither a folder nor a complete"),
        (package("google", [], {}), "no emoji.json with one folder"),
        (package("apple", [entry("1f34e", "apple")], {"1f34e.png": PNG}), "must not be copied"),
        (
            package("google", [entry("1f34e", "google")], {"1f34e.png": bytes(2 << 20)}),
            "2,097,152 bytes; a drawing may",
        ),
    ):
        (tmp_path / "x.tgz").write_bytes(data)
        with pytest.raises(DataError, match=words):
            emoji.EmojiImporter().run(str(tmp_path / "x.tgz"), str(tmp_path / "d"), say=quiet)
    assert not (tmp_path / "d").exists()


# --- clip art --------------------------------------------------------------------------------------------------------

SVG = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"><metadata>
<rdf:RDF xmlns="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<Work rdf:about=""><dc:title>{title}</dc:title><dc:creator><Agent><dc:title>Ann</dc:title></Agent></dc:creator>
<license rdf:resource="{license}"/></Work></rdf:RDF></metadata>{body}</svg>"""


def draw(
    root: Path, name: str, title: str, *, size: tuple[int, int] = (300, 200), **changes: str
) -> None:
    for part in ("png", "svg"):
        (root / part / name).parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGBA", size, (255, 0, 0, 255))
    picture.putpixel((0, 0), (0, 0, 0, 0))
    picture.save(root / "png" / f"{name}.png")
    given = {
        "title": title,
        "license": "http://web.resource.org/cc/PublicDomain",
        "body": "",
    } | changes
    (root / "svg" / f"{name}.svg").write_text(SVG.format(**given))


def test_clip_art_takes_its_caption_from_the_title_or_the_file_name(tmp_path: Path) -> None:
    root = tmp_path / "art"
    draw(root, "food/apple_ann_01", "A Red Apple (b and w)")
    draw(root, "food/green_pear_02", "Clipart by Ann - pear_07")
    for number in range(clipart.SERIES_ROWS):
        draw(root, f"food/plum-{number}", "fruit series")
    draw(root, "icons/x", "an icon")
    draw(root, "other/gpl", "a gnu", license="http://creativecommons.org/licenses/GPL/2.0/")
    draw(root, "other/lost", "a photo", body='<image xlink:href="file:///home/ann/photo.jpg"/>')
    draw(root, "other/torn", "a page")
    (root / "svg" / "other" / "torn.svg").write_text("<svg>")
    manifest = clipart.ClipartImporter(side=64, skip=["icons/*"], max_bad=1).run(
        str(root), str(tmp_path / "d"), say=quiet
    )
    found = read(tmp_path / "d")
    assert (
        found["food/apple_ann_01.png"].text == "a red apple"
        and found["food/green_pear_02.png"].text == "green pear"
    )
    assert {sample.text for key, sample in found.items() if "plum" in key} == {"plum"}
    assert found["food/apple_ann_01.png"].provenance == {
        "file": "food/apple_ann_01.png",
        "creator": "Ann",
    }
    assert decode(found["food/apple_ann_01.png"].images[0]).size == (64, 43)
    assert aside(tmp_path / "d") == {
        "other/gpl.png": Reason.LICENSE,
        "other/lost.png": Reason.MISSING_IMAGE,
        "other/torn.png": Reason.LICENSE,
    }
    assert manifest.license == "public domain" and manifest.parameters["skip"] == ["icons/*"]


def test_a_folder_without_pictures_is_no_clip_art(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images"):
        clipart.ClipartImporter().run(str(tmp_path), str(tmp_path / "d"), say=quiet)
