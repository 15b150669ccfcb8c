"""The metrics journal, and the tracker in memory."""

import json
import os
import time
from pathlib import Path

import pytest

from bridgework.errors import TrackingError
from bridgework.mixture import DatasetInput
from bridgework.tracking import tracker as tracking
from bridgework.tracking.tracker import Journal, MemoryTracker, Point, Tracker

SHAPES = DatasetInput(name="shapes", digest="ab" * 32, path="/data/shapes", rows=256)


def read(journal: Journal, after: str = "") -> list[tuple[str, float, int]]:
    return [(p.key, p.value, p.step) for _, points in journal.points(after) for p in points]


def test_points_come_back_in_the_order_of_writing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.append({"loss": 2.0, "lr": 1e-3}, 1)
    journal.append({"loss": 1.5}, 2)
    journal.flush()
    journal.append({"loss": 1.25}, 3)
    journal.flush()
    assert read(journal) == [("loss", 2.0, 1), ("lr", 1e-3, 1), ("loss", 1.5, 2), ("loss", 1.25, 3)]
    assert all(p.at > 1.6e12 for _, points in journal.points() for p in points)  # milliseconds


def test_nothing_is_written_before_flush_nor_by_an_empty_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.flush()
    journal.append({"loss": 2.0}, 1)
    assert not journal.folder.exists()
    assert read(journal) == []


def test_reader_continues_at_its_position(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"loss": 2.0}, 1)
    journal.flush()
    [(part, _)] = journal.points()
    journal.append({"loss": 1.0}, 2)
    journal.flush()
    assert read(journal, after=part) == [("loss", 1.0, 2)]


def test_repeated_step_occurs_twice(tmp_path: Path) -> None:
    for value in (2.0, 2.0):  # a worker, and the one that took its place
        journal = Journal(tmp_path)
        journal.append({"loss": value}, 7)
        journal.flush()
    assert read(Journal(tmp_path)) == [("loss", 2.0, 7)] * 2


def test_writer_with_a_slow_clock_still_sorts_last(tmp_path: Path) -> None:
    ahead = tmp_path / f"{time.time_ns() + 10**15:020d}-abcdef.jsonl"
    ahead.write_text(json.dumps({"key": "loss", "value": 2.0, "step": 1, "at": 0}) + "\n")
    journal = Journal(tmp_path)
    for step in (2, 3):
        journal.append({"loss": 1.0}, step)
        journal.flush()
    assert read(journal, after=ahead.name) == [("loss", 1.0, 2), ("loss", 1.0, 3)]


def test_incomplete_line_is_read_once_it_is_complete(
    tmp_path: Path,
) -> None:
    journal = Journal(tmp_path)
    journal.append({"loss": 2.0}, 1)
    journal.flush()
    [(position, _)] = journal.points()
    (file,) = tmp_path.iterdir()
    line = json.dumps({"step": 2, "at": 0, "values": {"loss": 1.0}}) + "\n"
    with file.open("a") as other:
        other.write(line[:17])
    assert read(journal) == [("loss", 2.0, 1)]
    assert read(journal, after=position) == []
    with file.open("a") as other:
        other.write(line[17:])
    assert read(journal, after=position) == [("loss", 1.0, 2)]


