"""Texts and boxes in words, at three granularities: what a caption says is what the row holds."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgework.curation.grounding import TEMPLATES, Grounding, corners, place, relation
from bridgework.curation.runner import make
from bridgework.data.dataset import open_dataset
from bridgework.data.samples import Box, Part, Sample, pair
from bridgework.errors import SpecError
from tests.curation.models import decided, judged
from tests.curation.support import flags, written

IMAGE = next(flags()).images[0]
SIGN = (Box(0, (0.1, 0.05, 0.4, 0.2), "SALE"), Box(0, (0.45, 0.45, 0.55, 0.55), "50 %"))
PETS = (Box(0, (0.02, 0.4, 0.31, 0.9), "dog"), Box(0, (0.4, 0.42, 0.6, 0.6), "cat"))
BBOX = re.compile(r"<bbox>([\d.,]+)</bbox>")


def row(
    key: str = "k", boxes: tuple[Box, ...] = (), ocr: str | None = None, caption: str = "a shop"
) -> Sample:
    return pair(key, IMAGE, caption, boxes=boxes, ocr=ocr)


def told(sample: Sample, **fields: Any) -> dict[str, str]:
    """{granularity: text} of what a row becomes."""
    (verdict,) = decided(Grounding(**fields), [sample], [{}])
    return {
        made.provenance["grounding.granularity"]: made.parts[1].text or ""
        for made in verdict.samples
    }


def test_a_row_becomes_a_sample_of_each_granularity_that_it_allows() -> None:
    texts = {"text.alone", "text.place", "text.box"}
    objects = {"object.place", "object.box", "object.relative"}
    assert told(row(boxes=SIGN, ocr="SALE\n50 %")).keys() == texts
    assert told(row(boxes=PETS)).keys() == objects
    assert told(row(boxes=(*SIGN, *PETS), ocr="SALE\n50 %")).keys() == texts | objects
    assert told(row(ocr="SALE")).keys() == {"text.alone"}
    assert told(row(boxes=PETS[:1])).keys() == {"object.place", "object.box"}


def test_a_box_is_a_texts_if_its_label_is_among_the_words_of_the_ocr() -> None:
    boxes = (Box(0, (0.1, 0.1, 0.3, 0.3), "cat"), Box(0, (0.5, 0.5, 0.9, 0.9), "CATALOGUE 9"))
    found = told(row(boxes=boxes, ocr="the CATALOGUE\n9 a category"))
    assert "cat" in found["object.box"] and "CATALOGUE" not in found["object.box"]
    assert '"CATALOGUE 9"' in found["text.box"] and '"cat"' not in found["text.box"]


@pytest.mark.parametrize("ocr", ["SALE, 50 %", '"Sale!"\n(50 %)', "50 %: SALE"])
def test_label_next_to_punctuation_is_a_text(ocr: str) -> None:
    found = told(row(boxes=SIGN, ocr=ocr))
    assert found.keys() == {"text.alone", "text.place", "text.box"}
    assert '"SALE"' in found["text.place"] and '"50 %"' in found["text.place"]


def test_words_of_a_text_label_are_adjacent_and_in_order() -> None:
    boxes = (Box(0, (0.1, 0.1, 0.3, 0.3), "red sale"), Box(0, (0.5, 0.5, 0.9, 0.9), "&"))
    assert "text.place" not in told(row(boxes=boxes, ocr="sale, red; red hot sale; A&B"))
    assert '"&"' in told(row(boxes=boxes, ocr="A & B"))["text.place"]


def test_every_template_contains_the_fields_of_its_granularity() -> None:
    seen: dict[str, set[str]] = {name: set() for name in TEMPLATES}
    for number in range(60):
        for name, text in told(
            row(f"k{number}", (*SIGN, *PETS), "SALE\n50 %"), caption=False
        ).items():
            seen[name].add(text)
    assert {name: len(texts) for name, texts in seen.items()} == {
        name: len(TEMPLATES[name]) for name in TEMPLATES
    }
    for name, texts in seen.items():
        for text in texts:
            assert text.endswith(".") and text[0] in '"<' + text[0].upper()
            labels = ("SALE", "50 %") if name.startswith("text") else ("dog", "cat")
            assert all(label in text for label in labels)
            boxes = [BBOX.findall(text)] if name.endswith("box") else []
            assert all(len(found) == 2 for found in boxes) and ("<bbox>" in text) == name.endswith(
                "box"
            )
    assert all("in the upper left" in text.lower() for text in seen["text.place"])
    assert all("to the left of the cat" in text.lower() for text in seen["object.relative"])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
def test_coordinates_have_two_decimals_and_a_positive_area(x: list[float], y: list[float]) -> None:
    box = Box(0, (min(x), min(y), max(x), max(y)), "dog")
    found = told(row(boxes=(box,)), caption=False)
    rounded = [round(share, 2) for share in box.corners]
    if rounded[0] < rounded[2] and rounded[1] < rounded[3]:
        (shares,) = BBOX.findall(found["object.box"])
        assert re.fullmatch(r"\d\.\d\d(,\d\.\d\d){3}", shares)
        assert [float(share) for share in shares.split(",")] == pytest.approx(rounded)
    else:
        assert not found


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((0.0, 0.0, 0.2, 0.2), "in the upper left"),
        ((0.4, 0.0, 0.6, 0.1), "at the top"),
        ((0.9, 0.0, 1.0, 0.1), "in the upper right"),
        ((0.0, 0.4, 0.2, 0.6), "on the left"),
        ((0.0, 0.0, 1.0, 1.0), "in the centre"),
        ((0.8, 0.4, 1.0, 0.6), "on the right"),
        ((0.0, 0.8, 0.1, 1.0), "in the lower left"),
        ((0.4, 0.9, 0.6, 1.0), "at the bottom"),
        ((1.0, 1.0, 1.0, 1.0), "in the lower right"),
    ],
)
def test_place_is_that_of_the_center(box: tuple[float, float, float, float], words: str) -> None:
    assert place(Box(0, box, "x")) == words


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ((0.0, 0.4, 0.2, 0.6), (0.5, 0.4, 0.7, 0.6), "to the left of"),
        ((0.0, 0.4, 0.2, 0.6), (0.05, 0.8, 0.25, 1.0), "above"),
        ((0.1, 0.1, 0.2, 0.2), (0.0, 0.0, 0.5, 0.5), "inside"),
        ((0.0, 0.4, 0.5, 0.6), (0.1, 0.2, 0.6, 0.5), "below"),
    ],
)
def test_a_relation_turns_round_with_its_boxes(one: Any, other: Any, words: str) -> None:
    turned = {
        "to the left of": "to the right of",
        "above": "below",
        "below": "above",
        "inside": "around",
    }
    assert relation(Box(0, one), Box(0, other)) == words
    assert relation(Box(0, other), Box(0, one)) == turned[words]


def test_largest_things_are_listed_in_reading_order() -> None:
    boxes = tuple(
        Box(0, (x / 10, 0.5, x / 10 + 0.01 * (x + 1), 0.6), f"thing{x}") for x in (7, 2, 5, 0)
    )
    found = told(row(boxes=boxes), most=3)["object.box"]
    assert re.findall(r"thing\d", found) == ["thing2", "thing5", "thing7"]


def test_boxes_that_are_turned_or_have_no_label_are_left_out() -> None:
    odd = (
        Box(0, (0.5, 0.5, 0.4, 0.9), "turned"), Box(0, (0.1, 0.1, 0.3, 0.3)), Box(0, (0.0, 0.0, 0.3, 1.0), "edge"),
    )  # fmt: skip
    found = told(row(boxes=odd), caption=False)["object.box"]
    assert BBOX.findall(found) == ["0.00,0.00,0.30,1.00"] and "edge" in found


def test_one_granularity_is_drawn_by_seed_and_key() -> None:
    each = [told(row(f"k{n}", PETS)) for n in range(90)]
    drawn = [told(row(f"k{n}", PETS), granularity="draw") for n in range(90)]
    assert all(
        len(one) == 1 and one.items() <= all_.items() for one, all_ in zip(drawn, each, strict=True)
    )
    assert drawn == [told(row(f"k{n}", PETS), granularity="draw") for n in range(90)]
    assert drawn != [told(row(f"k{n}", PETS), granularity="draw", seed=1) for n in range(90)]
    counts = Counter(name for one in drawn for name in one)
    assert len(counts) == 3 and min(counts.values()) > 15


def test_own_caption_comes_first_or_is_left_out() -> None:
    assert all(text.startswith("a shop ") for text in told(row(boxes=PETS)).values())
    assert not any("shop" in text for text in told(row(boxes=PETS), caption=False).values())


def test_braces_in_a_label_stay_text() -> None:
    found = told(row(ocr="{0} {} {ocr}", boxes=(Box(0, (0.1, 0.1, 0.3, 0.3), "{0}"),)))
    assert '"{0} {} {ocr}"' in found["text.alone"] and '"{0}"' in found["text.place"]


def test_row_without_boxes_is_dropped_and_row_of_two_images_quarantined(
    home: Path,
) -> None:
    two = Sample("two", (IMAGE, IMAGE), (Part("caption", image=0), Part("caption", image=1)))
    facts = judged(Grounding(), [row(), two], home)
    assert facts[0] == {} and facts[1]["bad"][0] == "bad_row"
    (verdict,) = decided(Grounding(), [row(), two], facts)
    assert not verdict.samples and verdict.why == "no text and no box that can be told"


def test_a_grounded_dataset_keeps_pictures_and_boxes(home: Path, tmp_path: Path) -> None:
    source = written(
        tmp_path / "source", [replace(row(f"k{n}", PETS), license="CC0-1.0") for n in range(4)]
    )
    made = make(Grounding(), [source], str(tmp_path / "made"), home=home, say=lambda text: None)
    samples = list(open_dataset(str(tmp_path / "made")).samples())
    assert made.rows == 12 and len({sample.key for sample in samples}) == 12
    assert all(sample.images == (IMAGE,) and len(sample.boxes) == 2 for sample in samples)
    assert {sample.provenance["grounding.key"] for sample in samples} == {f"k{n}" for n in range(4)}


def test_corners_are_written_as_the_paper_does() -> None:
    assert corners(SIGN[0]) == "<bbox>0.10,0.05,0.40,0.20</bbox>"


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (
            lambda: Grounding(granularity=cast(Any, "all")),
            "got granularity 'all'; expected 'each' or 'draw'",
        ),
        (lambda: Grounding(most=0), "got most 0; expected at least 1"),
    ],
)
def test_a_grounding_that_cannot_be_is_refused(
    make_one: Callable[[], Grounding], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        make_one()
