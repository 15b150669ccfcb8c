"""The tracker on a real PostgreSQL server, which the test starts with its own data folder."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from bridgework import api, override
from bridgework.system import load
from bridgework.tracking.lineage import trace
from bridgework.tracking.lineage_views import to_json
from bridgework.tracking.mlflow_store import MLflowReader, MLflowTracker

BIN = next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BIN is None, reason="PostgreSQL is not installed"),
]


def run(*words: str) -> None:
    """Run a program of PostgreSQL, which refuses to run as root."""
    assert BIN is not None
    command = [str(BIN / words[0]), *words[1:]]
    if os.geteuid() == 0:
        command = ["runuser", "-u", "postgres", "--", *command]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    # In /tmp itself, because another user may not enter pytest's own folders.
    folder = Path(f"/tmp/bridgework-postgresql-{os.getpid()}")
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, "postgres", "postgres")
        run("initdb", "-D", f"{folder}/data", "-U", "owner", "--auth=trust", "--no-sync")
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}"
        run("pg_ctl", "-D", f"{folder}/data", "-o", options, "-l", f"{folder}/log", "-w", "start")
        try:
            run("createdb", "-h", "127.0.0.1", "-p", str(port), "-U", "owner", "mlflow")
            yield f"postgresql+psycopg2://owner@127.0.0.1:{port}/mlflow"
        finally:
            run("pg_ctl", "-D", f"{folder}/data", "-m", "fast", "-w", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _open(uri: str, home: Path) -> str:
    return MLflowTracker(uri, home, "shared").start("opened")


def test_drivers_that_open_a_new_database_together_share_it(server: str, tmp_path: Path) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = list(pool.map(_open, [server] * 2, [tmp_path] * 2))
    reader = MLflowReader(server, tmp_path)
    assert [reader.run(run_id).name for run_id in runs] == ["opened"] * 2


def test_run_is_recorded_registered_and_traced(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    system = override(load("llava").tiny(), {"stages.*.budget.steps": 2})
    results = api.train(system, home=tmp_path, run="pg")
    reader = MLflowReader(None, tmp_path)
    align = results["align"].run_id or ""
    assert sorted(reader.history(align, "train/loss")) == [0, 1]
    graph = to_json(trace(results["instruct"].version or "", reader, tmp_path))
    names = {node["title"] for node in graph["nodes"].values()}
    assert {"stage align of llava-tiny", "stage instruct of llava-tiny"} <= names
