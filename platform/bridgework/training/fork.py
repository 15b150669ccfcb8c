"""A fork: a new run that starts from a checkpoint of another, with another recipe, on record.

What the other run has finished and the new recipe leaves as it is, is taken as it is; of the first
stage that it has not, the checkpoint becomes the first of the new run. fork.json in the new run's
folder says from where, and what was changed.
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
from bridgework.config import to_dict
from bridgework.errors import RunError, SpecError
from bridgework.system import Stage, System
from bridgework.training import checkpoint, run_dir
from bridgework.training.skips import FILE as SKIPS

FILE = "fork.json"
SHAPES = ("model", "trains", "zero")  # of a stage: what decides which tensors a checkpoint holds
_SOURCE = re.compile(r"(?P<run>.+?)(?:@(?P<step>\d+))?")


@dataclass(frozen=True)
class Fork:
    """Where a run comes from: the checkpoint of `step` of a stage of another run."""

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
        """The fork that the run at `folder` is; None for a run that is not one."""
        file = folder / FILE
        if not file.exists():
            return None
        return cls(**{**(said := json.loads(file.read_text())), "changed": tuple(said["changed"])})

    def tags(self) -> dict[str, str]:
        """For the tracker."""
        return {
            "forked_from": f"{self.run}/{self.stage}@{self.step}",
            "forked_from_fingerprint": self.fingerprint,
        }


def fork(
    system: System, source: str, *, home: Path, run: str, stages: Sequence[str] | None = None
) -> Fork:
    """Make `run` a fork of `source`, RUN or RUN@STEP; a fork that was made before stays as it is.

    stages: those that `run` will train; None: all. The caller holds the lock of `run`. Raises RunError where there is
    nothing to start from, where `run` is another run already, and for a change after which the checkpoint's tensors
    would not fit.
    """
    named = _SOURCE.fullmatch(source)
    if named is None:
        raise SpecError(
            f"--fork: Got {source!r}; expected the name of a run, or RUN@STEP for an older checkpoint"
        )
    other, at = named["run"], named["step"]
    folder, theirs = run_dir.path_of(home, run), run_dir.path_of(home, other)
    done = Fork.read(folder)
    if done is not None and done.run == other and at in (None, str(done.step)):
        return done
    if folder.resolve() == theirs.resolve() or (folder / "recipe.json").exists():
        raise RunError(
            f"--fork: run {run!r} exists already. Fix: give the new run another name with --run"
        )
    before = run_dir.recipe(home, other)
    changed = run_dir.changes(before, system)
    if not changed:
        raise RunError(
            f"--fork: the recipe is that of run {other!r}. Fix: resume it with --run {other}, or change something"
        )
    finished, stage = _taken(before, system, theirs, stages)
    found = _checkpoint(before, stage, theirs, other, int(at) if at else None, home)
    for name in finished:
        _copy(
            theirs / name,
            folder / name,
            (run_dir.artifact_dir(theirs / name).name, "metrics.json", "evals", SKIPS),
        )
    _start(found, system, theirs / stage.name, folder / stage.name, home)
    made = Fork(
        run=other,
        stage=stage.name,
        step=found.step,
        checkpoint=found.folder.relative_to(theirs).as_posix(),
        attempt=found.attempt,
        fingerprint=found.fingerprint,
        changed=tuple(changed),
        at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    )
    storage.write_atomic(folder / FILE, json.dumps(asdict(made), indent=1))
    return made


def _taken(
    before: System, system: System, theirs: Path, stages: Sequence[str] | None
) -> tuple[list[str], Stage]:
    """The finished stages that the new recipe leaves as they are, and the first stage that must train."""
    known = {stage.name: stage for stage in before.stages}
    finished: list[str] = []
    first: Stage | None = None
    for stage in system.stages:
        old = known.get(stage.name)
        same = old is not None and to_dict(old, options=False) == to_dict(stage, options=False)
        needs = {stage.starts_from, *(stage.curation.uses if stage.curation else ())} & known.keys()
        if same and needs <= set(finished) and run_dir.is_finished(theirs / stage.name):
            finished.append(stage.name)
        elif stages is None or stage.name in stages:
            first = first or stage
    if first is None:
        raise RunError(
            "--fork: every stage is finished and none is changed, so there is nothing to train"
        )
    return finished, first


def _checkpoint(
    before: System, stage: Stage, theirs: Path, other: str, step: int | None, home: Path
) -> checkpoint.Checkpoint:
    """The checkpoint to start from."""
    old = next((s for s in before.stages if s.name == stage.name), None)
    kept = checkpoint.checkpoints(theirs / stage.name) if old is not None else []
    if old is None or not kept:
        raise RunError(
            f"--fork: run {other!r} has no checkpoint of stage {stage.name!r}, the first that must train. Fix: start a "
            f"run without --fork; from another run's artifact, set stages.{stage.name}.starts_from to its folder"
        )
    had, has = (
        {name: to_dict(getattr(s, name), options=False) for name in SHAPES} for s in (old, stage)
    )
    shapes = run_dir.differences(had, has, f"stages.{stage.name}")
    if (old.optim.weight_decay == 0) != (
        stage.optim.weight_decay == 0
    ):  # else vectors are a group of their own
        shapes += run_dir.differences(
            old.optim.weight_decay,
            stage.optim.weight_decay,
            f"stages.{stage.name}.optim.weight_decay",
        )
    if shapes:
        raise RunError(
            f"--fork: {run_dir.summarize(shapes)}; expected the same {', '.join(SHAPES)} as in run {other!r}, and a "
            "weight decay that is 0 in both or in neither, since its checkpoint holds exactly those tensors. Fix: undo "
            f"this change, or start a run from an artifact (stages.{stage.name}.starts_from)"
        )
    if step is not None and step not in [each.step for each in kept]:
        steps = ", ".join(str(each.step) for each in kept)
        raise RunError(
            f"--fork: run {other!r} has no checkpoint of step {step} of stage {stage.name!r}. Got: {steps}"
        )
    if step is None:
        found, _ = checkpoint.resume(
            theirs / stage.name, kept[0].fingerprint, *_all(kept), home=home
        )
    else:
        found = next(each for each in kept if each.step == step)
        checkpoint.verify(found.folder, home=home)
    if found is None or found.step >= stage.budget.steps:
        raise RunError(
            f"--fork: the checkpoint is of step {found.step if found else 0}; expected more than that in "
            f"stages.{stage.name}.budget.steps, got {stage.budget.steps}"
        )
    return found


def _all(kept: list[checkpoint.Checkpoint]) -> list[str]:
    return [each.fingerprint for each in kept]


def _start(
    found: checkpoint.Checkpoint, system: System, theirs: Path, place: Path, home: Path
) -> None:
    """The checkpoint as the first of the new run's stage, and what the stage has read and left out so far."""
    _copy(theirs, place, ("curated", "quarantine", SKIPS))
    attempt = f"fork{os.urandom(3).hex()}"
    folder = checkpoint.begin(place, found.step, attempt)
    for name in found.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _link(str(found.folder / name), str(folder / name))
    checkpoint.complete(
        folder,
        step=found.step,
        world=found.world,
        attempt=attempt,
        fingerprint=system.fingerprint(),
        keep=1,
        home=home,
    )


def _copy(theirs: Path, place: Path, names: tuple[str, ...]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        source, dest = theirs / name, place / name
        if source.is_dir():
            shutil.rmtree(dest, ignore_errors=True)  # of a fork that was cut off
            shutil.copytree(source, dest, copy_function=_link)
        elif source.is_file():
            dest.unlink(missing_ok=True)
            _link(str(source), str(dest))


def _link(source: str, dest: str) -> None:
    """The same file under another name, which no run changes; a copy where the disk has no hard links."""
    try:
        os.link(source, dest)
    except OSError:
        shutil.copy2(source, dest)


def describe(made: Fork) -> str:
    """One line for a person."""
    return f"forked from step {made.step} of {made.run}/{made.stage}: {run_dir.summarize(list(made.changed))}"