def test_a_flush_lists_no_folder_and_opens_no_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work of a flush is bounded: a week's run has as many files as a minute's."""
    for number in range(50):
        (tmp_path / f"{10**18 + number:020d}-abcdef.jsonl").write_text("")
    journal, listed = Journal(tmp_path), list[str]()
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda *given: listed.append("listed") or real(*given))
    for step in range(200):
        journal.append({"loss": 1.0}, step)
        journal.flush()
    assert len(listed) == 1
    assert len(real(tmp_path)) == 51
    assert [step for _, _, step in read(journal)] == list(range(200))


def test_a_file_of_full_size_is_followed_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FILE_BYTES", 200)
    journal = Journal(tmp_path)
    for step in range(20):
        journal.append({"loss": 1.0}, step)
        journal.flush()
    assert 1 < len(list(tmp_path.iterdir())) < 20
    assert [step for _, _, step in read(journal)] == list(range(20))


def test_points_of_an_older_version_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"key": key, "value": 2.0, "step": 1, "at": 0}) for key in ("loss", "lr")]
    (tmp_path / f"{10**18:020d}-abcdef.jsonl").write_text("\n".join(lines) + "\n")
    assert read(Journal(tmp_path)) == [("loss", 2.0, 1), ("lr", 2.0, 1)]


def test_metrics_that_cannot_be_written_wait_and_never_raise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "journal"
    folder.write_text("a file where the folder should be")
    journal = Journal(folder)
    for step in range(3):
        journal.append({"loss": float(step)}, step)
        journal.flush()
    assert caplog.text.count("metrics are kept in memory") == 1
    folder.unlink()
    journal.append({"loss": 3.0}, 3)
    journal.flush()
    assert read(journal) == [("loss", float(step), step) for step in range(4)]
    assert "metrics are written again; those of 0 steps were lost" in caplog.text


def test_waiting_metrics_are_bounded_and_lost_ones_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "MAX_PENDING", 4)
    folder = tmp_path / "journal"
    folder.write_text("a file where the folder should be")
    journal = Journal(folder)
    for step in range(6):
        journal.append({"loss": 1.0}, step)
        journal.flush()
    folder.unlink()
    journal.flush()
    assert [step for _, _, step in read(journal)] == [2, 3, 4, 5]
    assert "those of 2 steps were lost" in caplog.text


def test_infinite_and_undefined_values_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append({"a": float("nan"), "b": float("inf")}, 1)
    journal.flush()
    (_, undefined, _), (_, infinite, _) = read(journal)
    assert undefined != undefined and infinite == float("inf")


def test_run_with_the_same_key_is_resumed() -> None:
    tracker: Tracker = MemoryTracker()
    parent = tracker.start("llava", tags={"run_key": "r1"})
    tracker.finish(parent, "FAILED")
    assert tracker.start("llava", tags={"run_key": "r1"}) == parent
    assert tracker.start("llava", tags={"run_key": "r2"}) != parent
    assert tracker.start("llava", parent=parent, tags={"run_key": "r1"}) != parent
    assert tracker.start("llava") != tracker.start("llava")


def test_run_stores_logged_values(tmp_path: Path) -> None:
    tracker = MemoryTracker()
    run_id = tracker.start("align", tags={"run_key": "r1"})
    point = Point("loss", 2.0, 1, 0)
    tracker.params(run_id, {"optim.peak_lr": 1e-3})
    tracker.params(run_id, {"seed": 0})
    tracker.inputs(run_id, [SHAPES])
    tracker.inputs(run_id, [SHAPES])
    tracker.points(run_id, [point])
    tracker.file(run_id, tmp_path / "recipe.json")
    tracker.file(run_id, tmp_path / "grid.png", "evals")
    tracker.finish(run_id)
    run = tracker.runs[run_id]
    assert run.params == {"optim.peak_lr": 1e-3, "seed": 0}
    assert (run.inputs, run.points) == ([SHAPES], [point])
    assert (run.files, run.status) == (["recipe.json", "evals/grid.png"], "FINISHED")


def test_an_alias_points_at_one_version() -> None:
    tracker = MemoryTracker()
    run_id = tracker.start("align")
    for artifact in ("/a", "/b"):
        model_id = tracker.output(run_id, "align", artifact, {})
        tracker.register("llava", model_id, run_id, artifact, {"fingerprint": "f"})
    tracker.alias("llava", "champion", "1")
    tracker.alias("llava", "challenger", "2")
    tracker.alias("llava", "champion", "2")
    assert tracker.version("llava", "1").aliases == ()
    champion = tracker.version("llava", "champion")
    assert (champion.version, champion.artifact, champion.run_id) == ("2", "/b", run_id)
    assert champion.aliases == ("challenger", "champion")


def test_unknown_name_is_an_error() -> None:
    tracker = MemoryTracker()
    run_id = tracker.start("align")
    tracker.register("llava", tracker.output(run_id, "align", "/a", {}), run_id, "/a", {})
    tracker.alias("llava", "champion", "1")
    with pytest.raises(TrackingError, match="no model 'lava' is registered; did you mean 'llava'"):
        tracker.version("lava", "1")
    with pytest.raises(TrackingError, match="no version or alias 'champ'; did you mean 'champion'"):
        tracker.version("llava", "champ")
    with pytest.raises(TrackingError, match="no version or alias '2'"):
        tracker.alias("llava", "champion", "2")
    with pytest.raises(TrackingError, match="no run 'x'"):
        tracker.points("x", [])
    with pytest.raises(TrackingError, match="no run 'x'"):
        tracker.output("x", "align", "/a", {})
