"""Stored evaluations: the figures and rows of one evaluation of one artifact, in a Parquet file.

A row of the file is a figure's value of one evaluated row: figure, key, cluster, value and weight.
The file's metadata hold the evaluation, the digests of its datasets and of the weights, and the
figures without rows. Two records are of the same evaluation if their `evaluation` digests are
equal: the same settings on the same data. Records are in `evals/` next to the artifact, for the
evaluations of its training, and in <home>/evals/<digest of the weights>.
"""

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bridgework import __version__, storage
from bridgework.config import to_dict
from bridgework.data.catalog import resolve
from bridgework.data.dataset import open_dataset
from bridgework.errors import DataError
from bridgework.evaluation.base import Figure, Result, figures_of
from bridgework.evaluation.statistics import RowValues
from bridgework.mixture import DatasetInput
from bridgework.system import Direction, EvalSpec

if TYPE_CHECKING:
    from bridgework.inference.pipeline import Pipeline

FOLDER = "evals"  # next to an artifact, and under the home
HEADER = b"bridgework"  # key of the metadata
SHORT = 12  # hex digits of digests in names
SCHEMA = pa.schema(
    [
        pa.field("figure", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("cluster", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of one artifact."""

    name: str
    evaluation: str  # digest of the settings and of the data
    spec: Mapping[str, Any]  # as `config.to_dict` writes it
    datasets: tuple[DatasetInput, ...]
    weights: str  # digest; empty until training has saved them
    metrics: Mapping[str, float]
    better: Mapping[str, Direction | None]
    rows: Mapping[str, RowValues]
    seconds: float
    created: float  # seconds since the epoch
    machine: str
    version: str  # of bridgework

    @property
    def figures(self) -> list[Figure]:
        """All metrics with their intervals, in order."""
        return figures_of(self.metrics, self.rows, self.better)

    @property
    def file_name(self) -> str:
        return f"{self.name}-{self.evaluation[:SHORT]}.parquet"


def evaluate(
    spec: EvalSpec, pipeline: "Pipeline", home: Path, weights: str = ""
) -> tuple[Result, EvaluationRecord]:
    """Run an evaluation; returns its result and the record of it."""
    inputs = _inputs(spec, home)
    start = time.monotonic()
    result: Result = spec.run(pipeline, home)
    return result, EvaluationRecord(
        name=spec.name,
        evaluation=digest(spec, inputs),
        spec=to_dict(spec),
        datasets=inputs,
        weights=weights,
        metrics=result.metrics,
        better=result.better or {f"{spec.name}.{key}": way for key, way in spec.better.items()},
        rows=result.rows,
        seconds=time.monotonic() - start,
        created=time.time(),
        machine=f"{platform.node()}, {pipeline.inputs.device}",
        version=__version__,
    )


def with_intervals(figures: Iterable[Figure]) -> dict[str, float]:
    """Return the values of figures, with NAME.low, NAME.high and NAME.n for those with rows."""
    values = dict[str, float]()
    for figure in figures:
        values[figure.name] = figure.value
        if (found := figure.interval) is not None:
            values[f"{figure.name}.n"] = found.n
            if found.clusters > 1:
                values |= {f"{figure.name}.low": found.low, f"{figure.name}.high": found.high}
    return values


def identity(spec: EvalSpec, home: Path) -> str:
    """Return the digest of an evaluation: of its settings and of the data that it reads."""
    return digest(spec, _inputs(spec, home))


def digest(spec: EvalSpec, inputs: Sequence[DatasetInput]) -> str:
    """Return the digest of a spec on these datasets; the dataset's path does not count."""
    settings = {key: value for key, value in to_dict(spec).items() if key != "dataset"}
    identified = {"spec": settings, "datasets": [dataset.digest for dataset in inputs]}
    return hashlib.sha256(json.dumps(identified, sort_keys=True).encode()).hexdigest()


def _inputs(spec: EvalSpec, home: Path) -> tuple[DatasetInput, ...]:
    found = []
    for name in getattr(spec, "datasets", (spec.dataset,)):
        path = resolve(name, home)
        manifest = open_dataset(path).manifest
        found.append(
            DatasetInput(path.rstrip("/").rsplit("/", 1)[-1], manifest.digest, path, manifest.rows)
        )
    return tuple(found)


def folder_of(weights: str, home: Path) -> Path:
    """Return the folder of the records of these weights under the home."""
    return home / FOLDER / weights[: 2 * SHORT]


def write(record: EvaluationRecord, folder: Path) -> Path:
    """Write a record; it replaces an older one of the same evaluation. Returns its file."""
    header = {
        key: value for key, value in vars(record).items() if key not in ("rows", "datasets")
    } | {"datasets": [asdict(dataset) for dataset in record.datasets]}
    columns = list(record.rows.items())
    table = pa.table(
        {
            "figure": pa.array(
                [name for name, rows in columns for _ in rows.keys], pa.string()
            ).dictionary_encode(),
            "key": [key for _, rows in columns for key in rows.keys],
            "cluster": [cluster for _, rows in columns for cluster in rows.clusters],
            "value": np.concatenate([rows.values for _, rows in columns] or [np.empty(0)]),
            "weight": np.concatenate([rows.weights for _, rows in columns] or [np.empty(0)]),
        },
        schema=SCHEMA.with_metadata({HEADER: json.dumps(header).encode()}),
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / record.file_name
    storage.write_atomic(file, sink.getvalue().to_pybytes())
    return file


def save(result: Result, record: EvaluationRecord, folder: Path) -> list[Path]:
    """Write the record and the images of an evaluation; returns their files."""
    files = [write(record, folder)]
    for name, image in result.pictures.items():
        files.append(folder / f"{name}.png")
        storage.save_image(image, files[-1])
    return files


def read(file: Path) -> EvaluationRecord:
    """Read a record. Raises DataError for a file that is not one."""
    try:
        table = pq.read_table(pa.BufferReader(file.read_bytes()))
        header = json.loads(table.schema.metadata[HEADER])
        inputs = tuple(DatasetInput(**dataset) for dataset in header.pop("datasets"))
        return EvaluationRecord(**header, datasets=inputs, rows=dict(_rows(table)))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{file} is not a stored evaluation. Got {type(error).__name__}: {error}. "
            "Fix: delete it and evaluate again"
        ) from None


def _rows(table: pa.Table) -> Iterator[tuple[str, RowValues]]:
    names = table["figure"].to_numpy(zero_copy_only=False)
    keys, clusters = table["key"].to_pylist(), table["cluster"].to_pylist()
    values, weights = table["value"].to_numpy(), table["weight"].to_numpy()
    for name in dict.fromkeys(names):
        at = np.flatnonzero(names == name)
        yield (
            str(name),
            RowValues(
                tuple(keys[i] for i in at),
                tuple(clusters[i] for i in at),
                values[at],
                weights[at],
            ),
        )


def records_of(artifact: str | Path, weights: str, home: Path) -> list[EvaluationRecord]:
    """Return the stored evaluations of an artifact, oldest first."""
    folders = (storage.locate(artifact).parent / FOLDER, folder_of(weights, home))
    found = [read(file) for folder in folders for file in sorted(folder.glob("*.parquet"))]
    own = [record for record in found if record.weights == weights]
    return sorted(own, key=lambda record: record.created)


def assign_weights(folder: Path, weights: str) -> list[Path]:
    """Write the digest of the weights into the records of a training; returns their files."""
    files = sorted(folder.glob("*.parquet"))
    for file in files:
        record = read(file)
        if record.weights != weights:
            write(replace(record, weights=weights), folder)
    return files
