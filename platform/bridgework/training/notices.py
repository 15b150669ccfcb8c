"""Notices: warnings of the workers, forwarded to the driver's console.

Ray Train keeps the log of a worker on the worker's machine, where no user sees it. Here every
warning of bridgework goes from the workers to a file in the stage's folder. The driver prints that
file, and the warnings of its own log, to the console.
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
    """Appends a line to the file; a failed write is ignored, because it must not stop a run."""

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
def to_file(folder: Path) -> Iterator[None]:
    """Append the warnings of this worker to the file in the stage's folder."""
    with _handled(_ToFile(folder / FILE)):
        yield


@contextmanager
def to_console(say: Callable[[str], object]) -> Iterator[None]:
    """Print the driver's own warnings by `say`, instead of by Python's handler of last resort."""
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
    """Reads the notices of a stage that were written after its construction."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / FILE
        self._read = self._file.stat().st_size if self._file.exists() else 0

    def new(self) -> list[str]:
        """Return the texts of complete lines since the last call, without repeated texts."""
        try:
            with self._file.open("rb") as file:
                file.seek(self._read)
                content = file.read()
        except OSError:
            return []
        lines = content[: content.rfind(b"\n") + 1]
        self._read += len(lines)
        return list(dict.fromkeys(json.loads(line)["text"] for line in lines.splitlines()))
