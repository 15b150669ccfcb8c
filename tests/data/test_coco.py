"""COCO's files become pairs and boxes: every caption once, boxes as shares of the image, bad rows with a reason."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import coco
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Part, Sample
from bridgework.errors import DataError

LICENSES = [
    {"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}
]
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
    "../up.png",
]


def picture(width: int = 40, height: int = 20) -> bytes:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((width, height)).save(file, "PNG")
    return file.getvalue()


def image(number: Any, **changes: Any) -> dict[str, Any]:
    file = f"{number:04d}.png" if isinstance(number, int) else None
    given = {"id": number, "file_name": file, "width": 40, "height": 20, "license": 4}
    return given | changes


def said(image_id: Any, text: Any) -> dict[str, Any]:
    return {"image_id": image_id, "id": 7, "caption": text}


def boxed(image_id: Any, bbox: Any, category: Any = 18) -> dict[str, Any]:
    return {"image_id": image_id, "bbox": bbox, "category_id": category, "iscrowd": 0}


class Source:
    """A folder with files of COCO's form and three pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for number in (1, 2, 3):
            (folder / f"{number:04d}.png").write_bytes(picture())

    def write(self, name: str, **fields: Any) -> str:
        given = {"images": [image(1), image(2), image(3)], "licenses": LICENSES} | fields
        (self.folder / name).write_text(json.dumps(given))
        return str(self.folder / name)

    def captions(self, *notes: Any, **fields: Any) -> str:
        return self.write("captions.json", annotations=list(notes), **fields)

    def instances(self, *notes: Any, **fields: Any) -> str:
        names = [{"id": 18, "name": "dog"}, {"id": 44, "name": "bottle"}]
        return self.write("instances.json", annotations=list(notes), categories=names, **fields)

    def read(self, source: str, **how: Any) -> dict[str, Sample]:
        dest = str(self.folder / "made")
        self.manifest = coco.CocoImporter(max_bad=1, **how).run(source, dest, say=lambda _: None)
        self.aside = {record.key: record.reason for record in records(f"{dest}.quarantine")}
        assert verify(dest) == []
        return {sample.key: sample for sample in open_dataset(dest).samples()}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_every_caption_is_a_pair_under_the_license_of_its_image(source: Source) -> None:
    found = source.read(
        source.captions(said(2, "a cat "), said(1, "a dog"), said(2, "two cats"), said(1, "a dog"))
    )
    assert {key: sample.text for key, sample in found.items()} == {
        "2": "a cat",
        "1": "a dog",
        "2#2": "two cats",
    }
    assert found["1"].parts == (Part("caption", image=0), Part("caption", text="a dog"))
    assert found["1"].images == (picture(),) and found["1"].provenance == {"file": "0001.png"}
    assert found["1"].license == "Attribution License" and not found["1"].boxes
    assert source.aside == {}
    assert source.manifest.left_out == {"captions that their picture has already": 1}


def test_boxes_are_shares_of_the_image_clamped_to_it_and_those_without_area_are_counted(
    source: Source,
) -> None:
    marks = [
        boxed(1, [10, 5, 20, 10]),
        boxed(1, [-4, 10, 8, 100], 44),
        boxed(1, [10, 10, 0, 5]),
        boxed(1, [50, 0, 5, 5], 44),
    ]
    found = source.read(source.instances(*marks))
    assert [(box.corners, box.label) for box in found["1"].boxes] == [
        ((0.25, 0.25, 0.75, 0.75), "dog"),
        (pytest.approx((0.0, 0.5, 0.1, 1.0)), "bottle"),
    ]
    assert found["1"].labels == ("dog", "bottle") and found["1"].provenance["dropped.boxes"] == "2"
    assert found["1"].parts == (Part("caption", image=0),)
    assert list(found) == ["1", "2", "3"] and found["2"].boxes == ()


def test_captions_know_the_boxes_of_a_file_beside_them(source: Source) -> None:
    boxes_file = source.instances(boxed(1, [0, 0, 40, 10]), boxed(9, [0, 0, 1, 1]), images=[])
    found = source.read(
        source.captions(said(1, "a dog"), said(1, "a pet"), said(2, "grass")), instances=boxes_file
    )
    assert [len(found[key].boxes) for key in ("1", "1#2", "2")] == [1, 1, 0]
    assert found["1#2"].boxes[0].corners == (0, 0, 1, 0.5) and found["1#2"].labels == ("dog",)
    assert found["1"].text == "a dog" and source.manifest.parameters["instances"] == boxes_file


def test_a_smaller_copy_keeps_its_boxes_and_a_turned_one_is_a_bad_row(source: Source) -> None:
    (source.folder / "0001.png").write_bytes(picture(21, 10))
    (source.folder / "0002.png").write_bytes(picture(20, 40))
    found = source.read(source.instances(*(boxed(number, [0, 0, 20, 20]) for number in (1, 2))))
    assert found["1"].boxes[0].corners == (0, 0, 0.5, 1) and "2" not in found
    assert source.aside == {"2": Reason.BAD_ROW}


