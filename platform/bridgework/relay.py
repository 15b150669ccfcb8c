"""The relay: posts the points of journals to the tracker from a side thread, and never holds up a run.

A tracker that is down costs the run nothing: its points stay in the journal, and go out when it is back or when a
later command replays what is `unfinished`. Beside the parts of a journal lies a ledger of those that were posted.
A crash between a post and its line in the ledger posts a part again, which the tracker takes as the same points.
"""

import logging
import os
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from bridgework.errors import TrackingError
from bridgework.tracking import Journal, Point, Tracker

LEDGER = "relayed.txt"  # the run's id, then the name of every part that was posted, a line each
BATCH = 1000  # points of a post: the most that MLflow takes in one call

log = logging.getLogger(__name__)


class Relay:
    """Posts what journals hold, every (key, step) of a run once: of a step redone after a failure, the first.

    journals: run id -> folder of its journal. `follow` adds more while it runs. Must be closed.
    """

    def __init__(self, tracker: Tracker, journals: Mapping[str, Path] | None = None, *, every_s: float = 2.0) -> None:
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
        left = sum(_Tail(t.run_id, t.folder).left() for t in self._tails.values())
        if left:
            log.warning("%d points are not tracked yet (%s); the next command replays them", left, self._trouble)
        return left

    def _loop(self) -> None:
        while not self._closing.wait(self._every_s):
            self._post()
        while time.monotonic() < self._deadline and not self._post():  # past it, what is left is a later relay's
            time.sleep(min(self._every_s, 0.5))

    def _post(self) -> bool:
        """One attempt for every run; True if nothing went wrong."""
        trouble = ""
        for tail in list(self._tails.values()):  # `follow` may add one meanwhile
            try:
                tail.sweep() if self._closing.is_set() else tail.poll()
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
    """One journal as it grows: what was posted, and what waits."""

    def __init__(self, run_id: str, folder: Path) -> None:
        self.run_id = run_id
        self.folder = folder
        self._journal = Journal(folder)
        self._posted = self._open_ledger()
        self._newest = ""
        self._seen: set[tuple[str, int]] = set()
        self._waiting: dict[str, list[Point]] = {}
        self.sweep()

    def sweep(self) -> None:
        """Read the journal whole: a part of a writer that was late may sort before parts already read."""
        parts = list(self._journal.points())
        for part, points in parts:
            if part in self._posted:
                self._seen |= {(p.key, p.step) for p in points}
        self._take(parts)

    def poll(self) -> None:
        self._take(self._journal.points(after=self._newest))

    def left(self) -> int:
        return sum(map(len, self._waiting.values()))

    def post(self, tracker: Tracker) -> None:
        while self._waiting:
            parts: list[str] = []
            points: list[Point] = []
            for part, some in self._waiting.items():
                if parts and len(points) + len(some) > BATCH:
                    break
                parts.append(part)
                points += some
            if points:
                tracker.points(self.run_id, points)
            self._settle(parts)

    def _take(self, parts: Iterable[tuple[str, list[Point]]]) -> None:
        for part, points in parts:
            self._newest = max(self._newest, part)
            if part in self._posted or part in self._waiting:
                continue
            self._waiting[part] = []
            for point in points:
                if (point.key, point.step) not in self._seen:
                    self._seen.add((point.key, point.step))
                    self._waiting[part].append(point)

    def _settle(self, parts: list[str]) -> None:
        with (self.folder / LEDGER).open("a") as ledger:
            # The newline leads: a line that a crash cut short names no part, and spoils none after it.
            ledger.write("".join(f"\n{part}" for part in parts))
            ledger.flush()
            os.fsync(ledger.fileno())
        for part in parts:
            self._posted.add(part)
            del self._waiting[part]

    def _open_ledger(self) -> set[str]:
        ledger = self.folder / LEDGER
        lines = ledger.read_text().split() if ledger.exists() else []
        if lines[:1] == [self.run_id]:
            return set(lines[1:])
        self.folder.mkdir(parents=True, exist_ok=True)  # none yet, or of a run in another store, which has the points
        temporary = ledger.with_suffix(".tmp")
        temporary.write_text(self.run_id)
        temporary.replace(ledger)
        return set()
