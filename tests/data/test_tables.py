"""Tables of captions: a row a record, however long and however quoted; what does not pair is told by its place."""

import csv
import json
from pathlib import Path

import pytest

from bridgework.data.dataset import open_dataset
from bridgework.data.importers import folder, llava_json, tables
from bridgework.data.quarantine import BadSample, Reason, Record, records
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError

PNG = next(shapes(1, size=16)).images[0]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "src" / name).write_bytes(PNG)
    return tmp_path / "src"


def read(pictures: Path, table: str) -> tuple[list[str], list[Record]]:
    """The captions that came out, and what was put aside."""
    dest = str(pictures.parent / table)
    folder.FolderImporter(table=table, max_bad=1).run(str(pictures), dest, say=lambda _: None)
    return [sample.text for sample in open_dataset(dest).samples()], list(
        records(f"{dest}.quarantine")
    )


def refused(pictures: Path, table: str, words: str, **columns: str) -> None:
    with pytest.raises(DataError, match=words):
        folder.FolderImporter(table=table, **columns).run(
            str(pictures), str(pictures.parent / "none"), say=lambda _: None
        )


def test_a_line_of_more_or_fewer_fields_than_the_header_is_put_aside(pictures: Path) -> None:
    (pictures / "t.csv").write_text(
        "image,caption\n\na.png,a cat, a dog, and a bird\nb.png\na.png,a cat\n"
    )
    (pictures / "t.tsv").write_text(
        "image\tcaption\n\na.png\ta cat\ta dog\tand a bird\nb.png\na.png\ta cat\n"
    )
    for table, remedy in (("t.csv", "holds commas"), ("t.tsv", "holds tabs")):
        texts, (more, fewer) = read(pictures, table)
        assert texts == ["a cat"]
        assert (more.row, more.key, more.reason) == (0, "row-00000000", Reason.BAD_ROW)
        assert (fewer.row, fewer.key, fewer.reason) == (1, "row-00000001", Reason.BAD_ROW)
        assert (
            "4 fields, and the header names 2 columns" in more.detail
            and "needs quotes" in more.detail
        )
        assert "1 fields, and the header names 2 columns" in fewer.detail
        assert all(remedy in record.detail for record in (more, fewer))


@pytest.mark.parametrize("table", ["t.csv", "t.tsv", "t.jsonl"])
def test_a_caption_may_be_as_long_in_any_table(table: str, pictures: Path) -> None:
    long = "x" * 500_000
    with (pictures / table).open("w", newline="") as file:
        if table.endswith("sv"):
            delimiter = "\t" if table.endswith(".tsv") else ","
            csv.writer(file, delimiter=delimiter).writerows(
                [("image", "caption"), ("a.png", long + '"')]
            )
        else:
            json.dump({"image": "a.png", "caption": long + '"'}, file)
    assert read(pictures, table) == ([long + '"'], [])


@pytest.mark.parametrize(
    "rest",
    [
        'b.png,"a dog\na.png,a bird\n',
        'b.png,"a dog\na.png,"a bird"\n',
        'b.png,"a dog" barks\n',
        'b.png,"a dog\n' + "a.png,a bird\n" * 100_000,
    ],
    ids=["to the end", "into another", "inside", "for megabytes"],
)
def test_a_quote_that_is_not_closed_is_an_error_that_says_where_it_began(
    rest: str, pictures: Path
) -> None:
    (pictures / "t.csv").write_text(f'image,caption\n\na.png,"a cat\non ""two"" lines"\n{rest}')
    refused(
        pictures,
        "t.csv",
        r"t\.csv: the row that begins in line 5 opens a quote.*close it, and write a quote",
    )


def test_quotes_of_a_tsv_are_those_of_a_whole_field_or_text(pictures: Path) -> None:
    written = {
        '"He said ""hi"""': 'He said "hi"',
        '"a tab\there"': "a tab\there",
        '5" wide': '5" wide',
        '"unclosed': '"unclosed',
        '"the" end': '"the" end',
        'the "end"': 'the "end"',
        '"odd """" quotes': '"odd """" quotes',
        '"three"""': 'three"',
        '"three""': '"three""',
        "a\u2028line's end": "a\u2028line's end",
    }
    with (pictures / "t.tsv").open("w", newline="") as file:
        file.write('"image"\tcaption\r\n' + "".join(f"a.png\t{text}\r\n" for text in written))
    assert read(pictures, "t.tsv") == (list(written.values()), [])


