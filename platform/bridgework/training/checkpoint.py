"""Resume checkpoints: folders with the state of all ranks and a signed manifest, written last.

`<stage>/checkpoints/00000010-<attempt>/` holds DeepSpeed's files and manifest.json: the step, the
number of workers, the recipe's fingerprint, size and sha256 of every file, a signature with the key
of the home (see `signing`) and a sha256 of all these. The newest complete checkpoint is found from
the manifests alone, never from the state of Ray or DeepSpeed. Randomness inside a step is a
function of (seed, step, position in the global batch), so a checkpoint holds no state of a random
generator.

A checkpoint may be rejected for one of three reasons:
- Damage: a file is missing, changed, not in the manifest, or holds values that are not finite; or
  the manifest cannot be read. The run resumes from the checkpoint before it, and the damaged one is
  reported and moved to `checkpoints/damaged/`.
- Trust: no signature, another home's key, or a wrong signature. The run stops with instructions.
- Version: the manifest of a newer version. The run stops with instructions.
All other files in the folder are ignored.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from uuid import uuid4

from bridgework import storage
from bridgework.data.catalog import home as home_folder
from bridgework.errors import RunError
from bridgework.training import signing

SCHEMA = 1  # of the manifest; a manifest of an older version has no schema and no signature
MANIFEST = "manifest.json"
DAMAGED = "damaged"
MARGIN = 64_000  # bytes for names, manifests and some metrics
FIELDS = {"step": int, "world": int, "attempt": str, "fingerprint": str, "files": dict}
_NAME = re.compile(r"(\d{8,})-(\w+)")
_UNFINISHED = re.compile(r"\.(?:\d{8,}|universal)-(\w+)")


class Unusable(RunError):
    """All checkpoints of a stage are damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint; `step` is the cursor: the number of the next step."""

    folder: Path
    step: int
    world: int
    attempt: str
    fingerprint: str
    files: dict[str, tuple[int, str]]  # relative path -> (bytes, sha256)

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(size for size, _ in self.files.values())

    def find_corruption(self) -> str | None:
        """Compare its files with name, size and sha256; returns the first problem, or None."""
        present = set(_files(self.folder)) - {MANIFEST}
        for name, (size, digest) in self.files.items():
            file = self.folder / name
            if name not in present or not file.is_file():
                return f"{name} is missing"
            if file.is_symlink():
                return f"{name} is a link"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes; expected {size}"
            if storage.sha256(file) != digest:
                return f"{name} has changed since it was written (sha256)"
        if unlisted := sorted(present - set(self.files)):
            return f"{unlisted[0]} is not in the manifest, so the folder is not read"
        return None


def root(stage_folder: Path) -> Path:
    return stage_folder / "checkpoints"


def begin(stage_folder: Path, step: int, attempt: str) -> Path:
    """Create the folder to which all ranks write; `complete` turns it into a checkpoint."""
    folder = root(stage_folder) / f".{step:08d}-{attempt}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def complete(
    folder: Path,
    *,
    step: int,
    world: int,
    attempt: str,
    fingerprint: str,
    keep: int,
    home: Path | None = None,
) -> Checkpoint:
    """Write the manifest, rename the folder, and remove all but the `keep` newest checkpoints.

    For rank 0, after a barrier.
    """
    home = home or home_folder()
    files = {
        name: ((folder / name).stat().st_size, storage.sha256(folder / name))
        for name in sorted(_files(folder))
    }
    final = folder.with_name(folder.name.removeprefix("."))
    written = Checkpoint(final, step, world, attempt, fingerprint, files)
    _write_manifest(folder, written, home)
    storage.publish(folder, final)
    prune(final.parent.parent, keep, home=home)
    return written


def prune(stage_folder: Path, keep: int, *, home: Path | None = None) -> None:
    """Remove all but the `keep` newest checkpoints that this home signed."""
    home = home or home_folder()
    own = [
        found.folder
        for found in _found(stage_folder)
        if found.checkpoint and not found.distrust(home)
    ]
    for folder in own[keep:]:
        shutil.rmtree(folder, ignore_errors=True)


def make_room(stage_folder: Path, need: int, *, home: Path | None = None) -> None:
    """Make room for `need` bytes: on a disk with less, remove all checkpoints but the newest.

    Raises ResourceError if that is not enough. The newest checkpoint is never removed.
    """
    place = root(stage_folder)
    place.mkdir(parents=True, exist_ok=True)
    need = need + need // 20 + MARGIN
    if shutil.disk_usage(place).free < need:
        prune(stage_folder, 1, home=home)
    if shutil.disk_usage(place).free < need:
        raise storage.full(place, need)


def checkpoints(stage_folder: Path) -> list[Checkpoint]:
    """List the folders with a readable manifest, newest step first.

    Neither files nor signatures are checked.
    """
    return [found.checkpoint for found in _found(stage_folder) if found.checkpoint is not None]


def latest(
    stage_folder: Path, fingerprint: str, *others: str, home: Path | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint with complete files, and the reasons against newer ones.

    `fingerprint` and `others` are those of the recipes with which the run was trained. Raises
    RunError for a checkpoint of another recipe or a newer version, or an untrusted one.
    """
    home = home or home_folder()
    _key(home)  # a new key signs the checkpoints of an older version
    rejected: list[str] = []
    for found in _found(stage_folder):
        if found.schema > SCHEMA:
            raise RunError(
                f"{found.folder}: the checkpoint was written by a newer version of bridgework. "
                f"Got a manifest of schema {found.schema}; expected {SCHEMA} at most. Fix: update "
                "bridgework, or move this folder away to resume from the one before; nothing was "
                "changed"
            )
        if found.checkpoint is None:
            rejected.append(f"checkpoint of step {found.step} is damaged: {found.damage}")
            continue
        if (reason := found.distrust(home)) is not None:
            raise _untrusted(found.folder, reason)
        if found.checkpoint.fingerprint not in (fingerprint, *others):
            raise RunError(
                f"{found.folder}: the checkpoint is of another recipe. "
                f"Got {found.checkpoint.fingerprint}; expected {fingerprint}. Fix: give the run "
                "another name (--run), undo the change, or --fork its run"
            )
        damage = found.checkpoint.find_corruption()
        if damage is None:
            return found.checkpoint, rejected
        rejected.append(f"checkpoint of step {found.step} is damaged: {damage}")
    return None, rejected


