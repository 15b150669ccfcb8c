"""The node's cache of remote files: the bytes of the store, a bound, and one download for a node."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridgework import storage
from bridgework.storage import node_cache
from tests.store.faults import FaultyStore


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRIDGEWORK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def blob(size: int) -> bytes:
    return random.Random(0).randbytes(size)


def used(cache: Path) -> int:
    return sum(path.stat().st_size for path in (cache / "files").rglob("*") if path.is_file())


def test_random_reads_give_the_bytes_of_the_store(place: Path, faults: FaultyStore) -> None:
    data = blob(3 * node_cache.BLOCK_BYTES + 17)
    storage.write_atomic(place / "file", data)
    faults.requests.clear()  # those of other tests too
    draw = random.Random(1)
    for _ in range(2):
        file = storage.cached_file(f"{place}/file")
        assert file is not None
        for _ in range(50):
            start = draw.randrange(len(data))
            end = start + draw.randrange(2 * node_cache.BLOCK_BYTES)
            assert file.range(start, end) == data[start:end]
    file.seek(-5, 2)
    assert file.read() == data[-5:]
    read = [path for method, path in faults.requests if method == "GET" and path.endswith("/file")]
    assert len(read) <= 4  # one request a gap, whatever the number of reads


def test_a_file_is_downloaded_once_for_all_processes_of_a_node(
    place: Path, faults: FaultyStore
) -> None:
    storage.write_atomic(place / "weights", blob(1_000_000))
    faults.requests.clear()

    def read(_: int) -> int:
        with storage.local_copy(place / "weights") as file:
            return len(file.read_bytes())

    with ThreadPoolExecutor(6) as pool:
        assert set(pool.map(read, range(12))) == {1_000_000}
    assert [m for m, path in faults.requests if path.endswith("/weights")].count("GET") == 1


def test_a_changed_file_is_downloaded_again(place: Path) -> None:
    for content in (b"one", b"two"):
        storage.write_atomic(place / "file", content)
        with storage.local_copy(place / "file") as file:
            assert file.read_bytes() == content


def test_the_cache_keeps_its_bound_and_its_readers_their_files(
    place: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BRIDGEWORK_CACHE_GB", "0.003")
    data = blob(1_000_000)
    storage.write_atomic(place / "first", data)
    with storage.local_copy(place / "first") as file:
        for number in range(8):
            storage.write_atomic(place / str(number), data)
            with storage.local_copy(place / str(number)):
                pass
        node_cache.evict()
        assert used(own_cache) <= 3_000_000
        assert file.read_bytes() == data
    assert not file.exists()


def test_scratch_folders_of_ended_processes_are_removed(own_cache: Path) -> None:
    left = node_cache.scratch_root() / "folder-left"
    left.mkdir()
    (left / node_cache.USED).touch()
    with node_cache.scratch() as own:
        node_cache.evict()
        assert own.is_dir()
        assert not left.exists()
