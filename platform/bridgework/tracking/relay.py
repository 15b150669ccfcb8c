"""The relay: posts the points of journals to the tracker from a side thread, and never holds up a run.

A tracker that is down costs the run nothing: its points stay in the journal, and go out when it is back or when a
later command replays what is `unfinished`. A ledger next to the files of a journal says how much of each was posted.
A crash between a post and its line in the ledger posts the points again, which the tracker takes as the same points.
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

LEDGER = "relayed.txt"  # the run's id, then a line for each post: a file of the journal, and how many bytes of it
BATCH = 1000  # points of a post: the most that MLflow takes in one call

log = logging.getLogger(__name__)


class MetricsForwarder:
    """Posts what journals hold, every (key, step) of a run once: of a step redone after a failure, the first.

    journals: run id -> folder of its journal. `follow` adds more while it runs. Must be closed.
    """

    def __init__(
        self, tracker: Tracker, journals: Mapping[str, Path] | None = None, *, every_s: float = 2.0
    ) -> None:
        self._tracker = tracker
        self._every_s = every_s
        self._tails: dict[str, _Tail] = {}
        self._trouble = ""
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
        """Post what is left, for at most `timeout_s` seconds; returns how many points must wait for a later command."""
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._thread.join(timeout_s)
        hung = (
            self._thread.is_alive()
        )  # in a post that does not return: what it holds is not for this thread
        left = sum((_Tail(t.run_id, t.folder) if hung else t).left() for t in self._tails.values())
        if left:
            log.warning(
                "%d points are not tracked yet (%s); the next command replays them",
                left,
                self._trouble,
            )
        return left

    def _loop(self) -> None:
        while not self._closing.wait(self._every_s):
            self._post()
        while (
            time.monotonic() < self._deadline and not self._post()
        ):  # past it, what is left is a later relay's
            time.sleep(min(self._every_s, 0.5))

    def _post(self) -> bool:
        """One attempt for every run; True if nothing went wrong."""
        trouble = ""
        for tail in list(self._tails.values()):  # `follow` may add one meanwhile
            try:
                tail.post(self._tracker)
            except (TrackingError, OSError, ValueError) as error:
                trouble = str(error)
        if trouble and not self._trouble:
            log.warning("%s; points wait in the journal meanwhile", trouble)
        if self._trouble and not trouble:
            log.info("the tracker is back; points that waited were posted")
        self._trouble = trouble
        return not trouble


def unfinished(root: Path) -> dict[str, Path]:
    """Run id -> journal, for every journal under `root` with points that were not posted: what to give a Relay."""
    folders = sorted(ledger.parent for ledger in root.rglob(LEDGER))
    known = {folder: (folder / LEDGER).read_text().split()[0] for folder in folders}
    return {run_id: folder for folder, run_id in known.items() if _Tail(run_id, folder).left()}


class _Tail:
    """One journal as it grows: how far each of its files was posted, and which steps of which keys."""

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
        """Points that were not posted yet."""
        return sum(len(points) for _, _, points in self._waiting())

    def post(self, tracker: Tracker) -> None:
        """Post what was written since, BATCH points at a time: memory stays bounded through any outage."""
        for name, end, points in self._waiting():
            if points:
                tracker.points(self.run_id, points)
            for point in points:
                self._seen.setdefault(point.key, Steps()).add(point.step)
            self._settle(name, end)

    def _waiting(self) -> Iterator[tuple[str, int, list[Point]]]:
        """(file, end, points), without points whose key and step were posted; in the order of writing."""
        taken: dict[str, Steps] = {}
        for name in self._journal.unread(self._posted):
            for end, points in self._journal.read(name, self._posted.get(name, 0), BATCH):
                new = []
                for point in points:
                    seen, here = self._seen.get(point.key), taken.setdefault(point.key, Steps())
                    if point.step not in here and (seen is None or point.step not in seen):
                        here.add(point.step)
                        new.append(point)
                yield name, end, new

    def _settle(self, name: str, end: int) -> None:
        # The newline leads: a line that a crash cut short says nothing, and spoils none after it.
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
        self.folder.mkdir(
            parents=True, exist_ok=True
        )  # none yet, or of a run in another store, which has the points
        self._write_ledger({})
        return {}

    def _write_ledger(self, posted: Mapping[str, int]) -> None:
        entries = "".join(f"\n{name} {end}" for name, end in posted.items())
        storage.write_atomic(self.folder / LEDGER, self.run_id + entries)


def _entry(line: str) -> tuple[str, int] | None:
    """(file, bytes that were posted) of a line; None for a line that was cut short.

    A line of an older version names a file alone: all of it was posted.
    """
    name, _, end = line.partition(" ")
    if end.isdecimal():
        return name, int(end)
    return (
        (name, sys.maxsize)
        if name.endswith(".jsonl") and not name.endswith(GROWING) and not end
        else None
    )


class Steps:
    """A set of step numbers, kept as ranges: a week of steps without a gap is one pair of numbers."""

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
