"""Durable writes to a local disk or a remote store, by path or URL.

On a local disk, a file or folder appears complete, and survives a power cut, or not at all. The
steps: write to a temporary name, flush to the disk (fsync), rename, flush the folder of the name.
Without the first flush the rename may outlive the bytes; without the second a crash may restore the
old name (Pillai et al. 2014, "All File Systems Are Not Created Equal", OSDI).

In an object store, a file appears complete or not at all, and a folder does not exist. A folder is
published by an object that is written last (COMPLETE, or a manifest), and is removed with that
object first. `locate` returns the path of either kind. See `stores` for requests, `leases` for
locks, `mirror` for growing files, and `node_cache` for local copies.
"""

import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import unquote
from uuid import uuid4

from filelock import FileLock

from bridgework.errors import ResourceError, SpecError
from bridgework.storage import leases, node_cache, stores
from bridgework.storage.leases import Lease
from bridgework.storage.mirror import Growing, growing, mirrored
from bridgework.storage.stores import connect as find_store
from bridgework.storage.stores import explained, is_of_a_client

__all__ = [
    "Growing",
    "Lease",
    "append",
    "cache_folder",
    "cached_file",
    "copy",
    "disk_errors",
    "disk_full",
    "explained",
    "fetch",
    "find_store",
    "for_ray",
    "free_bytes",
    "full",
    "growing",
    "home",
    "is_local",
    "is_of_a_client",
    "is_published",
    "local_copy",
    "locate",
    "lock",
    "mirrored",
    "move_files",
    "names",
    "opened_for_writing",
    "publish",
    "publishing",
    "remove",
    "rename",
    "save_image",
    "sha256",
    "sync_folder",
    "sync_tree",
    "unreachable",
    "upload",
    "write_atomic",
]

MOVES = 1000  # objects that are copied and deleted together
COMPLETE = ".complete"  # object that is written last in a published folder of a store
FULL = (errno.ENOSPC, errno.EDQUOT)  # no space left on the device; the user's quota is used up
# Messages about a full disk: of torch.save, whose zip writer raises a RuntimeError, and
# safetensors.
FULL_MESSAGES = (
    "PytorchStreamWriter failed writing",
    "inline_container.cc",
    "No space left on device",
    "Disk quota exceeded",
)


def home() -> Path:
    """Return the place of datasets and runs: $BRIDGEWORK_HOME, a folder or a URL.

    The default is ./.bridgework.
    """
    return locate(os.environ.get("BRIDGEWORK_HOME") or ".bridgework", absolute=True)


def locate(place: str | PurePath, *, absolute: bool = False) -> Path:
    """Return the path of a folder, a file or a URL.

    The path of a remote URL has pathlib's interface, and `is_local` is False for it. Raises
    DataError for an unknown protocol, ResourceError for one whose package is not installed.
    """
    if not isinstance(place, str | PurePath):
        return place  # a path of a store
    # pathlib reads s3://bucket as s3:/bucket
    text = re.sub(r"^([a-z][a-z0-9]+):/(?!/)", r"\1://", str(place))
    protocol, separator, rest = text.partition("://")
    if separator and protocol not in stores.LOCAL:
        if not rest.strip("/"):
            raise SpecError(
                f"{text!r}: the URL has no bucket. Fix: give one, e.g. {protocol}://BUCKET/FOLDER"
            )
        return stores.store_path(text.rstrip("/"))
    path = Path(unquote(rest) if separator else text)
    return path.expanduser().absolute() if absolute else path


def is_local(path: PurePath) -> bool:
    """Return True for a path of this machine's file systems, False for one of a store."""
    return isinstance(path, PurePath)


def cache_folder() -> Path:
    """Return the local folder of converted files: `cache` in the home, or the node's cache."""
    place = home()
    return place / "cache" if is_local(place) else node_cache.root()


def free_bytes(path: Path) -> float:
    """Return the free bytes of the disk at `path`; a store has no limit."""
    return float(shutil.disk_usage(path).free) if is_local(path) else float("inf")


