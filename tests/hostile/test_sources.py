"""Whatever a source holds: rows in are rows out and rows put aside, and nothing else is written, fetched or run."""

import csv
import io
import pickle
import socket
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bridgework.data.dataset import open_dataset, verify
from bridgework.data.importers import load
from bridgework.data.quarantine import records
from bridgework.data.samples import Sample
from bridgework.errors import DataError
from tests.hostile import sources


class Place:
    """A folder `source` beside a secret, and an importer that may write the dataset `out` and no other file."""

    def __init__(self, root: Path) -> None:
        self.root, self.source, self.tries = root, root / "source", 0
        self.source.mkdir()
        self.secret = sources.pictures(9)[-1]
        (root / sources.SECRET).write_bytes(self.secret)
        (self.source / "link.png").symlink_to(root / sources.SECRET)

    @property
    def dest(self) -> Path:
        """Of the last try."""
        return self.root / f"out{self.tries}"

    def run(self, name: str, source: Path | str, **options: Any) -> int:
        """Rows out, quarantined and repeated, which are all sound and all on record; or DataError."""
        self.tries += 1
        dest, before = self.dest, self._files()
        aside = f"{dest.name}.quarantine"
        try:
            manifest = load(name)(max_bad=1.0, **options).run(
                str(source), str(dest), say=lambda text: None
            )
        except DataError as error:
            assert "\n" not in str(error) and len(str(error)) < 2_000, str(error)[:200]
            assert self._files() - before <= {aside}
            raise
        assert self._files() - before <= {dest.name, aside}
        assert verify(str(dest)) == []
        bad = list(records(str(self.root / aside)))
        assert sum(manifest.quarantined.values()) == len(bad)
        assert all(len(record.detail) <= 1_000 for record in bad)
        assert not any(self.secret in sample.images for sample in self.rows())
        repeated = manifest.left_out.get("captions that their picture has already", 0)
        return manifest.rows + len(bad) + repeated

    def rows(self) -> list[Sample]:
        """Of the last try."""
        return list(open_dataset(str(self.dest)).samples())

    def _files(self) -> set[str]:
        """All that lies in the folder; what lies in a dataset, as one."""
        found = (*self.root.iterdir(), *self.source.rglob("*"))
        return {path.relative_to(self.root).as_posix() for path in found}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


# --- JSON ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", sources.ROWS, ids=lambda kind: f"{kind.format}-{kind.file}-{min(kind.row)}"
)
def test_every_row_with_a_wrong_value_is_read_or_put_aside(
    kind: sources.Rows, place: Place
) -> None:
    rows = [kind.row, *sources.mutants(kind.row)]
    (place.source / "a.gif").write_bytes(sources.animation())
    found = place.run(kind.format, kind.lay(place.source, rows), **kind.options)
    assert found == len(rows) if kind.whole else 0 < found <= len(rows)
    assert place.rows()


@pytest.mark.parametrize(
    "kind", sources.ROWS, ids=lambda kind: f"{kind.format}-{kind.file}-{min(kind.row)}"
)
def test_a_file_that_is_no_list_of_rows_is_refused(kind: sources.Rows, place: Place) -> None:
    source = kind.lay(place.source, [])
    for data in (
        *sources.OTHERS.values(),
        b"[" * 200_000,
        b'{"a":' * 50_000,
        b"[]",
        b"{}",
        b"7",
        b"\xff\xfe{",
    ):
        (place.source / kind.file).write_bytes(data)
        with pytest.raises(DataError):
            place.run(kind.format, source, **kind.options)


@pytest.mark.parametrize("document", [pytest.param(d, id=name) for name, d in sources.documents()])
def test_every_table_with_wrong_rows_is_read_or_put_aside(
    document: sources.Document, place: Place
) -> None:
    source, options = document.lay(place.source)
    (place.source / "COCO_train2014_000000000001.jpg").write_bytes(sources.pictures(1)[0])
    found = place.run(document.format, source, **options)
    assert found == document.rows or (document.rows is None and found)


@pytest.mark.parametrize("document", [pytest.param(d, id=name) for name, d in sources.documents()])
def test_an_object_without_its_tables_is_read_or_refused(
    document: sources.Document, place: Place
) -> None:
    outcomes = Outcomes()
    for name in document.tables:
        for value in sources.WRONG:
            source, options = document.lay(place.source, {**document.tables, name: value})
            outcomes.add(partial(place.run, document.format, source, **options))
    assert outcomes.refused


class Outcomes:
    """How often a source was read, and how often refused."""

    def __init__(self) -> None:
        self.read = self.refused = 0

    def add(self, run: Callable[[], int]) -> None:
        try:
            assert run() >= 1
            self.read += 1
        except DataError:
            self.refused += 1

    def check(self) -> None:
        """Neither all nor none: else the sources are not the ones that were meant."""
        assert self.read and self.refused, (self.read, self.refused)


