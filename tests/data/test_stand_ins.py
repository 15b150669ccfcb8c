"""What gives way, to what: bad rows and skipped ones, also where samples share a sequence."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bridgework.data.dataset import write
from bridgework.data.quarantine import records
from bridgework.data.reader import ReaderConfig, Row, local
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.errors import DataError
from bridgework.system import Mixture, Packing, Source
from tests.toy import Eye

MADE = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}
BAD = (5, 77, 130)


def fed(folder: Path, *datasets: list[Sample], **changes: object) -> ReaderConfig:
    """Four lanes, windows of 8 steps, 8 samples a step."""
    made = [
        write(rows, str(folder / f"{n}"), **MADE, group_rows=8) for n, rows in enumerate(datasets)
    ]
    paths = tuple(str(folder / f"{n}") for n in range(len(datasets)))
    sources = tuple(Source(name=f"s{n}", dataset=path) for n, path in enumerate(paths))
    mixture = Mixture(sources=sources, alpha=0.5, template="chat", lanes=4, window=8, max_bad=0.5)
    one = ReaderConfig(
        mixture, paths, tuple(m.digest for m in made), batch=8, steps=32, seed=3, model=Eye()
    )
    return replace(one, quarantine=str(folder / "quarantine"), **changes)


def told(rows: int, bad: tuple[int, ...] = ()) -> list[Sample]:
    """Captions of many lengths; the images of some cannot be read."""
    made = enumerate(shapes(rows=rows, size=16))
    return [
        pair(f"k{n}", b"" if n in bad else s.images[0], "w" * (1 + n * 37 % 150)) for n, s in made
    ]


def steps(feed: ReaderConfig, start: int = 0) -> list[list[tuple[int, str]]]:
    """(place, key) of every step."""
    return [
        sorted((row.place, row.key) for row in rows)
        for rows in local(feed, rank=0, world=1, start=start)
    ]


def test_a_small_source_goes_on_as_long_as_one_of_its_rows_is_good(tmp_path: Path) -> None:
    feed = fed(tmp_path, told(400), told(2, bad=(0,)), steps=60)
    for seed in range(4):
        rows = [
            row
            for step in local(replace(feed, seed=seed), rank=0, world=1, start=0)
            for row in step
        ]
        assert {row.key for row in rows if row.source == 1} == {"k1"}
        assert {row.replaces for row in rows if row.source == 1} == {"k0", ""}


def test_where_no_good_row_is_left_the_table_that_is_named_is_there(tmp_path: Path) -> None:
    feed = fed(tmp_path, told(400), told(2, bad=(0, 1)))
    with pytest.raises(
        DataError,
        match=r"sources\.s1: no good sample is left to replace 'k[01]'. Fix: read .*quarantine",
    ):
        list(local(feed, rank=0, world=1, start=0))
    assert {record.key for record in records(str(tmp_path / "quarantine"))} >= {"k0", "k1"}


def test_two_sources_of_one_dataset_are_allowed_the_bad_rows_of_one(tmp_path: Path) -> None:
    feed = fed(tmp_path, told(64, bad=(1, 2, 3)))
    (source,) = feed.mixture.sources
    twice = replace(feed.mixture, sources=(source, replace(source, name="again")), max_bad=0.04)
    both = replace(
        feed, mixture=twice, datasets=feed.datasets * 2, digests=feed.digests * 2, steps=16
    )
    with pytest.raises(DataError, match="3 of 64 rows are bad"):
        list(local(both, rank=0, world=1, start=0))


def test_a_skipped_stand_in_changes_no_other_place_and_no_earlier_step(tmp_path: Path) -> None:
    feed = fed(tmp_path, told(256, BAD))
    rows = [row for step in local(feed, rank=0, world=1, start=0) for row in step]
    plain, stand_ins = steps(feed), [row for row in rows if row.replaces]
    assert sorted(row.replaces for row in stand_ins) == sorted(f"k{n}" for n in BAD)
    for stand_in in stand_ins:
        since = stand_in.step // 8 * 8 + 4  # in the middle of its window
        skipping = steps(replace(feed, skipped=((stand_in.key, since),)))
        for step, (before, after) in enumerate(zip(plain, skipping, strict=True)):
            kept = [(place, key) for place, key in before if step < since or key != stand_in.key]
            assert set(kept) <= set(after) and len(after) == 8
            assert step < since or stand_in.key not in dict(after).values()


# --- packed ----------------------------------------------------------------------------------------------------------


def packed(folder: Path, rows: list[Sample], **limits: int) -> ReaderConfig:
    feed = fed(folder, rows, batch=32)
    return replace(feed, mixture=replace(feed.mixture, packing=Packing(**limits), max_tokens=400))


def sequences(feed: ReaderConfig) -> Iterator[list[Row]]:
    for step in local(feed, rank=0, world=1, start=0):
        for place in dict.fromkeys(row.place for row in step):
            yield [row for row in step if row.place == place]


@pytest.mark.parametrize("limits", [{}, {"tokens": 300}, {"images": 2}])
def test_what_stands_in_fits_beside_the_others_of_its_sequence(
    limits: dict[str, int], tmp_path: Path
) -> None:
    feed = packed(tmp_path, told(128), **limits)
    plain = list(sequences(feed))
    shared = next(rows for rows in plain if len(rows) >= 2)
    gone = tuple((row.key, 0) for row in shared)
    found = list(sequences(replace(feed, skipped=gone)))
    assert len(found) == len(plain)
    for rows in found:
        assert len(rows) == 1 or sum(len(row.ids) for row in rows) <= limits.get("tokens", 400)
        assert len(rows) == 1 or sum(row.num_images for row in rows) <= limits.get("images", 99)
    trained = Counter(row.key for rows in found for row in rows)
    assert not trained.keys() & {key for key, _ in gone}


def test_where_nothing_fits_the_others_stay_by_themselves(tmp_path: Path) -> None:
    long = [
        Sample(f"k{n}", (), (Part("user", text="q"), Part("assistant", text="w" * 300)))
        for n in range(127)
    ]
    short = Sample("short", (), (Part("user", text="q"), Part("assistant", text="w")))
    feed = replace(packed(tmp_path, [*long, short], tokens=400), steps=4)
    assert Counter(len(rows) for rows in sequences(feed)) == {1: 126, 2: 1}
    found = [row.key for rows in sequences(replace(feed, skipped=(("short", 0),))) for row in rows]
    assert sorted(found) == sorted(sample.key for sample in long)
