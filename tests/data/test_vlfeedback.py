"""VLFeedback becomes pairs of a better and a worse answer."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bridgework.data.dataset import open_dataset
from bridgework.data.importers import Say, vlfeedback
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Part, Sample
from bridgework.data.synthetic import shapes

PNG = next(shapes(1, size=16)).images[0]


def answer(text: str, *ratings: object) -> dict[str, Any]:
    return {
        "response": text,
        "annotations": {
            aspect: {"Rating": str(r)} for aspect, r in zip(vlfeedback.ASPECTS, ratings, strict=False)
        },
    }  # fmt: skip


def question(key: str, *answers: dict[str, Any], image: str = "a.png") -> dict[str, Any]:
    return {"id": key, "prompt": "What is it?", "image": image, "completions": list(answers)}


def quiet(_: str) -> None:
    """For importers whose reports are not read."""


def read(tmp_path: Path, rows: list[Any], *, say: Say = quiet, **how: Any) -> dict[str, Sample]:
    (tmp_path / "a.png").write_bytes(PNG)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    dest = str(tmp_path / "kept")
    vlfeedback.VLFeedbackImporter(**how).run(str(tmp_path / "rows.jsonl"), dest, say=say)
    return {sample.key: sample for sample in open_dataset(dest).samples()}


def test_the_best_mean_is_chosen_and_the_worst_rejected(tmp_path: Path) -> None:
    rows = [
        question("q", answer("middle", 3, 3, 3), answer("best", 5, 3, 5), answer("worst", 1, 5, 1))
    ]
    sample = read(tmp_path, rows)["q"]
    assert sample.parts == (
        Part("user", image=0), Part("user", text="\nWhat is it?"), Part("assistant", text="best"),
    )  # fmt: skip
    assert sample.rejected == "worst" and sample.images == (PNG,)


def test_a_line_ends_where_json_lines_do(tmp_path: Path) -> None:
    said = "one\u2028two\x85three\x0cfour"
    sample = read(tmp_path, [question("q", answer(said, 5, 5, 5), answer("worst", 1, 1, 1))])["q"]
    assert sample.parts[-1].text == said


def test_ties_are_left_out_and_said_and_answers_without_a_rating_do_not_count(
    tmp_path: Path,
) -> None:
    said = list[str]()
    rows = [
        question("tie", answer("a", 3, 3, 3), answer("b", 3, 3, 3)),
        question("unrated", answer("a", 3, 3, 3), answer("b", 1, 1, 1), answer("c", 5, 5, "N/A")),
    ]
    kept = read(tmp_path, rows, say=said.append)
    assert set(kept) == {"unrated"} and kept["unrated"].parts[-1].text == "a"
    assert "1 questions with equally rated answers" in said[-1]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{", Reason.BAD_ROW),
        ([], Reason.BAD_ROW),
        (question("x", answer("alone", 3, 3, 3)), Reason.BAD_ROW),
        (question("x", answer("<image>", 3, 3, 3), answer("b", 1, 1, 1)), Reason.PLACEHOLDERS),
        (
            question("x", answer("a", 3, 3, 3), answer("b", 1, 1, 1), image="no.png"),
            Reason.MISSING_IMAGE,
        ),
    ],
)
def test_bad_rows_are_put_aside_with_their_reason(tmp_path: Path, row: Any, reason: Reason) -> None:
    good = question("good", answer("a", 3, 3, 3), answer("b", 1, 1, 1))
    assert set(read(tmp_path, [good, row], max_bad=1)) == {"good"}
    assert [record.reason for record in records(f"{tmp_path}/kept.quarantine")] == [reason]


def test_the_picture_is_found_where_the_published_rows_have_it(tmp_path: Path) -> None:
    rated = [answer("best", 5, 5, 5), answer("worst", 1, 1, 1)]
    rows = [
        {"id": "path", "prompt": "What?", "completions": rated, "img_path": "a.png"},
        {"id": "null", "prompt": "What?", "completions": rated, "image": None, "img_path": "a.png"},
        {"id": "list", "prompt": "What?", "completions": rated, "image": [], "images": ["a.png"]},
        {"id": "text", "prompt": "What?", "completions": rated},
        {"id": "gone", "prompt": "What?", "completions": rated, "image_id": 4},
    ]
    found = read(tmp_path, rows, max_bad=1)
    assert {key: len(s.images) for key, s in found.items()} == {
        "path": 1,
        "null": 1,
        "list": 1,
        "text": 0,
    }


def test_every_question_of_one_id_has_a_key(tmp_path: Path) -> None:
    rated = [answer("best", 5, 5, 5), answer("worst", 1, 1, 1)]
    keys = ["llava-1", "llava-1", 0, "", None, "llava-1", 7.5]
    rows = [question("x", *rated) | {"id": key, "prompt": f"{n}?"} for n, key in enumerate(keys)]
    assert list(read(tmp_path, rows)) == [
        *("llava-1", "llava-1#2", "0", "row-00000003", "row-00000004", "llava-1#3"),
        "row-00000006",
    ]


@pytest.mark.parametrize("form", ["list of objects", "object of lists"])
def test_parquet_is_read_in_both_forms_of_its_answers(form: str, tmp_path: Path) -> None:
    answers = [answer("best", 5, 5, 5), answer("no", "N/A", 5, 5), answer("worst", 1, 1, 1)]
    given: Any = answers
    if form == "object of lists":
        notes = {
            aspect: {"Rating": [a["annotations"][aspect]["Rating"] for a in answers]}
            for aspect in vlfeedback.ASPECTS
        }
        given = {"annotations": notes, "response": [a["response"] for a in answers]}
    table = {
        "id": ["a"],
        "prompt": ["What is it?"],
        "completions": [given],
        "image": [{"bytes": PNG, "path": "a.png"}],
    }
    pq.write_table(pa.table(table), tmp_path / "train.parquet")
    dest = str(tmp_path / "made")
    vlfeedback.VLFeedbackImporter().run(str(tmp_path / "train.parquet"), dest, say=quiet)
    (sample,) = open_dataset(dest).samples()
    assert (sample.parts[-1].text, sample.rejected, sample.images) == ("best", "worst", (PNG,))
