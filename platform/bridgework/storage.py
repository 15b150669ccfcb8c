"""Durable writes to a local disk, and the fsspec file system of a path or URL.

A file or folder appears complete, and survives a power cut, or not at all. The steps: write to a
temporary name, flush to the disk (fsync), rename, flush the folder of the name. Without the first
flush the rename may outlive the bytes; without the second a crash may restore the old name (Pillai
et al. 2014, "All File Systems Are Not Created Equal", OSDI).
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec

from bridgework.errors import DataError, ResourceError, suggest

FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left on the device; the user's quota is used up
# Messages about a full disk: of torch.save, whose zip writer raises a RuntimeError, and
# safetensors.
FULL_MESSAGES = (
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
    "No space left on device",
    "Disk quota exceeded",
)


def write_atomic(path: Path, content: str | bytes, *, mode: int | None = None) -> None:
    """Replace the file at `path` by `content`; readers see the old or the new file, never a part.

    `mode` sets the permission bits before any byte is written. Raises ResourceError if the disk is
    full.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    try:
        with disk_errors(path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
            descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def append(path: Path, content: str) -> None:
    """Append `content` to the file at `path` and flush it to the disk; a failed write is truncated.

    Raises ResourceError if the disk is full.
    """
    data, new = content.encode(), not path.exists()
    with disk_errors(path):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        before = os.fstat(file).st_size
        try:
            while data:
                data = data[os.write(file, data) :]
            os.fsync(file)
        except OSError:
            with suppress(OSError):
                os.ftruncate(file, before)
            raise
        finally:
            os.close(file)
        if new:
            sync_folder(path.parent)


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` after the block, and is removed on an error.

    An existing folder of that name is replaced. Raises ResourceError if the disk is full.
    """
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def publish(temporary: Path, folder: Path) -> None:
    """Flush every file under `temporary` and rename it to `folder`, replacing an older folder.

    The older one is renamed first and removed last, so that a crash leaves one of them complete.
    """
    sync_tree(temporary)
    old = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.old")
    if folder.exists():
        folder.rename(old)
    temporary.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, itself included, to the disk."""
    for place, _, files in os.walk(folder):
        for name in files:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` after files were created, renamed or removed there."""
    _sync(folder)


def _sync(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def disk_full(error: BaseException) -> bool:
    """Return True for the error of a full disk or quota, also as other classes of libraries."""
    chain: list[BaseException] = []
    at: BaseException | None = error
    while at is not None and at not in chain:
        chain.append(at)
        at = at.__cause__ or at.__context__
    return any(
        (isinstance(e, OSError) and e.errno in FULL)
        or any(text in str(e) for text in FULL_MESSAGES)
        for e in chain
    )


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raise ResourceError, with the disk and its free space, if the block fails on a full disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ResourceError) or not disk_full(error):
            raise
        raise full(path) from error


def full(path: Path, need: int | None = None) -> ResourceError:
    """Return the error of a full disk; need: bytes of the file to write, if known."""
    place = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    needed = "" if need is None else f"; expected {need / 1e6:,.1f} MB"
    return ResourceError(
        f"{path}: the disk is full. Got {free / 1e6:,.1f} MB free on the disk of {place}{needed}. "
        "Fix: free some space there, or set BRIDGEWORK_HOME to a larger disk. Complete files are "
        "unchanged, and the same command resumes"
    )


def find_store(url: str) -> tuple[Any, str]:
    """Return the file system of `url` and the path in it, without a request to the store.

    Raises DataError for an unknown protocol, ResourceError for one whose package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        protocol = url.partition("://")[0]
        raise DataError(
            f"{url!r}: {error}{suggest(protocol, fsspec.available_protocols())}"
        ) from None
    except ImportError as error:
        raise ResourceError(f"{url!r} needs a package that is not installed: {error}") from None
    return fs, path


def unreachable(file: str, error: Exception) -> ResourceError:
    """Return the error of a file whose store does not answer or refuses; a retry may succeed."""
    return ResourceError(
        f"{file} cannot be reached. Got {type(error).__name__}: {error}. "
        "Fix: check that its store is up and that you have access"
    )
