"""A home in Google's and Microsoft's stores: an emulator of one, and of the other if you start it."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fsspec import get_filesystem_class

from bridgework import storage
from bridgework.errors import Paused, ResourceError
from bridgework.serving.launch import free_port
from bridgework.storage import leases, stores, write_atomic
from bridgework.system import load
from bridgework.training.driver import train
from bridgework.training.options import RunOptions


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    """A bucket of a local server, which all processes of the test use."""
    port = free_port("127.0.0.1")
    server = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("google_server.py"), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks for credentials
        patch.setenv("NO_GCE_CHECK", "true")
        for _ in range(200):
            try:
                httpx.get(f"http://127.0.0.1:{port}/", trust_env=False)
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield "gs://bucket"
    server.kill()
    server.wait()


@pytest.fixture
def azure() -> str:
    if "AZURE_STORAGE_CONNECTION_STRING" not in os.environ:
        pytest.skip("no account: start Azurite and set AZURE_STORAGE_CONNECTION_STRING")
    name = f"bridgework-{uuid4().hex[:8]}"
    fs, _ = storage.find_store("az://")
    fs.fs.mkdir(name)
    return f"az://{name}"


@pytest.fixture(params=["google", "azure"])
def place(request: pytest.FixtureRequest) -> Path:
    """A new home in a bucket."""
    return storage.locate(f"{request.getfixturevalue(request.param)}/{uuid4().hex[:8]}")


@pytest.mark.filterwarnings("ignore:Sending a large body directly")  # adlfs, for each large file
def test_files_of_a_home_are_written_listed_moved_and_removed(place: Path) -> None:
    write_atomic(place / "a" / "x.json", "{}")
    with (place / "a" / "large").open("wb") as file:
        file.write(large := random.Random(0).randbytes(3_000_000))
    assert (place / "a" / "large").read_bytes() == large
    assert sorted(path.name for path in (place / "a").iterdir()) == ["large", "x.json"]
    (place / "a" / "x.json").rename(place / "a" / "y.json")
    assert (place / "a" / "y.json").read_text() == "{}"
    (place / "a" / "y.json").unlink()
    assert [(place / "a" / name).exists() for name in ("x.json", "y.json", "large")] == [
        False,
        False,
        True,
    ]
    with pytest.raises(FileNotFoundError):
        (place / "a" / "y.json").read_text()


def test_one_of_several_threads_creates_an_object_and_leases_count_up(place: Any) -> None:
    file = place / "one.json"

    def create(number: int) -> int | None:
        try:
            file.fs.create(file.path, str(number).encode())
        except FileExistsError:
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        made = [number for number in pool.map(create, range(8)) if number is not None]
    assert [file.read_text()] == [str(number) for number in made]
    for generation in (1, 2):
        with leases.held(place / "lease") as lease:
            lease.check()
        assert lease.generation == generation


def test_missing_bucket_is_named(place: Path) -> None:
    protocol = str(place).partition("://")[0]
    missing = storage.locate(f"{protocol}://no-such-bucket-here/x")
    for work in (missing.read_text, lambda: write_atomic(missing, "x")):
        with pytest.raises(
            ResourceError, match=rf"{protocol}://no-such.*'no-such-bucket-here' does not exist.*Fix"
        ):
            work()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body directly")
def test_a_run_is_trained_stopped_and_resumed(place: Path, tmp_path: Path) -> None:
    system = load("llava").tiny()
    stage = ["align"]
    options = RunOptions(workers=0, checkpoint_every=2)
    local = train(system, home=tmp_path, run="r", stages=stage, options=options)["align"]
    with pytest.raises(Paused, match="stopped at step 4"):
        train(system, home=place, run="r", stages=stage, options=RunOptions(workers=0, until=4))
    stored = train(system, home=place, run="r", stages=stage, options=options)["align"]
    assert stored.metrics["loss"] == local.metrics["loss"]
    info = storage.locate(stored.artifact) / "artifact.json"
    assert json.loads(info.read_text())["stage"] == "align"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://b/x", "AWS_ACCESS_KEY_ID"),
        ("gs://b/x", "GOOGLE_APPLICATION_CREDENTIALS"),
        ("az://b/x", "AZURE_STORAGE_CONNECTION_STRING"),
        ("hdfs://b/x", "its own client"),
    ],
)
def test_refused_access_names_the_credentials_of_that_store(url: str, words: str) -> None:
    error = stores.explained(OSError("Forbidden: o\nno permission"), url)  # of gcsfs
    assert isinstance(error, ResourceError)
    assert f"{url}: the store refuses access" in str(error) and words in str(error)


def test_azure_without_an_account_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    get_filesystem_class("az").clear_instance_cache()
    with pytest.raises(ResourceError, match=r"'az://none/x'.*Fix: set AZURE_STORAGE_CONNECTION"):
        storage.find_store("az://none/x")
