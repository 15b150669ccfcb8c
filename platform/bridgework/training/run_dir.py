"""A run's folder: one writer at a time, one identity, room on the disk.

recipe.json is the recipe as the run is trained now; recipes.json lists every recipe that it was
trained with. These differ in options alone (see `spec.option`): what would change what is learned is
another run, see `fork`.
"""

import fcntl
import json
import re
import shutil
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
from bridgework.system import System, fingerprint

HISTORY = "recipes.json"
STEPS = re.compile(r"stages\.([^.]+)\.budget\.steps")


def path_of(home: Path, run: str) -> Path:
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
        raise SpecError(
            f"a run's name is a folder under {root}, not {run!r}; leave out '..' and a leading '/'"
        )
    return root / run


def artifact_dir(stage: Path) -> Path:
    """Return the folder of the artifact in a stage's folder, by its name today or before."""
    before = stage / old_names.ARTIFACT_DIR
    return before if before.is_dir() else stage / "artifact"


def is_finished(stage: Path) -> bool:
    """True if the folder of a stage holds a complete artifact."""
    return any(
        (artifact_dir(stage) / name).is_file()
        for name in ("artifact.json", old_names.ARTIFACT_FILE)
    )


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
    """The recipe of a run, as it is trained now. Raises RunError for a run that does not exist."""
    folder = path_of(home, run)
    file = folder / "recipe.json"
    if not file.is_file():
        locks = (home / "runs").rglob("lock")  # an artifact has a recipe, too
        known = [path.parent.relative_to(home / "runs").as_posix() for path in locks]
        raise RunError(f"there is no run {run!r} under {home / 'runs'}" + suggest(run, known))
    system = from_dict(json.loads(file.read_text()))
    if not isinstance(system, System):
        raise RunError(f"{file} holds no recipe; the run cannot be shown or resumed")
    return system


def same_recipe(
    folder: Path,
    system: System,
    may_extend: Callable[[System, str], bool] = lambda before, stage: False,
) -> tuple[str, ...]:
    """Take `system` as the recipe of the run; returns the fingerprints of all recipes that it was trained with.

    Options may differ from before, and the steps of a stage where `may_extend(before, stage)` allows it. Raises
    RunError, with the differences by dotted path, for a recipe that would learn something else.
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
            f"run {folder.name!r} exists with another recipe: {summarize(changed)}; undo the change, or give another "
            f"--run: with --fork {folder.name} it starts from this run's newest checkpoint"
        )
    if raw != now:
        _write(folder, now, differences(raw, now))
    return tuple(entry["fingerprint"] for entry in _history(folder))


def changes(before: System, now: System) -> list[str]:
    """List the differences that make two recipes learn something else, by dotted path."""
    return _differences(before, now)


def summarize(changed: list[str]) -> str:
    """The first differences, and how many more there are."""
    return "; ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


def _extends(difference: str, before: System, may_extend: Callable[[System, str], bool]) -> bool:
    steps = STEPS.fullmatch(difference.partition(" ")[0])
    return steps is not None and may_extend(before, steps[1])


def _system(recipe: Any) -> System | None:
    """A recipe of before; None for one that this version of bridgework cannot read."""
    try:
        system = from_dict(recipe)
    except SpecError:
        return None
    return system if isinstance(system, System) else None


def _differences(before: System, now: System) -> list[str]:
    """Fields that an older version did not have count with their defaults."""
    return differences(
        *(json.loads(json.dumps(to_dict(system, options=False))) for system in (before, now))
    )


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """`stages.align.optim.peak_lr was 0.003, is 0.001`, for every leaf in which two recipes differ."""
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
    """Every recipe of the run, oldest first; a run of an older version has kept one."""
    file, recipe = folder / HISTORY, folder / "recipe.json"
    if file.exists():
        entries: list[dict[str, Any]] = json.loads(file.read_text())
        return entries
    if not recipe.exists():
        return []
    return [
        {"fingerprint": fingerprint(json.loads(recipe.read_text())), "since": "", "changed": []}
    ]


def room(home: Path, need: int = 500_000_000) -> None:
    free = shutil.disk_usage(home).free
    if free < need:
        raise ResourceError(
            f"{home} has {free / 1e6:.0f} MB free, a run needs at least {need / 1e6:.0f} MB; "
            "free some, or set BRIDGEWORK_HOME to a larger disk"
        )
