"""Metrics relay: posts journals to the tracker from a thread, without delaying a run.

A tracker that is down costs the run nothing. The points stay in the journal until it is back, or
until a later command posts the `unfinished` journals. A ledger next to the files of a journal
records the posted bytes of each. After a crash between a post and its ledger line the points are
posted again; the tracker stores equal points once.
"""

import logging
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from bridgework import storage
from bridgework.errors import TrackingError
from bridgework.tracking.tracker import GROWING, Journal, Point, Tracker

# The run's id, then a line per post: a file of the journal, and the number of its posted bytes.
LEDGER = "relayed.txt"
BATCH = 1000  # points per post: MLflow's maximum per call

log = logging.getLogger(__name__)


class MetricsForwarder:
    """Posts the points of journals from a thread, every (key, step) of a run once.

    If a step was repeated after a failure, its first points are posted. journals: run id -> folder
    of its journal; `follow` adds more later. It must be closed.
    """

    def __init__(
        self, tracker: Tracker, journals: Mapping[str, Path] | None = None, *, every_s: float = 2.0
    ) -> None:
        self._tracker = tracker
        self._every_s = every_s
        self._tails: dict[str, _Tail] = {}
        self._error = ""  # of the last attempt
        self._closing = threading.Event()
        self._deadline = 0.0  # of the last attempts, on the monotonic clock
        for run_id, folder in (journals or {}).items():
            self.follow(run_id, folder)
        self._thread = threading.Thread(target=self._loop, name="relay", daemon=True)
        self._thread.start()

    def follow(self, run_id: str, folder: Path) -> None:
        if run_id not in self._tails:
            self._tails[run_id] = _Tail(run_id, folder)

    def close(self, timeout_s: float = 10.0) -> int:
        """Post the remaining points, for at most `timeout_s` seconds.

        Returns the number of points that a later command must post.
        """
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        # A thread in a post that does not return still owns its tails, so new ones are read.
        hung = self._thread.is_alive()
        left = sum((_Tail(t.run_id, t.folder) if hung else t).left() for t in self._tails.values())
        if left:
            log.warning(
                "%d points are not tracked yet (%s); the next command replays them",
                left,
                self._error,
            )
        return left

    def _loop(self) -> None:
        while not self._closing.wait(self._every_s):
            self._post()
        # After the deadline, a later relay posts the rest.
        while time.monotonic() < self._deadline and not self._post():
            time.sleep(min(self._every_s, 0.5))

    def _post(self) -> bool:
        """Post the new points of every run; returns True without an error."""
        failure = ""
        for tail in list(self._tails.values()):  # a copy, because `follow` may add one
            try:
                tail.post(self._tracker)
            except (TrackingError, OSError, ValueError) as error:
                failure = str(error)
        if failure and not self._error:
            log.warning("%s; points wait in the journal meanwhile", failure)
        if self._error and not failure:
            log.info("the tracker is back; the waiting points were posted")
        self._error = failure
        return not failure


def unfinished(root: Path) -> dict[str, tuple[Path, int]]:
    """Return run id -> (journal, points) of all journals under `root` with points to post."""
    found = {}
    for ledger in sorted(root.rglob(LEDGER)):
        journal = ledger.parent
        run_id, *lines = ledger.read_text().splitlines()
        posted = dict(filter(None, map(_entry, lines)))
        # The sizes of the files are enough for most runs; only the others are read.
        if Journal(journal).unread(posted) and (left := _Tail(run_id, journal).left()):
            found[run_id] = (journal, left)
    return found


class _Tail:
    """One growing journal: the posted bytes of each file, and the posted steps of each key."""

    def __init__(self, run_id: str, folder: Path) -> None:
        self.run_id = run_id
        self.folder = folder
        self._journal = Journal(folder)
        self._posted = self._open_ledger()  # file -> bytes
        self._seen: dict[str, Steps] = {}
        for name, end in sorted(self._posted.items()):
            for _, points in self._posted_points(name, end):
                for point in points:
                    self._seen.setdefault(point.key, Steps()).add(point.step)

    def _posted_points(self, name: str, end: int) -> Iterator[tuple[int, list[Point]]]:
        with suppress(FileNotFoundError):
            for at, points in self._journal.read(name, most=1):
                if at > end:
                    return
                yield at, points

    def left(self) -> int:
        """Count the points that were not posted yet."""
        return sum(len(points) for _, _, points in self._waiting())

    def post(self, tracker: Tracker) -> None:
        """Post the new points, BATCH at a time, so that memory is bounded after any outage."""
        for name, end, points in self._waiting():
            if points:
                tracker.points(self.run_id, points)
            for point in points:
                self._seen.setdefault(point.key, Steps()).add(point.step)
            self._settle(name, end)

    def _waiting(self) -> Iterator[tuple[str, int, list[Point]]]:
        """Yield (file, end, points) in the order of writing, without posted keys and steps."""
        yielded: dict[str, Steps] = {}
        for name in self._journal.unread(self._posted):
            for end, points in self._journal.read(name, self._posted.get(name, 0), BATCH):
                new = []
                for point in points:
                    posted = self._seen.get(point.key)
                    steps = yielded.setdefault(point.key, Steps())
                    if point.step not in steps and (posted is None or point.step not in posted):
                        steps.add(point.step)
                        new.append(point)
                yield name, end, new

    def _settle(self, name: str, end: int) -> None:
        # The newline comes first, so that a line truncated by a crash does not affect the next one.
        storage.append(self.folder / LEDGER, f"\n{name} {end}")
        self._posted[name] = end

    def _open_ledger(self) -> dict[str, int]:
        ledger = self.folder / LEDGER
        lines = ledger.read_text().splitlines() if ledger.exists() else []
        if lines[:1] == [self.run_id]:
            posted = dict(filter(None, map(_entry, lines[1:])))
            if len(lines) > 10 * len(posted) + 1_000:
                self._write_ledger(posted)
            return posted
        # There is no ledger yet, or it is that of a run in another store.
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write_ledger({})
        return {}

    def _write_ledger(self, posted: Mapping[str, int]) -> None:
        entries = "".join(f"\n{name} {end}" for name, end in posted.items())
        storage.write_atomic(self.folder / LEDGER, self.run_id + entries)


def _entry(line: str) -> tuple[str, int] | None:
    """Parse (file, posted bytes) of a ledger line; returns None for a truncated line.

    A line of an older version is only a file name: the complete file was posted.
    """
    name, _, end = line.partition(" ")
    if end.isdecimal():
        return name, int(end)
    old = name.endswith(".jsonl") and not name.endswith(GROWING) and not end
    return (name, sys.maxsize) if old else None


class Steps:
    """A set of step numbers, stored as ranges: a week of steps without a gap is two numbers."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []  # exclusive

    def __contains__(self, step: int) -> bool:
        at = bisect_right(self._starts, step) - 1
        return at >= 0 and step < self._ends[at]

    def add(self, step: int) -> None:
        if step in self:
            return
        at = bisect_right(self._starts, step)
        joins_before = at > 0 and self._ends[at - 1] == step
        joins_after = at < len(self._starts) and self._starts[at] == step + 1
        if joins_before and joins_after:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif joins_before:
            self._ends[at - 1] = step + 1
        elif joins_after:
            self._starts[at] = step
        else:
            self._starts.insert(at, step)
            self._ends.insert(at, step + 1)
