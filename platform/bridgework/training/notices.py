"""Warnings of workers, forwarded to the person at the command.

A warning in the log of a worker under Ray Train is not seen: Ray keeps it on the worker's machine.
Here every warning of bridgework goes from the workers to a file of the stage's folder, and from there,
as from the driver's own log, to the console.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "notices.jsonl"
LOGGER = logging.getLogger("bridgework")


class _ToFile(logging.Handler):
    """Appends a line to the file; a disk that refuses it is no reason to stop."""

    def __init__(self, file: Path) -> None:
        super().__init__(logging.WARNING)
        self._file = file

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with self._file.open("a") as file:
                file.write(json.dumps({"at": time.time(), "text": record.getMessage()}) + "\n")
        except OSError:
            return


class _ToConsole(logging.Handler):
    def __init__(self, say: Callable[[str], object]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """In a worker: its warnings go to the stage's folder."""
    with _handled(_ToFile(folder / FILE)):
        yield


@contextmanager
def shown(say: Callable[[str], object]) -> Iterator[None]:
    """In the driver: its own warnings are printed by `say`, and not by Python's last resort as well."""
    with _handled(_ToConsole(say)):
        yield


@contextmanager
def _handled(handler: logging.Handler) -> Iterator[None]:
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)


class Follower:
    """Reads the notices of a stage that were written since it was made."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._read = self._file.stat().st_size if self._file.exists() else 0

    def new(self) -> list[str]:
        """The texts of complete lines since the last call; the same text of several workers once."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._read)
                said = file.read()
        except OSError:
            return []
        lines = said[: said.rfind(b"\n") + 1]
        self._read += len(lines)
        return list(dict.fromkeys(json.loads(line)["text"] for line in lines.splitlines()))
