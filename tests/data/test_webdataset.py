"""webdataset's tars come in: every whole sample of every archive, however broken or hostile the rest of it is."""

import gzip
import io
import json
import tarfile
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import fsspec
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import Say, webdataset
from bridgework.data.importers import webdataset as tars
from bridgework.data.manifest import Manifest
from bridgework.data.quarantine import Reason, records
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from tests.data.tars import HOSTILE, PICTURES, PNG, Member, samples, special, tar


def quiet(_: str) -> None:
    """For importers that are not asked what they say."""


def bring(source: Path | str, dest: Path, *, say: Say = quiet, **options: Any) -> Manifest:
    importer = webdataset.WebDatasetImporter(**{"max_bad": 1.0} | options)
    return importer.run(str(source), str(dest), say=say)


def read(dest: Path) -> dict[str, Sample]:
    assert verify(str(dest)) == []
    return {sample.key: sample for sample in open_dataset(str(dest)).samples()}


def aside(dest: Path) -> dict[str, Reason]:
    return {record.key: record.reason for record in records(f"{dest}.quarantine")}


# --- what is sound ---------------------------------------------------------------------------------------------------


def test_a_sample_is_an_image_with_its_text_label_and_facts(tmp_path: Path) -> None:
    facts = {
        "url": "http://x/y",
        "width": 640,
        "nsfw": False,
        "exif": {"a": 1},
        "long": "x" * 999,
        "none": None,
    }
    (tmp_path / "a.tar").write_bytes(
        tar(
            ("deep/0001.PNG", PNG),
            ("deep/0001.txt", "\ufeffa cat\n".encode()),
            ("deep/0001.json", json.dumps({**facts, "caption": "an unused caption"}).encode()),
            ("deep/0001.cls", b"7\n"),
            ("./0002.webp", PNG),
            ("./0002.json", json.dumps({"caption": "a dog", "text": "x"}).encode()),
            ("0003.jpg", PNG),
            ("0003.json", b'{"text": "a bird"}'),
        )
    )
    manifest = bring(tmp_path / "a.tar", tmp_path / "d", license="CC-BY-4.0")
    found = read(tmp_path / "d")
    assert {key: sample.text for key, sample in found.items()} == {
        "deep/0001": "a cat",
        "0002": "a dog",
        "0003": "a bird",
    }
    assert found["deep/0001"].images == (PNG,) and found["deep/0001"].labels == ("7",)
    assert found["deep/0001"].provenance == {
        "url": "http://x/y",
        "width": "640",
        "nsfw": "False",
        "caption": "an unused caption",
    }
    assert found["0002"].provenance == {"text": "x"}
    assert (manifest.license, manifest.made_by) == (
        "CC-BY-4.0",
        "bridgework.data.importers.webdataset",
    )


def test_an_option_names_the_field_of_the_caption(tmp_path: Path) -> None:
    entry = json.dumps({"caption": "a cat", "long": "a cat that sits"}).encode()
    (tmp_path / "a.tar").write_bytes(
        tar(("1.png", PNG), ("1.txt", b"cat"), ("1.json", entry), *samples(0, 1))
    )
    bring(tmp_path / "a.tar", tmp_path / "d", text="long")
    assert {key: sample.text for key, sample in read(tmp_path / "d").items()} == {
        "1": "a cat that sits"
    }
    assert aside(tmp_path / "d") == {"0000": Reason.EMPTY_TEXT}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_that_webdataset_finds(form: int, tmp_path: Path) -> None:
    folder, names = (
        f"{'folder' * 20}/" if form != tarfile.USTAR_FORMAT else "f/",
        ("a", "b_2", "c-3", "\u00e9t\u00e9", "x y"),
    )
    members: list[Member] = [
        ("__meta__", b"1"),
        ("README", b"x"),
        ("notes.md", b"x"),
        (".hidden", b"x"),
    ]
    for place, name in enumerate(names):
        members += [
            (f"{folder}{name}.PNG", PICTURES[place]),
            (f"{folder}{name}.txt", b"words"),
            (f"{folder}{name}.t.pyd", b"x"),
        ]
    members += [
        ("__x__/1.png", PNG),
        ("d.e/f.png", PNG),
        ("d.e/f.txt", b"dots in a folder"),
        ("d.e/f.g.txt", b""),
    ]
    (tmp_path / "a.tar").write_bytes(tar(*members, form=form))
    bring(tmp_path / "a.tar", tmp_path / "d")
    with (tmp_path / "a.tar").open("rb") as file:
        found = list(group_by_keys(tar_file_expander([{"url": "a.tar", "stream": file}])))
    theirs = {
        sample["__key__"]: (sample["png"], sample["txt"]) for sample in found if "png" in sample
    }
    assert {
        key: (s.images[0], s.text.encode()) for key, s in read(tmp_path / "d").items()
    } == theirs
    assert len(theirs) == 6
    assert aside(tmp_path / "d") == {
        "notes": Reason.MISSING_IMAGE
    }  # webdataset gives it as a sample too


