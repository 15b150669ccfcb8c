"""Flight recorder: key, source, loss and length of every sample of every step; replay of a step.

Each worker and attempt appends to its own Arrow stream, so that the record survives any end of the
run. Of steps that were repeated (a worker died after its last checkpoint), the last attempt counts.
`replay` rebuilds the batch of a step as the model received it, because the plan is a function.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from bridgework import old_names, storage
from bridgework.data.collate import Batch
from bridgework.data.quarantine import scratch_quarantine
from bridgework.data.reader import ReaderConfig, Row
from bridgework.errors import RunError
from bridgework.system import Stage
from bridgework.training import run_dir
from bridgework.training.skips import Skips

FOLDER = "flight_recorder"
START = b"start"  # key in the metadata of a stream: the attempt's first step
MAX_WAITING = 10_000  # steps that wait in memory while the disk cannot be written
# Seconds that steps may wait in memory: a crash loses that much of the record, not of the run.
FLUSH_S = 2.0
FILE_BYTES = 8_000_000  # size after which a file of a store is followed by another

SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("key", pa.string()),
        ("source", pa.int16()),  # index in the mixture
        ("loss", pa.float32()),  # the sample's own mean, weighted over the losses
        ("counted", pa.float32()),  # divisor of that mean: tokens with loss, or one
        ("tokens", pa.int32()),  # of the complete sample, prompt and images included
    ]
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepSample:
    """One sample of one step; the fields are those of SCHEMA."""

    step: int
    key: str
    source: int
    loss: float
    counted: float
    tokens: int


class FlightRecorder:
    """Context manager that records one worker's samples. A failed write never ends a run."""

    def __init__(
        self, folder: Path, attempt: str, rank: int, start: int, into: Path | None = None
    ) -> None:
        """start: the attempt's first step. into: local folder to write to; default: `folder`.

        Later steps that this attempt does not record count as skipped, even if an earlier attempt
        recorded them.
        """
        self._stage_folder = folder
        self._place = (into or folder) / FOLDER
        self._name = f"{attempt}-{rank:05d}"
        self._schema = SCHEMA.with_metadata({START: str(start)})
        self._attempt = attempt
        self._waiting: list[pa.RecordBatch] = []
        self._lost = 0
        self._failing = False
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
        """Record one step: the samples of `batches` in order, with loss and count of each."""
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
        """Write the waiting steps to the disk."""
        self._flushed = time.monotonic()
        if not self._waiting:
            return
        place = self._stage_folder / FOLDER
        try:
            file = self._open()
            self._out.write_table(pa.Table.from_batches(self._waiting).combine_chunks())
            file.flush()
        except OSError as error:
            if not self._failing:
                log.warning(
                    "%s: the record of steps is kept in memory until it can be written: %s",
                    place,
                    error,
                )
            self._failing = True
            self._close()  # a partial write ends this file, and the next flush opens a new one
            return
        if self._failing:
            log.warning("%s: steps are recorded again; %d of them were lost", place, self._lost)
        self._failing, self._lost, self._waiting = False, 0, []
        if self._place.parent != self._stage_folder and file.tell() > FILE_BYTES:
            self._close()  # a mirror uploads complete files

    def _open(self) -> BinaryIO:
        """Return the open file. A new one sorts after all existing files of other attempts."""
        if self._file is None:
            self._place.mkdir(parents=True, exist_ok=True)
            names = [
                file.name
                for file in _files(self._stage_folder)
                if f"-{self._attempt}-" not in file.name
            ]
            others = [int(name[:20]) for name in names if name[:20].isdecimal()]
            # Clocks differ between machines and may be set back, so they alone give no order.
            self._order = max(time.time_ns(), self._order + 1, max(others, default=0) + 1)
            name = f"{self._order:020d}-{self._name}.arrows"
            self._file = (self._place / name).open("wb")
            options = pa.ipc.IpcWriteOptions(compression="zstd")
            self._out = pa.ipc.new_stream(self._file, self._schema, options=options)
        return self._file

    def _close(self) -> None:
        file, out, self._file, self._out = self._file, self._out, None, None
        for stream in (out, file):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


@dataclass(frozen=True)
class Replayed:
    """The samples of one step, highest loss first, with their records."""

    stage: Stage
    rows: list[Row]
    noted: list[StepSample]