def names(folder: Path) -> list[str]:
    """Return the sorted names in a folder; [] if there is none."""
    try:
        return sorted(path.name for path in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def write_atomic(path: Path, content: str | bytes, *, mode: int | None = None) -> None:
    """Replace the file at `path` by `content`; readers see the old or the new file, never a part.

    `mode` sets the permission bits before any byte is written. Raises ResourceError if the disk is
    full.
    """
    data = content.encode() if isinstance(content, str) else content
    if not is_local(path):
        _put(path, data)
        return
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
    if not is_local(path):  # its only writer writes it again
        _put(path, (path.read_bytes() if path.exists() else b"") + content.encode())
        return
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

    An existing folder of that name is replaced. In a store it is `folder` itself, which
    `is_published` after the block. Raises ResourceError if the disk is full.
    """
    if not is_local(folder):
        remove(folder, first=COMPLETE)
        try:
            yield folder
        except BaseException:
            remove(folder)
            raise
        write_atomic(folder / COMPLETE, "")
        return
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}")
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            yield temporary
            publish(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_published(folder: Path) -> bool:
    """Return True for a folder that `publishing` completed."""
    return folder.is_dir() if is_local(folder) else (folder / COMPLETE).is_file()


def sha256(file: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def sync_tree(folder: Path) -> None:
    """Flush every file and folder under `folder`, itself included, to the disk."""
    if not is_local(folder):
        return
    for place, _, files in os.walk(folder):
        for name in files:
            _sync(Path(place, name))
        sync_folder(Path(place))


def sync_folder(folder: Path) -> None:
    """Flush the names in `folder` after files were created, renamed or removed there."""
    if is_local(folder):
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
    on_disk = path.absolute() if is_local(path) else node_cache.root()
    place = next(p for p in (on_disk, *on_disk.parents) if p.exists())
    free = shutil.disk_usage(place).free
    needed = "" if need is None else f"; expected {need / 1e6:,.1f} MB"
    return ResourceError(
        f"{path}: the disk is full. Got {free / 1e6:,.1f} MB free on the disk of {place}{needed}. "
        "Fix: free some space there, or set "
        f"{'BRIDGEWORK_HOME' if is_local(path) else 'BRIDGEWORK_CACHE'} to a larger disk. Complete files are "
        "unchanged, and the same command resumes"
    )


def unreachable(file: str, error: Exception) -> ResourceError:
    """Return the error of a file whose store does not answer or refuses; a retry may succeed."""
    if isinstance(error, ResourceError):  # it names the cause
        return error
    return ResourceError(
        f"{file} cannot be reached. Got {type(error).__name__}: {error}. "
        "Fix: check that its store is up and that you have access"
    )


# --- remote stores


def _put(path: Any, data: bytes) -> None:
    """Write an object. Stores in which a reader could see a part of it rename it last."""
    if path.protocol in stores.OBJECTS:
        path.fs.pipe_file(path.path, data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:8]}.tmp")
    path.fs.pipe_file(temporary.path, data)
    path.fs.mv(temporary.path, path.path)


def upload(local: Path, target: Any) -> None:
    """Copy a local file to a store, in parts if it is large."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.fs.put_file(str(local), target.path)


def save_image(image: Any, path: Path) -> None:
    """Save a PIL image; to a store by an upload."""
    if is_local(path):
        image.save(path)
        return
    buffer = io.BytesIO()
    image.save(buffer, format=path.suffix.removeprefix(".").upper())
    write_atomic(path, buffer.getvalue())


def opened_for_writing(path: Any) -> Any:
    """Open a new file as a context manager; that of a store is uploaded when it is closed."""
    return path.open("wb") if is_local(path) else path.fs.open(path.path, "wb")


def move_files(fs: Any, moves: Sequence[tuple[str, str]]) -> None:
    """Move files of one file system; in an object store, many at a time."""
    if not isinstance(fs, stores.Store) or fs.protocol_name not in stores.OBJECTS:
        for source, dest in moves:
            fs.mv(source, dest)
        return
    for start in range(0, len(moves), MOVES):
        sources, dests = zip(*moves[start : start + MOVES], strict=True)
        fs.copy(list(sources), list(dests))
        fs.rm(list(sources))


def for_ray(folder: Any) -> dict[str, Any]:
    """Return the arguments of Ray's RunConfig for a folder that all nodes read and write."""
    if is_local(folder):
        return {"storage_path": str(folder)}
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return {
        "storage_path": folder.path,
        "storage_filesystem": PyFileSystem(FSSpecHandler(folder.fs)),
    }


def copy(source: Any, target: Any) -> None:
    """Copy a file or folder inside a store, without a download."""
    source.fs.copy(source.path, target.path, recursive=source.is_dir())


def remove(folder: Path, *, first: str = "") -> None:
    """Remove a folder; in a store, the object `first` before all others.

    A folder without that object does not count as published, so a crash leaves no partial one.
    Files that cannot be removed from a local disk are left.
    """
    if is_local(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    if first:
        (folder / first).unlink(missing_ok=True)
    remote: Any = folder
    with suppress(FileNotFoundError):
        remote.fs.rm(remote.path, recursive=True)


def rename(folder: Path, target: Path, *, first: str = "") -> None:
    """Rename a folder. A store copies it and then removes it, with the object `first` first."""
    if is_local(folder):
        folder.rename(target)
        return
    copy(folder, target)
    remove(folder, first=first)


@contextmanager
def local_copy(path: Path) -> Iterator[Path]:
    """Yield a local path of a file: itself, or its copy in the node's cache."""
    if is_local(path):
        yield path
        return
    remote: Any = path
    key = f"{path}@{remote.fs.ukey(remote.path)}"
    with node_cache.scratch() as folder:
        fetch(path, key, folder / path.name)
        yield folder / path.name


def fetch(path: Any, key: str, link: Path, check: Callable[[Path], object] | None = None) -> None:
    """Download a file of a store to the node's cache under `key`, and link it to `link`.

    check: raises an error for a download that is not kept.
    """

    def download(partial_: Path) -> None:
        path.fs.get_file(path.path, str(partial_))
        if check is not None:
            check(partial_)

    with disk_errors(path):
        node_cache.fetch(key, download, link)


def cached_file(
    path: str, size: int | None = None, key: str | None = None
) -> node_cache.CachedFile | None:
    """Return a file of a remote store for random reads, of which blocks are cached; else None.

    size: in bytes. key: identifies the content; None: by the store's own tag of it.
    """
    fs, file = find_store(path)
    if not isinstance(fs, stores.Store):
        return None
    size = int(fs.size(file)) if size is None else size
    return node_cache.CachedFile(fs, file, size, key or f"{path}@{fs.ukey(file)}")


@contextmanager
def lock(path: Path, *, mode: int = 0o644) -> Iterator[None]:
    """Hold the lock of a file or folder, for which other processes wait."""
    hidden = path.with_name(f".{path.name}.lock")
    with FileLock(hidden, mode=mode) if is_local(path) else leases.held(hidden):
        yield
