"""Forks: new runs that start from a checkpoint of another run, with a changed recipe.

Stages that the other run has finished and the new recipe does not change are copied. The checkpoint
of the first other stage becomes the first checkpoint of the new run. fork.json in the new run's
folder records the source and the changes.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from bridgework import storage
from bridgework.artifacts import FILE as ARTIFACT
from bridgework.config import to_dict
from bridgework.errors import RunError, SpecError
from bridgework.system import Stage, System
from bridgework.training import checkpoint, run_dir
from bridgework.training.skips import FILE as SKIPS

FILE = "fork.json"
SHAPES = ("model", "trains", "zero")  # fields of a stage that determine a checkpoint's tensors
_SOURCE = re.compile(r"(?P<run>.+?)(?:@(?P<step>\d+))?")


@dataclass(frozen=True)
class Fork:
    """Source of a forked run: the checkpoint of `step` of a stage of another run."""

    run: str
    stage: str
    step: int
    checkpoint: str  # the checkpoint's folder, under the other run's
    attempt: str
    fingerprint: str  # of the recipe that wrote it
    changed: tuple[str, ...]  # by dotted path
    at: str  # ISO 8601, UTC

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Read the fork.json of the run at `folder`; returns None for a run that is not a fork."""
        file = folder / FILE
        if not file.exists():
            return None
        values = json.loads(file.read_text())
        return cls(**{**values, "changed": tuple(values["changed"])})

    def tags(self) -> dict[str, str]:
        """Return the tags of the run in the tracker."""
        return {
            "forked_from": f"{self.run}/{self.stage}@{self.step}",
            "forked_from_fingerprint": self.fingerprint,
        }


