"""What goes out comes back the same, other tools can read it, and what a format cannot hold is said."""

import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import fsspec
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from bridgework.data import importers
from bridgework.data.dataset import open_dataset, verify, write
from bridgework.data.exporters import Exported, ending, formats, llava_json, load, webdataset
from bridgework.data.samples import Box, Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

KEYS = (
    "plain",
    "folder/cat.jpg",
    "a.b.c",
    "ünï côdé",
    "50%",
    "100%25",
    "#2",
    ".hidden",
    "__meta__",
    "x" * 300,
    "a\nb",
)


def quiet(_: str) -> None:
    """For importers that are not asked what they say."""


def image(kind: str, size: int = 8, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), "red").save(file, kind, **options)
    return file.getvalue()


IMAGES = tuple(image(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP"))
ENDINGS = ("jpg", "png", "webp", "gif", "bmp")


def talk(key: str, images: tuple[bytes, ...], **fields: Any) -> Sample:
    shown = [Part("user", image=place) for place in range(len(images))]
    told = (
        Part("system", text="Be kind."),
        *shown,
        Part("user", text="\nWhat?"),
        Part("assistant", text="Shapes."),
    )
    return Sample(
        key, images, (*told, Part("user", text="Sure?"), Part("assistant", text="Yes.")), **fields
    )


def everything() -> Iterator[Sample]:
    """Every kind of sample and every field, with keys that no file system likes."""
    for place, key in enumerate(KEYS):
        yield pair(key, IMAGES[place % len(IMAGES)], f"caption {place} <é>")
    yield talk("talk", IMAGES[:3], license="MIT", labels=("a", "b"), provenance={"url": "x"})
    yield talk("text only", ())
    yield Sample(
        "video/1.mp4",
        IMAGES[1:4],
        (
            *(Part("user", image=place) for place in range(3)),
            Part("user", text="?"),
            Part("assistant", text="better"),
        ),
        rejected="worse",
        times_s=(0.0, 0.5, 1.25),
        boxes=(Box(1, (0.25, 0.5, 0.75, 1.0), "cat"), Box(2, (0.0, 0.0, 1.0, 1.0))),
        ocr="STOP",
        language="en",
    )
    document = (
        Part("caption", text="A"),
        Part("caption", image=1),
        Part("caption", text="B"),
        Part("caption", image=0),
    )
    yield Sample("document", IMAGES[:2], document)


def store(samples: Iterator[Sample] | list[Sample], dest: Path, license: str = "unknown") -> str:
    write(samples, str(dest), source="s", license=license, made_by="t", group_rows=4)
    return str(dest)


def read(dest: Path | str) -> list[Sample]:
    return list(open_dataset(str(dest)).samples())


def test_exporters_are_found_by_name() -> None:
    assert formats() == ["llava-json", "webdataset"]
    assert load("webdataset") is webdataset.WebDatasetExporter
    with pytest.raises(DataError, match="did you mean 'llava-json'"):
        load("llava")
    with pytest.raises(DataError, match="expected one public config class with run"):
        load("bridgework.data.samples")


def test_an_image_is_named_by_its_bytes() -> None:
    assert [ending(data) for data in IMAGES] == list(ENDINGS)
    with pytest.raises(DataError, match="is not an image"):
        ending(b"<html>")


# --- webdataset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["local", "memory"])
def test_all_that_a_dataset_holds_comes_back_from_its_tars(place: str, tmp_path: Path) -> None:
    source = store(everything(), tmp_path / "d")
    out = str(tmp_path / "out") if place == "local" else f"memory://{tmp_path.name}/out"
    made = webdataset.WebDatasetExporter(rows=4).run(source, out)
    assert made == Exported(rows=15, images=19) and str(made) == "15 rows, 19 images; lost: nothing"
    back = importers.load("webdataset")(max_bad=0).run(out, str(tmp_path / "back"), say=quiet)
    assert read(tmp_path / "back") == read(source) and back.parameters["prefixed"] is False


def test_an_export_is_not_written_into_a_dataset(tmp_path: Path) -> None:
    source = str(tmp_path / "d")
    write(shapes(4, size=16), source, source="test", license="CC0-1.0", made_by="tests")
    with pytest.raises(DataError, match="is inside the dataset"):
        webdataset.WebDatasetExporter().run(source, f"{source}/tars")
    assert verify(source) == []


def test_the_license_of_a_dataset_comes_back_with_each_row_of_its_tars(tmp_path: Path) -> None:
    samples = [pair("a", IMAGES[0], "a cat"), pair("b", IMAGES[0], "a dog", license="MIT")]
    webdataset.WebDatasetExporter().run(
        store(samples, tmp_path / "d", "CC-BY-4.0"), str(tmp_path / "out")
    )
    importers.load("webdataset")().run(str(tmp_path / "out"), str(tmp_path / "back"), say=quiet)
    assert read(tmp_path / "back") == [replace(samples[0], license="CC-BY-4.0"), samples[1]]


def test_webdataset_reads_the_tars_and_finds_the_keys(tmp_path: Path) -> None:
    source = store(everything(), tmp_path / "d")
    webdataset.WebDatasetExporter(rows=6).run(source, str(tmp_path / "out"))
    found = []
    for path in sorted((tmp_path / "out").glob("*.tar")):
        with path.open("rb") as file:
            found += list(group_by_keys(tar_file_expander([{"url": path.name, "stream": file}])))
    samples = read(source)
    assert [unquote(sample["__key__"]) for sample in found] == [sample.key for sample in samples]
    for theirs, ours in zip(found, samples, strict=True):
        images = [data for name, data in theirs.items() if name.rpartition(".")[2] in ENDINGS]
        assert tuple(images) == ours.images
        assert json.loads(theirs["json"])["key"] == ours.key
    captions = [sample["txt"].decode() for sample in found if "txt" in sample]
    assert captions == [f"caption {place} <é>" for place in range(len(KEYS))]


def test_tars_hold_as_many_rows_as_asked_and_are_the_same_bytes_again(tmp_path: Path) -> None:
    source = store(everything(), tmp_path / "d")
    for name in ("a", "b"):
        webdataset.WebDatasetExporter(rows=6).run(source, str(tmp_path / name))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert sorted(files) == ["00000.tar", "00001.tar", "00002.tar", "shardindex.json"]
    listed = json.loads(files["shardindex.json"])["shardlist"]
    assert [(shard["url"], shard["nsamples"]) for shard in listed] == [
        ("00000.tar", 6),
        ("00001.tar", 6),
        ("00002.tar", 3),
    ]
    with tarfile.open(tmp_path / "a" / "00000.tar") as archive:
        names = archive.getnames()
    assert (
        names[:3] == ["plain.jpg", "plain.txt", "plain.json"] and "folder%2Fcat%2Ejpg.png" in names
    )
    with pytest.raises(DataError, match="at least 1"):
        webdataset.WebDatasetExporter(rows=0).run(source, str(tmp_path / "c"))


# --- LLaVA's JSON ----------------------------------------------------------------------------------------------------


def talks() -> list[Sample]:
    """Conversations with none, one and many images; two share one."""
    return [
        talk(key, IMAGES[:count]) for count, key in enumerate(("none", "one/1", "two.x", "three"))
    ]


@pytest.mark.parametrize("place", ["local", "memory"])
def test_conversations_come_back_from_llavas_json(place: str, tmp_path: Path) -> None:
    source = store(talks(), tmp_path / "d")
    out = str(tmp_path / "out") if place == "local" else f"memory://{tmp_path.name}/out"
    made = llava_json.LlavaJsonExporter().run(source, out)
    assert str(made) == "4 rows, 6 images; lost: nothing"
    importers.load("llava-json")(max_bad=0).run(
        f"{out}/conversations.json", str(tmp_path / "back"), say=quiet
    )
    assert read(tmp_path / "back") == talks()
    fs, root = fsspec.core.url_to_fs(out)
    names = [str(path).removeprefix(root) for path in fs.find(f"{root}/images")]
    assert len(names) == 3 and sorted(name.rpartition(".")[2] for name in names) == [
        "jpg",
        "png",
        "webp",
    ]


def test_a_pair_needs_a_prompt_to_become_a_conversation(tmp_path: Path) -> None:
    source = store([pair("a", IMAGES[0], "a cat")], tmp_path / "d")
    with pytest.raises(DataError, match=r"'a' is not a conversation.*prompt=TEXT makes one"):
        llava_json.LlavaJsonExporter().run(source, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
    llava_json.LlavaJsonExporter(prompt="Describe it.").run(source, str(tmp_path / "out"))
    rows = json.loads((tmp_path / "out" / "conversations.json").read_text())
    assert [turn["value"] for turn in rows[0]["conversations"]] == [
        "<image>\nDescribe it.",
        "a cat",
    ]
    importers.load("llava-json")().run(
        str(tmp_path / "out/conversations.json"), str(tmp_path / "back"), say=quiet
    )
    assert read(tmp_path / "back")[0].images == (IMAGES[0],)


def test_what_the_format_cannot_hold_is_counted_or_an_error(tmp_path: Path) -> None:
    rich = [sample for sample in everything() if sample.key in ("talk", "text only", "video/1.mp4")]
    made = llava_json.LlavaJsonExporter().run(store(rich, tmp_path / "d"), str(tmp_path / "out"))
    assert made.lost == dict.fromkeys(
        ("license", "labels", "provenance", "rejected", "times_s", "boxes", "ocr", "language"), 1
    )
    assert "boxes of 1 rows, labels of 1 rows" in str(made)
    bad = {
        "document": next(sample for sample in everything() if sample.key == "document").parts,
        "says so": (
            Part("user", text="What is <image>?"),
            Part("user", image=0),
            Part("assistant", text="x"),
        ),
        "shows": (
            Part("user", text="?"),
            Part("assistant", text="this:"),
            Part("assistant", image=0),
        ),
        "asks": (Part("user", image=0), Part("user", text="?")),
        "mute": (Part("user", image=0), Part("user", text=""), Part("assistant", text="x")),
    }
    for name, parts in bad.items():
        images = IMAGES[: 1 + max(part.image or 0 for part in parts)]
        source = store([Sample(name, images, parts)], tmp_path / name)
        with pytest.raises(DataError, match=f"'{name}'"):
            llava_json.LlavaJsonExporter(prompt="Describe it.").run(source, str(tmp_path / "none"))
    assert not list(tmp_path.glob("none*"))


def test_a_license_of_the_whole_dataset_is_lost_with_every_row(tmp_path: Path) -> None:
    made = llava_json.LlavaJsonExporter().run(
        store(talks(), tmp_path / "d", "CC-BY-4.0"), str(tmp_path / "out")
    )
    assert made.lost == {"license": 4}


def test_images_shown_in_another_order_or_twice_stay_where_they_are_shown(tmp_path: Path) -> None:
    parts = [
        Part("user", image=1),
        Part("user", text="and"),
        Part("user", image=0),
        Part("user", image=1),
    ]
    source = store([Sample("k", IMAGES[:2], (*parts, Part("assistant", text="x")))], tmp_path / "d")
    llava_json.LlavaJsonExporter().run(source, str(tmp_path / "out"))
    importers.load("llava-json")().run(
        str(tmp_path / "out/conversations.json"), str(tmp_path / "back"), say=quiet
    )
    back = read(tmp_path / "back")[0]
    assert [back.images[part.image] for part in back.parts if part.image is not None] == [
        IMAGES[1],
        IMAGES[0],
        IMAGES[1],
    ]


# --- whole or not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run", [webdataset.WebDatasetExporter().run, llava_json.LlavaJsonExporter().run]
)
def test_an_export_is_there_as_a_whole_or_not_at_all(run: Any, tmp_path: Path) -> None:
    source = store([*talks(), talk("torn", (b"<html>",))], tmp_path / "d")
    with pytest.raises(DataError, match="is not an image"):
        run(source, str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    sound = store(talks(), tmp_path / "e")
    with pytest.raises(DataError, match="is there already"):
        run(sound, str(tmp_path / "full"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    assert run(sound, str(tmp_path / "empty")).rows == 4


def test_synthetic_pairs_go_out_and_come_back_in_several_tars(tmp_path: Path) -> None:
    source = store(shapes(rows=25, size=12), tmp_path / "d")
    webdataset.WebDatasetExporter(rows=7).run(source, str(tmp_path / "out"))
    importers.load("webdataset")().run(
        f"{tmp_path}/out/{{00000..00003}}.tar", str(tmp_path / "back"), say=quiet
    )
    assert read(tmp_path / "back") == read(source)
