"""Resolve a recipe's dataset name to a location: a path, a URL, or a name under <home>/datasets."""

import os
from pathlib import Path

from bridgework import storage
from bridgework.data.dataset import read_manifest, write
from bridgework.data.manifest import FILE
from bridgework.data.names import check_place
from bridgework.data.synthetic import ROWS, SIZE, choices, preferences, shapes, yes_no
from bridgework.errors import DataError, SpecError, suggest

# data of tests and --tiny, written on first use
SYNTHETIC = {
    "synthetic:shapes": shapes,
    "synthetic:preferences": preferences,
    "synthetic:choices": choices,
    "synthetic:yes-no": yes_no,
}


def home() -> Path:
    """Return the place of datasets and runs: $BRIDGEWORK_HOME, by default ./.bridgework."""
    return storage.home()


def resolve(dataset: str, home: Path) -> str:
    """Return the absolute path or URL of an existing dataset.

    Raises DataError, with a suggestion, if there is none; SpecError for an empty name.
    """
    if dataset in SYNTHETIC:
        return _synthetic(dataset, home)
    named, place = _is_name(dataset), destination(dataset, home)
    # absolute, because workers run in other folders
    path = place if "://" in place else os.path.abspath(place)
    try:
        read_manifest(path)
    except DataError as error:
        if not named or dataset in names(home):
            raise
        known = [*names(home), *SYNTHETIC]
        raise DataError(
            f"dataset {dataset!r} not found ({error}). Fix: import it with "
            f"`bridgework data import FORMAT SOURCE {path}`{suggest(dataset, known)}"
        ) from None
    return path


def destination(dest: str, home: Path) -> str:
    """Return the folder or URL to write a dataset to: a bare name is under <home>/datasets.

    Raises SpecError for an empty name, and DataError for one that a folder cannot have.
    """
    if not dest.strip():
        raise SpecError("the dataset's name is empty; expected a name, a folder or a URL")
    check_place(dest)
    return str(home / "datasets" / dest) if _is_name(dest) else dest


def _is_name(dataset: str) -> bool:
    return "/" not in dataset and "\\" not in dataset and not dataset.startswith(".")


def names(home: Path) -> list[str]:
    """Return the names of the datasets under <home>/datasets, sorted."""
    folder = home / "datasets"
    return [name for name in storage.names(folder) if (folder / name / FILE).exists()]


def _synthetic(name: str, home: Path) -> str:
    """Return the folder of a synthetic dataset; the first of several processes writes it."""
    path = home / "datasets" / name.replace(":", "-")
    if not (path / FILE).is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.lock(path):
            if not (path / FILE).is_file():
                write(
                    SYNTHETIC[name](),
                    str(path),
                    source=name,
                    license="CC0-1.0",
                    made_by="bridgework.data.synthetic",
                    parameters={"rows": ROWS, "size": SIZE, "seed": 0},
                )
    return str(path)
