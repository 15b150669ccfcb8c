"""The flight recorder: which samples made every step, what each added to the loss, and how long it was.

One Arrow stream a worker and attempt, appended to as the run goes, so that whatever ends a run leaves what was written
before. Steps that were taken twice (a worker died after its last checkpoint) count as they were taken last.

A step of a run again, as the model saw it: the plan is a function, so the batch can be made once more.
"""

import logging
import math
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from bridgework.data.collate import Batch
from bridgework.data.quarantine import scratch_quarantine
from bridgework.data.reader import ReaderConfig, Row
from bridgework.errors import RunError
from bridgework.system import Stage
from bridgework.training import run_dir
from bridgework.training.skips import Skips

FOLDER = "flight"
START = b"start"  # in the metadata of a stream: the attempt's first step
MAX_WAITING = 10_000  # steps that wait in memory while the disk refuses them
FLUSH_S = (
    2.0  # how long steps may wait in memory: what a crash can lose of the record, not of the run
)
log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("key", pa.string()),
        ("source", pa.int16()),  # place in the mixture
        ("loss", pa.float32()),  # the sample's own mean, weighted over the losses
        ("counted", pa.float32()),  # what that is a mean of: tokens with loss, or one
        ("tokens", pa.int32()),  # of the whole sample, prompt and images included
    ]
)


@dataclass(frozen=True)
class StepSample:
    """One sample of one step."""

    step: int
    key: str
    source: int
    loss: float
    counted: float
    tokens: int


