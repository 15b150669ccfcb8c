"""Resume checkpoints: a folder with every rank's state and a signed manifest that is written last.

`<stage>/checkpoints/00000010-<attempt>/` holds DeepSpeed's files and manifest.json: the step, the
number of workers, the recipe's fingerprint, size and sha256 of every file, a signature with the key
of the home (see `signing`) and a sha256 of all that. The newest complete one is found from the
manifests alone, never from what Ray or DeepSpeed remember. Randomness inside a step is a function of
(seed, step, place in the global batch), so a checkpoint holds no state of a random generator.

There are three cases. Damage (a file is missing, changed, not in the manifest, or holds values
that are not finite; a manifest that cannot be read): the one before is taken, and this is reported
and moved to `checkpoints/damaged/`. Trust (no signature, another home's key, a wrong signature) and a
newer version's manifest: the run stops and says what to do. Whatever else is in the folder is left.
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

SCHEMA = 1  # of the manifest; one of an older version has none, and no signature
MANIFEST = "manifest.json"
DAMAGED = "damaged"
MARGIN = 64_000  # bytes: names, manifests and the metrics of a while
FIELDS = {"step": int, "world": int, "attempt": str, "fingerprint": str, "files": dict}
_NAME = re.compile(r"(\d{8,})-(\w+)")
_UNFINISHED = re.compile(r"\.(?:\d{8,}|universal)-(\w+)")


class Unusable(RunError):
    """All checkpoints of a stage are damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: `step` is the cursor, the next step to take."""

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

    def damage(self) -> str | None:
        """Describe what is wrong with its files, by name, size and sha256; None when nothing is."""
        there = set(_files(self.folder)) - {MANIFEST}
        for name, (size, digest) in self.files.items():
            file = self.folder / name
            if name not in there or not file.is_file():
                return f"{name} is missing"
            if file.is_symlink():
                return f"{name} is a link"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, written were {size}"
            if _sha256(file) != digest:
                return f"{name} has changed since it was written (sha256)"
        if unlisted := sorted(there - set(self.files)):
            return f"{unlisted[0]} is not in the manifest: nothing there is read"
        return None


@dataclass(frozen=True)
class _Found:
    """A folder that is named as a checkpoint, and what its manifest says or why it says nothing."""

    folder: Path
    step: int  # by its name
    checkpoint: Checkpoint | None = None
    damage: str = ""
    schema: int = 0
    key: str = ""  # name of the key that signed it; "" without a signature
    signature: str = ""
    signed: dict[str, Any] | None = None  # what the signature is of

    def distrust(self, home: Path) -> str | None:
        """Say why this home does not trust the manifest; None when it does."""
        key = _key(home)
        if not self.signature:
            return "has no signature"
        if self.key != signing.name(key):
            return f"is signed with the key {self.key} and the key of {home} is {signing.name(key)}"
        if not signing.signed(key, self.signed or {}, self.signature):
            return f"has a wrong signature for the key {self.key} of {home}"
        return None


def root(stage_folder: Path) -> Path:
    return stage_folder / "checkpoints"


def _damaged(stage_folder: Path) -> Path:
    return root(stage_folder) / DAMAGED


def begin(stage_folder: Path, step: int, attempt: str) -> Path:
    """The folder in which all ranks write; it becomes a checkpoint by `complete`."""
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
    """Write the manifest, rename the folder, remove all but the `keep` newest (rank 0, after a barrier)."""
    home = home or home_folder()
    files = {
        name: ((folder / name).stat().st_size, _sha256(folder / name))
        for name in sorted(_files(folder))
    }
    final = folder.with_name(folder.name.removeprefix("."))
    made = Checkpoint(final, step, world, attempt, fingerprint, files)
    _write_manifest(folder, made, home)
    storage.publish(folder, final)
    prune(final.parent.parent, keep, home=home)
    return made


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
    """Make room for `need` bytes: where the disk has less, all checkpoints but the newest are removed first.

    Raises ResourceError where that is not enough; the newest is never removed.
    """
    place = root(stage_folder)
    place.mkdir(parents=True, exist_ok=True)
    need = need + need // 20 + MARGIN
    if shutil.disk_usage(place).free < need:
        prune(stage_folder, 1, home=home)
    if shutil.disk_usage(place).free < need:
        raise storage.full(place, need)


def checkpoints(stage_folder: Path) -> list[Checkpoint]:
    """The folders with a readable manifest, newest step first; neither files nor signatures are checked."""
    return [found.checkpoint for found in _found(stage_folder) if found.checkpoint is not None]


def latest(
    stage_folder: Path, fingerprint: str, *others: str, home: Path | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint whose files are complete, and what was wrong with those passed over.

    `fingerprint` and `others` are those of the recipes that the run was trained with. Raises RunError
    for one of another recipe, of a newer version, or that this home does not trust.
    """
    home = home or home_folder()
    _key(home)  # which signs what an older version left, if it is made now
    passed: list[str] = []
    for found in _found(stage_folder):
        if found.schema > SCHEMA:
            raise RunError(
                f"{found.folder}: the checkpoint was written by a newer version of bridgework. Got a manifest of "
                f"schema {found.schema}; expected {SCHEMA} at most. Fix: update bridgework, or move this folder away "
                "to resume from the one before; nothing was changed"
            )
        if found.checkpoint is None:
            passed.append(f"checkpoint of step {found.step} is damaged: {found.damage}")
            continue
        if (reason := found.distrust(home)) is not None:
            raise _untrusted(found.folder, reason)
        if found.checkpoint.fingerprint not in (fingerprint, *others):
            raise RunError(
                f"{found.folder} was written by recipe {found.checkpoint.fingerprint}, this is {fingerprint}; "
                "give the run another name (--run) or undo the change, or --fork its run"
            )
        damage = found.checkpoint.damage()
        if damage is None:
            return found.checkpoint, passed
        passed.append(f"checkpoint of step {found.step} is damaged: {damage}")
    return None, passed


