"""Resume checkpoints: a folder with every rank's state and a manifest that is written last.

`<stage>/checkpoints/00000010-<attempt>/` holds DeepSpeed's files and manifest.json with the step, the world size, the
recipe's fingerprint, size and sha256 of every file, and a sha256 of itself. A folder without a valid manifest is not a
checkpoint; what is half-written is swept away by the next attempt. The newest complete one is found from the manifests
alone, never from what Ray or DeepSpeed remember. Randomness inside a step is a function of (seed, step, rank), so no
generator's state is kept.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bridgework.errors import RunError


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` is the cursor, the next step to take."""

    folder: Path
    step: int
    world: int
    attempt: str
    fingerprint: str
    files: dict[str, tuple[int, str]]  # relative path -> (bytes, sha256)

    def damage(self) -> str | None:
        """What is wrong with its files, by size and sha256; None when nothing is."""
        for name, (size, digest) in self.files.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, written were {size}"
            if _sha256(file) != digest:
                return f"{name} has changed since it was written (sha256)"
        return None


def root(stage_folder: Path) -> Path:
    return stage_folder / "checkpoints"


def begin(stage_folder: Path, step: int, attempt: str) -> Path:
    """The folder in which all ranks write; it becomes a checkpoint by `complete`."""
    folder = root(stage_folder) / f".{step:08d}-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def complete(folder: Path, *, step: int, world: int, attempt: str, fingerprint: str, keep: int) -> Checkpoint:
    """Write the manifest, move the folder to its name, drop all but the `keep` newest (rank 0, after a barrier)."""
    files = {
        f.relative_to(folder).as_posix(): (f.stat().st_size, _sha256(f))
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }
    final = folder.with_name(folder.name.removeprefix("."))
    made = Checkpoint(final, step, world, attempt, fingerprint, files)
    body = {k: v for k, v in asdict(made).items() if k != "folder"}
    temporary = folder / "manifest.json.tmp"
    temporary.write_text(json.dumps(body | {"sha256": _digest(body)}, indent=1))
    temporary.rename(folder / "manifest.json")
    folder.rename(final)
    for old in checkpoints(final.parent.parent)[keep:]:
        shutil.rmtree(old.folder)
    return made


def checkpoints(stage_folder: Path) -> list[Checkpoint]:
    """The folders with a readable manifest, newest step first; their files are not checked yet."""
    found = []
    for manifest in root(stage_folder).glob("[0-9]*/manifest.json"):
        try:
            body = json.loads(manifest.read_text())
            if body.pop("sha256") != _digest(body):
                continue
            files = {name: (size, digest) for name, (size, digest) in body.pop("files").items()}
            found.append(Checkpoint(folder=manifest.parent, files=files, **body))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return sorted(found, key=lambda c: (c.step, c.attempt), reverse=True)


def newest(stage_folder: Path, fingerprint: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are whole, and what was wrong with those passed over.

    Raises RunError when the run's checkpoints were written by another recipe.
    """
    passed: list[str] = []
    for found in checkpoints(stage_folder):
        if found.fingerprint != fingerprint:
            raise RunError(
                f"{found.folder} was written by recipe {found.fingerprint}, this is {fingerprint}; "
                "give the run another name (--run) or undo the change"
            )
        damage = found.damage()
        if damage is None:
            return found, passed
        passed.append(f"checkpoint of step {found.step} is damaged: {damage}")
    return None, passed


def sweep(stage_folder: Path, attempt: str, start: int) -> None:
    """Remove what other attempts left half-written, and checkpoints behind `start` (rank 0, before the first step).

    The latter are damaged, or `start` would be theirs; `complete` would take them for the newest and drop good ones.
    """
    for folder in root(stage_folder).glob(".*"):
        if not folder.name.endswith(attempt):
            shutil.rmtree(folder, ignore_errors=True)
    for folder in root(stage_folder).glob("[0-9]*"):
        if int(folder.name[:8]) > start:
            shutil.rmtree(folder, ignore_errors=True)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cursor(folder: Path, fingerprint: str) -> int:
    """The step from which the next worker group goes on: our manifest's, not what Ray remembers."""
    found, _ = newest(folder, fingerprint)
    return found.step if found else 0
