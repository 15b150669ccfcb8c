"""Curation, sweeps and serving with a home in a store (S3)."""

from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import httpx
import pytest
import torch
from ray import serve

import bridgework as bw
from bridgework import artifacts, storage
from bridgework.curation.filters import Filters
from bridgework.data.dataset import verify
from bridgework.errors import DataError, SpecError, TrackingError
from bridgework.serving import launch
from bridgework.system import load
from bridgework.tracking.mlflow_store import MLflowReader
from bridgework.training.feature_cache import prepare
from bridgework.tuning import search
from bridgework.tuning.space import load as load_space


def test_a_dataset_is_curated_in_a_store(store_home: Path, home: Path) -> None:
    for place in (home, store_home):
        bw.curate(Filters(min_side=8), "synthetic:shapes", "in-a-store", home=place)
    made = bw.open_dataset("in-a-store", home=store_home)
    assert made.path == f"{store_home}/datasets/in-a-store"
    assert made.manifest.shards == bw.open_dataset("in-a-store", home=home).manifest.shards
    assert not list(verify(made.path))
    again = bw.curate(Filters(min_side=8), "synthetic:shapes", "in-a-store", home=store_home)
    assert again.digest == made.manifest.digest


def test_an_unknown_dataset_of_a_store_is_suggested(store_home: Path) -> None:
    bw.open_dataset("synthetic:shapes", home=store_home)
    with pytest.raises(DataError, match="did you mean 'synthetic-shapes'"):
        bw.open_dataset("synthetic-shape", home=store_home)


def test_features_are_cached_in_a_store(store_home: Path) -> None:
    tower = load("llava").tiny()["align"].model.vision
    data = [bw.open_dataset("synthetic:shapes", home=store_home)]
    torch.manual_seed(0)
    first = prepare(tower, data, draws=10**6, home=store_home, workers=0)
    assert first.folder is not None
    assert storage.is_published(first.folder / data[0].manifest.digest)
    torch.manual_seed(0)
    again = prepare(tower, data, draws=10**6, home=store_home, workers=0)
    assert (again.folder, again.why[:24]) == (first.folder, "the features of 1 datase")


def test_a_sweep_says_that_it_needs_a_folder(store_home: Path) -> None:
    with pytest.raises(SpecError, match="keeps its study in a database file"):
        search.sweep(load_space("tests.tuning.tiny"), home=store_home, run="sweep")


def test_a_model_is_served_from_a_store(ray_session: None, store_home: Path) -> None:
    system = load("llava").tiny()
    torch.manual_seed(0)
    state = system["instruct"].model.build().state_dict()
    folder = store_home / "weights"
    artifacts.save(folder, state, system=system, stage="instruct")
    options = {"model": str(folder), "dev": True, "cpus": 0.5, "home": str(store_home)}
    endpoint = launch.start("chat", options, launch.AppAddress(port=launch.free_port()))
    try:
        asked = {"model": "weights", "max_tokens": 4}
        asked |= {"messages": [{"role": "user", "content": "What is it?"}]}
        url = f"{endpoint.address}/v1/chat/completions"
        with httpx.Client(timeout=120, trust_env=False) as client:
            answer = client.post(url, json=asked)
    finally:
        endpoint.stop()
        serve.shutdown()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["role"] == "assistant"
    assert len(storage.names(store_home / "deployments")) == 1


def test_a_home_in_a_store_needs_a_tracking_server(
    store_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match=r"Got no MLFLOW_TRACKING_URI.*Fix: set MLFLOW_TRACK"):
        MLflowReader(None, store_home)


class Guarded(BaseHTTPRequestHandler):
    """A tracking server's front that asks for a token; it has no experiments and no models."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Authorization", ""))
        known = self.asked[-1] == "Bearer the-token"
        self.send_response(200 if known else 401)
        self.end_headers()
        # as MLflow's own authentication answers
        self.wfile.write(b"{}" if known else b"You are not authenticated.")

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


def test_a_tracking_server_gets_the_token(
    store_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = HTTPServer(("127.0.0.1", 0), Guarded)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "another")
        with pytest.raises(TrackingError, match=r"refuses access.*Fix: set MLFLOW_TRACKING_TOKEN"):
            MLflowReader(None, store_home)
        monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "the-token")
        assert MLflowReader(None, store_home).models() == []
        assert Guarded.asked[-1] == "Bearer the-token"
    finally:
        server.shutdown()
        server.server_close()
