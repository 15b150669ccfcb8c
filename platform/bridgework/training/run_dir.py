"""Run directory: name, lock, recipes and free disk space of a run.

recipe.json is the run's current recipe; recipes.json lists every recipe with which it was trained.
They differ only in options (see `config.option`): a change that affects the training result needs
another run, see `fork`.
"""

import fcntl
import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bridgework import old_names, storage
from bridgework.config import from_dict, to_dict
from bridgework.data.names import MAX_BYTES as NAME_BYTES
from bridgework.data.names import has_control
from bridgework.errors import ResourceError, RunError, SpecError, suggest
from bridgework.storage import leases
from bridgework.system import System, fingerprint

HISTORY = "recipes.json"
SNAPSHOTS = "snapshots"  # in a stage's folder, see `training.snapshots`
FIGURES = "figures.json"  # of a snapshot that is evaluated
FEATURES = "features.json"  # in a stage's folder: cached or computed, and why
LOCK = "lock"
STEPS = re.compile(r"stages\.([^.]+)\.budget\.steps")


def path_of(home: Path, run: str) -> Path:
    """Return <home>/runs/<run>. Raises SpecError for an invalid name or a path outside runs."""
    if has_control(run) or not run.strip():
        raise SpecError(
            f"a run's name is a line of letters. Got {run[:80]!r}. "
            "Fix: leave out line breaks and other control characters"
        )
    if (size := max(len(part.encode()) for part in run.split("/"))) > NAME_BYTES:
        raise SpecError(
            f"a run's name has at most {NAME_BYTES} bytes. Got {size}: {run[:40]!r}... "
            "Fix: give a shorter --run"
        )
    root = (home / "runs").resolve()
    folder = (root / run).resolve()
    if folder == root or not folder.is_relative_to(root):
        raise SpecError(
            f"a run's name is a folder under {root}. Got {run!r}. "
            "Fix: leave out '..' and a leading '/'"
        )
    return root / run


def default_name(prefix: str, system: System, home: Path) -> str:
    """Return the name of an unnamed run: `prefix` and six digits of the system's identity.

    The identity leaves out options, so that the run resumes with others. Earlier versions took the
    digits of the fingerprint; an existing run with such a name is found again.
    """
    named, before = (
        f"{prefix}-{digest[:6]}" for digest in (system.identity(), system.fingerprint())
    )
    runs = home / "runs"
    return before if (runs / before).exists() and not (runs / named).exists() else named


def artifact_dir(stage: Path) -> Path:
    """Return the folder of the artifact in a stage's folder, under its old name if it has that."""
    old = stage / old_names.ARTIFACT_DIR
    return old if old.is_dir() else stage / "artifact"


def is_finished(stage: Path) -> bool:
    """Return True if the folder of a stage holds a complete artifact."""
    return any(
        (artifact_dir(stage) / name).is_file()
        for name in ("artifact.json", old_names.ARTIFACT_FILE)
    )


def has_snapshot(stage: Path, step: int) -> bool:
    """Return True if a snapshot of `step` was taken, also if its weights were removed since."""
    root = stage / SNAPSHOTS
    return any(
        (root / name / file).is_file()
        for name in storage.names(root)
        if name.startswith(f"{step:08d}-")
        for file in ("artifact/artifact.json", FIGURES)
    )


@contextmanager
def locked(folder: Path) -> Iterator[storage.Lease | None]:
    """Lock the run during the block. Raises RunError if another process trains it.

    In a store the lock is a lease, which the workers check before they publish anything.
    """
    if not storage.is_local(folder):
        with leases.held(folder / LOCK, lambda holder: _in_use(folder, holder)) as lease:
            yield lease
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _in_use(folder) from None
        yield None


def _in_use(folder: Path, holder: str = "another process") -> RunError:
    return RunError(
        f"run {folder.name!r} is being trained by {holder}. Fix: wait for it, or give another --run"
    )


def recipe(home: Path, run: str) -> System:
    """Read the current recipe of a run. Raises RunError for a run that does not exist."""
    folder = path_of(home, run)
    file = folder / "recipe.json"
    if not file.is_file():
        # recipe.json would also find artifacts; a run of an older version has no HISTORY
        locks = (home / "runs").rglob(LOCK if storage.is_local(home) else HISTORY)
        known = [path.parent.relative_to(home / "runs").as_posix() for path in locks]
        raise RunError(f"there is no run {run!r} under {home / 'runs'}" + suggest(run, known))
    system = from_dict(json.loads(file.read_text()))
    if not isinstance(system, System):
        raise RunError(
            f"{file} does not hold a recipe, so the run cannot be shown or resumed. "
            f"Got {type(system).__name__}; expected System"
        )
    return system


