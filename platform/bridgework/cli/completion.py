"""Shell completion: systems and their variants, stages, dotted paths, spaces and datasets.

`bridgework --install-completion` sets it up for bash, zsh, fish or PowerShell.
"""

import os
from collections.abc import Iterable

from bridgework.config import flat
from bridgework.data.catalog import SYNTHETIC, home, names
from bridgework.errors import BridgeworkError
from bridgework.system import System, load, recipes, variants


def systems(incomplete: str) -> list[str]:
    """Return recipes; after `RECIPE:`, its variants."""
    recipe, colon, _ = incomplete.partition(":")
    if not colon:
        return _starting(incomplete, recipes())
    try:
        return _starting(incomplete, (f"{recipe}:{variant}" for variant in variants(recipe)))
    except BridgeworkError:
        return []


def stages(incomplete: str) -> list[str]:
    """Return the stages of the system that was typed before."""
    system = _typed_system()
    return [] if system is None else _starting(incomplete, (s.name for s in system.stages))


def paths(incomplete: str) -> list[str]:
    """Return the dotted paths of the system that was typed before, up to the next dot."""
    system = _typed_system()
    if system is None:
        return []
    depth = incomplete.count(".") + 1
    parts = [path.split(".") for path in flat(system) if path.startswith(incomplete)]
    cut = (".".join(p[:depth]) + ("=" if len(p) <= depth else ".") for p in parts)
    return sorted(set(cut))


def datasets(incomplete: str) -> list[str]:
    """Return the names under <home>/datasets, and the synthetic ones."""
    return _starting(incomplete, (*names(home()), *SYNTHETIC))


def _starting(incomplete: str, known: Iterable[str]) -> list[str]:
    return [name for name in known if name.startswith(incomplete)]


def _typed_system() -> System | None:
    """Return the system of the command line that is completed, or None if it is not a recipe.

    The shell gives the typed words in the environment. click's own parser gives none of them while
    an option has no value yet.
    """
    typed = os.environ.get("_TYPER_COMPLETE_ARGS") or os.environ.get("COMP_WORDS", "")
    words = [word for word in typed.split()[2:] if not word.startswith("-")]
    try:
        return load(words[0]) if words else None
    except BridgeworkError:
        return None
