"""Preference pairs keep the better answer in the conversation and the worse one beside it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import preferences
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

PNG = next(shapes(1, size=16)).images[0]
WRONG = [
    None,
    True,
    -1,
    1.5,
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    float("nan"),
    10**400,
    "\ud800",
    "../a.png",
    [{}],
]
ASKED = Part("user", image=0), Part("user", text="\nWhat is it?"), Part("assistant", text="a cube")


def row(**changes: Any) -> dict[str, Any]:
    given = {
        "id": "k",
        "image": "a.png",
        "question": "What is it?",
        "chosen": "a cube",
        "rejected": "a ball",
    }
    return {name: value for name, value in (given | changes).items() if value is not ...}


def read(folder: Path, *rows: Any, name: str = "rows.jsonl") -> dict[str, Sample]:
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(PNG)
    lines = "\n".join(given if isinstance(given, str) else json.dumps(given) for given in rows)
    (folder / name).write_text(json.dumps(rows) if name.endswith(".json") else lines)
    preferences.PreferencesImporter(max_bad=1).run(
        str(folder / name), str(folder / "made"), say=lambda _: None
    )
    assert verify(str(folder / "made")) == []
    return {sample.key: sample for sample in open_dataset(str(folder / "made")).samples()}


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


SAME = {
    "plain": row(),
    "prompt": row(question=..., prompt="What is it?"),
    "conversation": row(question=..., conversations=[turn("human", "<image>\nWhat is it?")]),
    "placed": row(question="<image>\nWhat is it?"),
    "RLHF-V": row(question=..., chosen=..., rejected=..., image=..., image_path="a.png")
    | {"text": json.dumps({"question": "What is it?", "chosen": "a cube", "rejected": "a ball"})},
    "unpacked": row(question=..., chosen=..., rejected=...) | {"text": row(id=..., image=...)},
    "turns": row(
        chosen=turn("gpt", "a cube"), rejected=turn("gpt", "a ball"), image=..., images=["a.png"]
    ),
    "messages": row(question=..., prompt=[{"role": "user", "content": "What is it?"}])
    | {
        side: [{"role": "assistant", "content": said}]
        for side, said in (("chosen", "a cube"), ("rejected", "a ball"))
    },
}


@pytest.mark.parametrize("form", SAME)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_the_forms_of_a_row_mean_the_same(form: str, name: str, tmp_path: Path) -> None:
    found = read(tmp_path, SAME[form], name=name)["k"]
    assert (found.parts, found.rejected, found.images) == (ASKED, "a ball", (PNG,))


def test_images_of_one_question_and_conversations_of_many_turns(tmp_path: Path) -> None:
    talk = [turn("human", "Hi"), turn("gpt", "Hello"), turn("human", "And <image>?")]
    found = read(
        tmp_path, row(image=["a.png", "a.png"]), row(id="talk", question=..., conversations=talk)
    )
    assert found["k"].parts[:4] == (
        Part("user", image=0), Part("user", text="\n"), Part("user", image=1), Part("user", text="\nWhat is it?"),
    )  # fmt: skip
    assert [part.text for part in found["talk"].parts] == [
        "Hi",
        "Hello",
        "And ",
        None,
        "?",
        "a cube",
    ]


def test_a_question_without_an_image_stays_one(tmp_path: Path) -> None:
    assert read(tmp_path, row(image=...))["k"].parts == (Part("user", text="What is it?"), ASKED[2])


def test_one_id_with_many_pairs_is_kept_and_a_repetition_is_not(tmp_path: Path) -> None:
    assert list(read(tmp_path, row(), row(rejected="a cone"), row(), row(id=..., idx=4))) == [
        "k",
        "k#2",
        "4",
    ]
    assert [record.reason for record in records(f"{tmp_path}/made.quarantine")] == [
        Reason.DUPLICATE_KEY
    ]


BAD = {
    "no JSON": ("{", Reason.BAD_ROW),
    "no object": ([], Reason.BAD_ROW),
    "no question": (row(question=...), Reason.BAD_ROW),
    "no chosen": (row(chosen=...), Reason.BAD_ROW),
    "equal": (row(rejected=" a cube\n"), Reason.BAD_ROW),
    "blank": (row(rejected=" "), Reason.EMPTY_TEXT),
    "blank question": (row(question=" ", image=...), Reason.EMPTY_TEXT),
    "image in an answer": (row(rejected="<image>"), Reason.PLACEHOLDERS),
    "too many places": (row(question="<image> or <image>?"), Reason.PLACEHOLDERS),
    "ends with an answer": (
        row(conversations=[turn("human", "<image>"), turn("gpt", "b")]),
        Reason.BAD_ROW,
    ),
    "no list": (row(conversations="<image>"), Reason.BAD_ROW),
    "empty path": (row(image=""), Reason.BAD_ROW),
    "gone": (row(image="b.png"), Reason.MISSING_IMAGE),
    "outside": (row(image="../a.png"), Reason.OUTSIDE),
    "broken text": (row(chosen=...) | {"text": "[" * 100_000}, Reason.BAD_ROW),
}


def test_every_bad_row_is_put_aside_with_its_reason(tmp_path: Path) -> None:
    assert list(read(tmp_path, row(id="good"), *(given for given, _ in BAD.values()))) == ["good"]
    table = {record.row: record.reason for record in records(f"{tmp_path}/made.quarantine")}
    assert table == {number: reason for number, (_, reason) in enumerate(BAD.values(), start=1)}


def test_a_row_that_cannot_be_read_says_why(tmp_path: Path) -> None:
    read(tmp_path, row(id="good"), "{", "7")
    broken, number = records(f"{tmp_path}/made.quarantine")
    assert (
        "the line is not JSON" in broken.detail
        and "the row is int, and an object is wanted: 7" in number.detail
    )


def test_whatever_stands_in_a_field_every_row_goes_one_way_or_the_other(tmp_path: Path) -> None:
    names = (*row(), "prompt", "conversations", "images", "image_path", "text", "idx")
    rows = [row(**{name: value}) for name in names for value in WRONG]
    rows += [row(conversations=[value]) for value in WRONG] + [
        row(chosen=..., text=value) for value in WRONG
    ]
    rows += [{name: value for name in row()} for value in WRONG]
    read(tmp_path, row(id="good"), *rows, *map(json.dumps, WRONG))
    manifest = open_dataset(str(tmp_path / "made")).manifest
    assert manifest.rows + sum(manifest.quarantined.values()) == 1 + len(rows) + len(WRONG)


# --- where the picture of a row is -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("image", "images", "image_path", "image_paths", "img", "imgs", "img_path", "img_paths"),
        *("image_file", "img_file", "imagePath", "image_name", "file_name", "filename", "picture"),
        *("photo", "pic", "image_filename", "Image", "IMG_PATH"),
    ],
)
@pytest.mark.parametrize("value", ["a.png", ["a.png"], [None, "a.png"], {"path": "a.png"}])
def test_a_picture_is_found_under_its_usual_names(name: str, value: Any, tmp_path: Path) -> None:
    found = read(tmp_path, row(image=...) | {name: value})["k"]
    assert (found.parts, found.rejected, found.images) == (ASKED, "a ball", (PNG,))


@pytest.mark.parametrize("empty", [None, [], [None], [""], {}, {"bytes": None, "path": None}])
def test_an_empty_field_hides_no_picture_in_another(empty: Any, tmp_path: Path) -> None:
    for name in ("images", "img_path"):
        for given in ({"image": empty, name: "a.png"}, {name: "a.png", "image": empty}):
            assert read(tmp_path / name, row(image=...) | given)["k"].images == (PNG,)
            shutil.rmtree(tmp_path / name / "made")


@pytest.mark.parametrize(
    "given",
    [
        {"image_id": 391895},
        {"img_id": "COCO_391895"},
        {"visual": "a.png"},
        {"image_1": "a.png"},
        {"media": ["a.png"]},
        {"path_to_image": "photos/a.jpeg"},
        {"image_data": "data:image/png;base64,AA"},
        {"original_image": {"bytes": None, "path": "a.png"}},
    ],
)
def test_a_picture_under_another_name_is_put_aside_and_never_lost(
    given: dict[str, Any], tmp_path: Path
) -> None:
    found = read(tmp_path, row(id="text", image=...), row(image=...) | given)
    assert list(found) == ["text"]
    (bad,) = records(f"{tmp_path}/made.quarantine")
    assert bad.reason is Reason.BAD_ROW and f"`{next(iter(given))}`" in bad.detail


def test_fields_about_a_picture_are_no_picture(tmp_path: Path) -> None:
    others = {"image_width": 640, "image_source": "coco", "num_images": 0, "image_id": None}
    assert read(tmp_path, row(image=...) | others)["k"].images == ()


# --- as they are published -------------------------------------------------------------------------------------------

CELL = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def tabled(folder: Path, *tables: dict[str, Any], name: str = "Set_{:03d}.parquet") -> list[Sample]:
    """The samples of Parquet files, in order."""
    (folder / "src").mkdir(parents=True)
    for number, table in enumerate(tables):
        pq.write_table(pa.table(table), folder / "src" / name.format(number))
    source = folder / "src" if len(tables) > 1 else folder / "src" / name.format(0)
    preferences.PreferencesImporter(max_bad=1).run(
        str(source), str(folder / "made"), say=lambda _: None
    )
    assert verify(str(folder / "made")) == []
    return list(open_dataset(str(folder / "made")).samples())


def cells(*pictures: bytes | None) -> pa.Array:
    return pa.array([None if p is None else {"bytes": p, "path": "a.png"} for p in pictures], CELL)


def test_rlhf_v_is_read_as_it_is_published(tmp_path: Path) -> None:
    text = json.dumps({"question": "What is it?", "chosen": "a cube", "rejected": "a ball"})
    table = {
        "ds_name": ["RLHF-V", "RLHF-V"],
        "image": cells(PNG, PNG),
        "text": [text, text.replace("cube", "cone")],
        "origin_dataset": ["LCS-558K"] * 2,
        "idx": [0, 7],
        "image_path": ["llava1.5/cat.jpg"] * 2,
    }
    first, second = tabled(tmp_path, table, name="RLHF-V-Dataset.parquet")
    assert (first.key, second.key) == ("0", "7")
    assert (first.parts, first.rejected, first.images) == (ASKED, "a ball", (PNG,))


def test_rlaif_v_is_read_from_all_its_files(tmp_path: Path) -> None:
    tables = [
        {
            "image": cells(PNG, PNG),
            "question": ["What is it?"] * 2,
            "chosen": ["a cube", "a cone"],
            "rejected": ["a ball"] * 2,
            "idx": [f"{number}", "same"],
        }
        for number in range(3)
    ]
    found = tabled(tmp_path, *tables, name="RLAIF-V-Dataset_{:03d}.parquet")
    assert [s.key for s in found] == ["0", "same", "1", "same#2", "2", "same#3"]
    assert (found[0].parts, found[0].rejected, found[0].images) == (ASKED, "a ball", (PNG,))


def test_preferences_as_messages_are_read(tmp_path: Path) -> None:
    part = pa.struct([("text", pa.string()), ("type", pa.string())])
    turns = pa.list_(pa.struct([("content", pa.list_(part)), ("role", pa.string())]))

    def said(role: str, *content: dict[str, Any]) -> pa.Array:
        return pa.array([[{"content": list(content), "role": role}]], turns)

    asked = ({"type": "image"}, {"type": "text", "text": "What is it?"})
    table = {
        "images": pa.array([[{"bytes": PNG, "path": None}]], pa.list_(CELL)),
        "prompt": said("user", *asked),
        "chosen": said("assistant", {"type": "text", "text": "a cube"}),
        "rejected": said("assistant", {"type": "text", "text": "a ball"}),
    }
    (found,) = tabled(tmp_path, table)
    assert (found.parts, found.rejected, found.images) == (ASKED, "a ball", (PNG,))


def test_a_bad_cell_and_a_lost_file_are_put_aside(tmp_path: Path) -> None:
    table = {
        "image": cells(PNG, b"<html>", None),
        "question": ["What is it?"] * 3,
        "chosen": ["a cube"] * 3,
        "rejected": ["a ball"] * 3,
    }
    (tmp_path / "src").mkdir()
    pq.write_table(pa.table(table), tmp_path / "src" / "Set_000.parquet")
    (tmp_path / "src" / "Set_001.parquet").write_bytes(b"PAR1 cut")
    importer = preferences.PreferencesImporter(max_bad=1)
    importer.run(str(tmp_path / "src"), str(tmp_path / "made"), say=lambda _: None)
    bad = {record.key: record.reason for record in records(f"{tmp_path}/made.quarantine")}
    assert bad == {"row-00000001": Reason.NOT_AN_IMAGE, "row-00000003": Reason.TRUNCATED}
    with pytest.raises(DataError, match="Set_001"):
        file = str(tmp_path / "src" / "Set_001.parquet")
        importer.run(file, str(tmp_path / "none"))
