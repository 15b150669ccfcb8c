"""A store of its own for every test: a bucket of moto's S3 server."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from bridgework import storage
from tests.store.faults import FaultyStore


@pytest.fixture
def faults(server: FaultyStore) -> Iterator[FaultyStore]:
    """The server of the store; faults that a test switches on end with it."""
    yield server
    server.reset()


@pytest.fixture
def bucket(faults: FaultyStore, request: pytest.FixtureRequest) -> str:
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:40]
    name += f"-{uuid4().hex[:6]}"
    fs, _ = storage.find_store("s3://")
    fs.fs.mkdir(name)
    return name


@pytest.fixture
def place(bucket: str) -> Path:
    """A home in the store."""
    return storage.locate(f"s3://{bucket}/home")


@pytest.fixture
def store_home(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home in the store, which is also $BRIDGEWORK_HOME of this process."""
    monkeypatch.setenv("BRIDGEWORK_HOME", str(place))
    assert os.environ["AWS_ENDPOINT_URL"]
    return place