def same_recipe(
    folder: Path,
    system: System,
    may_extend: Callable[[System, str], bool] = lambda before, stage: False,
) -> tuple[str, ...]:
    """Record `system` as the recipe of the run; returns the fingerprints of all its recipes.

    Options may differ from the last recipe, and the steps of a stage if `may_extend(before, stage)`
    allows it. Raises RunError, with the differences by dotted path, for any other change.
    """
    file, now = folder / "recipe.json", json.loads(json.dumps(to_dict(system)))
    if not file.exists():
        _write(folder, now, [])
        return (system.fingerprint(),)
    raw = json.loads(file.read_text())
    before = _system(raw)
    changed = _differences(before, system) if before is not None else differences(raw, now)
    if before is not None:
        changed = [d for d in changed if not _extends(d, before, may_extend)]
    if changed:
        raise RunError(
            f"run {folder.name!r} exists with another recipe: {summarize(changed)}. Fix: undo the "
            f"change, or give another --run: with --fork {folder.name} it starts from this run's "
            "newest checkpoint"
        )
    if raw != now:
        _write(folder, now, differences(raw, now))
    return tuple(entry["fingerprint"] for entry in _history(folder))


def changes(before: System, now: System) -> list[str]:
    """List the differences of two recipes that affect the training result, by dotted path."""
    return _differences(before, now)


def summarize(changed: list[str]) -> str:
    """Return the first three differences and the number of the others."""
    return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _extends(difference: str, before: System, may_extend: Callable[[System, str], bool]) -> bool:
    steps = STEPS.fullmatch(difference.partition(" ")[0])
    return steps is not None and may_extend(before, steps[1])


def _system(recipe: Any) -> System | None:
    """Read an earlier recipe; returns None if this version of bridgework cannot read it."""
    try:
        system = from_dict(recipe)
    except SpecError:
        return None
    return system if isinstance(system, System) else None


def _differences(before: System, now: System) -> list[str]:
    """Compare two systems; fields that an older version did not have count with their defaults."""
    return differences(
        *(json.loads(json.dumps(to_dict(system, options=False))) for system in (before, now))
    )


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """List `stages.align.optim.peak_lr was 0.003, is 0.001` for every different leaf."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(set(before) | set(now))
        return [
            d
            for k in keys
            for d in differences(before.get(k), now.get(k), f"{path}.{k}".lstrip("."))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        names = [
            b.get("name", str(i)) if isinstance(b, dict) else str(i) for i, b in enumerate(before)
        ]
        return [
            d
            for n, b, a in zip(names, before, now, strict=True)
            for d in differences(b, a, f"{path}.{n}")
        ]
    return [] if before == now else [f"{path.removesuffix('._')} was {before!r}, is {now!r}"]


def _write(folder: Path, recipe: Any, changed: list[str]) -> None:
    history = _history(folder)
    history.append(
        {
            "fingerprint": fingerprint(recipe),
            "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "changed": changed,
        }
    )
    storage.write_atomic(folder / HISTORY, json.dumps(history, indent=1))
    storage.write_atomic(folder / "recipe.json", json.dumps(recipe, indent=1))


def _history(folder: Path) -> list[dict[str, Any]]:
    """Read every recipe of the run, oldest first; a run of an older version has only one."""
    file, recipe = folder / HISTORY, folder / "recipe.json"
    if file.exists():
        entries: list[dict[str, Any]] = json.loads(file.read_text())
        return entries
    if not recipe.exists():
        return []
    return [
        {"fingerprint": fingerprint(json.loads(recipe.read_text())), "since": "", "changed": []}
    ]


def check_disk_space(home: Path, need: int = 500_000_000) -> None:
    """Raise ResourceError if the disk of `home` has less than `need` bytes free."""
    free = storage.free_bytes(home)
    if free < need:
        raise ResourceError(
            f"{home}: not enough disk space. Got {free / 1e6:.0f} MB free; expected at least "
            f"{need / 1e6:.0f} MB for a run. "
            "Fix: free some, or set BRIDGEWORK_HOME to a larger disk"
        )
