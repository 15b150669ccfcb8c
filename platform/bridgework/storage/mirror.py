"""Mirrors: files that a process appends to on its local disk, copied to a folder of a store.

No store can append to an object. A journal or a record of steps therefore grows on the disk of its
node, and a thread uploads the files that changed. Its bandwidth has a bound: a large file is
uploaded less often. `flush` uploads at once, before a checkpoint.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from bridgework.storage import node_cache

EVERY_S = 5.0
BYTES_PER_S = 400_000  # of one file on average

log = logging.getLogger(__name__)


class Mirror:
    """A local folder whose files are uploaded to `remote`, under the same relative names."""

    def __init__(self, local: Path, remote: Path) -> None:
        self.local, self._remote = local, remote
        self._uploaded: dict[Path, tuple[int, float]] = {}  # file -> (bytes, monotonic time)
        self._failing = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="mirror", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Upload the rest and end the thread."""
        self._over.set()
        self._thread.join()
        self.flush()

    def flush(self) -> None:
        """Upload all files that changed. A failure is logged and never ends a run."""
        self._upload(all_=True)

    def _loop(self) -> None:
        while not self._over.wait(EVERY_S):
            self._upload(all_=False)

    def _upload(self, all_: bool) -> None:
        with self._lock:
            for file in sorted(path for path in self.local.rglob("*") if path.is_file()):
                size = file.stat().st_size
                before, at = self._uploaded.get(file, (0, 0.0))
                due = all_ or time.monotonic() - at > size / BYTES_PER_S
                if size == before or not due or file.name == node_cache.USED:
                    continue
                target: Any = self._remote / file.relative_to(self.local).as_posix()
                try:
                    with file.open("rb") as stream:
                        target.fs.pipe_file(target.path, stream.read(size))
                except OSError as error:
                    if not self._failing:
                        log.warning(
                            "%s waits on this node until it can be written: %s", target, error
                        )
                    self._failing = True
                    return
                self._uploaded[file] = size, time.monotonic()
            if self._failing:
                self._failing = False
                log.warning("%s is written again", self._remote)


class Growing(NamedTuple):
    """A local folder to append to, and the function that copies it to the store, if there is one."""

    folder: Path
    flush: Callable[[], None]


@contextmanager
def growing(folder: Path) -> Iterator[Growing]:
    """Yield a folder for files that grow: `folder`, or a mirror of it if it is in a store."""
    if isinstance(folder, PurePath):
        yield Growing(folder, lambda: None)
        return
    with mirrored(folder) as mirror:
        yield Growing(mirror.local, mirror.flush)


@contextmanager
def mirrored(remote: Path) -> Iterator[Mirror]:
    """Yield a mirror of `remote`, whose files are uploaded during and after the block."""
    with node_cache.scratch() as local:
        mirror = Mirror(local, remote)
        mirror.start()
        try:
            yield mirror
        finally:
            mirror.close()
