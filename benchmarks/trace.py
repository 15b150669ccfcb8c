"""Time of `bridgework trace` on a store of many runs.

python -m benchmarks.trace                 100,000 runs in sqlite; about 2 minutes
python -m benchmarks.trace --runs 10000

One system of two stages is recorded through the tracker. Its rows in MLflow's tables are then
copied with new ids, digests and names, so every run has its own datasets and weights. A hundredth of
the systems reads the first one's datasets. Then each kind of question is asked three times; the
median is printed.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import sqlalchemy

from bridgework.data.dataset import open_dataset, write
from bridgework.data.synthetic import shapes
from bridgework.mixture import DatasetInput
from bridgework.tracking.lineage import trace, uses
from bridgework.tracking.mlflow_store import MLflowTracker
from bridgework.tracking.tracker import Point

SHARED = 100  # one system of that many reads the first one's datasets
BATCH = 500  # systems that are inserted at a time


def record(home: Path) -> tuple[MLflowTracker, list[str], list[str]]:
    """Record one system; returns the tracker, the ids to replace, and those of the datasets."""
    tracker = MLflowTracker(None, home, "bridgework")
    datasets = []
    for seed in (1, 2):
        path = home / "datasets" / f"set-{seed}"
        manifest = write(
            shapes(rows=64, seed=seed),
            str(path),
            source="here",
            license="CC0-1.0",
            made_by="benchmarks.trace",
        )
        datasets.append(DatasetInput(path.name, manifest.digest, str(path), manifest.rows))
    system = tracker.start("system-0", tags={"system": "llava", "run_key": "system-0"})
    ids, start = [system], ""
    for stage, dataset in zip(("align", "instruct"), datasets, strict=True):
        digest = uuid4().hex * 2
        tags = {"system": "llava", "stage": stage, "starts_from_digest": start}
        run = tracker.start(stage, parent=system, tags=tags | {"run_key": f"system-0/{stage}"})
        tracker.inputs(run, [dataset])
        points = [Point(f"ranking.{i}", 0.1, 10, 1_700_000_000_000) for i in range(20)]
        tracker.points(run, points)
        model = tracker.output(run, f"llava-{stage}", f"/runs/{stage}", {"digest": digest})
        ids += [run, model, digest]
        start = digest
    tracker.register("llava", ids[-2], ids[-3], "/runs/instruct", {"digest": start})
    return tracker, ids, [d.digest for d in datasets]


def multiply(uri: str, ids: list[str], digests: list[str], systems: int) -> None:
    """Copy the rows that hold one of `ids` into `systems` more systems with ids of their own."""
    engine = sqlalchemy.create_engine(uri)
    tables = sqlalchemy.MetaData()
    tables.reflect(engine)
    with engine.begin() as connection:
        held = connection.execute(tables.tables["datasets"].select()).mappings().all()
        own = {row["dataset_uuid"]: str(row["digest"]) for row in held}
        replaced = [*ids, *own, *own.values(), *digests]
        rows = {
            table: [dict(r) for r in connection.execute(table.select()).mappings()]
            for table in tables.sorted_tables
            if table.name not in ("experiments", "registered_models", "alembic_version")
        }
        copied = {
            table: kept
            for table, found in rows.items()
            if (
                kept := [r for r in found if any(i in json.dumps(r, default=str) for i in replaced)]
            )
        }
        done = 0
        while done < systems:
            more = range(done, min(done + BATCH, systems))
            for table, found in copied.items():
                if table.name.startswith("model_version") or table.name.startswith("registered"):
                    continue
                new = []
                for number in more:
                    shared = number % SHARED == 0
                    keep = {*own, *own.values(), *digests} if shared else set()
                    if shared and table.name == "datasets":
                        continue
                    new += [_copy(row, number, replaced, keep) for row in found]
                if new:
                    connection.execute(table.insert(), new)
            done = more.stop


def _copy(row: dict[str, Any], number: int, replaced: list[str], keep: set[str]) -> dict[str, Any]:
    """Return a row with some digits of every id and every name changed by the system's number."""
    middle = f"{number + 1:06x}"
    result = {}
    for column, value in row.items():
        if isinstance(value, str):
            for one in replaced:
                if one not in keep:
                    value = value.replace(one, one[:2] + middle + one[8:])
            value = value.replace("system-0", f"system-{number + 1}")
            if not keep:
                value = value.replace("set-1", f"set-1-{number}").replace(
                    "set-2", f"set-2-{number}"
                )
        result[column] = value
    return result


def median_s(question: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        question()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        tracker, ids, digests = record(home)
        multiply(tracker.uri, ids, digests, runs // 3)
        key = next(iter(open_dataset(str(home / "datasets" / "set-1")).keys()))[3]
        questions: dict[str, Callable[[], object]] = {
            "trace llava": lambda: trace("llava", tracker, home),
            "trace a run's name": lambda: trace("system-77", tracker, home),
            "trace a digest of weights": lambda: trace(ids[-1][:12], tracker, home),
            "trace --uses weights": lambda: uses(ids[3], tracker, home),
            "trace --uses a dataset of one run": lambda: uses("set-1-77", tracker, home),
            f"trace --uses a dataset of {runs // 3 // SHARED:,} systems": lambda: uses(
                "set-1", tracker, home
            ),
            "trace --uses a sample": lambda: uses(f"set-2/{key}", tracker, home),
            "trace a wrong name": lambda: _wrong(tracker, home),
        }
        print(f"{runs:,} runs")
        for name, question in questions.items():
            print(f"{name:<50} {median_s(question):6.2f} s")


def _wrong(tracker: MLflowTracker, home: Path) -> None:
    from bridgework.errors import TrackingError

    try:
        trace("lava", tracker, home)
    except TrackingError:
        return
    raise AssertionError("a wrong name was found")


if __name__ == "__main__":
    main()
