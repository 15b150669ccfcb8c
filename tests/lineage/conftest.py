"""Fixtures: one MLflow store for all tests, since its tables take seconds; one project per test."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.tracker import MemoryTracker, Tracker


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("store")
    MLflowTracker(f"sqlite:///{home}/mlflow.db", home, "first")
    return home


@pytest.fixture
def mlflow_tracker(store: Path, request: pytest.FixtureRequest) -> MLflowTracker:
    return MLflowTracker(f"sqlite:///{store}/mlflow.db", store, request.node.name)


@pytest.fixture(params=["memory", "mlflow"])
def tracker(request: pytest.FixtureRequest) -> Iterator[Tracker]:
    yield (
        MemoryTracker() if request.param == "memory" else request.getfixturevalue("mlflow_tracker")
    )
