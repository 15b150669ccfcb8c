"""Validation of samples, and their round trip through rows."""

import pickle
from typing import Any, cast

import pyarrow as pa
import pytest

from bridgework.data.quarantine import BadSample, Reason
from bridgework.data.samples import SCHEMA, Box, Part, Sample, from_row, pair, to_row

TURNS = (
    Part("system", text="Be brief."),
    Part("user", image=0),
    Part("user", text="\nWhat?"),
    Part("assistant", text="A cat."),
)
EVERY_KIND = [
    pair("pair", b"jpeg", "a cat"),
    Sample("conversation", (b"jpeg",), TURNS, language="en", license="CC0-1.0", ocr="EXIT"),
    Sample("text only", (), (Part("user", text="Hi"), Part("assistant", text="Hello"))),
    Sample("preference", (b"jpeg",), TURNS, rejected="A dog."),
    Sample(
        "interleaved",
        (b"one", b"two"),
        (
            Part("caption", text="First"),
            Part("caption", image=0),
            Part("caption", text="then"),
            Part("caption", image=1),
        ),
    ),
    Sample(
        "video",
        (b"1", b"2"),
        (Part("user", image=0), Part("user", image=1), Part("assistant", text="x")),
        times_s=(0.0, 0.5),
    ),
    pair(
        "rich",
        b"jpeg",
        "a cat",
        labels=("cat", "pet"),
        boxes=(Box(0, (0.0, 0.25, 0.5, 1.0), "cat"),),
        provenance={"by": "me"},
    ),
    Sample("no text", (b"jpeg",), (Part("caption", image=0),)),
]


@pytest.mark.parametrize("sample", EVERY_KIND, ids=lambda sample: sample.key)
def test_every_kind_of_sample_round_trips_through_its_row(sample: Sample) -> None:
    table = pa.Table.from_pylist([to_row(sample)], SCHEMA)
    assert from_row(table.to_pylist()[0]) == sample
    assert pickle.loads(pickle.dumps(sample)) == sample


def test_text_of_a_sample_is_its_texts_in_order() -> None:
    assert EVERY_KIND[4].text == "First\nthen"


@pytest.mark.parametrize(
    ("parts", "images", "reason"),
    [
        ((), 1, Reason.PLACEHOLDERS),
        ((Part("user", image=1),), 1, Reason.PLACEHOLDERS),
        ((Part("user", image=0),), 0, Reason.PLACEHOLDERS),
    ],
)
def test_images_and_their_places_must_agree(
    parts: tuple[Part, ...], images: int, reason: Reason
) -> None:
    with pytest.raises(BadSample) as caught:
        Sample("k", (b"x",) * images, parts)
    assert caught.value.reason is reason


def test_one_image_may_be_shown_twice() -> None:
    assert Sample("k", (b"x",), (Part("user", image=0), Part("user", image=0))).images == (b"x",)


def test_malformed_samples_are_rejected_with_a_reason() -> None:
    with pytest.raises(BadSample, match="caption, system, user, assistant"):
        Part(cast(Any, "human"), text="hi")
    for text, image in ((None, None), ("x", 0)):
        with pytest.raises(BadSample, match="a text or an image"):
            Part("user", text=text, image=image)
    with pytest.raises(BadSample, match="caption is empty"):
        pair("k", b"x", " \n")
    with pytest.raises(BadSample, match="no key"):
        pair("", b"x", "a cat")
    with pytest.raises(BadSample, match="1 times for 2 frames"):
        Sample("k", (b"x", b"y"), (Part("user", image=0), Part("user", image=1)), times_s=(0.0,))


def test_text_of_a_sample_includes_the_rejected_answer() -> None:
    assert (
        Sample("preference", (b"jpeg",), TURNS, rejected="A dog.").text
        == "Be brief.\n\nWhat?\nA cat.\nA dog."
    )
