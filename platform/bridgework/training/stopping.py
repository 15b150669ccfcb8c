"""Requests to stop a run: a signal to one of its processes, or a file in the stage's folder.

The loop checks after every step. All workers agree on the step after which they stop, and a
checkpoint is saved there. Workers under Ray Train receive no signal, so the driver writes the file.
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
from bridgework.errors import Interrupted

FILE = "stop"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
POLL_S = 0.5  # interval between checks for the file: it may be on a shared disk
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


@contextmanager
def listening(folder: Path, say: Callable[[str], Any]) -> Iterator[Stop]:
    """Handle the first SIGTERM or Ctrl-C in the block as a request to stop; the second one kills.

    Handlers can be set only in the main thread. In other threads only the file is checked.
    """
    stop, stage = Stop(folder), folder.name
    if threading.current_thread() is not threading.main_thread():
        with stop.watching():
            yield stop
        return

    def handle(number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if stop.asked:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
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