def test_a_sample_without_one_image_and_a_text_is_put_aside(tmp_path: Path) -> None:
    bad: dict[str, tuple[Reason, list[Member]]] = {
        "none": (Reason.MISSING_IMAGE, [("none.txt", b"x")]),
        "two": (Reason.BAD_ROW, [("two.png", PNG), ("two.jpg", PNG), ("two.txt", b"x")]),
        "mute": (Reason.EMPTY_TEXT, [("mute.png", PNG)]),
        "facts": (Reason.EMPTY_TEXT, [("facts.png", PNG), ("facts.json", b'{"width": 3}')]),
        "blank": (Reason.EMPTY_TEXT, [("blank.png", PNG), ("blank.txt", b" \n")]),
        "place": (Reason.PLACEHOLDERS, [("place.png", PNG), ("place.txt", b"an <image>")]),
        "latin": (Reason.BAD_ROW, [("latin.png", PNG), ("latin.txt", b"\xe9t\xe9")]),
        "torn": (Reason.BAD_ROW, [("torn.png", PNG), ("torn.txt", b"x"), ("torn.json", b'{"a":')]),
        "deep": (Reason.BAD_ROW, [("deep.png", PNG), ("deep.json", b"[" * 100_000)]),
        "list": (Reason.BAD_ROW, [("list.png", PNG), ("list.json", b'["a cat"]')]),
        "number": (Reason.BAD_ROW, [("number.png", PNG), ("number.json", b'{"caption": 3}')]),
        "half": (Reason.BAD_ROW, [("half.png", PNG), ("half.json", b'{"caption": "\\ud800"}')]),
        "again": (
            Reason.DUPLICATE_KEY,
            [("again.png", PNG), ("again.png", PNG), ("again.txt", b"x")],
        ),
        "page": (Reason.NOT_AN_IMAGE, [("page.png", b"<html>"), ("page.txt", b"x")]),
        "empty": (Reason.EMPTY_FILE, [("empty.png", b""), ("empty.txt", b"x")]),
        "odd": (
            Reason.BAD_ROW,
            [("odd.png", PNG), ("odd.json", b'{"key": 1, "images": ["png"], "parts": [3]}')],
        ),
        "gone": (
            Reason.MISSING_IMAGE,
            [("gone.json", b'{"key": "a", "images": [[], "png"], "parts": []}')],
        ),
    }
    members = [member for _, flawed in bad.values() for member in flawed]
    (tmp_path / "a.tar").write_bytes(tar(*members, *samples(0, 1)))
    manifest = bring(tmp_path / "a.tar", tmp_path / "d")
    assert aside(tmp_path / "d") == {key: reason for key, (reason, _) in bad.items()}
    assert list(read(tmp_path / "d")) == ["0000"]
    assert manifest.rows + sum(manifest.quarantined.values()) == 1 + len(bad)


def test_a_list_of_captions_is_one_row_of_several_texts(tmp_path: Path) -> None:
    entry = {"caption": ["a cat", "a pet", "a cat"], "id": 4}
    blank = {"caption": ["a cat", " "]}
    members = [("0.png", PNG), ("0.json", json.dumps(entry).encode())]
    members += [("1.png", PNG), ("1.json", json.dumps(blank).encode())]
    (tmp_path / "a.tar").write_bytes(tar(*members))
    bring(tmp_path / "a.tar", tmp_path / "d")
    found = read(tmp_path / "d")
    assert [part.text for part in found["0"].parts] == [None, "a cat", "a pet"]
    assert found["0"].provenance == {"id": "4", "dropped.captions": "1"}
    assert aside(tmp_path / "d") == {"1": Reason.EMPTY_TEXT}


