"""Notices: warnings of the workers, forwarded to the driver's console.

Ray Train keeps the log of a worker on the worker's machine, where no user sees it. Here every
warning of bridgework goes from the workers to a file in the stage's folder, of each worker in a
store. The driver prints these files, and the warnings of its own log, to the console.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from bridgework import storage

FILE = "notices.jsonl"
FOLDER = "notices"  # in a store
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
    own = f"{FOLDER}/{time.time_ns():020d}-{uuid4().hex[:6]}.jsonl"
    with storage.growing(folder) as growing:
        file = growing.folder / (FILE if storage.is_local(folder) else own)
        file.parent.mkdir(exist_ok=True)
        with _handled(_ToFile(file)):
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
        self._folder = folder
        self._read: dict[Path, int] = {}
        for file in self._files():
            self._read[file] = file.stat().st_size if file.exists() else 0

    def _files(self) -> list[Path]:
        if storage.is_local(self._folder):
            return [self._folder / FILE]
        place = self._folder / FOLDER
        return [place / name for name in storage.names(place)]

    def new(self) -> list[str]:
        """Return the texts of complete lines since the last call, without repeated texts."""
        texts: list[str] = []
        try:
            for file in self._files():
                with file.open("rb") as stream:
                    stream.seek(self._read.get(file, 0))
                    content = stream.read()
                lines = content[: content.rfind(b"\n") + 1]
                self._read[file] = self._read.get(file, 0) + len(lines)
                texts += [json.loads(line)["text"] for line in lines.splitlines()]
        except OSError:
            pass
        return list(dict.fromkeys(texts))
