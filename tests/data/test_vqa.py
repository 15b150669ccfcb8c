"""VQA's questions become conversations with the answer of most people, and keep what all of them said."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import vqa
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
    "../up.png",
]


def asked(number: Any, question: Any = "What is it?", image: Any = 9) -> dict[str, Any]:
    return {"question_id": number, "image_id": image, "question": question}


def answered(number: Any, *answers: Any, image: Any = 9, **changes: Any) -> dict[str, Any]:
    people = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": i}
        for i, answer in enumerate(answers, 1)
    ]
    given = {"question_id": number, "image_id": image, "answers": people, "answer_type": "other"}
    return (
        given
        | {"multiple_choice_answer": answers[0] if answers else None, "question_type": "what is"}
        | changes
    )


def read(folder: Path, questions: list[Any], answers: list[Any], **how: Any) -> dict[str, Sample]:
    (folder / "COCO_train2014_000000000009.jpg").write_bytes(PNG)
    (folder / "q.json").write_text(
        json.dumps({"data_subtype": "train2014", "questions": questions})
    )
    (folder / "a.json").write_text(json.dumps({"annotations": answers}))
    beside = str(folder / "a.json")
    vqa.VQAImporter(annotations=beside, max_bad=1, **how).run(
        str(folder / "q.json"), str(folder / "made"), say=lambda _: None
    )
    assert verify(str(folder / "made")) == []
    return {sample.key: sample for sample in open_dataset(str(folder / "made")).samples()}


def aside(folder: Path) -> dict[str, Reason]:
    return {record.key: record.reason for record in records(f"{folder}/made.quarantine")}


def test_a_question_is_answered_by_the_majority_and_keeps_all_ten(tmp_path: Path) -> None:
    people = ["dog", "cat", "dog", "puppy", "dog", "a dog", "dog", "dog", "cat", "dog"]
    found = read(tmp_path, [asked(9000, " What is it? ")], [answered(9000, *people)])["9000"]
    assert found.parts == (
        Part("user", image=0), Part("user", text="\nWhat is it?"), Part("assistant", text="dog"),
    )  # fmt: skip
    assert found.labels == tuple(people) and found.images == (PNG,)
    assert found.provenance == {"question_type": "what is", "answer_type": "other"}


def test_the_files_own_choice_stands_and_without_one_the_most_frequent_answer(
    tmp_path: Path,
) -> None:
    own, none = answered(1, "a", "b", "b", multiple_choice_answer="c"), answered(2, "a", "b", "b")
    del none["multiple_choice_answer"]
    found = read(tmp_path, [asked(1), asked(2)], [none, own])
    assert [found[key].parts[-1].text for key in ("1", "2")] == ["c", "b"]


def test_the_pattern_names_the_image(tmp_path: Path) -> None:
    (tmp_path / "gqa").mkdir()
    (tmp_path / "gqa" / "n161.jpg").write_bytes(PNG)
    rows = [asked("q", image="n161")], [answered("q", "yes", image="n161")]
    assert set(read(tmp_path, *rows, images=str(tmp_path / "gqa"), pattern="{}.jpg")) == {"q"}
    for pattern in ("one.jpg", "{name}.jpg", "{:d", "{} {}", "{:012q}"):
        with pytest.raises(DataError, match="gives no file for an image_id"):
            read(tmp_path, *rows, pattern=pattern)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        (
            "{:999999999d}.jpg",
            "more than 100 characters in a field, or 1000 in all; it is one like COCO_val2014_",
        ),
        ("{:.999999999f}.jpg", "more than 100 characters in a field"),
        ("{:0>101}.jpg", "more than 100 characters in a field"),
        ("{:\u0669\u0669\u0669}.jpg", "more than 100 characters in a field"),
        ("{0:100d}" * 11, "or 1000 in all"),
        ("x" * 1000 + "{}", "or 1000 in all"),
        ("{0:{0}d}.jpg", "gives no file"),  # as wide as an image_id of the file says
        ("{0.__doc__}{0}", "gives no file"),
    ],
)
def test_a_pattern_of_very_wide_names_is_refused_before_one_is_made(
    pattern: str, words: str, tmp_path: Path
) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=words):
            vqa.VQAImporter(annotations="a.json", pattern=pattern).run(
                "q.json", str(tmp_path / "made")
            )
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_pattern_may_pad_to_a_hundred_characters(tmp_path: Path) -> None:
    (tmp_path / f"{9:0100d}.jpg").write_bytes(PNG)
    assert set(read(tmp_path, [asked(1)], [answered(1, "yes")], pattern="{:0100d}.jpg")) == {"1"}


def test_questions_that_are_answered_twice_and_differently_are_put_aside(tmp_path: Path) -> None:
    answers = [
        answered(1, "yes"),
        answered(2, "no"),
        answered(1, "yes"),
        answered(2, "yes"),
        answered(2, "no"),
    ]
    assert list(read(tmp_path, [asked(1), asked(2)], answers)) == ["1"]
    (bad,) = records(f"{tmp_path}/made.quarantine")
    assert (bad.key, bad.reason) == ("2", Reason.BAD_ROW)
    assert "answer question 2 more than once, and differently; leave one" in bad.detail


def test_true_is_no_question(tmp_path: Path) -> None:
    assert read(tmp_path, [asked(1), asked(True)], [answered(1, "yes"), answered(True, "no")])[
        "1"
    ].text.endswith("yes")
    assert aside(tmp_path) == {"row-00000001": Reason.BAD_ROW}


def test_questions_without_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotations=FILE.*test splits have none"):
        vqa.VQAImporter().run(str(tmp_path / "q.json"), str(tmp_path / "made"))


BAD = {
    "2": (asked(2), answered(22, "a"), Reason.BAD_ROW),  # nobody answered
    "3": (asked(3, image=10), answered(3, "a"), Reason.BAD_ROW),  # another image was answered about
    "4": (asked(4), answered(4), Reason.BAD_ROW),
    "5": (asked(5), answered(5, "a", 7), Reason.BAD_ROW),
    "6": (asked(6, None), answered(6, "a"), Reason.BAD_ROW),
    "7": (asked(7, " "), answered(7, "a"), Reason.EMPTY_TEXT),
    "8": (asked(8), answered(8, ""), Reason.EMPTY_TEXT),
    "9": (asked(9, "Is <image> it?"), answered(9, "a"), Reason.PLACEHOLDERS),
    "10": (asked(10), answered(10, "<image>"), Reason.PLACEHOLDERS),
    "11": (asked(11, image=4), answered(11, "a", image=4), Reason.MISSING_IMAGE),
    "12": (asked(12, image="../9"), answered(12, "a", image="../9"), Reason.BAD_ROW),
    "1": (asked(1), answered(13, "a"), Reason.DUPLICATE_KEY),
    "row-00000013": ("text", None, Reason.BAD_ROW),
}


def test_every_bad_question_is_put_aside_with_its_reason(tmp_path: Path) -> None:
    questions, answers, reasons = zip(*BAD.values(), strict=True)
    found = read(tmp_path, [asked(1), *questions], [answered(1, "yes"), *answers])
    assert list(found) == ["1"] and aside(tmp_path) == dict(zip(BAD, reasons, strict=True))


def test_a_path_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    rows = [asked(1), asked(2, image="../9")], [answered(1, "yes"), answered(2, "a", image="../9")]
    (tmp_path / "9.jpg").write_bytes(PNG)
    assert set(read(tmp_path, *rows, pattern="{}.jpg")) == {"1"} and aside(tmp_path) == {
        "2": Reason.OUTSIDE
    }


def test_only_a_whole_number_names_an_image(tmp_path: Path) -> None:
    given = (9, 9.0, float("inf"), float("-inf"), float("nan"), 9.5, True, None)
    (tmp_path / "COCO_train2014_000000000001.jpg").write_bytes(PNG)
    questions = [asked(place, image=image) for place, image in enumerate(given)]
    answers = [answered(place, "a", image=image) for place, image in enumerate(given)]
    assert list(read(tmp_path, questions, answers)) == ["0", "1"]
    assert aside(tmp_path) == {str(place): Reason.BAD_ROW for place in range(2, len(given))}


def test_whatever_stands_in_a_field_every_row_goes_one_way_or_the_other(tmp_path: Path) -> None:
    questions = [
        asked(9 + i) | {name: value} for name in asked(1) for i, value in enumerate(WRONG)
    ] + WRONG
    wrong = [
        answered(100 + i) | {name: v}
        for i, (name, v) in enumerate((n, v) for n in answered(1) for v in WRONG)
    ]
    wrong += [answered(300 + i, "a") | {"answers": [value]} for i, value in enumerate(WRONG)]
    answers = [*WRONG, *wrong, *(answered(9 + i, "yes") for i in range(len(WRONG)))]
    questions += [asked(note["question_id"]) for note in wrong]
    read(tmp_path, [asked(1), *questions], [answered(1, "yes"), *answers])
    manifest = open_dataset(str(tmp_path / "made")).manifest
    assert manifest.rows + sum(manifest.quarantined.values()) == 1 + len(questions)


@pytest.mark.parametrize("text", ["", "[]", '{"questions": {}, "annotations": {}}', "[" * 100_000])
def test_a_file_that_is_not_vqas_is_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    (tmp_path / "q.json").write_text('{"questions": [], "annotations": []}')
    for source, answers in (("q.json", "x.json"), ("x.json", "q.json")):
        with pytest.raises(DataError, match=r"x\.json"):
            vqa.VQAImporter(annotations=str(tmp_path / answers)).run(
                str(tmp_path / source), str(tmp_path / "made")
            )