def test_names_of_any_system_are_keys_and_jpegs_have_all_their_endings(tmp_path: Path) -> None:
    names = ("at 4\u202fPM", "12:30 x", "v\u00a01", "\U0001f468\u200d\U0001f469")
    members = [(f"{n}.{e}", d) for n in names for e, d in (("jfif", PNG), ("txt", b"a cat"))]
    members += [(unicodedata.normalize("NFD", "caf\u00e9.jpe"), PNG), ("caf\u00e9.txt", b"a cafe")]
    (tmp_path / "a.tar").write_bytes(tar(*members, form=tarfile.PAX_FORMAT))
    bring(tmp_path / "a.tar", tmp_path / "d")
    assert [unicodedata.normalize("NFC", key) for key in read(tmp_path / "d")] == [
        *names,
        "caf\u00e9",
    ]
    assert aside(tmp_path / "d") == {}


def test_tars_of_a_folder_that_are_hidden_or_compressed_are_no_rows(tmp_path: Path) -> None:
    source, said = tmp_path / "s", list[str]()
    for name in ("a.tar", "._a.tar", "__MACOSX/._a.tar", ".x/b.tar", "b.tar.gz", "c.tgz"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(tar(*samples(0, 2)) if name == "a.tar" else b"x")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "d.tar").write_bytes(tar(*samples(2, 2)))
    (source / "linked").symlink_to(tmp_path / "disk")
    made = bring(source, tmp_path / "d", max_bad=0.005, say=said.append)
    assert len(read(tmp_path / "d")) == 4
    assert made.left_out == {"compressed tars, which must be unpacked": 2}
    assert "left out: 2 compressed tars" in said[-1]
    (source / "a.tar").unlink()
    (source / "linked").unlink()
    with pytest.raises(DataError, match="there are 2 compressed tars, which must be unpacked"):
        bring(source, tmp_path / "e")


def test_pickles_and_other_members_are_never_read_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(
        tar(
            ("0.pyd", b"x"),
            *samples(0, 2),
            ("0001.pkl", b"x"),
            ("0001.npy", b"x"),
            ("a.!", b""),
            (".png", PNG),
        )
    )
    manifest = bring(tmp_path / "a.tar", tmp_path / "d")
    assert (
        manifest.parameters["ignored"] == {"": 2, "npy": 1, "pkl": 1, "pyd": 1}
        and manifest.rows == 2
    )


# --- many tars -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number:03d}.tar").write_bytes(tar(*samples(4 * number, 4)))
    (folder / "notes.txt").write_text("x")
    return folder


@pytest.mark.parametrize(
    "source", ["shards", "shards/", "shards/*.tar", "shards/{000..002}.tar", "shards/00[0-2].tar"]
)
def test_tars_are_given_as_a_folder_or_a_pattern(source: str, shards: Path, tmp_path: Path) -> None:
    manifest = bring(f"{tmp_path}/{source}", tmp_path / "d")
    keys = [f"{number:03d}/{row:04d}" for number in range(3) for row in range(4)]
    assert list(read(tmp_path / "d")) == keys and manifest.parameters["prefixed"] is True
    assert [sample.text for sample in read(tmp_path / "d").values()] == [
        f"caption {row}" for row in range(12)
    ]


def test_keys_that_differ_need_no_tar_in_front_and_the_order_is_the_one_given(
    shards: Path, tmp_path: Path
) -> None:
    (shards / "b").mkdir()
    (shards / "b" / "x.tar").write_bytes(tar(("other.png", PNG), ("other.txt", b"x")))
    manifest = bring(f"{shards}/{{b/x,001}}.tar", tmp_path / "d")
    assert list(read(tmp_path / "d")) == ["other", "0000", "0001", "0002", "0003"]
    assert manifest.parameters["prefixed"] is False


def test_tars_of_one_name_in_two_folders_are_told_apart(shards: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "0.tar").write_bytes(tar(*samples(0, 1)))
    bring(tmp_path / "s", tmp_path / "d")
    assert list(read(tmp_path / "d")) == ["a/0/0000", "b/0/0000"]


def test_tars_may_lie_in_a_store(shards: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    for path in shards.glob("*.tar"):
        fs.pipe_file(f"/{tmp_path.name}/{path.name}", path.read_bytes())
    bring(f"memory://{tmp_path.name}/{{000..002}}.tar", tmp_path / "d")
    bring(shards, tmp_path / "e")
    assert read(tmp_path / "d") == read(tmp_path / "e")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("shards/{000..003}.tar", "there is no tar .*003.tar"),
        ("shards/x*.tar", "names no .tar"),
        ("nowhere", "there is no tar .*nowhere"),
        ("shards/{000.tar", "write e.g."),
        (
            "shards/{0..99999999999999999999}.tar",
            "names more than 1,000,000 tars; import them in parts",
        ),
        ("shards/{0..9999}{0..9999..3}.tar", "names more than 1,000,000 tars"),
        ("shards/" + "{a,b}" * 40 + ".tar", "names more than 1,000,000 tars"),
    ],
)
def test_tars_that_are_not_there_are_an_error(
    source: str, words: str, shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=words):
        bring(f"{tmp_path}/{source}", tmp_path / "d")


