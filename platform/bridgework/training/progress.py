"""What a person sees of a running stage: a bar in a terminal, a line for every tenth of it in a log."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bridgework.tracking import Journal, Point
from bridgework.training.notices import Follower

POLL_S = 0.5


@contextmanager
def shown(folder: Path, title: str, steps: int, console: Console) -> Iterator[None]:
    """Follow a stage, by the journal and the notices in its folder, until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    task = bar.add_task(title, total=steps, figures="starting the workers")
    over = threading.Event()
    journal, notices = Journal(folder / "journal"), Follower(folder)
    before = journal.end()  # of a run that resumes

    def follow() -> None:
        part, tenth = before, 0
        while True:
            last = over.is_set()  # read once more after the end
            for text in notices.new():
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            for name, points in journal.points(part):
                part, at = name, max((p.step for p in points if p.key == "loss"), default=None)
                if at is None:
                    continue  # figures of an evaluation
                figures, done = _figures(points, at), min(at + 1, steps)
                bar.update(task, completed=done, figures=figures)
                if not console.is_terminal and done * 10 // steps > tenth:
                    tenth = done * 10 // steps
                    console.print(f"{title}: {done} of {steps} steps, {figures}", highlight=False)
            if last:
                return
            over.wait(POLL_S)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _figures(points: list[Point], step: int) -> str:
    now = {p.key: p.value for p in points if p.step == step}
    return f"loss {now.get('loss', float('nan')):.3f}, {now.get('samples_per_s', 0.0):.0f} samples/s"
