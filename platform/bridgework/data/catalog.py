"""From the name in a recipe to the place of a dataset: a path, a URL, or a name under <home>/datasets."""

import os
from pathlib import Path

from bridgework.data.dataset import read_manifest, write
from bridgework.data.names import check_place
from bridgework.data.synthetic import ROWS, SIZE, choices, preferences, shapes, yes_no
from bridgework.errors import DataError, SpecError, suggest
from bridgework.storage import find_store

# what tests and --tiny train on; made on first use
SYNTHETIC = {
    "synthetic:shapes": shapes,
    "synthetic:preferences": preferences,
    "synthetic:choices": choices,
    "synthetic:yes-no": yes_no,
}


def home() -> Path:
    """$BRIDGEWORK_HOME, or ./.bridgework: datasets, caches, runs."""
    return Path(os.environ.get("BRIDGEWORK_HOME") or ".bridgework").expanduser().absolute()


def resolve(dataset: str, home: Path) -> str:
    """The path or URL of a dataset that exists.

    Raises DataError, with a suggestion, when there is none, SpecError for an empty name.
    """
    if dataset in SYNTHETIC:
        return _synthetic(dataset, home)
    named, place = _is_name(dataset), destination(dataset, home)
    path = (
        place if "://" in place else os.path.abspath(place)
    )  # workers run in folders of their own
    try:
        read_manifest(path)
    except DataError as error:
        if not named or dataset in names(home):
            raise
        known = [*names(home), *SYNTHETIC]
        raise DataError(
            f"there is no dataset {dataset!r} ({error}){suggest(dataset, known)}; "
            f"bring it in with `bridgework data import FORMAT SOURCE {path}`"
        ) from None
    return path


def destination(dest: str, home: Path) -> str:
    """The folder that a dataset is written to: a bare name is under <home>/datasets.

    Raises SpecError for no name at all, and DataError for one that no folder can have.
    """
    if not dest.strip():
        raise SpecError("the dataset's name is empty; give a name, a folder or a URL")
    check_place(dest)
    return str(home / "datasets" / dest) if _is_name(dest) else dest


def _is_name(dataset: str) -> bool:
    return "/" not in dataset and "\\" not in dataset and not dataset.startswith(".")


def names(home: Path) -> list[str]:
    """The datasets under <home>/datasets."""
    return sorted(path.parent.name for path in (home / "datasets").glob("*/manifest.json"))


def _synthetic(name: str, home: Path) -> str:
    path = str(home / "datasets" / name.replace(":", "-"))
    fs, root = find_store(path)
    if not fs.exists(f"{root}/manifest.json"):
        try:
            write(
                SYNTHETIC[name](),
                path,
                source=name,
                license="CC0-1.0",
                made_by="bridgework.data.synthetic",
                parameters={"rows": ROWS, "size": SIZE, "seed": 0},
            )
        except DataError:
            read_manifest(path)  # another process was faster, and wrote the same
    return path
