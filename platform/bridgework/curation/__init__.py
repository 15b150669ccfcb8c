"""Curations: one module each, with one spec that judges and decides; between stages, or `bridgework curate NAME`.

`bridgework curate dedup SOURCE DEST` runs `dedup.Dedup`; a module of your own is `my_lab.curations.x`. See `flow`.
"""

import pkgutil
from dataclasses import is_dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

from bridgework.curation.capfilt import CapFilt as CapFilt
from bridgework.errors import SpecError, suggest


def known() -> dict[str, ModuleType]:
    """The curations that ship, by the name on the command line."""
    modules = {
        m.name.replace("_", "-"): import_module(f"{__name__}.{m.name}")
        for m in pkgutil.iter_modules(__path__)
    }
    return {name: module for name, module in sorted(modules.items()) if _specs(module)}


def load(name: str) -> type[Any]:
    """The spec class of a curation: `dedup`, or the import path of a module that holds one."""
    path = name if "." in name else f"{__name__}.{name.replace('-', '_')}"
    try:
        if path.startswith(".") or "/" in path:
            raise ModuleNotFoundError(name=path)  # the path of a file, or relative to nothing
        module = import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(error.name + ".")):
            raise  # the curation exists; something that it imports does not
        hint = (
            "; one of your own is given by its module's path, e.g. my_lab.sharp"
            if {".", "/"} & set(name)
            else ""
        )
        raise SpecError(f"there is no curation {name!r}" + suggest(name, known()) + hint) from None
    specs = _specs(module)
    if len(specs) != 1:
        raise SpecError(
            f"{path} is no curation: it holds {len(specs)} public specs with judge and decide, and one is wanted"
            + suggest(name, known())
        )
    return specs[0]


def _specs(module: ModuleType) -> list[type[Any]]:
    """The public specs of a module's own that judge and decide."""
    return [
        cls
        for name, cls in vars(module).items()
        if isinstance(cls, type) and is_dataclass(cls) and cls.__module__ == module.__name__
        if not name.startswith("_") and hasattr(cls, "judge") and hasattr(cls, "decide")
    ]
