"""Guard of every Python process of a node (see `separate_nodes`): no path outside its own folders.

It is the sitecustomize.py of the node, so it uses the standard library alone. An audit hook (PEP
578) refuses and records every path outside NODE_FOLDER: reading is allowed in the installed software
(NODE_READS) and in the folders of the operating system, and writing nowhere else. NODE_CLOCK_S is
added to the clock of the node.
"""

import os
import sys
import sysconfig
import time
from typing import Any

FOLDER = os.environ["NODE_FOLDER"]
RECORD = f"{FOLDER}/refused.txt"
SYSTEM = ("/bin", "/etc", "/lib", "/lib64", "/sbin", "/usr")
DEVICES = ("/dev", "/proc", "/sys")  # plasma stores its objects in /dev/shm
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# events -> number of their first arguments that are paths
READING = {"os.listdir": 1, "os.scandir": 1, "os.chdir": 1}
WRITING = {
    "os.chmod": 1,
    "os.link": 2,
    "os.mkdir": 1,
    "os.remove": 1,
    "os.rename": 2,
    "os.rmdir": 1,
    "os.symlink": 2,
    "os.truncate": 1,
    "os.utime": 1,
    "sqlite3.connect": 1,
}
readable = (
    *SYSTEM,
    *os.environ["NODE_READS"].split(os.pathsep),
    *(os.path.realpath(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")),
    sys.prefix,
    sys.base_prefix,
)


def inside(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == folder or path.startswith(f"{folder}/") for folder in folders)


def allowed(path: str, writes: bool) -> bool:
    return inside(path, (FOLDER, *DEVICES)) or (not writes and inside(path, readable))


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse an event with a path outside the node's folders. Raises PermissionError."""
    if event == "open":
        paths, flags = arguments[:1], arguments[2]
        writes = bool(flags & WRITES) if isinstance(flags, int) else True
    elif event in READING or event in WRITING:
        paths, writes = arguments[: (READING | WRITING)[event]], event in WRITING
    else:
        return
    for given in paths:
        if isinstance(given, str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(given) or ".")
            # A read of a path that does not exist here fails by itself: Ray gives the import path of
            # the command to the workers, with its working folder.
            if not allowed(path, writes) and (writes or os.path.lexists(path)):
                with open(RECORD, "a") as file:
                    file.write(f"{os.getpid()} {event} {path} {' '.join(sys.orig_argv)[:200]}\n")
                raise PermissionError(13, f"{event}: outside the folders of this node", path)


def shift_clock(seconds: float) -> None:
    """Add seconds to the clock of this process."""
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + seconds
    time.time_ns = lambda: now_ns() + int(seconds * 1e9)


if seconds := float(os.environ.get("NODE_CLOCK_S", "0")):
    shift_clock(seconds)
with open(f"{FOLDER}/guarded.txt", "a") as guarded:
    guarded.write(f"{' '.join(sys.orig_argv)[:200]}\n")
sys.addaudithook(watch)
