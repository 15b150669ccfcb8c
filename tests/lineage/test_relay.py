"""Relay: every point reaches the tracker once, after a failure of tracker, relay or run."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient

from bridgework.errors import TrackingError
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.relay import LEDGER, MetricsForwarder, Steps, unfinished
from bridgework.tracking.tracker import Journal, MemoryTracker, Point


class Switched(MemoryTracker):
    """A tracker that answers while it is up."""

    up = True

    def points(self, run_id: str, points: list[Point]) -> None:
        if not self.up:
            raise TrackingError("the tracker does not answer")
        super().points(run_id, points)


def write(folder: Path, steps: range, loss: float = 1.0, a_part: int = 1) -> None:
    journal = Journal(folder)
    for step in steps:
        journal.append({"loss": loss, "lr": 0.1}, step)
        if step % a_part == 0:
            journal.flush()
    journal.flush()


def steps(tracker: MemoryTracker, run: str, key: str = "loss") -> list[int]:
    return [p.step for p in tracker.runs[run].points if p.key == key]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what} in vain"
        time.sleep(0.01)


def test_points_arrive_during_the_run(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run = tracker.start("align")
    with closing(MetricsForwarder(tracker, {run: tmp_path}, every_s=0.01)):
        write(tmp_path, range(5))
        wait_for(lambda: steps(tracker, run) == [0, 1, 2, 3, 4], "the first points")
        write(tmp_path, range(5, 7))
        wait_for(lambda: len(steps(tracker, run)) == 7, "the next points")


def test_close_posts_what_the_last_round_missed(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run = tracker.start("align")
    relay = MetricsForwarder(tracker, {run: tmp_path}, every_s=60)
    write(tmp_path, range(2_500), a_part=30)
    assert relay.close() == 0
    assert steps(tracker, run) == list(range(2_500))


def test_step_repeated_after_a_failure_is_posted_once(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run = tracker.start("align")
    write(tmp_path, range(10), loss=1.0)
    assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
    write(tmp_path, range(7, 15), loss=2.0)
    assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
    assert steps(tracker, run) == list(range(15))
    assert [p.value for p in tracker.runs[run].points if p.key == "loss"] == [1.0] * 10 + [2.0] * 5


def test_part_of_a_late_writer_is_posted_and_its_known_steps_are_not(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run = tracker.start("align")
    relay = MetricsForwarder(tracker, {run: tmp_path}, every_s=0.01)
    write(tmp_path, range(3))
    wait_for(lambda: len(steps(tracker, run)) == 3, "the first points")
    late = [vars(Point("loss", 9.0, step, 1)) for step in (2, 3)]
    (tmp_path / f"{0:020d}-ffffff.jsonl").write_text("".join(json.dumps(p) + "\n" for p in late))
    assert relay.close() == 0
    assert sorted(steps(tracker, run)) == [0, 1, 2, 3]
    assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
    assert sorted(steps(tracker, run)) == [0, 1, 2, 3]


def test_points_of_an_outage_arrive_when_the_tracker_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Switched()
    run = tracker.start("align")
    with closing(MetricsForwarder(tracker, {run: tmp_path}, every_s=0.01)):
        write(tmp_path, range(3))
        wait_for(lambda: len(steps(tracker, run)) == 3, "the first points")
        tracker.up = False
        write(tmp_path, range(3, 6))
        wait_for(lambda: "points wait in the journal" in caplog.text, "the warning")
        tracker.up = True
        wait_for(lambda: len(steps(tracker, run)) == 6, "the points of the outage")
    assert caplog.text.count("points wait") == 1
    assert steps(tracker, run) == list(range(6))


def test_points_left_by_a_closed_relay_are_replayed_by_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Switched()
    tracker.up = False
    runs = {
        tracker.start(name): tmp_path / "runs" / name / "journal" for name in ("align", "instruct")
    }
    relay = MetricsForwarder(tracker, runs, every_s=0.01)
    for folder in runs.values():
        write(folder, range(4))
    assert relay.close(timeout_s=0.2) == 16
    assert (
        "16 points are not tracked yet (the tracker does not answer); the next command replays them"
        in caplog.text
    )
    assert unfinished(tmp_path) == {run: (folder, 8) for run, folder in runs.items()}
    tracker.up = True
    assert MetricsForwarder(tracker, runs).close() == 0
    assert unfinished(tmp_path) == {}
    assert [steps(tracker, run) for run in runs] == [[0, 1, 2, 3]] * 2


def test_a_week_of_steps_is_stored_in_a_few_numbers() -> None:
    seen, order = Steps(), list(range(1, 2_000, 2)) + list(range(0, 2_000, 2))
    for step in order:
        assert step not in seen
        seen.add(step)
        seen.add(step)
    assert all(step in seen for step in range(2_000)) and 2_000 not in seen and -1 not in seen
    assert len(seen._starts) == 1


@given(st.lists(st.integers(0, 30)))
def test_steps_are_a_set(added: list[int]) -> None:
    seen = Steps()
    for step in added:
        seen.add(step)
    assert [step for step in range(-1, 32) if step in seen] == sorted(set(added))


def test_points_posted_by_an_older_version_are_not_posted_again(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run = tracker.start("align")
    names = [f"{10**18 + step:020d}-abcdef.jsonl" for step in range(4)]
    for step, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps(vars(Point("loss", 1.0, step, 1))) + "\n")
    (tmp_path / LEDGER).write_text("\n".join([run, *names[:2]]))
    write(tmp_path, range(2, 6))
    assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
    assert steps(tracker, run) == [2, 3, 4, 5]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_ledger_cut_anywhere_loses_no_point(cut: int, tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run = tracker.start("align")
    write(tmp_path, range(4))
    assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
    ledger = tmp_path / LEDGER
    ledger.write_text(ledger.read_text()[:-cut])
    write(tmp_path, range(4, 6))
    assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
    assert set(steps(tracker, run)) == set(range(6))
    assert unfinished(tmp_path) == {}


def test_ledger_line_truncated_by_a_crash_affects_no_later_line(
    mlflow_tracker: MLflowTracker, tmp_path: Path
) -> None:
    run = mlflow_tracker.start("align")
    write(tmp_path, range(4))
    assert MetricsForwarder(mlflow_tracker, {run: tmp_path}).close() == 0
    ledger = tmp_path / LEDGER
    ledger.write_text(
        ledger.read_text()[:-9]
    )  # the last part was posted, and its line is incomplete on the disk
    write(tmp_path, range(4, 6))
    assert MetricsForwarder(mlflow_tracker, {run: tmp_path}).close() == 0
    history = MlflowClient(mlflow_tracker.uri).get_metric_history(run, "train/loss")
    assert sorted(m.step for m in history) == list(range(6))
    assert unfinished(tmp_path) == {}


def test_run_in_another_store_gets_every_point(tmp_path: Path) -> None:
    write(tmp_path, range(4))
    for tracker in (MemoryTracker(), MemoryTracker()):
        run = tracker.start("align")
        assert MetricsForwarder(tracker, {run: tmp_path}).close() == 0
        assert steps(tracker, run) == [0, 1, 2, 3]


# --- over HTTP -------------------------------------------------------------------------------------------------------


class JustEnough(ThreadingHTTPServer):
    """Answers the requests that open a project; delays every post of points until it is released."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.released = threading.Event()