def test_images_may_lie_elsewhere(source: Source, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(picture())
    text = source.captions(said(1, "a cat"), images=[image(1, file_name="a.png")])
    assert source.read(text, images=str(tmp_path / "train"))["1"].images == (picture(),)


def test_equal_captions_of_a_picture_are_one_row_and_refuse_nothing(source: Source) -> None:
    notes = [said(1, "a road ."), *[said(1, "a road .")] * 4, said(2, "a road ."), said(2, "trees")]
    text = source.captions(*notes)
    dest = str(source.folder / "strict")
    coco.CocoImporter().run(text, dest, say=lambda _: None)  # at the default max_bad
    made = open_dataset(str(source.folder / "strict"))
    assert [s.key for s in made.samples()] == ["1", "2", "2#2"]
    assert made.manifest.left_out == {"captions that their picture has already": 4}


def test_a_list_of_captions_gives_a_row_for_each(source: Source) -> None:
    found = source.read(source.captions(said(1, ["one", "two"]), said(1, ["two", "three", ""])))
    assert {key: s.text for key, s in found.items()} == {"1": "one", "1#2": "two", "1#3": "three"}
    assert source.aside == {"1#4": Reason.EMPTY_TEXT}
    assert source.manifest.left_out == {"captions that their picture has already": 1}


@pytest.mark.parametrize("categories", [[], [{"id": 0, "name": "text"}], None])
def test_captions_with_categories_are_captions_as_cvat_writes_them(
    categories: Any, source: Source
) -> None:
    notes = [said(n, f"caption {n}") | {"category_id": 0, "attributes": {}} for n in (1, 2)]
    text = source.captions(*notes, categories=categories, info={})
    assert [s.text for s in source.read(text).values()] == ["caption 1", "caption 2"]
    assert source.aside == {}


@pytest.mark.parametrize("crowd", [1, True, 1.0, "1"])
def test_a_box_around_a_crowd_is_no_object_and_is_counted(crowd: Any, source: Source) -> None:
    group = boxed(1, [0, 10, 40, 10], 44) | {"iscrowd": crowd, "segmentation": {"counts": [0]}}
    boxes_file = source.instances(group, boxed(1, [10, 5, 20, 10]), boxed(2, [0, 0, 0, 0]))
    text = source.captions(said(1, "a dog"), said(2, "x"))
    for given, how in ((boxes_file, {}), (text, {"instances": boxes_file})):
        found = source.read(given, **how)
        assert [box.label for box in found["1"].boxes] == ["dog"]
        assert found["1"].labels == ("bottle", "dog")
        assert found["1"].provenance == {"file": "0001.png", "dropped.crowds": "1"}
        assert found["2"].provenance == {"file": "0002.png", "dropped.boxes": "1"}
        shutil.rmtree(source.folder / "made")


IDS = {
    "texts": ("im1", "im1", "im1"),
    "a number and its digits": (1, "1", "1"),
    "digits and their number": ("1", 1, "1"),
    "an integer as a float": (1.0, 1, "1"),
    "a number and a float": (1, 1.0, "1"),
    "a path": ("train/0001.png", "train/0001.png", "train/0001.png"),
}


@pytest.mark.parametrize("name", IDS)
def test_ids_are_numbers_or_texts_however_they_are_written(name: str, source: Source) -> None:
    own, asked, key = IDS[name]
    kinds = [{"id": "dog" if name == "texts" else "18", "name": "dog"}]
    category = "dog" if name == "texts" else 18
    pictures = [image(own, file_name="0001.png", license="4")]
    box = boxed(asked, [0, 0, 40, 10], category)
    boxes_file = source.write(
        "instances.json", images=pictures, annotations=[box], categories=kinds
    )
    text = source.captions(said(asked, "a dog"), said(asked, "a pet"), images=pictures)
    found = source.read(text, instances=boxes_file)
    assert list(found) == [key, f"{key}#2"] and source.aside == {}
    assert found[key].boxes[0].label == "dog" and found[key].license == "Attribution License"


@pytest.mark.parametrize("sides", [(40.0, 20.0), (40, 20.0), ("40", "20"), (39.6, 20.2)])
def test_sizes_may_be_floats_or_digits(sides: tuple[Any, Any], source: Source) -> None:
    width, height = sides
    pictures = [image(1, width=width, height=height)]
    found = source.read(source.instances(boxed(1, [10, 5, 20, 10]), images=pictures))
    assert found["1"].boxes[0].corners == pytest.approx((0.25, 0.25, 0.75, 0.75), abs=0.02)


def test_captions_next_to_boxes_are_rows_and_boxes_alone_too(source: Source) -> None:
    notes = [said(1, "a dog"), boxed(1, [0, 0, 40, 10]), boxed(2, [0, 0, 40, 20]), said(1, "a pet")]
    found = source.read(source.instances(*notes, boxed(9, [0, 0, 1, 1])))
    assert {key: s.text for key, s in found.items()} == {"1": "a dog", "1#2": "a pet", "2": ""}
    assert [len(s.boxes) for s in found.values()] == [1, 1, 1]
    assert source.aside == {"boxes-9": Reason.BAD_ROW}


def test_a_region_with_a_text_is_a_caption_and_a_box_of_that_label(source: Source) -> None:
    region = said(1, "a dog on grass") | {"bbox": [0, 0, 40, 10]}
    found = source.read(source.captions(region, said(1, "a park")))
    assert [s.text for s in found.values()] == ["a dog on grass", "a park"]
    assert [box.label for box in found["1"].boxes] == ["a dog on grass"]


def test_captions_of_a_file_of_instances_are_counted(source: Source) -> None:
    boxes_file = source.instances(boxed(1, [0, 0, 40, 10]), said(1, "lost"))
    source.read(source.captions(said(1, "a dog")), instances=boxes_file)
    assert source.manifest.left_out == {"captions of the file of instances": 1}


def test_a_given_id_never_meets_a_key_that_was_made(source: Source) -> None:
    pictures = [image(n, file_name="0001.png") for n in ("1", "1#2")]
    notes = [said("1", "one"), said("1", "two"), said("1#2", "three")]
    assert list(source.read(source.captions(*notes, images=pictures))) == ["1", "1#2", "1#2#2"]


BAD = {
    "no object": (7, Reason.BAD_ROW),
    "no image": (said(9, "a cat"), Reason.BAD_ROW),
    "id is a list": (said([1], "a cat"), Reason.BAD_ROW),
    "no text": (said(1, 5), Reason.BAD_ROW),
    "blank": (said(1, " "), Reason.EMPTY_TEXT),
    "placeholder": (said(1, "an <image>"), Reason.PLACEHOLDERS),
    "outside": (said(3, "a cat"), Reason.OUTSIDE),
    "gone": (said(4, "a cat"), Reason.MISSING_IMAGE),
    "no name": (said(5, "a cat"), Reason.BAD_ROW),
}


def test_every_bad_caption_is_put_aside_with_its_reason(source: Source) -> None:
    images = [
        image(1),
        image(2),
        image(3, file_name="../0001.png"),
        image(4),
        image(5, file_name=None),
        "x",
        {"id": []},
    ]
    notes = [said(2, "good"), *(note for note, _ in BAD.values())]
    assert list(source.read(source.captions(*notes, images=images))) == ["2"]
    table = {record.row: record.reason for record in records(f"{source.folder}/made.quarantine")}
    assert table == {row: reason for row, (_, reason) in enumerate(BAD.values(), start=1)}


def test_whatever_stands_in_a_field_every_row_goes_one_way_or_the_other(source: Source) -> None:
    notes = [
        boxed(1, [1, 2, 3, 4]) | {name: value}
        for name in ("image_id", "bbox", "category_id")
        for value in WRONG
    ]
    notes += [boxed(2, [1, 2, value, 4]) for value in WRONG]
    fields = ("id", "file_name", "width", "height", "license")
    images = [
        image(10 + row, **({"file_name": "0003.png"} | {name: value}))
        for row, name in enumerate(fields)
        for value in WRONG
    ]
    found = source.read(
        source.instances(*notes, *WRONG, images=[image(1), image(2), image(3), *images, *WRONG])
    )
    assert {"3", "14"} <= set(found) and not {"1", "2"} & set(
        found
    )  # a wrong box makes the whole image a bad row
    extra = sum(
        record.key.startswith("boxes-") for record in records(f"{source.folder}/made.quarantine")
    )
    assert (
        source.manifest.rows + sum(source.manifest.quarantined.values())
        == 3 + len(images) + len(WRONG) + extra
    )
    texts = [said(1, value) for value in WRONG] + [said(value, "a cat") for value in WRONG]
    shutil.rmtree(source.folder / "made")
    source.read(
        source.captions(said(2, "good"), *texts, *WRONG, licenses=WRONG),
        instances=source.instances(*WRONG),
    )
    assert (
        source.manifest.rows + sum(source.manifest.quarantined.values())
        == 1 + len(texts) + len(WRONG) + 1
    )


@pytest.mark.parametrize(
    "text", ["", "[]", "3", '{"images": []}', '{"images": [], "annotations": {}}', "[" * 100_000]
)
def test_a_file_that_is_not_cocos_is_an_error(text: str, source: Source) -> None:
    (source.folder / "broken.json").write_text(text)
    with pytest.raises(DataError, match=r"broken\.json"):
        source.read(str(source.folder / "broken.json"))
    with pytest.raises(DataError, match=r"broken\.json"):
        source.read(source.captions(said(1, "a cat")), instances=str(source.folder / "broken.json"))


def test_instances_do_not_go_with_instances(source: Source) -> None:
    text = source.instances(boxed(1, [0, 0, 1, 1]))
    with pytest.raises(DataError, match="goes with a file of captions"):
        source.read(text, instances=text)
