"""Parts that the examples share: the terminal's report, intervals, and pictures of the results.

An example is a list of parts. Each part prints its title and an estimate of its time, shows a bar
in a terminal, and records its seconds. Messages of libraries (Ray, uv, DeepSpeed) go to a log file.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from scipy.stats import binomtest

from bridgework.data.catalog import home as home_folder
from bridgework.errors import BridgeworkError, SpecError

WIDTH = 100  # columns of the report where the output is not a terminal
console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
Interval = tuple[float, float]


class Report:
    """Results and seconds of the parts, written to `<home>/<name>.json`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.home = home_folder()
        self.seconds: dict[str, float] = {}
        self.values: dict[str, Any] = {}

    @contextmanager
    def part(self, name: str, title: str, about_s: float, *, bar: bool = True) -> Iterator[None]:
        """Print the title of a part and its estimated time, and record its seconds.

        bar: show a bar of the estimated time in a terminal; False if the part has its own.
        """
        console.print()
        console.rule(f"[bold]{name}[/]  {title}  [dim]{about(about_s)}[/]", align="left")
        began = time.perf_counter()
        with time_bar(about_s) if bar and console.is_terminal else _nothing():
            yield
        self.seconds[name] = round(time.perf_counter() - began, 1)
        console.print(f"[dim]{name} took {self.seconds[name]:.0f} s[/]")

    def write(self) -> Path:
        file = self.home / f"{self.name}.json"
        file.write_text(json.dumps({**self.values, "seconds": self.seconds}, indent=1))
        return file


def about(seconds: float) -> str:
    """Return an estimated time, e.g. `about 3 minutes`."""
    if seconds < 90:
        return f"about {max(5, round(seconds / 5) * 5)} s"
    return f"about {seconds / 60:.0f} minutes"


@contextmanager
def time_bar(about_s: float) -> Iterator[None]:
    """Show a bar that fills in the estimated time."""
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn(f"of {about(about_s)}"))
    over = threading.Event()
    bar = Progress(
        *columns,
        console=console,
        transient=True,
        redirect_stdout=False,  # lines of Ray belong in the log
        redirect_stderr=False,
    )
    with bar:
        task, began = bar.add_task("", total=about_s), time.perf_counter()

        def follow() -> None:
            while not over.wait(0.2):
                bar.update(task, completed=min(about_s * 0.99, time.perf_counter() - began))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def run(name: str, main: Callable[[Report], None]) -> None:
    """Run an example; an expected error is one line, any other is one line and a traceback's file.

    Everything that libraries print goes to `<home>/<name>.log`, so that the report has no line of
    theirs.
    """
    report = Report(name)
    report.home.mkdir(parents=True, exist_ok=True)
    file = report.home / f"{name}.log"
    sys.stdout.flush()
    sys.stderr.flush()
    console.file = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):  # the descriptors, because Ray's C++ writes to them
        os.dup2(log, stream.fileno())
    try:
        main(report)
    except BridgeworkError as error:
        console.print(f"[bold red]error[/]  {escape(error)}", soft_wrap=True)
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        text = f"{type(error).__name__}: {escape(error)}. The traceback is in {shown(file)}"
        console.print(f"[bold red]error[/]  {text}", soft_wrap=True)
        sys.exit(1)


def environment(example: str, variable: str) -> Path:
    """Return the Python of an example's own environment, which the variable may name.

    Raises SpecError if there is none.
    """
    folder = Path("examples") / example
    python = Path(os.environ.get(variable, folder / ".venv")).absolute() / "bin" / "python"
    if not python.exists():
        raise SpecError(
            f"{example}: no environment. Got {python}, which does not exist. Fix: make one as in "
            f"{folder}/README.md, and name it in {variable} if it is elsewhere"
        )
    return python


def escape(text: object) -> str:
    """Return a text in which rich reads no markup."""
    return str(text).replace("[", r"\[")


def shown(path: Path) -> str:
    """Return a path as it is printed: relative to the working folder if it is inside."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# --- figures


def interval(share: float, rows: int) -> Interval:
    """Return the 95 % interval of a share of `rows` (Wilson 1927, through scipy)."""
    if not 0 <= share <= 1 or rows < 1:
        raise ValueError(f"interval: not a share of rows. Got {share} of {rows}")
    found = binomtest(round(share * rows), rows).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)


def percent(share: float, rows: int | None = None) -> str:
    """Return e.g. `53 % (47 to 59)`, with the interval of `rows`."""
    if rows is None:
        return f"{share:.1%}".replace("%", " %")
    low, high = interval(share, rows)
    return f"{share:.0%} ({low * 100:.0f} to {high * 100:.0f})".replace("%", " %")


def columns(rows: Sequence[Sequence[str]], heads: Sequence[str]) -> str:
    """Return a plain table for a text file, e.g. the README."""
    table = [list(heads), *map(list, rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    )


def lines(values: Mapping[str, str]) -> None:
    """Print named values below each other."""
    for name, value in values.items():
        console.print(f"[bold]{name:18}[/]{value}", soft_wrap=True)
