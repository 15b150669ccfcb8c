"""Ablations that the papers report, at laptop size: `python -m examples.ablations [NAME ...]`.

Every arm is trained with three seeds on the real data of examples/data. The table shows the paired
difference of the paper's choice to each other arm with its 95 % interval over the seeds, and the
sign that the paper reports. At this scale a result says whether the effect is visible here, and
nothing about the paper's scale. Running it again reuses finished runs, and resumes the others.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
from rich.console import Console
from scipy import stats

from bridgework.data.catalog import home as home_folder
from bridgework.errors import BridgeworkError, SpecError, suggest
from bridgework.storage import write_atomic
from bridgework.training.driver import train
from bridgework.training.options import RunOptions
from examples.ablations.arms import PREFIX, Ablation, ablations, write_data

PAGE = Path("docs/ablations.md")
MINUS = "\N{MINUS SIGN}"
console = Console(highlight=False)


@dataclass(frozen=True)
class Mean:
    """Mean over the seeds with its 95 % interval, by Student's t."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Mean":
        mean = float(np.mean(values))
        if np.ptp(values) == 0:
            return cls(mean, mean, mean)
        low, high = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
        return cls(mean, float(low), float(high))

    @property
    def sign(self) -> str:
        """`+` or `-` if the interval excludes 0, else `not decided`."""
        if self.low > 0:
            return "+"
        return MINUS if self.high < 0 else "not decided"

    def shown(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"


@dataclass(frozen=True)
class Row:
    """An arm in the table. gain: of the paper's choice over this arm, above 0 if it is better."""

    arm: str
    scores: tuple[float, ...]  # one for each seed
    mean: Mean
    gain: Mean | None  # None for the paper's choice itself
    reported: str
    sign: str  # that the paper reports


def score(name: str, arm: str, seed: int, share: float, home: Path, threads: int) -> float:
    """Train one arm with one seed, unless it is finished, and return its metric."""
    ablation = next(a for a in ablations() if a.name == name)
    stages = ablation.arms[arm].stages
    result = train(
        ablation.system(arm, seed, share),
        home=home,
        run=f"{run_prefix(share)}/{name}/{arm.replace(' ', '-')}-{seed}",
        stages=stages,
        options=RunOptions(workers=0, threads=threads, features="cached"),
        console=Console(quiet=True),
    )
    return result[stages[-1]].metrics[ablation.metric]


def run_prefix(share: float) -> str:
    return PREFIX if share == 1 else f"{PREFIX}-{share:g}"


def scores_of(
    chosen: Sequence[Ablation], seeds: int, share: float, home: Path, processes: int
) -> Iterator[tuple[Ablation, dict[str, tuple[float, ...]]]]:
    """Yield each ablation with the scores of its arms, as soon as all its runs are finished."""
    threads = max(1, (os.cpu_count() or 1) // processes)
    jobs = [(a.name, arm, seed) for a in chosen for arm in a.arms for seed in range(seeds)]
    found = dict[tuple[str, str, int], float]()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(score, *job, share, home, threads): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                found[job] = future.result()
                name, arm, seed = job
                console.print(
                    f"{len(found)} of {len(jobs)}: {name}, {arm}, seed {seed}: {found[job]:.4f}"
                )
                ablation = next(a for a in chosen if a.name == name)
                mine = {arm: [(name, arm, s) for s in range(seeds)] for arm in ablation.arms}
                if all(key in found for keys in mine.values() for key in keys):
                    yield ablation, {a: tuple(found[k] for k in keys) for a, keys in mine.items()}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def rows_of(ablation: Ablation, scores: dict[str, tuple[float, ...]]) -> list[Row]:
    """Return the rows of an ablation, the paper's choice first."""
    first, *_ = ablation.arms
    chosen, rows = np.array(scores[first]), []
    for name, arm in ablation.arms.items():
        deltas = chosen - np.array(scores[name])
        gain = None if name == first else Mean.of(deltas if ablation.higher else -deltas)
        mean = Mean.of(scores[name])
        rows.append(Row(name, scores[name], mean, gain, arm.reported, arm.sign))
    return rows


# --- the page ----------------------------------------------------------------------------------

INTRODUCTION = """\
# Ablations

Choices that the papers compare, tried at laptop size on the real pairs of `examples/data`. This page is generated:

```sh
{command}
```

Each arm was trained with {seeds} seeds. The gain is the paired difference of the paper's choice, the
first arm, to the other one, with its 95 % interval over the seeds (Student's t). It is above 0
where the paper's choice is better, also for losses. A sign counts only if the interval excludes 0.
A result says whether the effect is visible at this size. It says nothing about the paper's size.

| ablation | arm | metric (rows) | mean [95 %] | gain of the paper's choice [95 %] | paper | here |
|---|---|---|---|---|---|---|
"""


def page(chosen: Sequence[Ablation], tables: dict[str, Any], command: str, seeds: int) -> str:
    """Return the page of all ablations that have rows in `tables`."""
    lines = []
    known = [ablation for ablation in chosen if ablation.name in tables]
    for ablation in known:
        for row in map(row_from, tables[ablation.name]["rows"]):
            metric = f"{ablation.metric} ({ablation.rows})"
            gain = "the paper's choice" if row.gain is None else row.gain.shown("+.4f")
            signs = ("", "") if row.gain is None else (row.sign or "not compared", row.gain.sign)
            cells = (ablation.name, row.arm, metric, row.mean.shown(".4f"), gain, *signs)
            lines.append("| " + " | ".join(cells) + " |")
    text = INTRODUCTION.format(command=command, seeds=seeds) + "\n".join(lines) + "\n"
    for ablation in known:
        text += f"\n## {ablation.name}: {ablation.title.lower()}\n\n{ablation.paper}. "
        text += f"{ablation.about}\n\n"
        steps = {
            f"{stage.name} {stage.budget.steps} steps of {stage.budget.batch}": None
            for arm in ablation.arms.values()
            for stage in arm.system.stages
            if stage.name in arm.stages
        }
        text += f"Trained: {', '.join(steps)}.\n"
        for name, arm in ablation.arms.items():
            if arm.reported:
                text += f"\n- {name}: {arm.reported}."
        text += "\n"
    missing = [ablation.name for ablation in chosen if ablation.name not in tables]
    if missing:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    return text


def row_from(stored: dict[str, Any]) -> Row:
    gain = None if stored["gain"] is None else Mean(**stored["gain"])
    return Row(**{**stored, "mean": Mean(**stored["mean"]), "gain": gain})


# --- the command -------------------------------------------------------------------------------


def main() -> None:
    every = ablations()
    names = [ablation.name for ablation in every]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {', '.join(names)}")
    parser.add_argument("--seeds", type=int, default=3, help="at least 2; default: 3")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the steps, to try it; default: 1"
    )
    parser.add_argument(
        "--processes", type=int, default=os.cpu_count() or 1, help="runs at the same time"
    )
    given = parser.parse_args()
    for name in given.names:
        if name not in names:
            raise SpecError(f"there is no ablation {name!r}{suggest(name, names)}")
    if given.seeds < 2 or given.processes < 1 or not 0 < given.share <= 1:
        raise SpecError(
            "out of range: expected --seeds of at least 2, --processes of at least 1 and --share "
            f"in (0, 1]. Got {given.seeds}, {given.processes} and {given.share:g}"
        )
    home, began = home_folder(), time.monotonic()
    file = home / f"{run_prefix(given.share)}.json"
    write_data(home)
    tables = json.loads(file.read_text()) if file.exists() else {}
    chosen = [a for a in every if a.name in (given.names or names)]
    for ablation, scores in scores_of(chosen, given.seeds, given.share, home, given.processes):
        rows = [asdict(row) for row in rows_of(ablation, scores)]
        tables[ablation.name] = {"seeds": given.seeds, "rows": rows}
        write_atomic(file, json.dumps(tables, indent=1))
    # a try never replaces the page
    out = PAGE if given.share == 1 and given.seeds == 3 else file.with_suffix(".md")
    command = "python -m examples.ablations"
    if out != PAGE:
        command += f" --seeds {given.seeds} --share {given.share:g}"
    out.write_text(page(every, tables, command, given.seeds))
    console.print(f"{(time.monotonic() - began) / 60:.1f} minutes; written to {out}")


if __name__ == "__main__":
    try:
        main()
    except BridgeworkError as error:
        sys.exit(f"error: {error}")
