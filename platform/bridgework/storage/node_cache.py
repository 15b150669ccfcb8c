"""Node cache: files of remote stores on the local disk, shared by all processes of a node.

It is a folder, $BRIDGEWORK_CACHE (default ~/.cache/bridgework), that holds blocks of shards and
features, and complete files such as weights. Least recently used files are removed when it has more
than $BRIDGEWORK_CACHE_GB gigabytes (default 50, and at most half of the disk's free space). A
reader has its own hard link to a complete file, so a removal never breaks it.
"""

import fcntl
import hashlib
import io
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from bridgework.errors import SpecError

DEFAULT_GB = 50.0
BLOCK_BYTES = 1 << 20
CHECK_EVERY = 64  # files written by a process between two checks of the bound
PART = ".part"
USED = ".used"  # file in a scratch folder that its process holds locked

_written = CHECK_EVERY  # the first file is followed by a check


def root() -> Path:
    """Return the folder of the cache; it is created."""
    given = os.environ.get("BRIDGEWORK_CACHE")
    folder = Path(given) if given else Path.home() / ".cache" / "bridgework"
    folder = folder.expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scratch_root() -> Path:
    """Return the folder for temporary files, on the disk of the cache."""
    folder = root() / "scratch"
    folder.mkdir(exist_ok=True)
    return folder


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder; one that a killed process left is removed later."""
    folder = Path(tempfile.mkdtemp(prefix="folder-", dir=scratch_root()))
    with _alive(folder):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _alive(folder: Path) -> Iterator[None]:
    """Hold a lock in the folder for as long as this process uses it."""
    with (folder / USED).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def setting(variable: str, default: float) -> float:
    """Return the number in an environment variable. Raises SpecError for anything else."""
    given = os.environ.get(variable) or str(default)
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise SpecError(
            f"{variable}: not a number. Got {given!r}; expected a number of at least 0, such as "
            f"{default:g}. Fix: correct it, or unset it"
        )
    return number


def bound() -> float:
    """Return the bytes that the cache may have."""
    if os.environ.get("BRIDGEWORK_CACHE_GB"):
        return setting("BRIDGEWORK_CACHE_GB", DEFAULT_GB) * 1e9
    return min(DEFAULT_GB * 1e9, _used() + shutil.disk_usage(root()).free / 2)


def entry(key: str) -> Path:
    """Return the file of a key; it may not exist."""
    name = hashlib.sha256(key.encode()).hexdigest()
    return root() / "files" / name[:2] / name[2:]


def fetch(key: str, download: Callable[[Path], object], link: Path) -> None:
    """Make `link` a hard link to the file of `key`, which one process of the node downloads."""
    file = entry(key)
    file.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):  # another process may remove the file before it is linked
        if not file.exists():
            with FileLock(file.with_name(f".{file.name}.lock")):
                if not file.exists():
                    _write(file, download)
        try:
            os.utime(file)
            os.link(file, link)
            return
        except FileNotFoundError:
            continue
        except OSError:  # a disk without hard links
            break
    download(link)


def _write(file: Path, fill: Callable[[Path], object]) -> None:
    global _written
    descriptor, name = tempfile.mkstemp(suffix=PART, dir=file.parent)
    os.close(descriptor)
    partial = Path(name)
    try:
        fill(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)
    _written += 1
    if _written >= CHECK_EVERY or file.stat().st_size > CHECK_EVERY * BLOCK_BYTES:
        _written = 0
        evict()


def evict(need: int = 0) -> None:
    """Remove the least recently used files until the cache keeps its bound.

    need: bytes that must be free on its disk, in addition.
    """
    with suppress(OSError), (root() / ".evict").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # one process at a time
        found = sorted(_files())
        limit, size = bound(), sum(size for _, size, _ in found)
        limit = min(limit, size - (need - shutil.disk_usage(root()).free))
        for _, bytes_, path in found:
            if size <= limit:
                break
            with suppress(OSError):
                os.unlink(path)
                size -= bytes_
        _remove_orphans()


def _used() -> int:
    return sum(size for _, size, _ in _files())


def _files() -> Iterator[tuple[float, int, str]]:
    """Yield (time of last use, bytes, path) of every file of the cache."""
    for place, _, names in os.walk(root() / "files"):
        for name in names:
            with suppress(FileNotFoundError):
                path = os.path.join(place, name)
                state = os.stat(path)
                yield state.st_mtime, state.st_size, path


def _remove_orphans() -> None:
    """Remove scratch folders whose process has ended, and single files older than a day."""
    for path in scratch_root().iterdir():
        if path.is_file():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > 86_400:
                    path.unlink()
            continue
        with suppress(OSError), (path / USED).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)


class CachedFile(io.RawIOBase):
    """A remote file for random reads, in blocks that are kept in the node cache.

    Contiguous missing blocks are one request.
    """

    def __init__(self, fs: Any, path: str, size: int, key: str) -> None:
        self._fs, self._path, self.size, self._key = fs, path, size, key
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self.size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self.range(self._at, self._at + len(buffer))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def range(self, start: int, end: int) -> bytes:
        """Return the bytes from `start` to `end`, of cached blocks where there are any."""
        end = min(end, self.size)
        if start >= end:
            return b""
        first, last = start // BLOCK_BYTES, (end - 1) // BLOCK_BYTES
        blocks = {n: data for n in range(first, last + 1) if (data := self._cached(n)) is not None}
        for begin, stop in _gaps(first, last + 1, blocks):
            fetched = self._fs.cat_file(
                self._path, start=begin * BLOCK_BYTES, end=min(stop * BLOCK_BYTES, self.size)
            )
            for n in range(begin, stop):
                at = (n - begin) * BLOCK_BYTES
                blocks[n] = fetched[at : at + BLOCK_BYTES]
                self._keep(n, blocks[n])
        joined = b"".join(blocks[n] for n in range(first, last + 1))
        return joined[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _file(self, block: int) -> Path:
        return entry(f"{self._key}#{block}")

    def _cached(self, block: int) -> bytes | None:
        file = self._file(block)
        try:
            data = file.read_bytes()
            os.utime(file)
        except OSError:
            return None
        expected = min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)
        return data if len(data) == expected else None

    def _keep(self, block: int, data: bytes) -> None:
        file = self._file(block)
        with suppress(OSError):  # a full disk is no reason to stop
            file.parent.mkdir(parents=True, exist_ok=True)
            _write(file, lambda partial: partial.write_bytes(data))


def _gaps(first: int, end: int, known: Any) -> Iterator[tuple[int, int]]:
    """Yield the ranges of numbers from `first` to before `end` that are not in `known`."""
    begin: int | None = None
    for number in range(first, end + 1):
        missing = number < end and number not in known
        if missing and begin is None:
            begin = number
        elif not missing and begin is not None:
            yield begin, number
            begin = None


def node() -> str:
    """Return a name of this node: its host name and the id of its last start."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]
    return f"{socket.gethostname()}-{boot}"
