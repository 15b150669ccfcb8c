"""Cost of the plan for 10^9 rows in 10^5 shards, four sources by the square root of their sizes.

python -m benchmarks.plan              lookups of windows and row positions, memory: half a minute
python -m benchmarks.plan --ray        time to create a Ray Data dataset: half a minute
python -m benchmarks.plan --json FILE

Only the manifests exist: they are written, opened and checked as real ones, without shards. A
lookup is one row: its index, and its shard, row group and position. Peak memory is that of the
process (ru_maxrss).
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.ingest.feeding import start_ray
from benchmarks.ingest.reading import manifest
from bridgework.data.dataset import open_dataset
from bridgework.data.manifest import FILE
from bridgework.data.plan.plan import Plan, SourceRows
from bridgework.data.row_groups import Groups
from bridgework.system import Mixture, Source

ROWS = (600_000_000, 250_000_000, 100_000_000, 50_000_000)
SHARD_ROWS = 10_000  # 10^5 shards in all, each with a short last row group
GROUP_ROWS = 32
BATCHES = (256, 4_096)
PLACES = (0.0, 0.1, 0.5, 0.9, 3.5)  # epochs of the rows of all sources
WINDOWS = 200  # lookups at each of PLACES
ITEMS = (10_000, 100_000, 6_250_000)  # windows for Ray Data; the last is CLIP on 256 workers


@dataclass(frozen=True)
class Lookups:
    """Microseconds, medians over windows."""

    window_us: float  # a window of the plan
    row_us: float  # the same per row
    place_us: float  # per row: its shard, row group and position
    rows: int  # per window


def open_datasets(folder: Path) -> tuple[list[Any], float]:
    """Write the manifests. Returns the datasets and the seconds that opening them took."""
    for number, rows in enumerate(ROWS):
        (folder / str(number)).mkdir()
        (folder / str(number) / FILE).write_text(manifest(rows, SHARD_ROWS).to_json())
    began = time.perf_counter()
    datasets = [open_dataset(str(folder / str(number))) for number in range(len(ROWS))]
    return datasets, time.perf_counter() - began


def make_plan(datasets: list[Any], batch: int) -> tuple[Plan, float]:
    """Return a plan of five epochs and the seconds that it took to build."""
    names = [f"source-{number}" for number in range(len(datasets))]
    mixture = Mixture(sources=tuple(Source(name=name, dataset="-") for name in names), alpha=0.5)
    sources = [
        SourceRows(name, dataset.manifest.digest, len(dataset), GROUP_ROWS)
        for name, dataset in zip(names, datasets, strict=True)
    ]
    began = time.perf_counter()
    plan = Plan(sources, mixture, batch=batch, steps=5 * sum(ROWS) // batch, seed=0)
    return plan, time.perf_counter() - began


def measure_lookups(plan: Plan, groups: Groups, epoch: float) -> Lookups:
    """Measure lookups of consecutive windows of several lanes, from `epoch` on."""
    first = int(epoch * sum(ROWS)) // (plan.window_rows * 64)
    windows, places = [], []
    for number in range(WINDOWS):
        began = time.perf_counter()
        rows = plan.window(number % 64, first + number // 64)
        between = time.perf_counter()
        for source, row in zip(rows.source.tolist(), rows.row.tolist(), strict=True):
            groups.locate(source, row)
        windows.append(1e6 * (between - began))
        places.append(1e6 * (time.perf_counter() - between) / plan.window_rows)
    window = statistics.median(windows)
    return Lookups(window, window / plan.window_rows, statistics.median(places), plan.window_rows)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def create_dataset(items: int) -> float:
    """Return the seconds to create a Ray Data dataset of windows, as data.ray_ingest does."""
    from bridgework.data.ray_ingest import range_dataset

    began = time.perf_counter()
    range_dataset(items)
    return time.perf_counter() - began


def by_ray() -> dict[str, float]:
    start_ray()
    create_dataset(10)  # imports, and the first task of a cluster
    return {str(items): create_dataset(items) for items in ITEMS}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").strip(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    console = Console()
    if given.ray:
        found: dict[str, Any] = by_ray()
        for items, seconds in found.items():
            console.print(f"{int(items):,} windows: Ray Data dataset created in {seconds:.2f} s")
    else:
        found = measured(console)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def measured(console: Console) -> dict[str, Any]:
    """Print all lookups and return them."""
    found: dict[str, Any] = {"imports_mb": peak_mb(), "lookups": []}
    with tempfile.TemporaryDirectory() as folder:
        datasets, found["open_s"] = open_datasets(Path(folder))
        groups = Groups(datasets, None)
        table = Table(
            "batch",
            "at epoch",
            "a window, us",
            "a row, us",
            "its position, us",
            "a lookup, us",
            box=None,
        )
        for batch in BATCHES:
            plan, found["plan_s"] = make_plan(datasets, batch)
            for epoch in PLACES:
                cost = measure_lookups(plan, groups, epoch)
                figures = (cost.window_us, cost.row_us, cost.place_us, cost.row_us + cost.place_us)
                table.add_row(f"{batch:,}", f"{epoch:g}", *(f"{figure:.1f}" for figure in figures))
                found["lookups"].append({"batch": batch, "epoch": epoch, **vars(cost)})
    shards = sum(len(dataset.manifest.shards) for dataset in datasets)
    found["peak_mb"] = peak_mb()
    console.print(table)
    console.print(
        f"{shards:,} shards, {sum(ROWS):,} rows: opened in {found['open_s']:.1f} s, "
        f"planned in {found['plan_s']:.3f} s"
    )
    console.print(
        f"peak memory {found['peak_mb']:.0f} MB, of which {found['imports_mb']:.0f} MB before"
    )
    return found


if __name__ == "__main__":
    main()