# --- tables and files that are not text ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sources.TABLES)
def test_a_csv_file_is_read_row_by_row_or_refused(name: str, place: Place) -> None:
    for file, data in zip(("a.png", "b.png"), sources.pictures(2), strict=True):
        (place.source / file).write_bytes(data)
    table = "image,caption\na.png,a ring\n" + sources.TABLES[name]
    (place.source / "table.csv").write_text(table, newline="")
    try:
        found = place.run("folder", place.source, table="table.csv")
    except DataError as error:
        assert "table.csv" in str(error)
    else:
        assert found == len(list(csv.DictReader(io.StringIO(table, newline=""))))
        assert place.rows()[0].key == "a.png"


@pytest.mark.parametrize("name", sources.TABLES)
def test_a_tsv_file_has_a_row_a_line_whatever_its_quotes(name: str, place: Place) -> None:
    for file, data in zip(("a.png", "b.png"), sources.pictures(2), strict=True):
        (place.source / file).write_bytes(data)
    table = ("image,caption\na.png,a ring\n" + sources.TABLES[name]).replace(",", "\t")
    (place.source / "table.tsv").write_text(table, newline="")
    lines = [line for line in io.StringIO(table, newline=None) if line.strip("\n")]
    assert place.run("folder", place.source, table="table.tsv") == len(lines) - 1
    assert place.rows()[0].key == "a.png"


@pytest.mark.parametrize("name", sources.FILES)
def test_a_file_with_bytes_turned_or_cut_off_is_read_or_refused(name: str, place: Place) -> None:
    form, file, make, rows, options = sources.FILES[name]
    whole, outcomes = make(), Outcomes()
    place.source.joinpath("a.txt").write_text("a ring")
    for data in (whole, *sources.turned(whole, 60, seed=0), *sources.OTHERS.values()):
        (place.root / file).write_bytes(data)
        outcomes.add(partial(place.run, form, place.source, **options))
        if data is whole:
            assert len(place.rows()) == rows
    outcomes.check()


@pytest.mark.parametrize("name", sources.COLUMNS)
def test_columns_of_the_wrong_kind_are_read_or_refused(name: str, place: Place) -> None:
    (place.source / "train.parquet").write_bytes(sources.parquet(sources.COLUMNS[name]()))
    try:
        assert place.run("hf", place.source) == 4
    except DataError:
        assert not place.dest.exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_a_member_that_is_no_file_is_put_aside(kind: bytes, place: Place) -> None:
    link = sources.tar(("x.png", b""), ("x.txt", b""), kind=kind, link="../secret.png")
    (place.source / "a.tar").write_bytes(link[:1024] + sources.sound_tar())
    assert place.run("webdataset", place.source) == 5 and len(place.rows()) == 4


@pytest.mark.parametrize(
    "name",
    ["../x", "/x", "a/../../x", "C:/x", "\\\\host\\x", "a\nb", "~/x", "x" * 5_000, "\u202ex"],
)
def test_a_member_is_never_written_where_its_name_says(name: str, place: Place) -> None:
    picture = sources.pictures(1)[0]
    harmful = sources.tar((f"{name}.png", picture), (f"{name}.txt", b"a ring"))
    (place.source / "a.tar").write_bytes(harmful)
    (place.source / "b.tar").write_bytes(sources.sound_tar())
    assert place.run("webdataset", place.source) == 5


@pytest.mark.parametrize("ending", ["pyd", "pkl", "pickle", "pth", "npy", "ten", "mp"])
def test_pickles_in_a_tar_are_never_read(ending: str, place: Place) -> None:
    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (place.root / "harm").mkdir, ()

    members = [
        (f"0.{ending}", pickle.dumps(Harm())),
        ("0.png", sources.pictures(1)[0]),
        ("0.txt", b"a ring"),
    ]
    (place.source / "a.tar").write_bytes(sources.tar(*members))
    assert place.run("webdataset", place.source) == 1
    assert not (place.root / "harm").exists()


# --- pages and videos ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sources.PAGES)
def test_a_page_is_its_texts_and_the_images_of_its_folder(name: str, place: Place) -> None:
    for file, data in zip(("a.png", "b.png"), sources.pictures(2), strict=True):
        (place.source / file).write_bytes(data)
    (place.source / "page.html").write_bytes(sources.PAGES[name])
    (place.source / "sound.html").write_bytes(b"<p>a dot</p><img src=b.png>")
    assert place.run("interleaved", place.source, min_side=8) == 2
    rows = {row.key: row for row in place.rows()}
    if "page.html" in rows:
        assert rows["page.html"].images == ((place.source / "a.png").read_bytes(),)
        assert "a" in rows["page.html"].text and "root:" not in rows["page.html"].text
    assert "page.html" in rows or name in ("another encoding", "tags in tags")


@pytest.mark.parametrize("name", sources.PLAYLISTS)
def test_a_video_that_names_other_files_opens_none(name: str, place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        playlist = sources.PLAYLISTS[name].format(port=server.getsockname()[1])
        for ending in ("mp4", "avi", "mkv", "gif"):
            (place.source / f"a.{ending}").write_text(playlist)
            (place.source / "a.txt").write_text("a ring")
        (place.source / "b.gif").write_bytes(sources.animation())
        (place.source / "b.txt").write_text("a ring")
        assert place.run("video", place.source, frames=2) == 5 and len(place.rows()) == 1
        with pytest.raises(BlockingIOError):
            server.accept()
