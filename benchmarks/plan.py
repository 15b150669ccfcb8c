"""What the plan costs at a size that no disk here holds: 10^9 rows in 10^5 shards, four sources by the square root.

python -m benchmarks.plan              the plan's windows, where their rows lie, memory: half a minute
python -m benchmarks.plan --ray        how long Ray Data takes to be handed the windows of a run: half a minute
python -m benchmarks.plan --json FILE

The manifests are simulated, and real in all that the plan and the reader ask of them: written, opened, checked. A
lookup is one row: which it is, and its shard, row group and place. Peak memory is that of the process (ru_maxrss).
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
SHARD_ROWS = 10_000  # 10^5 shards in all, each with a short row group at its end
GROUP_ROWS = 32
BATCHES = (256, 4_096)
PLACES = (0.0, 0.1, 0.5, 0.9, 3.5)  # epochs of the rows of all sources
WINDOWS = 200  # looked up at each place
ITEMS = (
    10_000,
    100_000,
    6_250_000,
)  # windows handed to Ray Data; the last are CLIP's on 256 workers


@dataclass(frozen=True)
class Lookups:
    """Microseconds, medians over windows."""

    window_us: float  # a whole window of the plan
    row_us: float  # the same per row
    place_us: float  # per row: where it lies
    rows: int  # of a window


def opened(folder: Path) -> tuple[list[Any], float]:
    """The datasets, and the seconds that opening them took."""
    for number, rows in enumerate(ROWS):
        (folder / str(number)).mkdir()
        (folder / str(number) / FILE).write_text(manifest(rows, SHARD_ROWS).to_json())
    began = time.perf_counter()
    datasets = [open_dataset(str(folder / str(number))) for number in range(len(ROWS))]
    return datasets, time.perf_counter() - began


def made(datasets: list[Any], batch: int) -> tuple[Plan, float]:
    """A plan of five epochs, and the seconds that making it took."""
    names = [f"source-{number}" for number in range(len(datasets))]
    mixture = Mixture(sources=tuple(Source(name=name, dataset="-") for name in names), alpha=0.5)
    sources = [
        SourceRows(name, dataset.manifest.digest, len(dataset), GROUP_ROWS)
        for name, dataset in zip(names, datasets, strict=True)
    ]
    began = time.perf_counter()
    plan = Plan(sources, mixture, batch=batch, steps=5 * sum(ROWS) // batch, seed=0)
    return plan, time.perf_counter() - began


def looked_up(plan: Plan, groups: Groups, epoch: float) -> Lookups:
    """Windows of several lanes in a row, from a place in the run on."""
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


def handed_over(items: int) -> float:
    """Seconds that Ray Data takes to be handed `items` windows, as bridgework.data.ray_ingest does it."""
    from bridgework.data.ray_ingest import range_dataset

    began = time.perf_counter()
    range_dataset(items)
    return time.perf_counter() - began


def by_ray() -> dict[str, float]:
    start_ray()
    handed_over(10)  # imports, and the first task of a cluster
    return {str(items): handed_over(items) for items in ITEMS}


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
            console.print(f"{int(items):,} windows are handed to Ray Data in {seconds:.2f} s")
    else:
        found = measured(console)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")


def measured(console: Console) -> dict[str, Any]:
    """Every lookup, printed and as values."""
    found: dict[str, Any] = {"imports_mb": peak_mb(), "lookups": []}
    with tempfile.TemporaryDirectory() as folder:
        datasets, found["open_s"] = opened(Path(folder))
        groups = Groups(datasets, None)
        shown = Table(
            "batch",
            "at epoch",
            "a window, us",
            "a row, us",
            "its place, us",
            "a lookup, us",
            box=None,
        )
        for batch in BATCHES:
            plan, found["plan_s"] = made(datasets, batch)
            for epoch in PLACES:
                cost = looked_up(plan, groups, epoch)
                figures = (cost.window_us, cost.row_us, cost.place_us, cost.row_us + cost.place_us)
                shown.add_row(f"{batch:,}", f"{epoch:g}", *(f"{figure:.1f}" for figure in figures))
                found["lookups"].append({"batch": batch, "epoch": epoch, **vars(cost)})
    shards = sum(len(dataset.manifest.shards) for dataset in datasets)
    found["peak_mb"] = peak_mb()
    console.print(shown)
    console.print(
        f"{shards:,} shards, {sum(ROWS):,} rows: opened in {found['open_s']:.1f} s, planned in {found['plan_s']:.3f} s"
    )
    console.print(
        f"peak memory {found['peak_mb']:.0f} MB, of which {found['imports_mb']:.0f} MB before"
    )
    return found


if __name__ == "__main__":
    main()