def read_step(folder: Path, step: int) -> list[StepSample]:
    """Read the samples of `step` of the stage at `folder`, of all workers, highest loss first.

    Raises RunError for a step that is not recorded.
    """
    place = folder / FOLDER
    attempts: dict[str, _Attempt] = {}  # in the order of their starts
    for file in _files(folder):
        attempts.setdefault(file.stem.split("-")[1], _Attempt()).read(file, step)
    for attempt in reversed(attempts.values()):
        if attempt.rows:
            return sorted(
                attempt.rows, key=lambda row: -row.loss if math.isfinite(row.loss) else -math.inf
            )
        if attempt.start <= step < attempt.last:
            raise RunError(f"{place}: step {step} did no update, because it was skipped (--skip)")
    nonempty = [attempt for attempt in attempts.values() if attempt.last >= 0]
    first = min((attempt.start for attempt in nonempty), default=0)
    last = max((attempt.last for attempt in nonempty), default=0)
    known = f"it has steps {first} to {last}" if nonempty else "it has none yet"
    raise RunError(f"{place} has no step {step}; {known}")


def replay(run: str, step: int, home: Path) -> Replayed:
    """Rebuild step `step` of `RUN` or `RUN/STAGE`, for any number of workers that trained it.

    The default stage is the one that trained last. Raises RunError for a run, stage or step that is
    not recorded, and if the data now yields other samples.
    """
    folder, stage = _find_stage(run, home)
    noted = read_step(folder, step)
    resolved = resolve_curated_data(stage, folder)
    config = ReaderConfig.of(
        resolved,
        home,
        skipped=Skips.read(folder).keys,
        quarantine=scratch_quarantine(home, str(folder)),
    )
    span = config.mixture.window
    reader = config.open()
    rows = reader.window(range(config.mixture.lanes), step // span, first_step=step)[0]
    remaining = list(rows)
    replayed = []
    for sample in noted:
        key = (sample.key, sample.source)
        at = next((i for i, row in enumerate(remaining) if (row.key, row.source) == key), None)
        if at is None:
            raise RunError(
                f"step {step} of {run}: the data has changed since. "
                f"Got other samples by the plan; expected {sample.key!r}"
            )
        replayed.append(remaining.pop(at))
    return Replayed(resolved, replayed, noted)


def resolve_curated_data(stage: Stage, folder: Path) -> Stage:
    """Return the stage with the path of its curated dataset, which is in the stage's folder."""
    curation = stage.curation
    if curation is None:
        return stage
    path = str(folder / "curated" / curation.makes)
    return replace(stage, data=stage.data.with_dataset(curation.makes, path), curation=None)


@dataclass
class _Attempt:
    """The records of one attempt, of all its workers."""

    start: int = 0
    last: int = -1  # recorded step
    rows: list[StepSample] = field(default_factory=list)  # of the requested step

    def read(self, file: Path, step: int) -> None:
        """Add the complete batches of a file, whose end may be truncated."""
        try:
            with file.open("rb") as source, pa.ipc.open_stream(source) as stream:
                self.start = int(stream.schema.metadata[START])
                for batch in stream:
                    self.last = max([self.last, *batch["step"].to_pylist()])
                    rows = batch.filter(pc.equal(batch["step"], step)).to_pylist()
                    self.rows += [StepSample(**row) for row in rows]
        except (pa.ArrowInvalid, EOFError, OSError):
            return


def _files(folder: Path) -> Iterator[Path]:
    """Yield the files of a stage in the order of writing, also from a folder of the old name."""
    names = (FOLDER, old_names.FLIGHT_RECORDER_DIR)
    files = [folder / name / file for name in names for file in storage.names(folder / name)]
    yield from sorted(
        (file for file in files if file.suffix == ".arrows"), key=lambda file: file.name
    )


def _find_stage(run: str, home: Path) -> tuple[Path, Stage]:
    """Return the folder of a stage in its run, and the stage."""
    try:
        system, name = run_dir.recipe(home, run), None
    except RunError:
        parent, _, name = run.rpartition("/")
        if not parent:
            raise
        system, run = run_dir.recipe(home, parent), parent
    folder = run_dir.path_of(home, run)
    if name is not None:
        return folder / name, system[name]
    recorded = [stage for stage in system.stages if any(_files(folder / stage.name))]
    if not recorded:
        raise RunError(f"run {run!r} has trained no step yet")
    return folder / recorded[-1].name, recorded[-1]