def test_the_same_tars_again_are_nothing_to_do_and_others_are_an_error(
    shards: Path, tmp_path: Path
) -> None:
    first = bring(shards, tmp_path / "d")
    assert bring(shards, tmp_path / "d") == first
    later = tarfile.TarInfo("0000.png")
    later.size, later.mtime = len(PICTURES[4]), 1
    changed = tar((later, PICTURES[4]), *samples(4, 4)[1:])
    assert len(changed) == len((shards / "001.tar").read_bytes())
    (shards / "001.tar").write_bytes(changed)
    with pytest.raises(DataError, match=r"another dataset\. Got sha256"):
        bring(shards, tmp_path / "d")


# --- what is broken --------------------------------------------------------------------------------------------------


def test_wherever_a_tar_is_cut_every_whole_sample_comes_out_and_the_cut_is_one_row(
    tmp_path: Path,
) -> None:
    members = samples(0, 6)
    whole, end = tar(*members), len(tar(*members, end=False))
    (tmp_path / "b.tar").write_bytes(tar(("other.png", PNG), ("other.txt", b"x")))
    for cut in range(1, end + 1, 331):
        (tmp_path / "a.tar").write_bytes(whole[:cut])
        manifest = bring(tmp_path / "{a,b}.tar", tmp_path / f"d{cut}")
        complete = [f"{row:04d}" for row in range(6) if _behind(members, row) <= cut]
        assert list(read(tmp_path / f"d{cut}")) == [*complete, "other"], cut
        assert manifest.quarantined == {"truncated" if cut >= 512 else "corrupt": 1}, cut


def _behind(members: list[Member], row: int) -> int:
    """The byte behind the last one of a sample."""
    return len(tar(*members[: 2 * row + 1], end=False)) + 512 + len(members[2 * row + 1][1])


@pytest.mark.parametrize(
    ("data", "reason", "words"),
    [
        (
            b"<html><body>404</body></html>" * 99,
            Reason.CORRUPT,
            "not a tar from byte 0 on, which begins b'<html><body>'",
        ),
        (b"", Reason.EMPTY_FILE, "0 bytes"),
        (gzip.compress(tar(*samples(0, 3))), Reason.CORRUPT, "compressed by gzip"),
        (PNG, Reason.CORRUPT, "not a tar from byte 0"),
    ],
    ids=["HTML", "0 bytes", "gzip", "PNG"],
)
def test_what_is_no_tar_is_an_error_alone_and_one_row_among_others(
    data: bytes, reason: Reason, words: str, shards: Path, tmp_path: Path
) -> None:
    (shards / "001.tar").write_bytes(data)
    with pytest.raises(DataError, match=rf"001\.tar.*{words}"):
        bring(shards / "001.tar", tmp_path / "d")
    manifest = bring(shards, tmp_path / "d")
    assert manifest.rows == 8 and aside(tmp_path / "d") == {"001": reason}
    with pytest.raises(DataError, match="1 of 9 rows are bad"):
        bring(shards, tmp_path / "e", max_bad=0.1)


def test_a_cut_behind_a_sample_that_is_bad_anyway_is_told_too(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*samples(0, 1), ("../x.png", PNG), end=False))
    bring(tmp_path / "a.tar", tmp_path / "d")
    assert (
        aside(tmp_path / "d") == {"../x": Reason.OUTSIDE, "a": Reason.TRUNCATED}
        and len(read(tmp_path / "d")) == 1
    )


def test_a_header_that_was_changed_loses_no_sample_before_it_in_silence(tmp_path: Path) -> None:
    members = samples(0, 4)
    data = bytearray(tar(*members))
    data[len(tar(*members[:4], end=False)) + 100] ^= 1  # in the header of sample 2
    (tmp_path / "a.tar").write_bytes(data)
    bring(tmp_path / "a.tar", tmp_path / "d")
    assert list(read(tmp_path / "d")) == ["0000", "0001"] and aside(tmp_path / "d") == {
        "a": Reason.CORRUPT
    }


