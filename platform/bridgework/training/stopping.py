"""Requests to stop a run: a signal to a process of it, or a file in the stage's folder.

The loop looks after every step, all workers agree on the step after which they stop, and a
checkpoint is saved there. Workers under Ray Train get no signal of their own: the driver writes the
file for them.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from bridgework.errors import Interrupted

FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
LOOK_S = 0.5  # how often the file is looked for: it may be on a shared disk


class Stop:
    """The request to stop the run of one stage, if there is one."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._asked = ""
        self._looked = 0.0

    def ask(self, reason: str) -> None:
        """Ask this process to stop, and through the file all others."""
        self._asked = reason
        try:
            self._file.write_text(reason)
        except (
            OSError
        ):  # the disk is full: this process knows, and the others learn it in its next step
            return

    def clear(self) -> None:
        """Take the request of the file back."""
        with suppress(OSError):
            self._file.unlink(missing_ok=True)

    @property
    def asked(self) -> str:
        """The reason, such as SIGTERM; empty as long as there is none."""
        if not self._asked and time.monotonic() - self._looked > LOOK_S:
            self._looked = time.monotonic()
            try:
                self._asked = self._file.read_text() or "a request"
            except OSError:
                return ""
        return self._asked


@contextmanager
def listening(folder: Path, say: Callable[[str], Any]) -> Iterator[Stop]:
    """Inside, the first SIGTERM or Ctrl-C asks to stop; the second ends this process as it would have at once.

    Handlers can be set in the main thread alone; elsewhere the file is what is looked at.
    """
    stop, stage = Stop(folder), folder.name
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        stop.ask(name)
        say(
            f"{stage}: {name}: a checkpoint is saved after this step, then the run stops; a second one stops it at once"
        )

    stop.clear()  # what asked an attempt before
    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        stop.clear()


def interrupted(stage: str, reason: str, step: int | None) -> Interrupted:
    """The error of a run that was asked to stop; `step` is that of the checkpoint, None without one."""
    kept = "no step was taken yet" if step is None else f"a checkpoint of step {step} is saved"
    return Interrupted(
        f"{stage}: stopped by {reason or 'a request'}; {kept}. The same command resumes"
    )