def test_no_record_of_a_tsv_runs_into_the_next(pictures: Path) -> None:
    lines = ['a.png\t"two', "b.png\ta cat", 'a.png\t"three" dogs', '""\t""', "b.png\ta dog"]
    (pictures / "t.tsv").write_text("\n".join(["image\tcaption", *lines]))
    texts, bad = read(pictures, "t.tsv")
    assert texts == ['"two', "a cat", '"three" dogs', "a dog"]
    assert [(record.row, record.reason) for record in bad] == [(3, Reason.BAD_ROW)]


def test_lines_of_a_tsv_that_may_be_one_row_or_two_are_put_aside_whole(pictures: Path) -> None:
    lines = ["a cat\ta.png", '"a tab\tand', 'a line"\tb.png', "a dog\tb.png"]
    (pictures / "t.tsv").write_text("\n".join(["caption\timage", *lines]))
    texts, (bad,) = read(pictures, "t.tsv")
    assert texts == ["a cat", "a dog"]
    assert "two lines may be a row each, or one row with a line break in quotes" in bad.detail


WHOLE = (
    *("two\nlines", "three\n\nlines", 'a "big"\ncat', "a tab\tand one line", "a return\rin it"),
    *("two\rreturns\rin it", "ends with one\r", "both\r\nkinds", "\rbegins with one"),
)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("order", [("image", "caption"), ("caption", "image")])
@pytest.mark.parametrize("table", ["t.csv", "t.tsv"])
def test_a_caption_with_ends_of_lines_is_whole(
    table: str, order: tuple[str, str], end: str, pictures: Path
) -> None:
    rows = [{"image": "a.png", "caption": text} for text in (*WHOLE, "a cat")]
    with (pictures / table).open("w", newline="") as file:
        mark = "\t" if table == "t.tsv" else ","
        writer = csv.DictWriter(file, order, delimiter=mark, lineterminator=end)
        writer.writeheader()
        writer.writerows(rows)
    texts, bad = read(pictures, table)
    as_it_is = [text.strip().replace("\r\n", "\n") for text in (*WHOLE, "a cat")]
    assert [text.replace("\r\n", "\n") for text in texts] == as_it_is and not bad


@pytest.mark.parametrize("order", [("image", "caption"), ("caption", "image")])
@pytest.mark.parametrize("table", ["t.csv", "t.tsv"])
def test_a_caption_with_a_bare_carriage_return_is_never_cut(
    table: str, order: tuple[str, str], pictures: Path
) -> None:
    mark = "\t" if table == "t.tsv" else ","
    rows = [
        {"image": "a.png", "caption": f"number {n}" + "\rhalf" * (n % 4 == 0)} for n in range(9)
    ]
    lines = [mark.join(order), *(mark.join(row[name] for name in order) for row in rows)]
    (pictures / table).write_bytes("\n".join(lines).encode())
    assert read(pictures, table) == ([row["caption"] for row in rows], [])


@pytest.mark.parametrize("table", ["t.csv", "t.tsv"])
def test_lines_may_end_with_a_carriage_return_as_on_old_systems(table: str, pictures: Path) -> None:
    mark = "\t" if table == "t.tsv" else ","
    lines = [f"image{mark}caption", f"a.png{mark}a cat", f"b.png{mark}a dog"]
    (pictures / table).write_bytes("\r".join(lines).encode())
    assert read(pictures, table) == (["a cat", "a dog"], [])
    (pictures / f"mixed-{table}").write_bytes(("\r".join(lines) + "\r\n" + lines[1]).encode())
    texts, bad = read(pictures, f"mixed-{table}")
    assert texts == ["a cat", "a dog"] and not bad  # the last row repeats the first


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_json_lines_may_end_as_on_any_system(end: str, pictures: Path) -> None:
    rows = [{"image": "a.png", "caption": text} for text in ("a\u2028cat", "a\rdog")]
    (pictures / "t.jsonl").write_bytes(end.join(map(json.dumps, rows)).encode())
    assert read(pictures, "t.jsonl") == (["a\u2028cat", "a\rdog"], [])


@pytest.mark.parametrize("table", ["t.csv", "t.tsv"])
def test_two_columns_of_one_name_are_refused_if_one_is_read(table: str, pictures: Path) -> None:
    mark = "\t" if table == "t.tsv" else ","
    for head in (("image", "caption", "caption"), ("image", "image", "caption")):
        name = head[1] if head[1] == head[0] else head[2]
        (pictures / table).write_text("\n".join(map(mark.join, (head, ("a.png", "x", "y")))))
        refused(pictures, table, f"{table} has two columns named {name!r}. Fix: rename one")
    for head in (("image", "caption", "tag", "tag"), ("image", "caption", "", "")):
        (pictures / f"ok-{head[2]}{table}").write_text(
            "\n".join(map(mark.join, (head, ("a.png", "a cat", "x", "y"))))
        )
        assert read(pictures, f"ok-{head[2]}{table}") == (["a cat"], [])


