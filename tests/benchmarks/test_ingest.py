"""Benchmarks of the data plane: every side reads a complete epoch of the same bytes."""

import gc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from benchmarks.ingest import work
from benchmarks.ingest.feeding import in_process
from benchmarks.ingest.peers import PEERS, installed
from benchmarks.ingest.reading import read
from benchmarks.ingest.store import MIX, Store, photo
from benchmarks.ingest.work import BATCH, DECODE, MIXED, READ, Work, keys
from bridgework.data.collate import Batch

ROWS = 256


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BRIDGEWORK_HOME", str(tmp_path_factory.mktemp("home")))
        yield Store("clipart", ROWS)


def test_epoch_of_our_reader_has_every_id_once(store: Store) -> None:
    steps = islice(in_process(READ, store), ROWS // BATCH)
    assert sorted(key for step in steps for key in keys(step)) == [
        f"whole/{row:06d}" for row in range(ROWS)
    ]


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset and datasets leave files open
@pytest.mark.parametrize("name", PEERS)
def test_epoch_of_a_library_has_every_id_once_with_equal_bytes(store: Store, name: str) -> None:
    peer = PEERS[name]
    if not installed(peer):
        pytest.skip(f"{peer.module} is not installed")
    folder = store.folder("whole", name, peer.write)
    steps = list(peer.resumed(folder, peer.state(folder, 0), list))
    gc.collect()
    assert sorted(raw for step in steps for raw in step) == sorted(store.raws("whole"))


def test_both_pipelines_make_equal_batches(store: Store) -> None:
    ours = next(in_process(DECODE, store))
    assert isinstance(ours, Batch) and ours.pixels_N3HW is not None
    raws = {raw.key: raw for raw in store.raws("whole")}
    theirs = Work(DECODE, work.ours)([raws[key] for key in ours.keys])
    assert isinstance(theirs, Batch) and theirs.pixels_N3HW is not None
    assert (ours.ids_BT == theirs.ids_BT).all() and (ours.labels_BT == theirs.labels_BT).all()
    assert (ours.pixels_N3HW == theirs.pixels_N3HW).all()


def test_our_reader_mixes_the_four_sources(store: Store) -> None:
    came = [
        key.split("/")[0]
        for step in islice(in_process(MIXED, store), ROWS // BATCH)
        for key in keys(step)
    ]
    assert set(came) == set(MIX)


def test_decoders_agree_without_downscaling() -> None:
    file = photo(0, 320, 240)
    difference = np.abs(work.ours(file).astype(int) - work.pillow(file).astype(int))
    assert difference.mean() < 1


def test_dataset_that_fits_in_memory_is_read_once(tmp_path: Path) -> None:
    found = read(tmp_path, (50_000,), 100, 4)
    assert found.read_per_used == pytest.approx(1, abs=0.05) and found.fewest > 1