def verify(folder: Path, *, home: Path | None = None) -> None:
    """Raises RunError for a checkpoint that this home does not trust, or that is damaged."""
    name = _NAME.fullmatch(folder.name)
    found = _read(folder, int(name[1]) if name else 0)
    if (
        found.checkpoint is not None
        and (reason := found.distrust(home or home_folder())) is not None
    ):
        raise _untrusted(folder, reason)
    damage = found.damage if found.checkpoint is None else found.checkpoint.damage()
    if damage:
        raise RunError(f"{folder}: the checkpoint is damaged: {damage}. Fix: take another step")


def _untrusted(folder: Path, reason: str) -> RunError:
    return RunError(
        f"{folder}: the checkpoint is not trusted, because its manifest {reason}. Loading a checkpoint runs code that "
        "is in it. Fix: if you know who wrote it, add --trust-checkpoints once, which signs the checkpoints of this "
        "run with this home's key; else move the folder away"
    )


def resume(
    stage_folder: Path, fingerprint: str, *others: str, home: Path | None = None
) -> tuple[Checkpoint | None, list[str]]:
    """`newest`, where a stage that has checkpoints may not begin again by accident.

    Raises Unusable when all of them are damaged.
    """
    found, passed = latest(stage_folder, fingerprint, *others, home=home)
    lost = [
        *passed,
        *(
            f"{DAMAGED}/{place.name} was found damaged before"
            for place in _listed(_damaged(stage_folder))
        ),
    ]
    if found is None and lost:
        raise Unusable(
            f"{root(stage_folder)}: no checkpoint can be used ({'; '.join(lost[:4])}). Fix: restore one from a backup; "
            "or add --start-over to train the stage again from step 0: what is there is renamed, not removed"
        )
    return found, passed


