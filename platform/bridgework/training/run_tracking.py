"""Run tracking: a tracker run per system with one child per stage, its inputs and outputs."""

import json
import os
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from bridgework import artifacts, storage
from bridgework.artifacts import StageResult
from bridgework.config import flat, to_dict
from bridgework.data import quarantine
from bridgework.errors import TrackingError
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking.tracker import MemoryTracker, Point, Status, Tracker
from bridgework.training import run_dir
from bridgework.training.skips import FILE as SKIPS


class RunRecord:
    """One run of a system and its stages in the tracker.

    A tracker that does not answer never stops a run: the rest is untracked. The same command later
    records everything, because it does not train finished stages again.
    """

    def __init__(
        self,
        tracker: Tracker | None,
        system: System,
        run: str,
        parent: str | None,
        say: Callable[[str], object],
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """tags: of the run and of the run of every stage."""
        self.tracker: Tracker = tracker or MemoryTracker()
        self._system, self._run, self._say = system, run, say
        self._tags = {
            "system": system.name,
            "fingerprint": system.fingerprint(),
            "git_commit": _commit(),
            "run": run,
        }
        self._tags |= tags or {}
        if (job := os.environ.get("RAY_JOB_SUBMISSION_ID")) is not None:
            self._tags["ray_job_id"] = job
        self._id: str | None = None
        self._open: str | None = None
        with self._try_tracker() as tracked:
            self._id = tracked.start(run, parent=parent, tags={**self._tags, "run_key": run})
            tracked.params(self._id, flat(system), resumed=True)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "recipe.json"
                file.write_text(json.dumps(to_dict(system), indent=1))
                tracked.file(self._id, file)

    def start(
        self, stage: Stage, inputs: Sequence[DatasetInput], parent: Path | None
    ) -> str | None:
        """Open the stage's run with its parameters and datasets; returns its id.

        Returns None if the tracker does not answer.
        """
        digest = artifacts.describe(parent).digest if parent else ""
        tags = {
            **self._tags,
            "stage": stage.name,
            "run_key": f"{self._run}/{stage.name}",
            "starts_from_digest": digest,
        }
        with self._try_tracker() as tracker:
            self._open = tracker.start(stage.name, parent=self._id, tags=tags)
            tracker.params(self._open, flat(stage), resumed=True)
            tracker.inputs(self._open, inputs)
        return self._open

    def done(self, stage: Stage, place: Path) -> StageResult:
        """Return the stage's result, after its images and weights are logged to the tracker."""
        metrics: dict[str, float] = json.loads((place / "metrics.json").read_text())
        result = StageResult(run_dir.artifact_dir(place), metrics)
        info = artifacts.describe(result.artifact)
        tags = {
            "digest": info.digest,
            "fingerprint": info.fingerprint,
            "stage": stage.name,
            "run": self._run,
        }
        with self._try_tracker() as tracker:
            if self._open is not None:
                images = [name for name in storage.names(place / "evals") if name.endswith(".png")]
                for name in images:
                    with storage.local_copy(place / "evals" / name) as image:
                        tracker.file(self._open, image, "evals")
                if (place / SKIPS).exists():
                    with storage.local_copy(place / SKIPS) as file:
                        tracker.file(self._open, file)
                quarantined = _count_quarantined(place / "quarantine", stage.budget.steps)
                tracker.points(self._open, quarantined)
                model_id = tracker.output(
                    self._open, f"{self._system.name}-{stage.name}", str(result.artifact), tags
                )
                tracker.finish(self._open)
                result = replace(result, run_id=self._open, model_id=model_id)
                self._open = None
        return result

    def finish(self, status: Status) -> None:
        with self._try_tracker() as tracker:
            for run_id in (self._open, self._id):
                if run_id is not None:
                    tracker.finish(run_id, status)

    @contextmanager
    def _try_tracker(self) -> Iterator[Tracker]:
        """Yield the tracker; after the first failure, it is one in memory."""
        try:
            yield self.tracker
        except (TrackingError, OSError) as error:  # OSError: a full disk never ends a run
            self.tracker, self._id, self._open = MemoryTracker(), None, None
            self._say(f"{error}; training continues untracked: the same command later records it")


def _count_quarantined(table: Path, step: int) -> list[Point]:
    """Count the rows that the stage quarantined, in total and by reason."""
    reasons = Counter(
        {(r.dataset, r.row): r.reason for r in quarantine.records(str(table))}.values()
    )
    now = int(time.time() * 1000)
    counts = {
        "quarantine.rows": reasons.total(),
        **{f"quarantine.{reason}": n for reason, n in reasons.items()},
    }
    return [Point(name, float(n), step, now) for name, n in counts.items()]


def _commit() -> str:
    """Return the git commit of the code, `-dirty` with changes; empty outside a repository."""
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
