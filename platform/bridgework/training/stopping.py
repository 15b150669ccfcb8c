"""Requests to stop a run or to save a checkpoint, which the loop checks after every step.

A request to stop is a signal to one of the run's processes, or a file in the stage's folder. All
workers agree on the step after which they stop, and a checkpoint is saved there. Workers under Ray
Train receive no signal, so the driver writes the file. The notice that a node is about to be taken
away leads to checkpoints, and training continues until the node is gone.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from bridgework import storage
from bridgework.errors import Interrupted, Paused

FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 0.5  # interval between checks for the file: it may be on a shared disk
MARGIN_S = 2.0  # least time between the end of a checkpoint and that of a node
STORE_POLL_S = 5.0  # in a store, where a thread checks, because a request takes time


class Stop:
    """The request to stop the run of one stage, if there is one."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._asked = ""
        self._checked = 0.0  # on the monotonic clock
        self._local = storage.is_local(folder)
        self._over = threading.Event()

    def ask(self, reason: str) -> None:
        """Ask this process to stop, and by the file all others."""
        self._asked = reason
        # With a full disk, the other processes learn of it in this process's next step.
        with suppress(OSError):
            self._file.write_text(reason)

    def clear(self) -> None:
        """Remove the file."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    def withdraw(self, reason: str) -> None:
        """Remove the file, unless it holds another request by now."""
        with suppress(OSError):
            if self._file.read_text() == reason:
                self.clear()

    @property
    def asked(self) -> str:
        """The reason of the request, e.g. SIGTERM; empty without one."""
        if self._local and not self._asked and time.monotonic() - self._checked > POLL_S:
            self._checked = time.monotonic()
            self._check()
        return self._asked

    def _check(self) -> None:
        with suppress(OSError):
            self._asked = self._file.read_text() or "a request"

    @contextmanager
    def watching(self) -> Iterator[None]:
        """In a store, check for the file from a thread during the block."""
        if self._local:
            yield
            return

        def watch() -> None:
            while not self._asked and not self._over.wait(STORE_POLL_S):
                self._check()

        threading.Thread(target=watch, name="stop", daemon=True).start()
        try:
            yield
        finally:
            self._over.set()


class Preemption:
    """The notice that a node of the run is about to be taken away, and the checkpoints it leads to.

    The first one is due at the notice, and another one each time when half of the remaining time
    has passed, as long as there is time for it. What is lost with the node is then little, without
    a pause of the training until then.
    """

    def __init__(self, deadline: Callable[[], float | None]) -> None:
        """`deadline` returns the end of the node in Unix seconds; None without a notice."""
        self._find = deadline
        self._deadline: float | None = None
        self._next = 0.0  # time of the next checkpoint
        self._cost_s = 0.0  # of the newest checkpoint

    def due(self) -> bool:
        """Return True if a checkpoint is due on account of the notice."""
        deadline, now = self._find(), time.time()
        if deadline is None:
            return False
        if deadline != self._deadline:  # another node may follow the first one
            self._deadline, self._next = deadline, now
        return self._next <= now < deadline - self._cost_s - MARGIN_S

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure the checkpoint that the block saves, and schedule the next one."""
        started = time.time()
        yield
        now = time.time()
        self._cost_s = now - started
        if self._deadline is not None:
            self._next = now + (self._deadline - now) / 2


@contextmanager
def listening(folder: Path, say: Callable[[str], Any]) -> Iterator[Stop]:
    """Handle the first SIGTERM or Ctrl-C in the block as a request to stop; the second one kills.

    Handlers can be set only in the main thread. In other threads only the file is checked.
    """
    stop, stage, received = Stop(folder), folder.name, list[int]()
    if threading.current_thread() is not threading.main_thread():
        with stop.watching():
            yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if received:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        received.append(number)
        stop.ask(name)
        say(
            f"{stage}: {name}: a checkpoint is saved after this step, then the run stops; "
            "a second one stops it at once"
        )

    stop.clear()  # the request to an earlier attempt
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        with stop.watching():
            yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.clear()


def interrupted(stage: str, reason: str, step: int | None) -> Interrupted:
    """Return the error of a stopped run; step: that of the checkpoint, None without one."""
    saved = "no step was taken yet" if step is None else f"a checkpoint of step {step} is saved"
    return Interrupted(
        f"{stage}: stopped by {reason or 'a request'}; {saved}. The same command resumes"
    )


def paused(stage: str, step: int) -> Paused:
    """Return the error of a run that has reached the step of --until."""
    return Paused(
        f"{stage}: stopped at step {step}, as requested; a checkpoint is saved. The same command "
        "with a later --until, or without, resumes"
    )