def start_over(stage_folder: Path) -> Path:
    """Rename the folder of a stage's checkpoints, so that the stage begins at step 0; returns its new name."""
    place = root(stage_folder)
    there = place.with_name(
        f"{place.name}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid4().hex[:4]}"
    )
    place.rename(there)
    return there


def cursor(stage_folder: Path, fingerprint: str, *others: str, home: Path | None = None) -> int:
    """The step at which the next worker group starts: our manifest's, not what Ray remembers."""
    found, _ = resume(stage_folder, fingerprint, *others, home=home)
    return found.step if found else 0


def remove_stale(stage_folder: Path, attempt: str, start: int) -> None:
    """Remove what other attempts left half-written; move checkpoints after `start` to `damaged/`.

    For rank 0, before the first step. The latter cannot be used, or `start` would be theirs.
    """
    for folder in _listed(root(stage_folder)):
        unfinished = _UNFINISHED.fullmatch(folder.name)
        if unfinished and unfinished[1] != attempt:
            shutil.rmtree(folder, ignore_errors=True)
    for found in _found(stage_folder):
        if found.step > start:
            set_aside(found.folder)


def set_aside(folder: Path) -> Path:
    """Move a checkpoint to `damaged/`, where no run reads it; returns its new place."""
    place = folder.parent / DAMAGED
    place.mkdir(exist_ok=True)
    there = place / folder.name
    if there.exists():
        there = place / f"{folder.name}.{uuid4().hex[:6]}"
    folder.rename(there)
    storage.sync_folder(folder.parent)
    return there


def trust(stage_folder: Path, *, home: Path | None = None) -> int:
    """Sign a stage's complete checkpoints with the key of `home`; returns how many were not trusted before."""
    home, count = home or home_folder(), 0
    for found in _found(stage_folder):
        if (
            found.checkpoint
            and found.schema <= SCHEMA
            and found.distrust(home)
            and not found.checkpoint.damage()
        ):
            _write_manifest(found.folder, found.checkpoint, home)
            count += 1
    return count


def _key(home: Path) -> bytes:
    """The key of the home; when it is made, the checkpoints that older versions left in its runs are signed."""

    def adopt(key: bytes) -> None:
        for place in (home / "runs").rglob("checkpoints"):
            for found in _found(place.parent):
                if found.checkpoint and not found.schema:
                    _write_manifest(found.folder, found.checkpoint, home, key)

    return signing.key(home, adopt)


def _write_manifest(folder: Path, made: Checkpoint, home: Path, key: bytes | None = None) -> None:
    key = key or _key(home)
    body = {"schema": SCHEMA} | {k: v for k, v in asdict(made).items() if k != "folder"}
    body["key"] = signing.name(key)
    body["signature"] = signing.sign(key, body)
    storage.write_atomic(folder / MANIFEST, json.dumps(body | {"sha256": _digest(body)}, indent=1))


def _found(stage_folder: Path) -> list[_Found]:
    """Every folder that is named as a checkpoint, newest step first."""
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
            raise TypeError("a field is of another type")
        files = {name: (size, digest) for name, (size, digest) in given.pop("files").items()}
        if not all(_is_inside(name) for name in files):
            raise ValueError("a file is outside of the folder")
    except FileNotFoundError:
        return _Found(folder, step, damage=f"it has no {MANIFEST}")
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        return _Found(
            folder, step, damage=f"{MANIFEST} cannot be read ({type(error).__name__}: {error})"
        )
    made = Checkpoint(folder=folder, files=files, **given)
    if folder.name != f"{made.step:08d}-{made.attempt}":
        return _Found(
            folder,
            step,
            damage=f"the folder is not named for step {made.step}, attempt {made.attempt}",
        )
    return _Found(folder, step, made, schema=schema, key=key, signature=signature, signed=body)


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name != MANIFEST


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _files(folder: Path) -> Iterator[str]:
    """Everything under a folder that is not a plain folder, by relative path."""
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*files, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
