"""A run's folder: one writer at a time, one recipe for ever, room on the disk."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridgework.data.names import MAX_BYTES as NAME_BYTES
from bridgework.data.names import has_control
from bridgework.errors import ResourceError, RunError, SpecError, suggest
from bridgework.spec import from_dict, to_dict
from bridgework.system import System


def place(home: Path, run: str) -> Path:
    """<home>/runs/<run>. Raises SpecError for a name that would lead out of it, or that no folder can have."""
    if has_control(run) or not run.strip():
        raise SpecError(
            f"a run's name is a line of letters. Got {run[:80]!r}. "
            "Fix: leave out line breaks and other control characters"
        )
    if (size := max(len(part.encode()) for part in run.split("/"))) > NAME_BYTES:
        raise SpecError(
            f"a run's name has at most {NAME_BYTES} bytes. Got {size}: {run[:40]!r}... Fix: give a shorter --run"
        )
    root = (home / "runs").resolve()
    folder = (root / run).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise SpecError(f"a run's name is a folder under {root}, not {run!r}; leave out '..' and a leading '/'")
    return root / run


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"run {folder.name!r} is being trained by another process; wait for it or give another --run"
            ) from None
        yield


def recipe(home: Path, run: str) -> System:
    """The recipe of a run, as it was begun. Raises RunError for a run that was not."""
    folder = place(home, run)
    file = folder / "recipe.json"
    if not file.is_file():
        locks = (home / "runs").rglob("lock")  # an artefact has a recipe, too
        known = [path.parent.relative_to(home / "runs").as_posix() for path in locks]
        raise RunError(f"there is no run {run!r} under {home / 'runs'}" + suggest(run, known))
    system = from_dict(json.loads(file.read_text()))
    if not isinstance(system, System):
        raise RunError(f"{file} holds no recipe; the run cannot be shown or resumed")
    return system


def same_recipe(folder: Path, system: System) -> None:
    file, now = folder / "recipe.json", to_dict(system)
    if not file.exists():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(now, indent=1))
        temporary.rename(file)
        return
    before = json.loads(file.read_text())
    if before != json.loads(json.dumps(now)):
        changed = _differences(before, json.loads(json.dumps(now)))
        raise RunError(
            f"run {folder.name!r} exists with another recipe: {'; '.join(changed[:3])}"
            + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
            + "; give another --run, or undo the change"
        )


def _differences(before: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [d for k in keys for d in _differences(before.get(k), now.get(k), f"{path}.{k}".lstrip("."))]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        names = [b.get("name", str(i)) if isinstance(b, dict) else str(i) for i, b in enumerate(before)]
        return [d for n, b, a in zip(names, before, now, strict=True) for d in _differences(b, a, f"{path}.{n}")]
    return [] if before == now else [f"{path} was {before!r}, is {now!r}"]


def room(home: Path, need: int = 500_000_000) -> None:
    free = shutil.disk_usage(home).free
    if free < need:
        raise ResourceError(
            f"{home} has {free / 1e6:.0f} MB free, a run needs at least {need / 1e6:.0f} MB; "
            "free some, or set BRIDGEWORK_HOME to a larger disk"
        )