def test_two_tars_in_one_file_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar(*samples(0, 2)) + tar(*samples(2, 2)))
    bring(tmp_path / "a.tar", tmp_path / "d")
    assert len(read(tmp_path / "d")) == 2 and aside(tmp_path / "d") == {"a": Reason.CORRUPT}


# --- what is made to harm --------------------------------------------------------------------------------------------


def test_members_made_to_harm_are_rows_with_a_reason_and_nothing_is_written_beside_the_dataset(
    tmp_path: Path,
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    hostile = [member for _, members in HOSTILE.values() for member in members]
    (work / "a.tar").write_bytes(
        tar(
            ("good.png", PNG),
            ("good.txt", b"good"),
            *hostile,
            *samples(0, 2),
            form=tarfile.PAX_FORMAT,
        )
    )
    bring(work / "a.tar", work / "d")
    found = aside(work / "d")
    assert found == {
        key if key != "renamed" else "../renamed": reason for key, (reason, _) in HOSTILE.items()
    }
    assert list(read(work / "d")) == ["good", "0000", "0001"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["work", "a.tar", "d", "d.quarantine", "manifest.json", "shard-00000.parquet"]
        + [path.name for path in (work / "d.quarantine").iterdir()]
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"size": 8**11 - 1},
        {"size": 2**60},
        {"size": 2**85},
        {"size": -512},
        {"pax_headers": {"size": "-1024"}},
        {"pax_headers": {"size": str(2**70)}},
        {
            "pax_headers": {
                "GNU.sparse.major": "1",
                "GNU.sparse.minor": "0",
                "GNU.sparse.name": "x.png",
            }
        },
        {"pax_headers": {"GNU.sparse.map": "0,99999999999999,1", "GNU.sparse.size": "1"}},
    ],
    ids=str,
)
def test_a_size_that_is_a_lie_ends_the_tar_with_a_reason(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    form = tarfile.PAX_FORMAT if "pax_headers" in fields else tarfile.GNU_FORMAT
    members = [*samples(0, 2), special("lie.png", tarfile.REGTYPE, **fields), *samples(2, 1)]
    (tmp_path / "a.tar").write_bytes(tar(*members, form=form))
    bring(tmp_path / "a.tar", tmp_path / "d")
    assert list(read(tmp_path / "d"))[:2] == ["0000", "0001"] and len(aside(tmp_path / "d")) >= 1


def test_a_json_nested_too_deep_is_put_aside_and_the_others_stay(tmp_path: Path) -> None:
    deep = b'{"caption": "x", "more": ' + b"[" * 400 + b"]" * 400 + b"}"
    (tmp_path / "a.tar").write_bytes(tar(*samples(0, 2), ("deep.png", PNG), ("deep.json", deep)))
    bring(tmp_path / "a.tar", tmp_path / "d")
    assert list(read(tmp_path / "d")) == ["0000", "0001"] and aside(tmp_path / "d") == {
        "deep": Reason.BAD_ROW
    }


def test_headers_without_end_take_no_memory(tmp_path: Path) -> None:
    huge = special("x", b"x", size=64 << 20)[0]
    assert isinstance(huge, tarfile.TarInfo)
    long = huge.tobuf(format=tarfile.GNU_FORMAT) + b"\0" * (64 << 20)
    nested = special("x", b"x", size=0)[0].tobuf(format=tarfile.GNU_FORMAT) * 50_000
    for name, data in (("long", long), ("nested", nested)):
        (tmp_path / f"{name}.tar").write_bytes(tar(*samples(0, 1), end=False) + data)
        tracemalloc.start()
        bring(tmp_path / f"{name}.tar", tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
        tracemalloc.stop()
        assert list(aside(tmp_path / name).values()) == [Reason.CORRUPT]


def test_a_tar_of_very_many_members_is_read_in_constant_memory() -> None:
    rows = 5_000
    block = tar(("x.png", b""), end=False)
    file = io.BytesIO(block * rows + b"\0" * 1024)
    tracemalloc.start()
    assert sum(1 for _ in tars.members(file, len(file.getbuffer()))) == rows
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


def test_a_pattern_counts_no_row_twice(shards: Path, tmp_path: Path) -> None:
    manifest = bring(f"{shards}/{{*,000}}.tar", tmp_path / "d")
    assert manifest.rows == 12 and manifest.quarantined == {}