@pytest.mark.parametrize("table", ["t.json", "t.jsonl"])
def test_a_row_with_two_fields_of_one_name_is_put_aside(table: str, pictures: Path) -> None:
    good = '{"image": "a.png", "caption": "a cat"}'
    rows = [good, '{"image": "b.png", "caption": "first", "caption": "second"}']
    text = "\n".join(rows) if table == "t.jsonl" else f"[{','.join(rows)}]"
    (pictures / table).write_text(text)
    texts, (bad,) = read(pictures, table)
    assert texts == ["a cat"] and "two fields 'caption'" in bad.detail


@pytest.mark.parametrize("table", ["t.csv", "t.tsv", "t.json", "t.jsonl"])
def test_a_column_that_is_not_there_is_an_error_that_names_those_that_are(
    table: str, pictures: Path
) -> None:
    row, mark = {"photo": "a.png", "title": "a cat"}, "\t" if table.endswith(".tsv") else ","
    sheet = "".join(mark.join(line) + "\n" for line in (row, row.values()))
    (pictures / table).write_text(
        sheet if table.endswith("sv") else json.dumps([row] if table == "t.json" else row)
    )
    refused(
        pictures,
        table,
        rf"image='foto' names no column of {table}; did you mean 'photo'\?",
        image="foto",
    )
    refused(
        pictures,
        table,
        rf"text='caption' names no column of {table}; known: photo, title",
        image="photo",
    )


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


DEPTHS = (
    100,
    500,
    *range(800, 1_000, 7),
)  # at some of the last ones the parser may or may not reach its own limit


def test_a_line_nested_too_deep_is_put_aside_and_the_others_stay(pictures: Path) -> None:
    given = (("a cat", 99), *(("deep", depth) for depth in DEPTHS), ("a dog", 99))
    rows = [
        f'{{"image": "a.png", "caption": "{text}", "more": {nested(depth)}}}'
        for text, depth in given
    ]
    (pictures / "t.jsonl").write_text("\n".join([*rows, *map(nested, DEPTHS[1:])]))
    texts, bad = read(pictures, "t.jsonl")
    assert texts == ["a cat", "a dog"] and len(bad) == 2 * len(DEPTHS) - 1
    assert {record.reason for record in bad} == {Reason.BAD_ROW}
    assert "the row is nested deeper than the 100 lists and objects that are read" in bad[0].detail


@pytest.mark.parametrize("depth", [100, 500, 850])
def test_an_item_of_a_list_nested_too_deep_is_put_aside(depth: int, pictures: Path) -> None:
    rows = [
        {"image": "a.png", "caption": "a cat", "more": json.loads(nested(at))} for at in (99, depth)
    ]
    (pictures / "t.json").write_text(json.dumps([*rows, json.loads(nested(depth + 1))]))
    texts, bad = read(pictures, "t.json")
    assert texts == ["a cat"] and [record.key for record in bad] == ["row-00000001", "row-00000002"]
    assert all("nested deeper than the 100 lists" in record.detail for record in bad)


def test_a_conversation_nested_too_deep_is_put_aside(tmp_path: Path) -> None:
    talk = '[{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]'
    rows = [
        f'{{"id": "{key}", "conversations": {talk}, "more": {nested(depth)}}}'
        for key, depth in (("a", 1), *(("deep", depth) for depth in DEPTHS), ("c", 1))
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    llava_json.LlavaJsonImporter(max_bad=1).run(
        str(tmp_path / "t.jsonl"), str(tmp_path / "made"), say=lambda _: None
    )
    assert [sample.key for sample in open_dataset(str(tmp_path / "made")).samples()] == ["a", "c"]
    assert {record.reason for record in records(str(tmp_path / "made.quarantine"))} == {
        Reason.BAD_ROW
    }


def test_what_a_json_object_lists_is_put_aside_when_nested_too_deep() -> None:
    whole = tables.document(
        f'{{"rows": [{{"a": {nested(100)}}}, {{"a": {nested(99)}}}]}}', "x.json"
    )
    deep, good = tables.listed(whole, "rows", "x.json")
    assert (
        isinstance(deep, BadSample) and deep.reason is Reason.BAD_ROW and good == whole["rows"][1]
    )
