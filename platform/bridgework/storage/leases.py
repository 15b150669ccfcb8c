"""Leases: locks on a store, with fencing, for processes on any node.

A lease is a folder of generations, `00000001.json`, `00000002.json` ..: the newest one holds it.
A new generation is a conditional create, so exactly one process gets it. The holder rewrites its
file every few seconds. A process that sees no new content for LEASE_S seconds, by its own clock,
creates the next generation; no clocks of machines are compared. It waits longer if its own requests
take long, because those of the holder do too. A holder that comes back is fenced: `Lease.check`
fails before it publishes anything.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from bridgework.errors import RunError
from bridgework.storage import node_cache

LEASE_S = 60.0  # seconds without a sign of life, after which another process takes over
SLOW = 4  # rounds of requests to a slow store that are added to LEASE_S
SAY_EVERY_S = 10.0
_NAME = re.compile(r"(\d{8})\.json")

log = logging.getLogger(__name__)


class Lease(NamedTuple):
    """A held lease: its folder and generation. It is picklable, so that workers can check it."""

    folder: Path
    generation: int

    def check(self) -> None:
        """Raise RunError if another process has taken the lease over."""
        newest = _newest(self.folder)
        if newest > self.generation:
            raise RunError(
                f"{self.folder.parent}: another process has taken this run over, because this one "
                f"gave no sign of life for {LEASE_S:g} s or more. Got lease {newest}; expected "
                f"{self.generation}. Fix: let the other process train; nothing more is written here"
            )


@contextmanager
def held(folder: Path, refusal: Callable[[str], Exception] | None = None) -> Iterator[Lease]:
    """Hold the lease at `folder` during the block.

    refusal: returns the error for a lease that a living process holds, by a description of that
    process; None: wait until it is free.
    """
    own = {
        "node": node_cache.node(),
        "pid": os.getpid(),
        "id": uuid4().hex,
        **_started(os.getpid()),
    }
    lease = _acquire(folder, own, refusal)
    over = threading.Event()
    beat = threading.Thread(target=_beat, args=(lease, own, over), name="lease", daemon=True)
    beat.start()
    try:
        yield lease
    finally:
        over.set()
        beat.join()
        with suppress(OSError):  # it then ends after LEASE_S
            if _newest(folder) <= lease.generation:  # a stale listing may lack it
                _write(lease, own | {"released": True})


def _acquire(
    folder: Path, own: dict[str, Any], refusal: Callable[[str], Exception] | None
) -> Lease:
    known = 0  # a generation that a stale listing may lack
    while True:
        generation = max(_newest(folder), known)
        if generation:
            _wait_until_free(folder, generation, refusal)
        known = generation + 1
        with suppress(FileExistsError):
            lease = Lease(folder, known)
            file: Any = _file(lease)
            file.fs.create(file.path, json.dumps(own).encode())
            for number in range(max(1, generation - 3), generation):  # older ones are of no use
                with suppress(OSError):
                    _file(Lease(folder, number)).unlink(missing_ok=True)
            return lease


def _wait_until_free(
    folder: Path, generation: int, refusal: Callable[[str], Exception] | None
) -> None:
    """Return once the generation is released, replaced or abandoned."""
    held_by = Lease(folder, generation)
    seen, since, said = "", time.monotonic(), time.monotonic()
    patience_s, asked = LEASE_S, time.monotonic()
    while _newest(folder) <= generation:
        try:
            content = _file(held_by).read_text()
            holder = json.loads(content)
        except (FileNotFoundError, ValueError):  # eventual consistency
            content, holder = seen, {}
        if holder.get("released") or _is_alive(holder) is False:
            return
        now = time.monotonic()
        patience_s = max(patience_s, LEASE_S + SLOW * (now - asked))
        changed = content != seen and seen != ""
        if refusal is not None and (changed or _is_alive(holder)):
            raise refusal(f"{holder.get('node')}, process {holder.get('pid')}")
        if content != seen:
            seen, since = content, now
        if now - since > patience_s:
            log.warning(
                "%s: process %s of %s gave no sign of life for %.0f s and is replaced",
                folder,
                holder.get("pid"),
                holder.get("node"),
                now - since,
            )
            return
        if now - said > SAY_EVERY_S:
            said = now
            log.warning(
                "%s: waiting for process %s of %s to finish or give no sign of life for %.0f s",
                folder,
                holder.get("pid"),
                holder.get("node"),
                patience_s,
            )
        time.sleep(min(1.0, LEASE_S / 20))
        asked = time.monotonic()


def _beat(lease: Lease, own: dict[str, Any], over: threading.Event) -> None:
    number = 0
    while not over.wait(LEASE_S / 6):
        number += 1
        try:
            if _newest(lease.folder) > lease.generation:
                return
            _write(lease, own | {"beat": number})
        except OSError as error:
            log.warning("%s: the lease cannot be renewed: %s", lease.folder, error)


def _write(lease: Lease, content: dict[str, Any]) -> None:
    file: Any = _file(lease)
    file.fs.pipe_file(file.path, json.dumps(content).encode())


def _file(lease: Lease) -> Path:
    return lease.folder / f"{lease.generation:08d}.json"


def _newest(folder: Path) -> int:
    try:
        names = [path.name for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return 0
    return max((int(found[1]) for name in names if (found := _NAME.fullmatch(name))), default=0)


def _is_alive(holder: dict[str, Any]) -> bool | None:
    """Return whether a process of this node lives; None for one of another node."""
    if holder.get("node") != node_cache.node():
        return None
    started = _started(int(holder["pid"]))
    return bool(started) and started["started"] == holder.get("started")


def _started(pid: int) -> dict[str, str]:
    """Return the start time of a process; {} if there is none."""
    try:
        return {"started": Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]}
    except OSError:
        return {}
