"""Questions with candidates: their importers, their way through every format, and how a prompt shows them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridgework.data import importers
from bridgework.data.dataset import open_dataset, verify, write
from bridgework.data.exporters import llava_json, webdataset
from bridgework.data.importers import multiple_choice, visdial
from bridgework.data.quarantine import BadSample, Reason, records
from bridgework.data.samples import CANDIDATES, Part, Sample, from_row, pair, to_row
from bridgework.data.synthetic import choices, shapes
from bridgework.data.templates import conversation, letter, unanswered
from bridgework.errors import DataError

PNG = next(shapes(1, size=16)).images[0]


def quiet(_: str) -> None:
    """For importers that are not asked what they say."""


def read(path: Path | str) -> dict[str, Sample]:
    assert verify(str(path)) == []
    return {sample.key: sample for sample in open_dataset(str(path)).samples()}


def reasons(path: Path | str) -> dict[str, Reason]:
    return {record.key: record.reason for record in records(f"{path}.quarantine")}


# --- a sample's candidates -------------------------------------------------------------------------------------------


def test_candidates_come_back_from_shards_and_every_export(tmp_path: Path) -> None:
    rows = [
        *choices(3, size=16),
        pair("bare", PNG, "a picture"),
        replace(
            next(choices(1, size=16)),
            key="known",
            provenance={"by": "me"},
            candidates=("a", "b", "a", '"c", {'),
        ),
    ]
    write(rows, str(tmp_path / "d"), source="s", license="CC0-1.0", made_by="t")
    assert list(read(tmp_path / "d").values()) == rows
    webdataset.run(str(tmp_path / "d"), str(tmp_path / "tars"))
    importers.load("webdataset")(
        str(tmp_path / "tars"), str(tmp_path / "back"), max_bad=0, say=quiet
    )
    assert [sample.candidates for sample in read(tmp_path / "back").values()] == [
        row.candidates for row in rows
    ]
    made = llava_json.run(str(tmp_path / "d"), str(tmp_path / "json"), prompt="What is it?")
    assert made.lost == {
        "license": 5,
        "labels": 4,
        "provenance": 1,
    }  # of all rows, of the questions, of one
    importers.load("llava-json")(
        str(tmp_path / "json/conversations.json"), str(tmp_path / "again"), max_bad=0, say=quiet
    )
    assert [sample.candidates for sample in read(tmp_path / "again").values()] == [
        row.candidates for row in rows
    ]


def test_a_row_without_candidates_is_the_same_bytes_as_ever() -> None:
    assert to_row(pair("k", PNG, "a picture"))["provenance"] == []
    row = to_row(next(choices(1)))
    assert from_row(row | {"provenance": []}).candidates == ()


@pytest.mark.parametrize("kept", ["{bad", '"abc"', "[1, 2]", '{"a": 1}', "5", '["one"]'])
def test_kept_candidates_that_are_no_list_of_texts_are_a_bad_row(kept: str) -> None:
    row = to_row(next(choices(1)))
    with pytest.raises(BadSample, match="candidates") as caught:
        from_row(row | {"provenance": [(CANDIDATES, kept)]})
    assert caught.value.reason is Reason.BAD_ROW
    with pytest.raises(BadSample, match="candidates"):
        from_row(row | {"provenance": [], "candidates": "abc"})


@pytest.mark.parametrize("candidates", [("one",), ("a", " "), ("", "b")])
def test_one_candidate_or_a_blank_one_is_a_bad_row(candidates: tuple[str, ...]) -> None:
    with pytest.raises(BadSample, match="expected two or more") as caught:
        replace(next(choices(1)), candidates=candidates)
    assert caught.value.reason is Reason.BAD_ROW


@pytest.mark.parametrize("given", ["a", [1, 2], {"a": 1}, [["a"], "b"]])
def test_candidates_that_are_no_list_of_texts_are_a_bad_row(given: Any, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "a"}]
    good = {"id": "good", "conversations": turns, "candidates": ["a", " b "]}
    (tmp_path / "c.json").write_text(
        json.dumps([good, {"id": "bad", "conversations": turns, "candidates": given}])
    )
    importers.load("llava-json")(
        str(tmp_path / "c.json"), str(tmp_path / "d"), max_bad=1, say=quiet
    )
    assert read(tmp_path / "d")["good"].candidates == ("a", "b") and reasons(tmp_path / "d") == {
        "bad": Reason.BAD_ROW
    }


def test_a_prompt_shows_the_candidates_with_letters() -> None:
    said = (Part("user", text="\nWhich?"), Part("assistant", text="red"))
    sample = Sample("k", (), said, candidates=("red", "blue"))
    prompts = ("{} {options}", "Q: {} Options: {OPTIONS}", "Look.")
    assert [conversation(sample, (prompt,), 0)[0].text for prompt in prompts] == [
        "Which? (a) red (b) blue", "Q: Which? Options: (A) red (B) blue", "\nWhich?"
    ]  # fmt: skip
    bare = replace(sample, candidates=())
    assert conversation(bare, ("{} {options}",), 0)[0].text == "Which? "
    braces = replace(sample, candidates=("{}", "{ocr}"))
    assert conversation(braces, ("{} {options}",), 0)[0].text == "Which? (a) {} (b) {ocr}"


def test_letters_go_on_after_z_with_two() -> None:
    assert [letter(place) for place in (0, 25, 26, 51, 52, 701, 702)] == [
        "a",
        "z",
        "aa",
        "az",
        "ba",
        "zz",
        "aaa",
    ]


def test_a_conversation_ends_where_its_last_answer_is_due() -> None:
    talk = [
        Part("user", text="a"),
        Part("assistant", text="b"),
        Part("user", text="c"),
        Part("assistant", text="d"),
    ]
    assert unanswered(talk) == talk[:3] == unanswered(talk[:3])


# --- ScienceQA, A-OKVQA, IconQA --------------------------------------------------------------------------------------


def science(**changes: Any) -> dict[str, Any]:
    given = {
        "question": "What is the capital of Wyoming?", "choices": ["Phoenix", "Cheyenne"], "answer": 1, "hint": "",
        "image": None, "split": "train", "subject": "social science", "topic": "geography", "grade": "grade3",
        "lecture": "A capital is a seat of government.", "solution": "Cheyenne is the capital of Wyoming.",
    }  # fmt: skip
    return given | changes


def ask(folder: Path, rows: Any, name: str = "rows.json", **how: Any) -> dict[str, Sample]:
    folder.mkdir(exist_ok=True)
    (folder / "one.png").write_bytes(PNG)
    (folder / name).write_text(rows if isinstance(rows, str) else json.dumps(rows))
    multiple_choice.run(str(folder / name), str(folder / "made"), max_bad=1, say=quiet, **how)
    return read(folder / "made")


def test_scienceqa_is_read_as_it_is_published(tmp_path: Path) -> None:
    (tmp_path / "train" / "2").mkdir(parents=True)
    (tmp_path / "train" / "2" / "image.png").write_bytes(PNG)
    rows = {
        "1": science(), "2": science(image="image.png", hint="Look at the map.", answer=0), "3": science(split="test")
    }  # fmt: skip
    found = ask(tmp_path, rows, split="train")
    assert set(found) == {"1", "2"}
    assert found["1"].parts == (
        Part("user", text=science()["question"]),
        Part("assistant", text="Cheyenne"),
    )
    assert found["1"].candidates == ("Phoenix", "Cheyenne") and found["1"].images == ()
    assert found["1"].provenance == {
        n: science()[n] for n in ("subject", "topic", "grade", "split")
    }
    assert found["2"].images == (PNG,) and found["2"].parts == (
        Part("user", image=0), Part("user", text="\nLook at the map.\nWhat is the capital of Wyoming?"),
        Part("assistant", text="Phoenix"),
    )  # fmt: skip
    assert set(ask(tmp_path / "all", {"1": science(), "3": science(split="test")})) == {"1", "3"}


def test_with_solutions_the_answer_follows_its_reasons(tmp_path: Path) -> None:
    found = ask(tmp_path, {"1": science(), "2": science(lecture="", solution=None)}, solutions=True)
    assert found["1"].parts[-1].text == (
        "A capital is a seat of government. Cheyenne is the capital of Wyoming. The answer is B."
    )
    assert found["2"].parts[-1].text == "The answer is B."


def test_a_okvqa_names_its_images_by_number(tmp_path: Path) -> None:
    (tmp_path / "000000000299.jpg").write_bytes(PNG)
    row = {"question_id": "22MexNkBPpdZGX6sxbxVBH", "image_id": 299, "question": "What is there?",
           "choices": ["ride", "shade", "ice", "art"], "correct_choice_idx": 3}  # fmt: skip
    found = ask(tmp_path, [row])["22MexNkBPpdZGX6sxbxVBH"]
    assert found.parts[-1].text == "art" and found.images == (PNG,) and len(found.candidates) == 4
    (tmp_path / "lines").mkdir()
    (tmp_path / "lines" / "9.png").write_bytes(PNG)
    text = json.dumps(row | {"image_id": 9}) + "\n"
    assert set(ask(tmp_path / "lines", text, "rows.jsonl", pattern="{}.png")) == {
        "22MexNkBPpdZGX6sxbxVBH"
    }


@pytest.mark.parametrize("answer", [2, "C", "ice", " ice "])
def test_the_right_choice_is_a_number_a_letter_or_its_text(answer: Any, tmp_path: Path) -> None:
    row = {"question": "?", "choices": ["ride", "shade", "ice"], "answer": answer}
    assert ask(tmp_path, [row])["row-00000000"].parts[-1].text == "ice"


BAD_CHOICES = {
    "a": (science(question=" "), Reason.EMPTY_TEXT),
    "b": (science(question=5), Reason.EMPTY_TEXT),
    "c": (science(choices="ab"), Reason.BAD_ROW),
    "d": (science(choices=["one"], answer=0), Reason.BAD_ROW),
    "e": (science(choices=["one", " "], answer=0), Reason.BAD_ROW),
    "f": (science(answer=2), Reason.NO_TARGET),
    "g": (science(answer=-1), Reason.NO_TARGET),
    "h": (science(answer=True), Reason.NO_TARGET),
    "i": (science(answer="Paris"), Reason.NO_TARGET),
    "j": (science(answer=None), Reason.NO_TARGET),
    "k": (science(choices=["<image>", "b"]), Reason.PLACEHOLDERS),
    "l": (science(question="<image>?"), Reason.PLACEHOLDERS),
    "m": (science(image="none.png", split=None), Reason.MISSING_IMAGE),
    "n": (science(image="../one.png", split=None), Reason.OUTSIDE),
    "o": (science(image=7), Reason.BAD_ROW),
    "p": ("text", Reason.BAD_ROW),
    "q": ({"question": "?"}, Reason.BAD_ROW),
    "r": (science(image_id=[]), Reason.BAD_ROW),
}


def test_every_bad_choice_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    found = ask(
        tmp_path, {"good": science(), **{name: row for name, (row, _) in BAD_CHOICES.items()}}
    )
    assert set(found) == {"good"}
    assert reasons(tmp_path / "made") == {name: reason for name, (_, reason) in BAD_CHOICES.items()}


def test_a_split_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row of the split 'val'; it has test, train"):
        ask(tmp_path, {"1": science(), "3": science(split="test")}, split="val")
    with pytest.raises(DataError, match=r"is no list of questions\. Got str; expected a list"):
        ask(tmp_path / "text", '"x"')


# --- Visual Dialog ---------------------------------------------------------------------------------------------------

QUESTIONS = ["what color is it", "is it big", "where is it"]
ANSWERS = ["red", "yes", "no", "on a table"]


def turn(question: Any, answer: Any, right: Any = 0, options: Any = (0, 1, 2)) -> dict[str, Any]:
    chosen = list(options) if isinstance(options, tuple) else options
    return {"question": question, "answer": answer, "answer_options": chosen, "gt_index": right}


def talked(folder: Path, dialogs: Any, **how: Any) -> dict[str, Sample]:
    (folder / "VisualDialog_val2018_000000000009.jpg").write_bytes(PNG)
    data = {"questions": QUESTIONS, "answers": ANSWERS, "dialogs": dialogs}
    (folder / "visdial.json").write_text(json.dumps({"data": data, "split": "val2018"}))
    visdial.run(str(folder / "visdial.json"), str(folder / "made"), max_bad=1, say=quiet, **how)
    return read(folder / "made")


def test_every_round_is_a_question_after_those_before_it(tmp_path: Path) -> None:
    rounds = [turn(0, 0), turn(1, 2, right=2), turn(2, 3, right=1, options=(0, 3))]
    found = talked(tmp_path, [{"image_id": 9, "caption": "a cup", "dialog": rounds}])
    assert list(found) == [f"dialog-000000-{place:02d}" for place in range(3)]
    first, _, last = found.values()
    assert first.parts[1].text == "\nDialog history: a cup.\nQuestion: what color is it?"
    assert last.parts == (
        Part("user", image=0),
        Part(
            "user",
            text="\nDialog history: a cup. what color is it? red. is it big? no.\nQuestion: where is it?",
        ),
        Part("assistant", text="on a table"),
    )
    assert first.candidates == ("red", "yes", "no") and last.candidates == ("red", "on a table")
    assert first.images == (PNG,)


BAD_ROUNDS = {
    "options": (turn(0, 0, options="abc"), Reason.BAD_ROW),
    "unknown answer": (turn(0, 0, options=(0, 9)), Reason.BAD_ROW),
    "unknown question": (turn(7, 0), Reason.BAD_ROW),
    "right": (turn(0, 0, right=3), Reason.NO_TARGET),
    "no number": (turn(0, 0, right=None), Reason.NO_TARGET),
    "true": (turn(0, 0, right=True), Reason.NO_TARGET),
    "no round": ("text", Reason.BAD_ROW),
    "test split": ({"question": 0}, Reason.BAD_ROW),
}


@pytest.mark.parametrize("name", BAD_ROUNDS)
def test_every_bad_round_is_quarantined_with_its_reason(name: str, tmp_path: Path) -> None:
    bad, reason = BAD_ROUNDS[name]
    found = talked(tmp_path, [{"image_id": 9, "caption": "a cup", "dialog": [turn(0, 0), bad]}])
    assert list(found) == ["dialog-000000-00"] and reasons(tmp_path / "made") == {
        "dialog-000000-01": reason
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image_id": 10}, Reason.MISSING_IMAGE),
        ({"caption": None}, Reason.EMPTY_TEXT),
        ({"caption": "<image>"}, Reason.PLACEHOLDERS),
        ({"dialog": "x"}, Reason.BAD_ROW),
    ],
)
def test_every_bad_dialog_is_quarantined_with_its_reason(
    changes: dict[str, Any], reason: Reason, tmp_path: Path
) -> None:
    good = {"image_id": 9, "caption": "a cup", "dialog": [turn(0, 0)]}
    found = talked(tmp_path, [good, good | changes])
    assert list(found) == ["dialog-000000-00"] and reasons(tmp_path / "made") == {
        "dialog-000001-00": reason
    }


def test_a_file_that_is_no_dialogs_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"data": {"questions": [], "answers": []}}')
    with pytest.raises(DataError, match="list 'dialogs'"):
        visdial.run(str(tmp_path / "x.json"), str(tmp_path / "made"), say=quiet)
    with pytest.raises(DataError, match="gives no file for an image_id"):
        visdial.run(str(tmp_path / "x.json"), str(tmp_path / "made"), pattern="one.jpg", say=quiet)
