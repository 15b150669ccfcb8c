"""A store that refuses, fails, is slow or stale; and processes that share it."""

import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bridgework import artifacts, cli, storage
from bridgework.errors import ResourceError, RunError
from bridgework.storage import leases, stores
from bridgework.tracking.tracker import Journal
from bridgework.training import checkpoint
from tests.store.faults import FaultyStore
from tests.training.support import Stop, go, llava, losses, same, stop_at, weights

WRITE = "from bridgework import storage; storage.write_atomic(storage.locate('{url}'), 'x')"
ANONYMOUS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
    "AWS_CONFIG_FILE": "/nowhere",
}


def written_by_another_process(url: str, without: tuple[str, ...] = (), **changes: str) -> str:
    """Return the last line of the errors of a process that writes an object."""
    env = {k: v for k, v in os.environ.items() if k not in without} | changes
    done = subprocess.run(
        [sys.executable, "-c", WRITE.format(url=url)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


def test_missing_credentials_are_named(place: Path) -> None:
    line = written_by_another_process(
        f"{place}/x", ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"), **ANONYMOUS
    )
    assert "the store refuses access" in line
    assert "Fix: give credentials" in line


def test_an_endpoint_that_does_not_answer_is_named(place: Path) -> None:
    line = written_by_another_process(
        f"{place}/x", AWS_ENDPOINT_URL="http://127.0.0.1:9", BRIDGEWORK_STORE_WAIT_S="1"
    )
    assert "the store cannot be reached; gave up after 1 s" in line
    assert "AWS_ENDPOINT_URL" in line


REFUSALS = [
    ("400 Bad Request", "AuthorizationHeaderMalformed", "is in another region.*AWS_REGION"),
    ("403 Forbidden", "RequestTimeTooSkewed", "clock is wrong.*NTP"),
    ("403 Forbidden", "InvalidAccessKeyId", "refuses access.*credentials"),
    ("403 Forbidden", "AccessDenied", "refuses access.*credentials"),
    ("404 Not Found", "NoSuchBucket", "bucket 'test-.*does not exist.*BRIDGEWORK_HOME"),
]


@pytest.mark.parametrize(("status", "code", "cause"), REFUSALS)
@pytest.mark.parametrize("do", ["write", "read", "exists", "list", "remove"])
def test_a_refusal_is_one_line_with_its_cause(
    place: Path, faults: FaultyStore, status: str, code: str, cause: str, do: str
) -> None:
    storage.write_atomic(place / "file", "content")
    calls: dict[str, Callable[[], object]] = {
        "write": lambda: storage.write_atomic(place / "file", "other"),
        "read": (place / "file").read_text,
        "exists": (place / "file").exists,
        "list": lambda: storage.names(place),
        "remove": lambda: storage.remove(place),
    }
    faults.refuse = (status, code)
    with pytest.raises(ResourceError, match=cause) as raised:
        calls[do]()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "words",
    [
        "train llava --tiny --workers 0",
        "data stats synthetic:shapes",
        "data import folder {photos} photos --workers 0",
        "data verify photos",
        "curate filters synthetic:shapes made min_side=8",
        "eval {home}/runs/run/align/artifact",
    ],
)
@pytest.mark.parametrize(("status", "code", "cause"), [REFUSALS[0], REFUSALS[3], REFUSALS[4]])
def test_a_command_ends_with_the_cause_in_one_line(
    store_home: Path, faults: FaultyStore, tmp_path: Path, words: str, status: str, code: str,
    cause: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    filled = words.format(home=store_home, photos=tmp_path)
    monkeypatch.setattr(sys, "argv", ["bridgework", *filled.split()])
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a black square")
    faults.refuse = (status, code)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1
    assert said[-1].startswith("error  ") and re.search(cause, said[-1]), said


def test_requests_are_repeated_while_the_store_is_busy(place: Path, faults: FaultyStore) -> None:
    for call in (partial(storage.write_atomic, place / "file", "x"), (place / "file").read_text):
        faults.failing = 3
        call()
    assert faults.failing == 0


@pytest.mark.parametrize("read", ["read_text", "open"])
def test_an_object_that_is_replaced_while_it_is_opened_is_read(
    place: Path, faults: FaultyStore, read: str
) -> None:
    """A lease and a journal are rewritten every few seconds; the one read is the old or the new."""
    file, contents = place / "file", ["third", "second"]
    storage.write_atomic(file, "first")

    def replace(method: str, path: str) -> bool:
        if method == "GET" and path.endswith("/file") and contents:
            storage.write_atomic(file, contents.pop())
        return False

    faults.when = replace
    if read == "read_text":
        assert file.read_text() == "second"
    else:
        with file.open() as opened:
            assert opened.read() == "third"


def test_a_slow_store_is_reported_and_waited_for(
    place: Path, faults: FaultyStore, caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    monkeypatch.setattr(stores, "SAY_EVERY_S", 1.0)
    faults.delay_s = 3.5
    with caplog.at_level(logging.WARNING):
        storage.write_atomic(place / "file", "x")
    assert f"{place}/file: waiting for the store" in caplog.text


def test_training_does_not_wait_for_the_records_of_a_slow_store(
    home: Path, store_home: Path, run: str, faults: FaultyStore
) -> None:
    go(llava(3), home, run)
    faults.delay_s = 2.0
    faults.when = lambda method, path: (
        method == "PUT" and ("/journal/" in path or "/flight_recorder/" in path)
    )
    go(llava(3), store_home, run)
    assert same(weights(store_home, run), weights(home, run))
    journal = Journal(store_home / "runs" / run / "align" / "journal")
    times = {p.value for _, points in journal.points() for p in points if p.key == "step_s"}
    assert max(times) < 2.0
    assert losses(store_home, run) == losses(home, run)


def test_a_store_with_stale_listings_gives_the_same_bits(
    home: Path, store_home: Path, run: str, faults: FaultyStore
) -> None:
    """With a listing that is 2 s old, a run resumes from an older checkpoint, or begins again."""
    system = llava(6)
    go(system, home, run)
    faults.hidden_s = 2.0
    with pytest.raises(Stop):
        go(system, store_home, run, checkpoint_every=1, evaluate_every=1, report=stop_at(4))
    go(system, store_home, run, checkpoint_every=1)
    assert same(weights(store_home, run), weights(home, run))


def test_a_bucket_that_is_deleted_ends_a_run_with_one_line(
    store_home: Path, run: str, bucket: str
) -> None:
    fs = storage.find_store("s3://")[0].fs

    def delete(metrics: dict[str, float], done: int) -> None:
        if done == 2:
            fs.rm(bucket, recursive=True)  # with the bucket itself

    with pytest.raises(ResourceError, match=f"the bucket {bucket!r} does not exist"):
        go(llava(6), store_home, run, checkpoint_every=3, evaluate_every=1, report=delete)


def test_a_clock_that_is_set_back_does_not_mix_attempts(
    home: Path, store_home: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = llava(4)
    go(system, home, run)
    with pytest.raises(Stop):
        go(system, store_home, run, checkpoint_every=2, evaluate_every=1, report=stop_at(3))
    now, now_ns = time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: now() - 600)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns() - 600_000_000_000)
    go(system, store_home, run)
    assert [step for step, _ in losses(store_home, run)] == [0, 1, 2, 2, 3]
    assert same(weights(store_home, run), weights(home, run))


# --- checkpoints


def checkpointed(store_home: Path, run: str) -> tuple[Any, Path, Any]:
    """Return a system, its stage's folder with checkpoints of steps 2 and 4, and its weights."""
    system = llava(6)
    go(system, store_home, run, checkpoint_every=2)
    folder = store_home / "runs" / run / "align"
    before = weights(store_home, run)
    storage.remove(folder / "artifact", first=artifacts.FILE)
    return system, folder, before


def test_a_changed_checkpoint_is_damage_and_the_one_before_is_loaded(
    store_home: Path, run: str
) -> None:
    system, folder, before = checkpointed(store_home, run)
    newest = checkpoint.checkpoints(folder)[0]
    name = max(newest.files, key=lambda name: newest.files[name][0])
    digest = "sha256:" + newest.files[name][1]
    storage.node_cache.entry(digest).unlink(missing_ok=True)
    changed = bytearray((newest.folder / name).read_bytes())
    changed[len(changed) // 2] ^= 1
    storage.write_atomic(newest.folder / name, bytes(changed))
    go(system, store_home, run, checkpoint_every=2)
    assert same(weights(store_home, run), before)
    assert [step for step, _ in losses(store_home, run)][6:] == [2, 3, 4, 5]
    assert storage.names(folder / "checkpoints" / "damaged") == [newest.folder.name]


def test_a_checkpoint_without_a_manifest_is_unfinished(store_home: Path, run: str) -> None:
    system, folder, before = checkpointed(store_home, run)
    newest = checkpoint.checkpoints(folder)[0]
    (newest.folder / checkpoint.MANIFEST).unlink()
    go(system, store_home, run, checkpoint_every=2)
    assert same(weights(store_home, run), before)
    assert [step for step, _ in losses(store_home, run)][6:] == [2, 3, 4, 5]
    assert newest.folder.name not in storage.names(folder / "checkpoints")
    assert storage.names(folder / "checkpoints" / "damaged") == []


def test_checkpoints_of_another_key_are_not_trusted(store_home: Path, run: str) -> None:
    system, folder, _ = checkpointed(store_home, run)
    storage.write_atomic(store_home / "checkpoint.key", "ab" * 32)
    with pytest.raises(RunError, match=r"not trusted, because its manifest is signed with the key"):
        go(system, store_home, run)
    assert len(checkpoint.checkpoints(folder)) == 2


# --- leases


def refused(holder: str) -> Exception:
    return RunError(f"in use by {holder}")


def test_of_many_writers_exactly_one_creates_an_object(place: Any) -> None:
    def create(number: int) -> bool:
        try:
            place.fs.create(f"{place.path}/one", str(number).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(8))) == 1


def test_a_run_that_is_being_trained_is_refused(store_home: Path, run: str) -> None:
    with (
        leases.held(store_home / "runs" / run / "lock", refused),
        pytest.raises(RunError, match=f"run '{run}' is being trained by .*process {os.getpid()}"),
    ):
        go(llava(2), store_home, run)


def test_a_lease_is_free_after_the_block(place: Path) -> None:
    for generation in (1, 2, 3):
        with leases.held(place / "lock", refused) as lease:
            assert lease.generation == generation
            lease.check()


def test_a_silent_holder_is_replaced_and_fenced(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 1.0)
    silent = leases.Lease(place / "lock", 1)
    holder = {"node": "another", "pid": 1, "id": "x"}
    storage.write_atomic(place / "lock" / "00000001.json", json.dumps(holder))
    silent.check()
    with leases.held(place / "lock", refused) as lease:
        assert lease.generation == 2
        with pytest.raises(RunError, match="another process has taken this run over"):
            silent.check()


@contextmanager
def holder_of_another_node(lease: Path, every_s: float) -> Iterator[None]:
    """Hold a lease as a process of another node does, which renews it every `every_s` seconds."""
    over = threading.Event()

    def beat() -> None:
        for number in range(1_000):
            holder = {"node": "another", "pid": 7, "beat": number}
            storage.write_atomic(lease / "00000001.json", json.dumps(holder))
            if over.wait(every_s):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    until = time.monotonic() + 10
    while not storage.names(lease) and time.monotonic() < until:
        time.sleep(0.05)
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_living_holder_is_not_replaced_on_a_slow_store(
    place: Path, faults: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The holder renews its lease later than LEASE_S, because its requests take long."""
    monkeypatch.setattr(leases, "LEASE_S", 1.0)
    with holder_of_another_node(place / "lock", every_s=4.0):
        faults.delay_s = 0.3
        faults.when = lambda method, path: method == "GET"
        with (
            pytest.raises(RunError, match="in use by another, process 7"),
            leases.held(place / "lock", refused),
        ):
            pass


def test_a_living_holder_of_another_node_is_not_replaced(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 2.0)
    with (
        holder_of_another_node(place / "lock", every_s=0.3),
        pytest.raises(RunError, match="in use by another, process 7"),
        leases.held(place / "lock", refused),
    ):
        pass


def test_a_fenced_run_publishes_nothing(
    store_home: Path, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_over(metrics: dict[str, float], done: int) -> None:
        if done == 1:
            taken = store_home / "runs" / run / "lock" / "00000002.json"
            storage.write_atomic(taken, json.dumps({"node": "another", "pid": 1}))

    with pytest.raises(RunError, match="another process has taken this run over"):
        go(llava(4), store_home, run, checkpoint_every=2, evaluate_every=1, report=take_over)
    folder = store_home / "runs" / run / "align"
    assert checkpoint.checkpoints(folder) == []
    assert not (folder / "artifact").exists()
