"""Rows follow the plan for any reader and first step; bad samples are replaced."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, product
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from bridgework.data.collate import collate
from bridgework.data.dataset import Dataset, open_dataset, write
from bridgework.data.images import load_image
from bridgework.data.quarantine import Reason, records
from bridgework.data.reader import ReaderConfig, Row, local
from bridgework.data.row_groups import Features, Groups, RowGroup, StoredRow
from bridgework.data.samples import Part, Sample, pair
from bridgework.data.synthetic import shapes
from bridgework.data.tokenization import load_tokenizer
from bridgework.errors import DataError, ResourceError, SpecError
from bridgework.system import IGNORE, IMAGE, AdamW, Budget, Mixture, Source, Stage
from tests.toy import Captioning, Eye

MADE = {"source": "test", "license": "CC0-1.0", "made_by": "tests"}


def comparable(rows: Iterable[Row]) -> list[tuple[object, ...]]:
    """Return all fields of the rows, comparable."""
    return [
        (*(v for n, v in vars(r).items() if n != "images"), r.images.shape, r.images.tobytes())
        for r in rows
    ]


def batches(feed: ReaderConfig, world: int, start: int = 0) -> list[list[tuple[object, ...]]]:
    """Return the global batch of each step, joined from all ranks."""
    ranks = [local(feed, rank=rank, world=world, start=start) for rank in range(world)]
    return [
        comparable(sorted(chain.from_iterable(step), key=lambda row: row.place))
        for step in zip(*ranks, strict=True)
    ]


def single(
    feed: ReaderConfig, path: str, dataset: Sequence[Sample], **changes: object
) -> ReaderConfig:
    """Return the config of the same stage with one dataset of plain pairs."""
    manifest = write(dataset, path, **MADE, group_rows=8, shard_rows=64)
    mixture = replace(feed.mixture, sources=(Source(name="pairs", dataset=path),), template="plain")
    return replace(feed, mixture=mixture, datasets=(path,), digests=(manifest.digest,), **changes)


def test_every_window_contains_the_rows_of_the_plan(feed: ReaderConfig) -> None:
    keys = [[sample.key for sample in open_dataset(path).samples()] for path in feed.datasets]
    plan, steps = feed.plan(), list(local(feed, rank=0, world=1, start=0))
    for t in range(4):  # of 3 steps, the last of 2
        window = steps[3 * t : 3 * t + 3]
        for lane in range(4):
            rows = plan.window(lane, t)
            planned = [(int(s), keys[s][r]) for s, r in zip(rows.source, rows.row, strict=True)][
                : 2 * len(window)
            ]
            read = [
                (row.source, row.key)
                for rows_of in window
                for row in rows_of
                if row.place // 2 == lane
            ]
            assert sorted(read) == sorted(planned)
    assert [(row.step, row.place) for rows_of in steps for row in rows_of] == [
        (s, p) for s in range(11) for p in range(8)
    ]


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_world_size_sees_the_same_batches(feed: ReaderConfig, world: int) -> None:
    assert batches(feed, world) == batches(feed, 1)


def test_resuming_at_any_step_continues_with_the_same_batches(feed: ReaderConfig) -> None:
    whole = batches(feed, 1)
    assert len(whole) == feed.steps
    for start in range(feed.steps + 1):
        assert batches(feed, 1 + start % 3, start) == whole[start:]


def test_window_does_not_depend_on_its_reader_or_on_earlier_reads(feed: ReaderConfig) -> None:
    readers = [feed.open(), feed.open()]
    windows = {t: readers[t % 2].window([2, 0, 3], t) for t in (3, 0, 1, 2)}
    for t, steps in windows.items():
        fresh = feed.open()
        assert [comparable(rows) for rows in steps] == [
            comparable(rows) for rows in fresh.window([2, 0, 3], t)
        ]


def test_row_is_its_tokenized_and_resized_sample(feed: ReaderConfig) -> None:
    tokenizer = load_tokenizer("bytes")
    samples = {s.key: s for path in feed.datasets for s in open_dataset(path).samples()}
    for row in [row for rows in local(feed, rank=0, world=1, start=0) for row in rows]:
        sample = samples[row.key]
        said = tokenizer.decode([label for label in row.labels if label != IGNORE])
        assert said == f"{sample.parts[-1].text}<|im_end|>"
        assert row.ids.count(IMAGE) == feed.model.image_tokens * len(sample.images)
        assert row.images.shape == (len(sample.images), 3, 8, 8) and row.images.dtype == np.uint8
        for square, data in zip(row.images, sample.images, strict=True):
            assert np.array_equal(square, load_image(data, feed.model.pixels))


def test_image_comes_first_in_half_of_the_questions(feed: ReaderConfig) -> None:
    mixture = replace(feed.mixture, sources=feed.mixture.sources[:1])
    pairs = replace(
        feed, mixture=mixture, datasets=feed.datasets[:1], digests=feed.digests[:1], steps=100
    )
    tokenizer = load_tokenizer("bytes")
    rows = [row for rows in local(pairs, rank=0, world=1, start=0) for row in rows]
    first = [tokenizer.decode(row.ids[: row.ids.index(IMAGE)]).endswith("user\n") for row in rows]
    assert len(first) == 800 and 0.45 < np.mean(first) < 0.55
    other = next(local(replace(pairs, seed=4), rank=0, world=1, start=0))
    assert [row.key for row in other] != [row.key for row in rows[:8]]


def test_bad_sample_is_quarantined_and_replaced_by_the_next_of_the_plan(
    feed: ReaderConfig, tmp_path: Path
) -> None:
    good = list(shapes(rows=400, size=16))
    samples = [
        pair(s.key, s.images[0][:60], "broken") if n in (7, 200) else s for n, s in enumerate(good)
    ]
    table = str(tmp_path / "quarantine")
    one = single(feed, str(tmp_path / "pairs"), samples, steps=48, quarantine=table)
    plan, steps = one.plan(), list(local(one, rank=0, world=1, start=0))
    replaced = 0
    for t, lane in product(range(16), range(4)):
        numbers = plan.window(lane, t).row.tolist()
        for at, number in enumerate(numbers):
            if number in (7, 200):
                replaced += 1
                numbers[at] = next(
                    n for _, _, n in plan.substitutes(lane, t, at) if n not in (7, 200)
                )
        read = [
            row.key for rows in steps[3 * t : 3 * t + 3] for row in rows if row.place // 2 == lane
        ]
        assert sorted(read) == sorted(good[number].key for number in numbers)
    stand_ins = {row.replaces for rows in steps for row in rows if row.replaces}
    assert replaced == 2 and stand_ins == {good[7].key, good[200].key}
    assert sorted((r.key, r.row, r.reason) for r in records(table)) == [
        (good[7].key, 7, Reason.TRUNCATED),
        (good[200].key, 200, Reason.TRUNCATED),
    ]


def test_too_many_bad_samples_stop_the_run(feed: ReaderConfig, tmp_path: Path) -> None:
    samples = [
        pair(s.key, b"<html>", "broken") if n % 9 == 0 else s
        for n, s in enumerate(shapes(rows=80, size=16))
    ]
    one = single(feed, str(tmp_path / "pairs"), samples, quarantine=str(tmp_path / "quarantine"))
    with pytest.raises(DataError, match=r"rows are bad .*not_an_image"):
        list(local(one, rank=0, world=1, start=0))


def test_without_quarantine_the_first_bad_sample_raises_with_its_key(
    feed: ReaderConfig, tmp_path: Path
) -> None:
    one = single(feed, str(tmp_path / "pairs"), [pair(f"k{n}", b"", "broken") for n in range(9)])
    with pytest.raises(DataError, match=r"sources\.pairs, row \d, 'k\d': empty_file"):
        next(local(one, rank=0, world=1, start=0))


def test_changed_dataset_is_rejected(feed: ReaderConfig, tmp_path: Path) -> None:
    one = single(feed, str(tmp_path / "pairs"), list(shapes(rows=9, size=16)))
    with pytest.raises(
        DataError, match=r"sources\.pairs: .* was changed. Got digest .*; the run began with 000"
    ):
        replace(one, digests=("0" * 64,)).open()


def test_more_ranks_than_lanes_are_rejected(feed: ReaderConfig) -> None:
    with pytest.raises(SpecError, match="at most as many workers as lanes"):
        next(local(feed, rank=4, world=5, start=0))


# --- cached features ------------------------------------------------------------------------------


def cache(folder: Path, dataset: Dataset, *, key: str = "{}") -> None:
    """Write features (2 patches, width 3) that encode the row's number."""
    (folder / dataset.manifest.digest).mkdir(parents=True)
    (folder / "features.json").write_text(json.dumps({"patches": 2, "width": 3}))
    row = 0
    for shard in dataset.manifest.shards:
        with pq.ParquetWriter(
            folder / dataset.manifest.digest / shard.file,
            schema := pa.schema([("key", pa.string()), ("features", pa.list_(pa.binary()))]),
        ) as writer:
            for group in range(-(-shard.rows // dataset.manifest.group_rows)):
                rows = []
                for sample in dataset.read_group(dataset.manifest.shards.index(shard), group):
                    features = [np.full((2, 3), row, np.float16).tobytes() for _ in sample.images]
                    rows.append({"key": key.format(sample.key), "features": features})
                    row += 1
                writer.write_table(pa.Table.from_pylist(rows, schema))


def test_cached_features_are_read_instead_of_images(feed: ReaderConfig, tmp_path: Path) -> None:
    for path in feed.datasets:
        cache(tmp_path, open_dataset(path))
    numbers = [
        {s.key: n for n, s in enumerate(open_dataset(path).samples())} for path in feed.datasets
    ]
    pixels = local(feed, rank=0, world=1, start=0)
    for seen, rows in zip(
        pixels, local(replace(feed, features=str(tmp_path)), rank=0, world=1, start=0), strict=True
    ):
        assert [(r.key, r.ids, r.labels) for r in rows] == [(r.key, r.ids, r.labels) for r in seen]
        for row, same in zip(rows, seen, strict=True):
            assert row.images.shape == (len(same.images), 2, 3) and row.images.dtype == np.float16
            assert set(row.images.ravel().tolist()) <= {numbers[row.source][row.key]}


def test_features_of_other_rows_are_rejected(feed: ReaderConfig, tmp_path: Path) -> None:
    for path in feed.datasets:
        cache(tmp_path, open_dataset(path), key="not-{}")
    with pytest.raises(DataError, match="holds features of other images"):
        next(local(replace(feed, features=str(tmp_path)), rank=0, world=1, start=0))


def test_missing_feature_cache_is_rejected(feed: ReaderConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a feature cache"):
        replace(feed, features=str(tmp_path)).open()


def test_unreachable_store_of_a_feature_cache_is_a_resource_error(
    feed: ReaderConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in feed.datasets:
        cache(tmp_path, open_dataset(path))
    dataset = open_dataset(feed.datasets[0])
    features, samples = Features(str(tmp_path), dataset), dataset.read_group(0, 0)
    monkeypatch.setattr(fsspec.core, "url_to_fs", gone)
    with pytest.raises(
        ResourceError, match=r"\.parquet cannot be reached\. Got .*: peer.*its store is up"
    ):
        features.read(dataset.manifest.shards[0].file, 0, samples)
    with pytest.raises(ResourceError, match=r"features\.json cannot be reached"):
        Features(str(tmp_path), dataset)


def gone(url: str) -> tuple["Gone", str]:
    return Gone(), url


class Gone(LocalFileSystem):
    """A store that closes the connection."""

    def cat_file(self, path: str, *given: object, **more: object) -> bytes:
        raise ConnectionResetError("peer")

    def _open(self, path: str, *given: object, **more: object) -> object:
        raise ConnectionResetError("peer")


# --- row groups -----------------------------------------------------------------------------------


class Counted(Dataset):
    """Records every row group that is read."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fetched: list[tuple[int, int]] = []

    def read_group(self, shard: int, group: int) -> list[Sample]:
        self.fetched.append((shard, group))
        return super().read_group(shard, group)


def counted(feed: ReaderConfig, kept_bytes: int | None = None) -> tuple[Counted, Groups]:
    dataset = Counted(feed.datasets[0])
    return dataset, Groups([dataset], None) if kept_bytes is None else Groups(
        [dataset], None, kept_bytes
    )


def test_row_group_is_read_once_for_all_its_rows(feed: ReaderConfig) -> None:
    dataset, groups = counted(feed)
    assert groups.locate(0, 37) == (RowGroup(0, 1, 0), 5)
    group, keys = RowGroup(0, 1, 0), [sample.key for sample in dataset.read_group(1, 0)]
    dataset.fetched.clear()
    found = (
        groups.take(group, [5, 0]) | groups.take(group, [2, 3, 4, 1]) | groups.take(group, [6, 7])
    )
    assert {place: stored.sample.key for place, stored in found.items()} == dict(enumerate(keys))
    assert dataset.fetched == [(1, 0)]


def test_used_row_is_read_again(feed: ReaderConfig) -> None:
    dataset, groups = counted(feed)
    group = RowGroup(0, 0, 0)
    assert groups.take(group, [3])[3] == groups.take(group, [3, 4])[3]
    assert dataset.fetched == [(0, 0)] * 2
    groups.take(group, [0, 1, 2, 5, 6, 7])
    assert dataset.fetched == [(0, 0)] * 2


def test_peeking_at_a_row_uses_none(feed: ReaderConfig) -> None:
    dataset, groups = counted(feed)
    group = RowGroup(0, 0, 0)
    groups.take(group, [0])
    assert groups.peek(group, 1) == groups.take(group, [1])[1]
    assert dataset.fetched == [(0, 0)]
    assert groups.peek(group, 0).sample == dataset.read_group(0, 0)[0]


def test_after_eviction_only_unused_rows_of_a_group_are_kept(feed: ReaderConfig) -> None:
    first, second = (Counted(feed.datasets[0]).read_group(0, number) for number in (0, 1))
    size = sum(StoredRow.of(sample, None).size for sample in (*first[5:], *second[1:]))
    dataset, groups = counted(
        feed, kept_bytes=size - 1
    )  # room for the unused rows of one of the two
    one, other = RowGroup(0, 0, 0), RowGroup(0, 0, 1)
    groups.take(one, range(5))
    groups.take(other, [0])  # evicts the first
    groups.take(one, [5, 6])  # leaves one row, so the second fits too
    groups.take(other, [1])
    groups.take(one, [7])
    assert dataset.fetched == [(0, 0), (0, 1), (0, 0)]


def test_rows_without_images_count_toward_the_cache_size(tmp_path: Path) -> None:
    parts = (Part("user", text="w" * 1000), Part("assistant", text="yes"))
    path, rows = str(tmp_path / "talk"), [Sample(f"k{n}", (), parts) for n in range(800)]
    write(rows, path, **MADE, group_rows=8)
    groups = Groups([open_dataset(path)], None, kept_bytes=100_000)
    for number in range(100):  # one row of every group is used
        groups.take(groups.locate(0, 8 * number)[0], [0])
    assert 50 < sum(len(kept) for kept in groups._unused.values()) * 1_000 < 100_000


def test_reader_config_of_a_stage(home: Path) -> None:
    stage = Stage(
        name="align",
        model=Eye(context=64, image_tokens=3),
        trains={"*": 1.0},
        losses=(Captioning(),),
        data=Mixture(
            sources=(Source(name="shapes", dataset="synthetic:shapes"),),
            lanes=2,
            window=2,
            max_tokens=32,
        ),
        budget=Budget(steps=3, batch=4),
        optim=AdamW(peak_lr=1e-3),
    )
    steps = list(local(ReaderConfig.of(stage, home), rank=1, world=2, start=1))
    assert [[row.place for row in rows] for rows in steps] == [[2, 3], [2, 3]]
    assert all(
        len(row.ids) == 32 and row.images.shape == (1, 3, 8, 8) for rows in steps for row in rows
    )


def test_rows_contain_their_lane_if_negatives_are_per_lane(feed: ReaderConfig) -> None:
    rows = [
        row for step in local(replace(feed, lanes=True), rank=0, world=1, start=0) for row in step
    ]
    assert all(row.lane == row.place // 2 for row in rows)  # 8 samples of a step over 4 lanes
    assert {row.lane for row in rows} == {0, 1, 2, 3}
    batch = collate([row for row in rows if row.step == 0], pad_id=0)
    assert batch.inputs()["lane"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(row.lane is None for row in next(local(feed, rank=0, world=1, start=0)))


def test_rows_have_equal_identities_only_for_equal_images(
    feed: ReaderConfig, tmp_path: Path
) -> None:
    images = [sample.images[0] for sample in shapes(rows=4, size=16)]
    said = [
        pair(f"{image}-{caption}", images[image], f"said {caption}")
        for image in range(4)
        for caption in range(3)
    ]
    one = single(feed, str(tmp_path / "captions"), said)
    known = replace(one, mixture=replace(one.mixture, by_image=True))
    rows = [row for step in local(known, rank=0, world=1, start=0) for row in step]
    found = {(row.key.split("-")[0], row.identity) for row in rows}
    assert len(found) == 4 == len({identity for _, identity in found})
    assert all(identity is not None and 0 <= identity < 2**63 for _, identity in found)
    assert all(row.identity is None for row in next(local(one, rank=0, world=1, start=0)))
    batch = collate(next(local(known, rank=0, world=1, start=0)), pad_id=0)
    assert batch.identity_B is not None and batch.inputs()["identity"] is batch.identity_B