class Answer(BaseHTTPRequestHandler):
    server: JustEnough

    def do_GET(self) -> None:
        known = {"experiment": {"experiment_id": "1", "name": "p", "lifecycle_stage": "active"}}
        self._answer(known if "get-by-name" in self.path else {})

    def do_POST(self) -> None:
        if "log-batch" in self.path:
            self.server.released.wait()
        self._answer({})

    def _answer(self, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


@pytest.mark.timeout(10)  # less than MLflow's client waits by itself, retry included
@pytest.mark.parametrize("server_is", ["gone", "hanging"])
def test_dead_server_delays_no_call_beyond_the_timeout(server_is: str, tmp_path: Path) -> None:
    server = JustEnough()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    tracker = MLflowTracker(f"http://127.0.0.1:{server.server_port}", tmp_path, "p")
    if server_is == "gone":
        server.server_close()
    relay = MetricsForwarder(tracker, {"0123abc": tmp_path}, every_s=0.01)
    write(tmp_path, range(50))
    assert relay.close(timeout_s=0.5) == 100
    assert unfinished(tmp_path) == {"0123abc": (tmp_path, 100)}
    server.released.set()
    server.shutdown()
    server.server_close()


@contextmanager
def mlflow_server(home: Path, port: int) -> Iterator[str]:
    words = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--workers",
        "1",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    words += [
        "--backend-store-uri",
        f"sqlite:///{home}/mlflow.db",
        "--artifacts-destination",
        str(home / "artifacts"),
    ]
    env = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    process = subprocess.Popen(
        words, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            assert process.poll() is None, "mlflow server ended by itself"
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, 15)
        process.wait(30)


@pytest.mark.slow
def test_server_stopped_in_the_middle_of_a_run_costs_no_point(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    journal = tmp_path / "journal"
    with mlflow_server(tmp_path, port) as uri:
        tracker = MLflowTracker(uri, tmp_path, "p")
        run = tracker.start("align", tags={"run_key": "k"})
        relay = MetricsForwarder(tracker, {run: journal}, every_s=0.05)
        write(journal, range(100))
        client = MlflowClient(uri)
        wait_for(
            lambda: len(client.get_metric_history(run, "train/loss")) >= 50,
            "points before the outage",
        )
    write(journal, range(100, 200))
    wait_for(lambda: "points wait in the journal" in caplog.text, "the relay to notice")
    with mlflow_server(tmp_path, port) as uri:
        write(journal, range(200, 300))
        assert relay.close(timeout_s=60) == 0
        assert MetricsForwarder(tracker, {run: journal}).close() == 0
        for key in ("loss", "lr"):
            assert [m.step for m in client.get_metric_history(run, f"train/{key}")] == list(
                range(300)
            )
        (tmp_path / "recipe.json").write_text("{}")
        tracker.file(run, tmp_path / "recipe.json")
        model = tracker.output(run, "llava-align", "/runs/align", {"digest": "w" * 64})
        version = tracker.register("llava", model, run, "/runs/align", {"digest": "w" * 64})
        tracker.alias("llava", "champion", version.version)
        assert tracker.version("llava", "champion").artifact == "/runs/align"
        assert tracker.start("align", tags={"run_key": "k"}) == run
