"""Curations: each module holds one config class that annotates rows and decides on them.

`bridgework curate dedup SOURCE DEST` runs `dedup.Dedup`; one of your own is given by the import
path of its module, e.g. `my_lab.curations.sharp`. A stage may have one too. See `runner.Curation`.
"""

from types import ModuleType
from typing import Any

from bridgework.curation.capfilt import CapFilt as CapFilt
from bridgework.plugins import Plugins

CURATIONS = Plugins(
    kind="curation",
    package=__name__,
    methods=("judge", "decide"),
    example="my_lab.sharp",
    hint="docs/curation.md",
    separator="-",
)


def known() -> dict[str, ModuleType]:
    """Return the modules of the curations that ship, by the name on the command line."""
    return CURATIONS.modules()


def load(name: str) -> type[Any]:
    """Return the class of a curation: `dedup`, or the import path of a module that holds one.

    Raises SpecError for a name that is neither, for a module whose import fails or that holds none.
    """
    return CURATIONS.load_class(name)
