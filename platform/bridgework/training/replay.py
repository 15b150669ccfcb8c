"""A step of a run again, as the model saw it: the plan is a function, so the batch can be made once more."""

from dataclasses import dataclass, replace
from pathlib import Path

from bridgework.data.quarantine import aside
from bridgework.data.reader import Feed, Row
from bridgework.errors import RunError
from bridgework.system import Stage
from bridgework.training import run_folder
from bridgework.training.recorder import FOLDER, Flown, flown
from bridgework.training.skips import Skips


@dataclass(frozen=True)
class Replayed:
    """The samples of one step, dearest first, with what the run noted of each."""

    stage: Stage
    rows: list[Row]
    noted: list[Flown]


def replay(run: str, step: int, home: Path) -> Replayed:
    """Step `step` of `RUN` or `RUN/STAGE` (default: the stage that trained last), whole, whatever trained it.

    Raises RunError for a run, stage or step that is not on record, and where the data now gives other samples.
    """
    folder, stage = _stage(run, home)
    noted = flown(folder, step)
    reading = reads(stage, folder)
    feed = Feed.of(reading, home, skipped=Skips.read(folder).keys, quarantine=aside(home, str(folder)))
    span = feed.mixture.window
    reader = feed.open()
    rows = reader.window(range(feed.mixture.lanes), step // span, first_step=step)[0]
    left = list(rows)
    found = []
    for each in noted:
        at = next((i for i, row in enumerate(left) if (row.key, row.source) == (each.key, each.source)), None)
        if at is None:
            raise RunError(
                f"step {step} of {run} had {each.key!r}, and the plan now gives others: the data has changed"
            )
        found.append(left.pop(at))
    return Replayed(reading, found, noted)


def reads(stage: Stage, folder: Path) -> Stage:
    """The stage as it reads: what its curation makes stands in the run, under the stage's folder."""
    curation = stage.curation
    if curation is None:
        return stage
    made = str(folder / "curated" / curation.makes)
    return replace(stage, data=stage.data.with_dataset(curation.makes, made), curation=None)


def _stage(run: str, home: Path) -> tuple[Path, Stage]:
    """The folder of a stage in its run, and the stage."""
    try:
        system, name = run_folder.recipe(home, run), None
    except RunError:
        above, _, name = run.rpartition("/")
        if not above:
            raise
        system, run = run_folder.recipe(home, above), above
    folder = run_folder.place(home, run)
    if name is not None:
        return folder / name, system[name]
    begun = [stage for stage in system.stages if any((folder / stage.name / FOLDER).glob("*.arrows"))]
    if not begun:
        raise RunError(f"run {run!r} has trained no step yet")
    return folder / begun[-1].name, begun[-1]