def verify(folder: Path, *, home: Path | None = None) -> None:
    """Raise RunError if the checkpoint is untrusted or damaged."""
    name = _NAME.fullmatch(folder.name)
    found = _read(folder, int(name[1]) if name else 0)
    if (
        found.checkpoint is not None
        and (reason := found.distrust(home or home_folder())) is not None
    ):
        raise _untrusted(folder, reason)
    damage = found.damage if found.checkpoint is None else found.checkpoint.find_corruption()
    if damage:
        raise RunError(f"{folder}: the checkpoint is damaged: {damage}. Fix: take another step")


def resume(
    stage_folder: Path, fingerprint: str, *others: str, home: Path | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """Return `latest`, but never None for a stage that has checkpoints.

    A stage with checkpoints must not begin again by accident. Raises Unusable if all are damaged.
    """
    found, rejected = latest(stage_folder, fingerprint, *others, home=home)
    damaged = [folder.name for folder in _listed(root(stage_folder) / DAMAGED)]
    reasons = [*rejected, *(f"{DAMAGED}/{name} was found damaged before" for name in damaged)]
    if found is None and reasons:
        raise Unusable(
            f"{root(stage_folder)}: no checkpoint can be used ({'; '.join(reasons[:4])}). Fix: "
            "restore one from a backup; or add --start-over to train the stage again from step 0: "
            "the folder is renamed, not removed"
        )
    return found, rejected


def cursor(stage_folder: Path, fingerprint: str, *others: str, home: Path | None = None) -> int:
    """Return the step at which the next workers start: by the manifests, not by Ray's state."""
    found, _ = resume(stage_folder, fingerprint, *others, home=home)
    return found.step if found else 0


def start_over(stage_folder: Path) -> Path:
    """Rename a stage's checkpoints folder, so that the stage begins at step 0; returns its path."""
    folder = root(stage_folder)
    now = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    renamed = folder.with_name(f"{folder.name}-{now}-{uuid4().hex[:4]}")
    folder.rename(renamed)
    return renamed


def remove_stale(stage_folder: Path, attempt: str, start: int) -> None:
    """Remove partial checkpoints of other attempts; move those after `start` to `damaged/`.

    For rank 0, before the first step. Checkpoints after `start` are unusable: the run would
    otherwise have resumed from them.
    """
    for folder in _listed(root(stage_folder)):
        unfinished = _UNFINISHED.fullmatch(folder.name)
        if unfinished and unfinished[1] != attempt:
            shutil.rmtree(folder, ignore_errors=True)
    for found in _found(stage_folder):
        if found.step > start:
            move_to_damaged(found.folder)


def move_to_damaged(folder: Path) -> Path:
    """Move a checkpoint to `damaged/`, where no run reads it; returns its new path."""
    parent = folder.parent / DAMAGED
    parent.mkdir(exist_ok=True)
    moved = parent / folder.name
    if moved.exists():
        moved = parent / f"{folder.name}.{uuid4().hex[:6]}"
    folder.rename(moved)
    storage.sync_folder(folder.parent)
    return moved


def trust(stage_folder: Path, *, home: Path | None = None) -> int:
    """Sign a stage's complete checkpoints with the key of `home`.

    Returns the number of newly trusted ones.
    """
    home, count = home or home_folder(), 0
    for found in _found(stage_folder):
        if (
            found.checkpoint
            and found.schema <= SCHEMA
            and found.distrust(home)
            and not found.checkpoint.find_corruption()
        ):
            _write_manifest(found.folder, found.checkpoint, home)
            count += 1
    return count


@dataclass(frozen=True)
class _Found:
    """A folder with the name of a checkpoint, and its manifest or the reason why it has none."""

    folder: Path
    step: int  # by its name
    checkpoint: Checkpoint | None = None
    damage: str = ""
    schema: int = 0
    key: str = ""  # name of the key that signed it; "" without a signature
    signature: str = ""
    signed: dict[str, Any] | None = None  # the signed part of the manifest

    def distrust(self, home: Path) -> str | None:
        """Return the reason why this home does not trust the manifest; None if it does."""
        key = _key(home)
        if not self.signature:
            return "has no signature"
        if self.key != signing.name(key):
            return f"is signed with the key {self.key} and the key of {home} is {signing.name(key)}"
        if not signing.verify(key, self.signed or {}, self.signature):
            return f"has a wrong signature for the key {self.key} of {home}"
        return None


def _untrusted(folder: Path, reason: str) -> RunError:
    return RunError(
        f"{folder}: the checkpoint is not trusted, because its manifest {reason}. Loading a "
        "checkpoint runs code from it. Fix: if you know who wrote it, add --trust-checkpoints "
        "once, which signs the checkpoints of this run with this home's key; else move the folder "
        "away"
    )


def _key(home: Path) -> bytes:
    """Return the key of the home; a new key signs the checkpoints of older versions in its runs."""

    def adopt(key: bytes) -> None:
        for folder in (home / "runs").rglob("checkpoints"):
            for found in _found(folder.parent):
                if found.checkpoint and not found.schema:
                    _write_manifest(found.folder, found.checkpoint, home, key)

    return signing.key(home, adopt)


def _write_manifest(
    folder: Path, checkpoint: Checkpoint, home: Path, key: bytes | None = None
) -> None:
    key = key or _key(home)
    body = {"schema": SCHEMA} | {k: v for k, v in asdict(checkpoint).items() if k != "folder"}
    body["key"] = signing.name(key)
    body["signature"] = signing.sign(key, body)
    storage.write_atomic(folder / MANIFEST, json.dumps(body | {"sha256": _digest(body)}, indent=1))


def _found(stage_folder: Path) -> list[_Found]:
    """List the folders with the name of a checkpoint, newest step first."""
    found = []
    for folder in _listed(root(stage_folder)):
        name = _NAME.fullmatch(folder.name)
        if name and folder.is_dir() and not folder.is_symlink():
            found.append(_read(folder, int(name[1])))
    return sorted(found, key=lambda f: (f.step, f.folder.name), reverse=True)


def _read(folder: Path, step: int) -> _Found:
    try:
        body = json.loads((folder / MANIFEST).read_text())
        schema = body.get("schema", 0)
        if isinstance(schema, int) and schema > SCHEMA:
            return _Found(folder, step, schema=schema)
        if body.pop("sha256") != _digest(body):
            return _Found(
                folder, step, damage=f"{MANIFEST} has changed since it was written (sha256)"
            )
        signature, key = body.pop("signature", ""), body.get("key", "")
        given = {name: body[name] for name in FIELDS}
        typed = zip(
            (*given.values(), schema, key, signature),
            (*FIELDS.values(), int, str, str),
            strict=True,
        )
        if not all(type(value) is kind for value, kind in typed) or given["world"] < 1:
            raise TypeError("a field has another type")
        files = {name: (size, digest) for name, (size, digest) in given.pop("files").items()}
        if not all(_is_inside(name) for name in files):
            raise ValueError("a file is outside the folder")
    except FileNotFoundError:
        return _Found(folder, step, damage=f"it has no {MANIFEST}")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        return _Found(
            folder, step, damage=f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        )
    checkpoint = Checkpoint(folder=folder, files=files, **given)
    if folder.name != f"{checkpoint.step:08d}-{checkpoint.attempt}":
        damage = f"the folder is not named for step {checkpoint.step}, attempt {checkpoint.attempt}"
        return _Found(folder, step, damage=damage)
    return _Found(
        folder, step, checkpoint, schema=schema, key=key, signature=signature, signed=body
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name != MANIFEST


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(folder: Path) -> Iterator[str]:
    """Yield all files and links under a folder, by relative path."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*files, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
