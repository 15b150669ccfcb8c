"""Per-step metrics: losses, per-source counts, timing; the samples with the highest loss; progress.

The loop computes them and writes the journal. The driver follows the journal with a progress bar in
a terminal, and with a line per tenth of the stage in a log.
"""

# R samples of this rank  L losses  S sources of the mixture

import math
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from bridgework import ray_metrics, ray_utils, storage
from bridgework.config import path_name
from bridgework.data.collate import Batch
from bridgework.system import Stage
from bridgework.tracking.tracker import JOURNAL, PIECE, Journal, Point
from bridgework.training.engine import StepResult
from bridgework.training.notices import Follower

Metrics = dict[str, float]
POLL_S = 0.5  # interval at which the progress bar reads the journal
STORE_POLL_S = 5.0  # in a store


def step_metrics(stage: Stage, result: StepResult) -> Metrics:
    """Return the loss of a step, its parts, and the gradient's norm.

    With several sources, also the losses, samples and tokens of each source.
    """
    names = [f"loss.{path_name(loss)}" for loss in stage.losses]
    metrics = dict(zip(names, result.losses_L.tolist(), strict=True))
    total = sum(loss.weight * metrics[name] for loss, name in zip(stage.losses, names, strict=True))
    sources = [source.name for source in stage.data.leaves]
    if len(sources) > 1:
        means, counts = result.means_LS.tolist(), result.counts_LS.tolist()
        for name, means_S, counts_S in zip(names, means, counts, strict=True):
            by_source = zip(sources, means_S, counts_S, strict=True)
            metrics |= {f"{name}.{source}": mean for source, mean, n in by_source if n}
        samples = zip(sources, result.samples_S.tolist(), strict=True)
        metrics |= {f"samples.{source}": n for source, n in samples}
        tokens = zip(sources, result.tokens_S.tolist(), strict=True)
        metrics |= {f"tokens.{source}": n for source, n in tokens}
    return {"loss": total, **metrics, "grad_norm": result.norm}


def per_sample(stage: Stage, result: StepResult) -> tuple[list[float], list[float]]:
    """Return (losses, counts) of this rank's samples.

    losses: each sample's own mean, weighted over the losses. counts: the divisor of that mean in
    the first loss.
    """
    weights_L = torch.tensor([loss.weight for loss in stage.losses])
    sums_LR = result.sums_LR.cpu()
    losses_R: Tensor = weights_L @ (sums_LR / result.counts_LR.clamp(min=1))
    return losses_R.tolist(), result.counts_LR[0].tolist()


def suspects(keys: Sequence[str], losses: Sequence[float], most: int = 4) -> list[str]:
    """Return the samples whose loss is not finite, or else those with the highest loss."""
    order = sorted(
        range(len(keys)), key=lambda i: -losses[i] if math.isfinite(losses[i]) else -math.inf
    )
    not_finite = [i for i in order if not math.isfinite(losses[i])]
    return [keys[i] for i in (not_finite or order)[:most]]


class MixtureCounter:
    """Samples of each source since the stage began, and replacements; part of every checkpoint."""

    def __init__(self, stage: Stage, before: Mapping[str, float]) -> None:
        """before: the `state` in the checkpoint from which the stage resumes; {} at its start."""
        self._sources = [source.name for source in stage.data.leaves]
        self.seen = {name: before.get(name, 0.0) for name in self._sources}
        self.replaced = before.get("replaced.", 0.0)  # a key that no source can have

    def add(self, result: StepResult) -> Metrics:
        """Count a step; returns the number of replaced samples.

        With several sources, also the realized share of each.
        """
        self.replaced += float(result.replaced_S.sum())
        for name, samples in zip(self._sources, result.samples_S.tolist(), strict=True):
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
    """Time of a step, and the share of it spent waiting for data."""

    def __init__(self) -> None:
        self._mark = self._flushed = time.perf_counter()
        self._wait = 0.0

    def start_wait(self) -> None:
        """Start the wait for data; the time before it was a checkpoint or an evaluation."""
        self._mark = time.perf_counter()

    def end_wait(self) -> None:
        self._wait = time.perf_counter() - self._mark

    def end_step(self, batches: Sequence[Batch], result: StepResult) -> Metrics:
        """Return the metrics of the step that ends now.

        Rates are over all workers; `padding` is this worker's.
        """
        now = time.perf_counter()
        step_s, self._mark = now - self._mark, now
        real = sum(int(b.attention_BT.sum()) for b in batches)
        return {
            "step_s": step_s,
            "samples_per_s": float(result.samples_S.sum()) / step_s,
            "tokens_per_s": float(result.tokens_S.sum()) / step_s,
            "padding": 1 - real / sum(b.ids_BT.numel() for b in batches),
            "data_wait_share": self._wait / step_s,
        }

    def flush_due(self, every_s: float) -> bool:
        """Return True once per `every_s` seconds."""
        if time.perf_counter() - self._flushed < every_s:
            return False
        self._flushed = time.perf_counter()
        return True