def fork(
    system: System,
    source: str,
    *,
    home: Path,
    run: str,
    stages: Sequence[str] | None = None,
    unchanged: bool = False,
) -> Fork:
    """Make `run` a fork of `source`, RUN or RUN@STEP; an existing fork of it is not changed.

    stages: those that `run` will train; None: all. unchanged: the recipe may be that of the source.
    The caller holds the lock of `run`. Raises RunError if there is no checkpoint to start from, if
    `run` is already another run, and for a change after which the checkpoint's tensors would not
    fit.
    """
    named = _SOURCE.fullmatch(source)
    if named is None:
        raise SpecError(
            f"--fork: invalid source. Got {source!r}; "
            "expected the name of a run, or RUN@STEP for an older checkpoint"
        )
    other, at = named["run"], named["step"]
    folder, other_folder = run_dir.path_of(home, run), run_dir.path_of(home, other)
    existing = Fork.read(folder)
    if existing is not None and existing.run == other and at in (None, str(existing.step)):
        return existing
    if folder.resolve() == other_folder.resolve() or (folder / "recipe.json").exists():
        raise RunError(
            f"--fork: run {run!r} exists already. Fix: give the new run another name with --run"
        )
    before = run_dir.recipe(home, other)
    changed = run_dir.changes(before, system)
    if not changed and not unchanged:
        raise RunError(
            f"--fork: the recipe is that of run {other!r}. "
            f"Fix: resume it with --run {other}, or change something"
        )
    finished, stage = _split_stages(before, system, other_folder, stages)
    found = _find_checkpoint(before, stage, other_folder, other, int(at) if at else None, home)
    for name in finished:
        copy_stage(other_folder / name, folder / name)
    _start(found, system, other_folder / stage.name, folder / stage.name, home)
    new = Fork(
        run=other,
        stage=stage.name,
        step=found.step,
        checkpoint=found.folder.relative_to(other_folder).as_posix(),
        attempt=found.attempt,
        fingerprint=found.fingerprint,
        changed=tuple(changed),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    storage.write_atomic(folder / FILE, json.dumps(asdict(new), indent=1))
    return new


def describe(fork: Fork) -> str:
    """Return one line about a fork for the console."""
    source = f"step {fork.step} of {fork.run}/{fork.stage}"
    return f"forked from {source}: {run_dir.summarize(list(fork.changed))}"


def _split_stages(
    before: System, system: System, other_folder: Path, stages: Sequence[str] | None
) -> tuple[list[str], Stage]:
    """Return the finished stages that the new recipe does not change, and the first to train."""
    known = {stage.name: stage for stage in before.stages}
    finished: list[str] = []
    first: Stage | None = None
    for stage in system.stages:
        old = known.get(stage.name)
        same = old is not None and to_dict(old, options=False) == to_dict(stage, options=False)
        needs = {stage.starts_from, *(stage.curation.uses if stage.curation else ())} & known.keys()
        if same and needs <= set(finished) and run_dir.is_finished(other_folder / stage.name):
            finished.append(stage.name)
        elif stages is None or stage.name in stages:
            first = first or stage
    if first is None:
        raise RunError(
            "--fork: every stage is finished and none is changed, so there is nothing to train"
        )
    return finished, first


def misfits(before: Stage, now: Stage) -> list[str]:
    """List the changes of a stage, by dotted path, after which its checkpoints would not fit."""
    old_shapes, new_shapes = (
        {name: to_dict(getattr(s, name), options=False) for name in SHAPES} for s in (before, now)
    )
    changed = run_dir.differences(old_shapes, new_shapes, f"stages.{now.name}")
    decays = (before.optim.weight_decay, now.optim.weight_decay)
    if (decays[0] == 0) != (decays[1] == 0):  # only with a decay, vectors are a separate group
        changed += run_dir.differences(*decays, f"stages.{now.name}.optim.weight_decay")
    return changed


def _find_checkpoint(
    before: System, stage: Stage, other_folder: Path, other: str, step: int | None, home: Path
) -> checkpoint.Checkpoint:
    """Return the checkpoint to start from."""
    old = next((s for s in before.stages if s.name == stage.name), None)
    known = checkpoint.checkpoints(other_folder / stage.name) if old is not None else []
    if old is None or not known:
        raise RunError(
            f"--fork: run {other!r} has no checkpoint of stage {stage.name!r}, the first that must "
            "train. Fix: start a run without --fork; from another run's artifact, set "
            f"stages.{stage.name}.starts_from to its folder"
        )
    changed = misfits(old, stage)
    if changed:
        raise RunError(
            f"--fork: {run_dir.summarize(changed)}; expected the same {', '.join(SHAPES)} as in "
            f"run {other!r}, and a weight decay that is 0 in both or in neither, because its "
            "checkpoint holds exactly those tensors. Fix: undo this change, or start a run from an "
            f"artifact (stages.{stage.name}.starts_from)"
        )
    steps = [one.step for one in known]
    if step is not None and step not in steps:
        raise RunError(
            f"--fork: run {other!r} has no checkpoint of step {step} of stage {stage.name!r}. "
            f"Got {step}; expected one of {', '.join(map(str, steps))}"
        )
    if step is None:
        fingerprints = [one.fingerprint for one in known]
        found, _ = checkpoint.resume(other_folder / stage.name, *fingerprints, home=home)
    else:
        found = next(one for one in known if one.step == step)
        checkpoint.verify(found.folder, home=home)
    if found is None or found.step >= stage.budget.steps:
        raise RunError(
            f"--fork: stages.{stage.name}.budget.steps is too small. Got {stage.budget.steps}; "
            f"expected more than the step of the checkpoint, {found.step if found else 0}"
        )
    return found


def _start(
    found: checkpoint.Checkpoint, system: System, other_stage: Path, place: Path, home: Path
) -> None:
    """Copy the checkpoint to the new run's stage, with its curated data, quarantine and skips."""
    _copy(other_stage, place, ("curated", "quarantine", SKIPS))
    attempt = f"fork{os.urandom(3).hex()}"
    folder = checkpoint.begin(place, found.step, attempt)
    for name in found.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link(found.folder / name, folder / name)
    checkpoint.complete(
        folder,
        files=found.files,
        step=found.step,
        world=found.world,
        attempt=attempt,
        fingerprint=system.fingerprint(),
        keep=1,
        home=home,
    )


def copy_stage(finished: Path, place: Path) -> None:
    """Link or copy a finished stage of one run to another run, without its checkpoints."""
    artifact = run_dir.artifact_dir(finished).name
    # the artifact last: its presence means that the stage is finished
    _copy(finished, place, ("metrics.json", "evals", SKIPS, run_dir.FEATURES))
    with storage.publishing(place / artifact) as temporary:
        shutil.copytree(finished / artifact, temporary, copy_function=_link, dirs_exist_ok=True)


def _copy(other_stage: Path, place: Path, names: tuple[str, ...]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, dest = other_stage / name, place / name
        if source.is_dir():
            storage.remove(dest, first=ARTIFACT)  # of an interrupted fork
            if storage.is_local(source):
                shutil.copytree(source, dest, copy_function=_link)
            else:
                _copy_in_store(source, dest)
        elif source.is_file():
            dest.unlink(missing_ok=True)
            _link(source, dest)


def _copy_in_store(source: Path, dest: Path) -> None:
    """Copy a folder, artifact.json last, because it makes the folder an artifact."""
    for name in sorted(storage.names(source), key=lambda name: name == ARTIFACT):
        storage.copy(source / name, dest / name)


def _link(source: str | Path, dest: str | Path) -> None:
    """Hard-link a file, which no run changes; copy it if the disk has no hard links."""
    if not isinstance(source, str) and not storage.is_local(source):
        storage.copy(source, dest)
        return
    try:
        os.link(source, dest)
    except OSError:
        shutil.copy2(source, dest)