class FlightRecorder:
    """Writes what one worker trains on; a context manager. A disk that refuses never ends a run."""

    def __init__(self, folder: Path, attempt: str, rank: int, start: int) -> None:
        """`start` is the attempt's first step: what it passes from there on was not taken, whatever others say."""
        self._place = folder / FOLDER
        self._name = f"{attempt}-{rank:05d}"
        self._schema = SCHEMA.with_metadata({START: str(start)})
        self._attempt = attempt
        self._waiting: list[pa.RecordBatch] = []
        self._lost = 0
        self._trouble = False
        self._flushed = time.monotonic()
        self._file: BinaryIO | None = None
        self._out: Any = None
        self._order = 0
        with suppress(OSError):  # `flush` reports it
            self._open()

    def __enter__(self) -> "FlightRecorder":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()
        self._close()

    def step(
        self,
        step: int,
        batches: Sequence[Batch],
        losses_R: Sequence[float],
        counts_R: Sequence[float],
    ) -> None:
        """Note one step: the samples of `batches` in order, of which each has its loss and what it is a mean of."""
        real = [batch for batch in batches if not batch.idle]
        keys = [key for batch in real for key in batch.keys]
        sources = [source for batch in real for source in batch.sources]
        tokens = [number for batch in real for number in batch.tokens_by_sample().tolist()]
        self._waiting.append(
            pa.record_batch(
                [[step] * len(keys), keys, sources, losses_R, counts_R, tokens], schema=SCHEMA
            )
        )
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[0]
            self._lost += 1
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Hand what waits to the disk."""
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        try:
            file = self._open()
            self._out.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
            file.flush()
        except OSError as error:
            if not self._trouble:
                log.warning(
                    "%s: the record of steps is kept in memory until it can be written: %s",
                    self._place,
                    error,
                )
            self._trouble = True
            self._close()  # what was half-written ends this file; a new one follows
            return
        if self._trouble:
            log.warning(
                "%s: steps are recorded again; %d of them were lost", self._place, self._lost
            )
        self._trouble, self._lost, self._waiting = False, 0, []

    def _open(self) -> BinaryIO:
        """The file to write to. Files sort by attempt: one sorts after all those of other attempts that are there."""
        if self._file is None:
            self._place.mkdir(parents=True, exist_ok=True)
            names = [
                file.name
                for file in self._place.glob("*.arrows")
                if f"-{self._attempt}-" not in file.name
            ]
            others = [int(name[:20]) for name in names if name[:20].isdecimal()]
            # clocks differ between machines and may be set back: they order nothing alone
            self._order = max(time.time_ns(), self._order + 1, max(others, default=0) + 1)
            self._file = (self._place / f"{self._order:020d}-{self._name}.arrows").open("wb")
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            self._out = pa.ipc.new_stream(self._file, self._schema, options=options)
        return self._file

    def _close(self) -> None:
        file, out, self._file, self._out = self._file, self._out, None, None
        for each in (out, file):
            if each is not None:
                with suppress(OSError):
                    each.close()


def read_step(folder: Path, step: int) -> list[StepSample]:
    """What the stage at `folder` trained on at `step`, of all workers, dearest sample first.

    Raises RunError for a step that is not on record.
    """
    attempts: dict[str, _Attempt] = {}  # in the order of their starts
    for file in sorted((folder / FOLDER).glob("*.arrows")):
        attempts.setdefault(file.stem.split("-")[1], _Attempt()).read(file, step)
    for attempt in reversed(attempts.values()):
        if attempt.rows:
            return sorted(
                attempt.rows, key=lambda row: -row.loss if math.isfinite(row.loss) else -math.inf
            )
        if attempt.start <= step < attempt.last:
            raise RunError(f"{folder / FOLDER}: step {step} was passed without an update (--skip)")
    there = [attempt for attempt in attempts.values() if attempt.last >= 0]
    ends = [
        min((one.start for one in there), default=0),
        max((one.last for one in there), default=0),
    ]
    known = f"it has steps {ends[0]} to {ends[1]}" if there else "it has none yet"
    raise RunError(f"{folder / FOLDER} has no step {step}; {known}")


@dataclass
class _Attempt:
    """What the workers of one attempt recorded."""

    start: int = 0
    last: int = -1  # step on record
    rows: list[StepSample] = field(default_factory=list)  # of the step that is asked for

    def read(self, file: Path, step: int) -> None:
        """Adds what was written whole; the end of a stream may be torn."""
        try:
            with pa.ipc.open_stream(file) as stream:
                self.start = int(stream.schema.metadata[START])
                for batch in stream:
                    self.last = max([self.last, *batch["step"].to_pylist()])
                    rows = batch.filter(pc.equal(batch["step"], step)).to_pylist()
                    self.rows += [StepSample(**row) for row in rows]
        except (pa.ArrowInvalid, EOFError, OSError):
            return


@dataclass(frozen=True)
class Replayed:
    """The samples of one step, dearest first, with what the run noted of each."""

    stage: Stage
    rows: list[Row]
    noted: list[StepSample]


def replay(run: str, step: int, home: Path) -> Replayed:
    """Step `step` of `RUN` or `RUN/STAGE` (default: the stage that trained last), whole, whatever trained it.

    Raises RunError for a run, stage or step that is not on record, and where the data now gives other samples.
    """
    folder, stage = _stage(run, home)
    noted = read_step(folder, step)
    reading = reads(stage, folder)
    feed = ReaderConfig.of(
        reading,
        home,
        skipped=Skips.read(folder).keys,
        quarantine=scratch_quarantine(home, str(folder)),
    )
    span = feed.mixture.window
    reader = feed.open()
    rows = reader.window(range(feed.mixture.lanes), step // span, first_step=step)[0]
    left = list(rows)
    found = []
    for each in noted:
        at = next(
            (i for i, row in enumerate(left) if (row.key, row.source) == (each.key, each.source)),
            None,
        )
        if at is None:
            raise RunError(
                f"step {step} of {run} had {each.key!r}, and the plan now gives others: the data has changed"
            )
        found.append(left.pop(at))
    return Replayed(reading, found, noted)


def reads(stage: Stage, folder: Path) -> Stage:
    """The stage as it reads: what its curation makes stands in the run, under the stage's folder."""
    curation = stage.curation
    if curation is None:
        return stage
    made = str(folder / "curated" / curation.makes)
    return replace(stage, data=stage.data.with_dataset(curation.makes, made), curation=None)


def _stage(run: str, home: Path) -> tuple[Path, Stage]:
    """The folder of a stage in its run, and the stage."""
    try:
        system, name = run_dir.recipe(home, run), None
    except RunError:
        above, _, name = run.rpartition("/")
        if not above:
            raise
        system, run = run_dir.recipe(home, above), above
    folder = run_dir.path_of(home, run)
    if name is not None:
        return folder / name, system[name]
    begun = [
        stage for stage in system.stages if any((folder / stage.name / FOLDER).glob("*.arrows"))
    ]
    if not begun:
        raise RunError(f"run {run!r} has trained no step yet")
    return folder / begun[-1].name, begun[-1]
