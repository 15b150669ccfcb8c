"""Run tracking: a tracker run per system with one child per stage, its inputs and outputs."""

import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from bridgework import artifacts, storage
from bridgework.artifacts import StageResult
from bridgework.config import flat, to_dict
from bridgework.data import quarantine
from bridgework.errors import RunError, TrackingError
from bridgework.evaluation import results
from bridgework.mixture import DatasetInput
from bridgework.system import Stage, System
from bridgework.tracking import card, environment, evaluations
from bridgework.tracking.openlineage_events import Artifact, Event, State, emit
from bridgework.tracking.relay import MetricsForwarder, unfinished
from bridgework.tracking.tracker import MemoryTracker, Point, Status, Tracker
from bridgework.training import run_dir, snapshots
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
        *,
        home: Path,
    ) -> None:
        """tags: of the run and of the run of every stage."""
        self.tracker: Tracker = tracker or MemoryTracker()
        self._system, self._run, self._say = system, run, say
        self._home, self._tracked = home, tracker is not None
        self._event: Event | None = None  # of the stage that trains
        self._tags = {
            "system": system.name,
            "fingerprint": system.fingerprint(),
            "run": run,
            **environment.tags(),
            **(tags or {}),
        }
        self._id: str | None = None
        self._runs: dict[Path, str] = {}  # artifact -> the run that made it
        self._open: str | None = None
        with self._try_tracker() as tracked:
            self._id = tracked.start(run, parent=parent, tags={**self._tags, "run_key": run})
            tracked.params(self._id, flat(system), resumed=True)
            with tempfile.TemporaryDirectory() as folder:
                file = Path(folder) / "recipe.json"
                file.write_text(json.dumps(to_dict(system), indent=1))
                tracked.file(self._id, file)

    def start(
        self,
        stage: Stage,
        inputs: Sequence[DatasetInput],
        parent: Path | None,
        *,
        finished: bool = False,
    ) -> str | None:
        """Open the stage's run with its parameters and datasets; returns its id.

        finished: it was trained before, and is only recorded.
        Returns None if the tracker does not answer.
        """
        digest = artifacts.describe(parent).digest if parent else ""
        tags = {
            **self._tags,
            "stage": stage.name,
            "seed": str(stage.seed),
            "run_key": f"{self._run}/{stage.name}",
            "starts_from_digest": digest,
        }
        if parent is not None and parent in self._runs:
            tags["starts_from_run"] = self._runs[parent]
        with self._try_tracker() as tracker:
            self._open = tracker.start(stage.name, parent=self._id, tags=tags)
            tracker.params(self._open, flat(stage), resumed=True)
            tracker.inputs(self._open, inputs)
            if self._id is not None:  # the UI then shows them with the run of the system too
                tracker.inputs(self._id, inputs)
        if self._tracked and not finished:
            read = [Artifact(d.path, d.digest) for d in inputs]
            start = [Artifact(str(parent), digest)] if parent else []
            self._event = Event(
                "STAGE",
                f"{self._system.name}/{stage.name}",
                "START",
                run=self._open or f"{self._run}/{stage.name}",
                inputs=[*read, *start],
                parent=(self._system.name, self._id or self._run),
                tags={"run": self._run, "fingerprint": self._system.fingerprint()},
            )
            emit(self._home, self._event)
        return self._open

    def note(self, values: Mapping[str, str]) -> None:
        """Log parameters of the open stage that are not fields of its recipe."""
        with self._try_tracker() as tracker:
            if self._open is not None:
                tracker.params(self._open, values, resumed=True)

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
        if snapshots.BEST_STEP in metrics:
            tags["steps"] = str(info.steps)
        self._emit("COMPLETE", [Artifact(str(result.artifact), info.digest)])
        files = results.assign_weights(place / results.FOLDER, info.digest)
        with self._try_tracker() as tracker:
            if self._open is not None:
                if (place / SKIPS).exists():
                    with storage.local_copy(place / SKIPS) as file:
                        tracker.file(self._open, file)
                self._log_card(tracker, self._open, stage, result)
                quarantined = _count_quarantined(place / "quarantine", stage.budget.steps)
                tracker.points(self._open, quarantined)
                model_id = tracker.output(
                    self._open, f"{self._system.name}-{stage.name}", str(result.artifact), tags
                )
                for file in files:
                    record = results.read(file)
                    images = [file.with_name(f"{record.name}.png")]
                    kept = [file, *(image for image in images if image.is_file())]
                    evaluations.log(tracker, record, kept, str(result.artifact))
                tracker.finish(self._open)
                result = replace(result, run_id=self._open, model_id=model_id)
                self._runs[result.artifact] = self._open
                self._open = None
        return result

    def _log_card(self, tracker: Tracker, run_id: str, stage: Stage, result: StageResult) -> None:
        known = card.stored_facts(result.artifact, self._home)
        names = tuple(f"{spec.name}." for spec in stage.evals)
        figures = {n: value for n, value in result.metrics.items() if n.startswith(names)}
        figures = figures | dict(known.figures)
        facts = replace(known, figures=figures, tags=self._tags)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / card.FILE
            file.write_text(card.model_card(result.artifact, facts), encoding="utf-8")
            tracker.file(run_id, file)

    def _emit(self, state: State, outputs: Sequence[Artifact] = ()) -> None:
        """Send the end of the stage that trains, if there is one."""
        if self._event is not None:
            emit(self._home, replace(self._event, state=state, outputs=outputs))
            self._event = None

    def finish(self, status: Status) -> None:
        self._emit("ABORT" if status == "KILLED" else "FAIL")
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


def post_waiting(tracker: Tracker, home: Path, *, timeout_s: float) -> tuple[int, int]:
    """Post the points of earlier runs that the tracker does not have, for at most `timeout_s`.

    Runs that another process trains post their own. Returns the posted points and those left.
    """
    with ExitStack() as locks:
        waiting: dict[str, Path] = {}
        points = 0
        for run_id, (journal, left) in unfinished(home / "runs").items():
            with suppress(RunError):
                locks.enter_context(run_dir.locked(journal.parent.parent))
                waiting[run_id] = journal
                points += left
        if not waiting:
            return 0, 0
        left = MetricsForwarder(tracker, waiting).close(timeout_s)
        return points - left, left
