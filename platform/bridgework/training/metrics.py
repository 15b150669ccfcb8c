"""What a step tells of itself, by name: losses, what each source gave, time; and which samples were dearest.

What a person sees of a running stage: a bar in a terminal, a line for every tenth of it in a log.
"""

import math
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bridgework.data.collate import Batch
from bridgework.system import Stage
from bridgework.tracking.tracker import Journal, Point
from bridgework.training.deepspeed_engine import StepResult
from bridgework.training.notices import Follower

Metrics = dict[str, float]


def metric_names(stage: Stage, taken: StepResult) -> Metrics:
    """The loss of the step, each of its parts, and what each source had in them, where there are several."""
    names = [f"loss.{type(loss).__name__.lower()}" for loss in stage.losses]
    metrics = dict(zip(names, taken.losses_L.tolist(), strict=True))
    total = sum(loss.weight * metrics[name] for loss, name in zip(stage.losses, names, strict=True))
    sources = [source.name for source in stage.data.leaves]
    if len(sources) > 1:
        for name, means, counts in zip(
            names, taken.means_LS.tolist(), taken.counts_LS.tolist(), strict=True
        ):
            metrics |= {
                f"{name}.{s}": mean for s, mean, n in zip(sources, means, counts, strict=True) if n
            }
        metrics |= {
            f"samples.{s}": n for s, n in zip(sources, taken.samples_S.tolist(), strict=True)
        }
        metrics |= {f"tokens.{s}": n for s, n in zip(sources, taken.tokens_S.tolist(), strict=True)}
    return {"loss": total, **metrics, "grad_norm": taken.norm}


def per_sample(stage: Stage, taken: StepResult) -> tuple[list[float], list[float]]:
    """Of each of this rank's samples: its own mean loss, weighted over the losses, and what the first is a mean of."""
    weights_L = torch.tensor([loss.weight for loss in stage.losses])
    sums_LR = taken.sums_LR.cpu()
    own_R: Tensor = weights_L @ (sums_LR / taken.counts_LR.clamp(min=1))
    return own_R.tolist(), taken.counts_LR[0].tolist()


def suspects(keys: Sequence[str], losses: Sequence[float], most: int = 4) -> list[str]:
    """The samples whose own loss is not finite; where there are none, the dearest."""
    order = sorted(
        range(len(keys)), key=lambda i: -losses[i] if math.isfinite(losses[i]) else -math.inf
    )
    wrong = [i for i in order if not math.isfinite(losses[i])]
    return [keys[i] for i in (wrong or order)[:most]]


class MixtureCounter:
    """What the sources gave since the stage began: goes into every checkpoint."""

    def __init__(self, stage: Stage, before: Mapping[str, float]) -> None:
        self._sources = [source.name for source in stage.data.leaves]
        self.seen = {name: before.get(name, 0.0) for name in self._sources}
        self.replaced = before.get("replaced.", 0.0)  # a name that no source can have

    def add(self, taken: StepResult) -> Metrics:
        """The realized share of every source, where there are several, and how many samples stood in for others."""
        self.replaced += float(taken.replaced_S.sum())
        for name, samples in zip(self._sources, taken.samples_S.tolist(), strict=True):
            self.seen[name] += samples
        total = sum(self.seen.values())
        shares = (
            {f"share.{name}": n / total for name, n in self.seen.items()}
            if len(self.seen) > 1
            else {}
        )
        return {**shares, "replaced": self.replaced}

    def state(self) -> dict[str, float]:
        return {**self.seen, "replaced.": self.replaced}


class Clock:
    """Where the time of a step goes: waiting for data, or working."""

    def __init__(self) -> None:
        self._mark = self._flushed = time.perf_counter()
        self._wait = 0.0

    def waits(self) -> None:
        """The wait for data begins: what lies before it was a checkpoint or an evaluation."""
        self._mark = time.perf_counter()

    def waited(self) -> None:
        self._wait = time.perf_counter() - self._mark

    def took(self, batches: Sequence[Batch], taken: StepResult) -> Metrics:
        """Of the step that ends here; rates are of all workers. `padding` is this worker's."""
        now = time.perf_counter()
        step_s, self._mark = now - self._mark, now
        real = sum(int(b.attention_BT.sum()) for b in batches)
        return {
            "step_s": step_s,
            "samples_per_s": float(taken.samples_S.sum()) / step_s,
            "tokens_per_s": float(taken.tokens_S.sum()) / step_s,
            "padding": 1 - real / sum(b.ids_BT.numel() for b in batches),
            "data_wait_share": self._wait / step_s,
        }

    def due(self, seconds: float) -> bool:
        if time.perf_counter() - self._flushed < seconds:
            return False
        self._flushed = time.perf_counter()
        return True


POLL_S = 0.5


@contextmanager
def progress_bar(folder: Path, title: str, steps: int, console: Console) -> Iterator[None]:
    """Follow a stage, by the journal and the notices in its folder, until the block ends."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    bar = Progress(
        *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
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
    return (
        f"loss {now.get('loss', float('nan')):.3f}, {now.get('samples_per_s', 0.0):.0f} samples/s"
    )