class GoodputMeter:
    """Exports the progress of a stage, and the parts of its time, to Prometheus.

    Only rank 0 of a stage that runs in a Ray exports. The goodput is the rate of
    `ray_bridgework_train_seconds_total{part="step"}`: seconds of steps per second.
    """

    def __init__(self, system: str, run: str, stage: str, *, rank: int) -> None:
        self._exports = rank == 0 and ray_utils.is_open()
        self._labels = {"system": system, "run": run, "stage": stage}
        self._start: float | None = time.perf_counter()

    def step(self, step: int, metrics: Metrics) -> None:
        """Export the metrics of one step. The first call also exports the time of the start."""
        if not self._exports:
            return
        step_s, wait_s = metrics["step_s"], metrics["data_wait_share"] * metrics["step_s"]
        if self._start is not None:
            self._seconds("start", time.perf_counter() - self._start - step_s)
            self._start = None
        self._seconds("data_wait", wait_s)
        self._seconds("step", step_s - wait_s)
        ray_metrics.add("bridgework_train_steps", 1, **self._labels)
        for name in ("samples", "tokens"):
            total = metrics[f"{name}_per_s"] * step_s
            ray_metrics.add(f"bridgework_train_{name}", total, **self._labels)
        ray_metrics.set_value("bridgework_train_step", step, **self._labels)
        for name in ("loss", "grad_norm", "padding", "replaced"):
            ray_metrics.set_value(f"bridgework_train_{name}", metrics[name], **self._labels)
        for name, share in metrics.items():
            if name.startswith("share."):
                source = name.removeprefix("share.")
                ray_metrics.set_value(
                    "bridgework_train_source_share", share, source=source, **self._labels
                )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Export the seconds of the block as `part`, also if it raises."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds(part, time.perf_counter() - started)

    def _seconds(self, part: str, seconds: float) -> None:
        if self._exports:
            ray_metrics.add("bridgework_train_seconds", seconds, part=part, **self._labels)


@contextmanager
def progress_bar(folder: Path, title: str, steps: int, console: Console) -> Iterator[None]:
    """Show the progress of the stage in `folder` from its journal and notices in the block."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
    )
    # Lines of libraries go above the bar only if they have its stream anyway.
    shared = console.file in (sys.stdout, sys.stderr)
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=shared,
        redirect_stderr=shared,
    )
    task = bar.add_task(title, total=steps, figures="starting the workers")
    over = threading.Event()
    journal, notices = Journal(folder / JOURNAL), Follower(folder)
    # bytes that were read of each file; those of an earlier attempt have ended
    offsets, tenth = dict.fromkeys(journal.names(), sys.maxsize), 0

    def read() -> Iterator[list[Point]]:
        for name in journal.unread(offsets):  # workers and the driver write at the same time
            for end, points in journal.read(name, offsets.get(name, 0), PIECE):
                offsets[name] = end
                yield points

    def show() -> None:
        nonlocal tenth
        for text in notices.new():
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        for points in read():
            step = max((p.step for p in points if p.key == "loss"), default=None)
            if step is None:
                continue  # metrics of an evaluation
            figures, done = _figures(points, step), min(step + 1, steps)
            bar.update(task, completed=done, figures=figures)
            if not console.is_terminal and done * 10 // steps > tenth:
                tenth = done * 10 // steps
                console.print(f"{title}: {done} of {steps} steps, {figures}", highlight=False)

    def follow() -> None:
        last = False
        while not last:
            last = over.is_set()  # read once more after the end
            with suppress(OSError):  # the run itself reports a disk or store that fails
                show()
            if not last:
                over.wait(POLL_S if storage.is_local(folder) else STORE_POLL_S)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    with bar:
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _figures(points: Sequence[Point], step: int) -> str:
    values = {p.key: p.value for p in points if p.step == step}
    loss, rate = values.get("loss", float("nan")), values.get("samples_per_s", 0.0)
    return f"loss {loss:.3f}, {rate:.0f} samples/s"
